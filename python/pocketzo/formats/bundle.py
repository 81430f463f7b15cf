"""A bundle: the folder that holds a prepared model.

====================  ==================================================================================================
``model.onnx``        the graph; its weights are external data that point into the next file
``weights.safetensors``  all weights of the model; where there is no adapter, tuning changes this file only
``adapter.safetensors``  optional: what was added to the model, and what is trained; tuning changes this file only
``bundle.json``       the description: task, tensors and their ids, inputs, outputs, checksums
``probe.npz``         optional: inputs on which the model is checked
``tokenizer.json``    optional
``generate.onnx``     optional: the graph of a language model for generating text, over the same weights
``chat_template.jinja``  optional
====================  ==================================================================================================

``docs/formats.md`` specifies this for readers in other languages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypedDict

from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats import strict_json
from pocketzo.formats.added import AddedSpec, parse_added
from pocketzo.formats.fields import FieldError, Fields
from pocketzo.formats.files import write_file
from pocketzo.formats.frozen import FrozenSpec, parse_frozen
from pocketzo.formats.generation import CHAT_TEMPLATE, GENERATE, Generation
from pocketzo.formats.probe import PROBE, Probe, check_probe, read_probe
from pocketzo.formats.safetensors import ALIGNMENT, DTYPES, Entry, file_sha256, header_bytes, map_tensors, read_header
from pocketzo.formats.side import SideHead
from pocketzo.formats.stage import StageSpec
from pocketzo.formats.staging import sweep

FORMAT: Final = "pocketzo-bundle"
VERSION: Final = 3
_WITHOUT_ADAPTER: Final = 2
"""The version of a bundle that has no adapter."""
MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.safetensors"
ADAPTER: Final = "adapter.safetensors"
DESCRIPTION: Final = "bundle.json"
TOKENIZER: Final = "tokenizer.json"
FILES: Final = (DESCRIPTION, MODEL, WEIGHTS, ADAPTER, TOKENIZER, PROBE, GENERATE, CHAT_TEMPLATE)
"""All files that a bundle may consist of."""
_NUMPY: Final = r"bool|object|complex(64|128)|float(16|32|64)|u?int(8|16|32|64)"
_ANY: Final = rf"{_NUMPY}|bfloat16|float[468]_\w+|u?int[24]"
"""The names of the element types that inputs may have, and outputs."""
FLOATS: Final = ("float32", "float16")
"""The types that trainable weights may have."""
ORDER_ID: Final = 0xFFFFFFFF
"""A reserved tensor id, given to no weight: its noise orders the data."""

BLOCK_ID: Final = 0xFFFFFFFE
"""A reserved tensor id, given to no weight: its noise selects tensors in :class:`pocketzo.optim.block.Block`."""


@dataclass(frozen=True)
class TensorSpec:
    """One stored weight.

    Attributes
    ----------
    name : str
    id : int
        A 32-bit id that selects the tensor's noise; computed from the names alone by :func:`tensor_ids`.
    dtype : str
        ``"float32"`` or ``"float16"`` for every trainable tensor; large constants of the graph may have another type.
    shape : tuple of int
    sets : tuple of str
        The names of the trainable sets that contain it.
    """

    name: str
    id: int
    dtype: str
    shape: tuple[int, ...]
    sets: tuple[str, ...] = ()

    @property
    def trainable(self) -> bool:
        """Whether training may change it."""
        return bool(self.sets)


@dataclass(frozen=True)
class ValueSpec:
    """One input or output of the graph; a dynamic size is a name, or ``"?"`` if it has no name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def is_float(self) -> bool:
        """Whether numpy has its type, and that is a floating-point one: bfloat16 is not."""
        return self.dtype in ("float16", "float32", "float64")


@dataclass(frozen=True)
class TaskSpec:
    """The task of a graph, by name; :func:`pocketzo.tasks.registry.task_of` creates the task object.

    Attributes
    ----------
    name : str
    settings : mapping of str to JSON value
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """The file ``adapter.safetensors``.

    Attributes
    ----------
    sha256 : str
        SHA-256 of the file as prepared. A tuned copy keeps this value.
    header_sha256 : str
        SHA-256 of the part before the data, which never changes.
    """

    sha256: str
    header_sha256: str


@dataclass(frozen=True)
class Bundle:
    """The contents of ``bundle.json``, checked against the other files.

    Attributes
    ----------
    path : Path
        The folder.
    tensors : tuple of TensorSpec
        In the byte order of the weights file, and then of the adapter. A tensor of the weights file of which the
        adapter has one of the same name is not among them: nothing reads it.
    frozen : tuple of FrozenSpec
        Every floating-point or quantised tensor of the model that is not trainable.
    inputs, outputs : tuple of ValueSpec
    loss : str or None
        The name of the scalar loss output; None if the graph has none.
    logits : str or None
        The name of the logits output; None if the graph has none.
    task : TaskSpec or None
        The graph's task; None if it is unknown.
    max_length : int or None
        Texts are truncated to this number of tokens; None if the bundle sets none.
    tokenizer : str or None
        The name of the tokenizer file in the folder.
    graph_sha256 : str
        SHA-256 of ``model.onnx``.
    base_sha256 : str
        SHA-256 of ``weights.safetensors`` as prepared. A tuned copy keeps this value, which identifies its base; if
        there is an adapter, it is that of the file in every copy.
    header_sha256 : str
        SHA-256 of the part of ``weights.safetensors`` before the data. This part never changes, because the graph
        refers to offsets behind it.
    probe : dict of str to ndarray or None
        The probing batch, with an array for each input; None if the bundle has none.
    generation : Generation or None
        What generating text needs; None if the model generates none.
    side : SideHead or None
        The layers that a side head reads; None if the graph has no side head.
    adapter : Adapter or None
        The file of what is trained; None if that is the weights file.
    added : tuple of AddedSpec
        What sets such as LoRA added to the model; empty in bundles from before it was described.
    stage : StageSpec or None
        Which stage of a pipeline this is; None for a whole model. Nothing in a stage may be trainable.
    """

    path: Path
    tensors: tuple[TensorSpec, ...]
    frozen: tuple[FrozenSpec, ...]
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    loss: str | None
    logits: str | None
    task: TaskSpec | None
    max_length: int | None
    tokenizer: str | None
    graph_sha256: str
    base_sha256: str
    header_sha256: str
    probe: Probe | None = field(default=None, compare=False, repr=False)
    generation: Generation | None = None
    side: SideHead | None = None
    adapter: Adapter | None = None
    added: tuple[AddedSpec, ...] = ()
    stage: StageSpec | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a bundle and check that its files are complete and match each other.

        The weights' data is not read, so the time does not depend on its size.

        Raises
        ------
        BundleError
            If a file is missing, damaged, of another version, or does not match the others.
        """
        path = Path(path)
        if not path.exists():
            sweep(path.parent, FILES)  # it may be there again then
        if not path.exists():
            raise BundleError(f"{path}: no such bundle")
        for name in (DESCRIPTION, MODEL, WEIGHTS):
            if not (path / name).is_file():
                raise BundleError(f"{path}: not a bundle: there is no {name} in it; make one with 'pocketzo prepare'")
        bundle = cls._parse(path)

        if file_sha256(bundle.model_path) != bundle.graph_sha256:
            raise BundleError(
                f"{bundle.model_path}: not the graph that {DESCRIPTION} describes; prepare the model again"
            )
        bundle._check_weights()
        if bundle.tokenizer_path is not None and not bundle.tokenizer_path.is_file():
            raise BundleError(f"{bundle.tokenizer_path}: the bundle's tokenizer is missing")
        if bundle.generation is not None:
            bundle._check_generation(bundle.generation)
        return bundle

    def _check_weights(self) -> None:
        headers = {self.weights_path: self.header_sha256}
        if self.adapter is not None:
            headers[self.trained_path] = self.adapter.header_sha256
        for file, sha256 in headers.items():
            if not file.is_file():
                raise BundleError(f"{file}: a file of the bundle is missing")
            if _header_sha256(file) != sha256:
                raise BundleError(
                    f"{file}: its header is not the one that {MODEL} points into; "
                    "the file was changed by other means than PocketZO"
                )
            for name, entry in read_header(file).items():
                if entry.start % ALIGNMENT:
                    raise BundleError(f"{file}: {name!r} does not start at a multiple of {ALIGNMENT} bytes")
        stored = self.places
        described = [(spec.name, spec.dtype, spec.shape) for spec in self.tensors]
        if described != [(name, DTYPES[entry.dtype], entry.shape) for name, (_, entry) in stored.items()]:
            raise BundleError(f"{self.trained_path}: its tensors are not those that {DESCRIPTION} describes")
        if {spec.name: spec.id for spec in self.tensors} != tensor_ids(stored):
            raise BundleError(f"{self.path / DESCRIPTION}: tensor ids are not those of the tensors' names")

    def _check_generation(self, generation: Generation) -> None:
        for name in (GENERATE, generation.chat_template):
            if name is not None and not (self.path / name).is_file():
                raise BundleError(f"{self.path / name}: a file of the bundle is missing")
        if file_sha256(self.generate_path) != generation.graph_sha256:
            raise BundleError(
                f"{self.generate_path}: not the graph that {DESCRIPTION} describes; prepare the model again"
            )

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes, in the order of the logits; None if the task has none."""
        labels = None if self.task is None else self.task.settings.get("labels")
        return None if labels is None else tuple(labels)

    @property
    def trainable(self) -> dict[str, tuple[str, ...]]:
        """The names of the tensors of each trainable set, in the order of the file."""
        names = dict.fromkeys(name for tensor in self.tensors for name in tensor.sets)
        return {name: tuple(tensor.name for tensor in self.tensors if name in tensor.sets) for name in names}

    @property
    def is_fp16(self) -> bool:
        """Whether weights are fp16, those that are trained or those beside which tensors were added."""
        return any(tensor.dtype == "float16" for tensor in self.tensors)

    @property
    def model_path(self) -> Path:
        """The path of the graph file."""
        return self.path / MODEL

    @property
    def generate_path(self) -> Path:
        """The path of the graph that generates text, if the bundle has one."""
        return self.path / GENERATE

    @property
    def weights_path(self) -> Path:
        """The path of the weights file."""
        return self.path / WEIGHTS

    @property
    def trained_path(self) -> Path:
        """The path of the file that tuning changes: the adapter, or the weights file."""
        return self.weights_path if self.adapter is None else self.path / ADAPTER

    @property
    def prepared_sha256(self) -> str:
        """SHA-256 of :attr:`trained_path` as prepared."""
        return self.base_sha256 if self.adapter is None else self.adapter.sha256

    @property
    def places(self) -> dict[str, tuple[Path, Entry]]:
        """The file of each tensor, and its place there, in the order of `tensors`."""
        return _places(self.weights_path, None if self.adapter is None else self.trained_path)

    def map_tensors(self) -> dict[str, NDArray[Any]]:
        """Return all tensors as views of the files, which must not change while they are used."""
        return map_tensors(self.weights_path) | map_tensors(self.trained_path)

    @property
    def weights_nbytes(self) -> int:
        """Size of the files of weights, in bytes."""
        return sum(path.stat().st_size for path in {self.weights_path, self.trained_path})

    @property
    def tokenizer_path(self) -> Path | None:
        """The path of the tokenizer file; None if the bundle has none."""
        return None if self.tokenizer is None else self.path / self.tokenizer

    def write_description(self) -> None:
        """Write ``bundle.json`` into the folder."""
        fields = {
            "format": FORMAT,
            "version": _WITHOUT_ADAPTER if self.adapter is None else VERSION,
            "graph_sha256": self.graph_sha256,
            "base_sha256": self.base_sha256,
            "header_sha256": self.header_sha256,
            "loss": self.loss,
            "logits": self.logits,
            "max_length": self.max_length,
            "tokenizer": self.tokenizer,
            "probe": None if self.probe is None else PROBE,
            "generation": None if self.generation is None else self.generation.described(),
            **({} if self.side is None else {"side": self.side.described()}),
            **({} if self.adapter is None else {"adapter": asdict(self.adapter)}),
            **({"added": [item.described() for item in self.added]} if self.added else {}),
            **({} if self.stage is None else {"stage": self.stage.described()}),
            "task": None if self.task is None else {"name": self.task.name, "settings": dict(self.task.settings)},
            "trainable": [{"name": name, "tensors": tensors} for name, tensors in self.trainable.items()],
            "frozen": [vars(tensor) for tensor in self.frozen],
            "inputs": [vars(value) for value in self.inputs],
            "outputs": [vars(value) for value in self.outputs],
            "tensors": [
                {"name": tensor.name, "id": tensor.id, "dtype": tensor.dtype, "shape": tensor.shape}
                for tensor in self.tensors
            ],
        }
        write_file(self.path / DESCRIPTION, f"{json.dumps(fields, indent=1, ensure_ascii=False)}\n".encode())

    @classmethod
    def _parse(cls, path: Path) -> Self:
        file = path / DESCRIPTION
        try:
            values = strict_json.parse(file.read_bytes())
        except ValueError as error:
            raise BundleError(f"{file}: not JSON: {error}") from None
        if values.get("format") != FORMAT:
            raise BundleError(f"{file}: not the description of a bundle")
        version = values.get("version")
        if version not in (_WITHOUT_ADAPTER, VERSION):
            raise BundleError(
                f"{file}: version {version!r} of the format; this PocketZO reads {_WITHOUT_ADAPTER} and {VERSION}"
            )
        try:
            fields = Fields(values)
            adapter = fields.object("adapter") if version == VERSION else None
            inputs = _values(fields, "inputs", _NUMPY)
            outputs = _values(fields, "outputs")
            generation = fields.optional_object("generation")
            side = fields.object("side") if "side" in values else None
            stage = fields.object("stage") if "stage" in values else None
            tensors = _tensors(fields, may_be_frozen=stage is not None)
            shapes = {tensor.name: tensor.shape for tensor in tensors}
            return cls(
                path=path,
                tensors=tensors,
                frozen=parse_frozen(fields),
                inputs=inputs,
                outputs=outputs,
                loss=_output(fields, "loss", outputs),
                logits=_output(fields, "logits", outputs),
                task=_task(fields),
                max_length=fields.optional_integer("max_length", 1, 2**31 - 1),
                tokenizer=_file(fields, "tokenizer", TOKENIZER),
                graph_sha256=fields.sha256("graph_sha256"),
                base_sha256=fields.sha256("base_sha256"),
                header_sha256=fields.sha256("header_sha256"),
                probe=None if _file(fields, "probe", PROBE) is None else _probe(path / PROBE, inputs),
                generation=None if generation is None else Generation.parse(generation),
                side=None if side is None else SideHead.parse(side),
                adapter=None if adapter is None else Adapter(adapter.sha256("sha256"), adapter.sha256("header_sha256")),
                added=parse_added(fields, shapes) if "added" in values else (),
                stage=None if stage is None else StageSpec.parse(stage),
            )
        except FieldError as error:
            raise BundleError(f"{file}: damaged: {error}") from None


def tensor_ids(names: Iterable[str]) -> dict[str, int]:
    """Return a 32-bit id for each name, a function of the set of names alone.

    An id is the first 4 bytes, little-endian, of the name's SHA-256. If two names collide, the later one in sorted
    order uses the hash of its name with a zero byte appended, and so on until the id is free. No name gets
    :data:`ORDER_ID` or :data:`BLOCK_ID`.

    Returns
    -------
    dict of str to int
        In sorted order of the names.
    """
    ids: dict[str, int] = {}
    used = {ORDER_ID, BLOCK_ID}
    for name in sorted(names):
        text = name.encode()
        while (number := int.from_bytes(hashlib.sha256(text).digest()[:4], "little")) in used:
            text += b"\0"
        used.add(number)
        ids[name] = number
    return ids


class Files(TypedDict):
    """What a :class:`Bundle` says of its graph and its weights, under the same names."""

    tensors: tuple[TensorSpec, ...]
    graph_sha256: str
    base_sha256: str
    header_sha256: str
    adapter: Adapter | None


def _places(weights: Path, adapter: Path | None) -> dict[str, tuple[Path, Entry]]:
    added = {} if adapter is None else {name: (adapter, entry) for name, entry in read_header(adapter).items()}
    base = {name: (weights, entry) for name, entry in read_header(weights).items() if name not in added}
    return base | added


def files_of(folder: Path, sets: Mapping[str, Iterable[str]]) -> Files:
    """Describe the graph and the weights that were written to a folder.

    Parameters
    ----------
    folder : Path
    sets : mapping of str to iterable of str
        By tensor, the names of the trainable sets that contain it; others are not trainable.
    """
    weights = folder / WEIGHTS
    adapter = folder / ADAPTER if (folder / ADAPTER).is_file() else None
    places = _places(weights, adapter)
    ids = tensor_ids(places)
    return {
        "tensors": tuple(
            TensorSpec(name, ids[name], DTYPES[entry.dtype], entry.shape, tuple(sets.get(name, ())))
            for name, (_, entry) in places.items()
        ),
        "graph_sha256": file_sha256(folder / MODEL),
        "base_sha256": file_sha256(weights),
        "header_sha256": _header_sha256(weights),
        "adapter": None if adapter is None else Adapter(file_sha256(adapter), _header_sha256(adapter)),
    }


def _header_sha256(path: Path) -> str:
    return hashlib.sha256(header_bytes(path)).hexdigest()


def _tensors(fields: Fields, *, may_be_frozen: bool) -> tuple[TensorSpec, ...]:
    tensors = [
        TensorSpec(
            item.text("name"),
            item.integer("id", 0, min(ORDER_ID, BLOCK_ID) - 1),
            item.text("dtype"),
            item.shape("shape"),
        )
        for item in fields.objects("tensors")
    ]
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    sets: dict[str, set[str]] = {}
    for item in fields.objects("trainable"):
        name = item.text("name")
        if name in sets:
            raise item.error("name", "a name that no set before it has")
        for tensor in item.names("tensors"):
            if dtypes.get(tensor) not in FLOATS:
                found = f"is {dtypes[tensor]}, expected {' or '.join(FLOATS)}" if tensor in dtypes else "does not exist"
                raise FieldError(f"set {name!r} of 'trainable': tensor {tensor!r} {found}")
        sets[name] = set(item.names("tensors"))
    if not sets and not may_be_frozen:
        raise fields.error("trainable", "at least one set")
    return tuple(
        replace(tensor, sets=tuple(name for name, members in sets.items() if tensor.name in members))
        for tensor in tensors
    )


def _values(fields: Fields, key: str, dtypes: str = _ANY) -> tuple[ValueSpec, ...]:
    for item in fields.objects(key):
        if not re.fullmatch(dtypes, item.text("dtype")):
            raise item.error("dtype", "an element type, such as 'float32'")
    return tuple(
        ValueSpec(item.text("name"), item.text("dtype"), item.shape("shape", symbols=True))
        for item in fields.objects(key)
    )


def _output(fields: Fields, key: str, outputs: Iterable[ValueSpec]) -> str | None:
    name = fields.optional_text(key)
    if name is not None and name not in {value.name for value in outputs}:
        raise fields.error(key, "the name of an output, or null")
    return name


def _task(fields: Fields) -> TaskSpec | None:
    task = fields.optional_object("task")
    if task is None:
        return None
    settings = task.object("settings")
    if settings.plain().get("labels") is not None:
        settings.names("labels")
    return TaskSpec(task.text("name"), settings.plain())


def _file(fields: Fields, key: str, name: str) -> str | None:
    """Return the name of an optional file of the bundle, which is always the same, or None."""
    if fields.optional_text(key) not in (None, name):
        raise fields.error(key, f"{name!r} or null")
    return fields.optional_text(key)


def _probe(path: Path, inputs: Iterable[ValueSpec]) -> Probe:
    try:
        return check_probe(read_probe(path), inputs)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from None
