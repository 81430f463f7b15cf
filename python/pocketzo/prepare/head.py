"""Prepare a frozen model with what reads the outputs of its last layers: a side head, or a parallel adapter."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import (
    ADAPTER,
    MODEL,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    Files,
    TaskSpec,
    TensorSpec,
    files_of,
    tensor_ids,
)
from pocketzo.formats.bundle_writer import staged_bundle
from pocketzo.formats.companions import Companions
from pocketzo.formats.files import copy_file, write_file
from pocketzo.formats.frozen import FrozenSpec
from pocketzo.formats.probe import PROBE, Probe, write_probe
from pocketzo.formats.safetensors import map_tensors, read_header, write
from pocketzo.formats.side import SideHead
from pocketzo.formats.staging import scratch_folder
from pocketzo.packages import require
from pocketzo.prepare.convert import prepare
from pocketzo.prepare.options import SIDE_HEAD, checked_names
from pocketzo.runtime.taps import Stream
from pocketzo.tasks.registry import loss_text, task_for
from pocketzo.tasks.template import Template
from pocketzo.trainable.spec import ParallelAdapter, parse

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from pocketzo.graph.loss import Loss
    from pocketzo.trainable.editor import Added

HEAD_TASKS: Final[Mapping[str, str]] = {
    "classification": "cross-entropy",
    "multi-label": "bce",
    "regression": "mse",
    "prompt": "cross-entropy",
}
"""The tasks that a side head or a parallel adapter learns, and the loss of each."""


def prepare_head(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    template: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    train: str = SIDE_HEAD,
    dtype: Literal["float32", "float16"] | None = None,
    probe: str | os.PathLike[str] | Mapping[str, NDArray[Any]] | None = None,
    note: Callable[[str], None] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Turn a transformer into a bundle whose side head or parallel adapter is trained.

    The graph computes scores from the outputs of the layers of its last half, which are found by its structure. What it
    computed from the last layer is removed. All its weights are frozen. A side head's weights are zero, and are the
    trainable set ``side-head``; see :mod:`pocketzo.trainable.parallel` for the other.

    Parameters
    ----------
    model : path-like
        The export of an encoder, with or without a head, or of a decoder with its cache; see :func:`prepare`.
    out : path-like
        The folder to write.
    task : {"classification", "multi-label", "regression", "prompt"}, optional
        ``"prompt"`` puts a text into a template before it is classified. By default that if there is a template, else
        classification.
    template : str, optional
        For the task ``"prompt"``: contains ``{text}``.
    tokenizer : path-like, optional
        The model's ``tokenizer.json``; by default that beside the model.
    labels : sequence of str, optional
        The names of the classes. By default a side head's are those of the training data; ``"multi-label"`` and
        parallel adapters need them.
    train : str
        ``"side-head"`` or ``"parallel-adapter:R"``.
    max_length, dtype, probe, note, overwrite
        See :func:`prepare`.

    Raises
    ------
    BundleError
        As for :func:`prepare`, or no residual stream is found in the graph.
    ValueError
        An option does not belong to the task, or is missing.
    """
    require("onnx", "onnx-ir")
    source = Path(model)
    if not source.is_file():
        raise BundleError(f"{source}: no such file")
    names = checked_names("labels", labels)
    part = None if train == SIDE_HEAD else parse(train)[0]
    if part is not None and not isinstance(part, ParallelAdapter):
        raise ValueError(f"train must be {SIDE_HEAD!r} or 'parallel-adapter:R', got {train!r}")
    task = _checked(task, template, names, train)
    if tokenizer is None:
        tokenizer = Companions.of(source).tokenizer
    out = Path(out)
    with staged_bundle(out, overwrite=overwrite) as folder, scratch_folder(folder.parent) as scratch:
        decoder = _is_decoder(source)
        whole = prepare(
            source,
            scratch / "whole",
            tokenizer=tokenizer,
            max_length=max_length,
            dtype=dtype,
            probe=probe,
            **({"task": "causal-lm"} if decoder else {"loss": "none"}),  # type: ignore[arg-type]
        )
        try:
            beside = (
                _Head(whole, task, template, names) if part is None else _Adapter(whole, task, template, names, part)
            )
            beside.write(folder, note)
        except BundleError as error:
            raise BundleError(f"{source}: {error}") from None
    return Bundle.read(out)


def _checked(task: str | None, template: str | None, labels: Sequence[str] | None, train: str) -> str:
    if task is None:
        task = "classification" if template is None else "prompt"
    if task not in HEAD_TASKS:
        raise ValueError(f"train={train!r} is for the tasks {', '.join(HEAD_TASKS)}, got {task!r}")
    if (template is not None) != (task == "prompt"):
        raise ValueError(f"a template belongs to the task 'prompt', which needs one; the task is {task!r}")
    if template is not None and "mask" in Template(template).places:
        raise ValueError(f"train={train!r} reads all tokens of a prompt: leave {{mask}} out of the template")
    if task == "regression" and labels is not None:
        raise ValueError("labels are for classes, and the task 'regression' has none")
    if labels is not None and len(labels) < 2:
        raise ValueError(f"labels must be two or more, got {list(labels)!r}")
    if task == "multi-label" and labels is None:
        raise ValueError("the task 'multi-label' needs labels: their names, in the order of the scores")
    if train != SIDE_HEAD and task != "regression" and labels is None:
        raise ValueError(f"train={train!r} needs labels, the names of the classes: there is a score for each")
    return task


def _is_decoder(source: Path) -> bool:
    from pocketzo.graph.decoder import has_cache
    from pocketzo.graph.read import read_model

    try:
        return has_cache(read_model(source).graph)
    except BundleError as error:
        raise BundleError(f"{source}: {error}") from None


class _Beside(ABC):
    """Puts what reads the outputs of layers into a bundle."""

    _trained: str
    """The set that is trained."""

    def __init__(self, whole: Bundle, task: str, template: str | None, labels: tuple[str, ...] | None) -> None:
        self._whole = whole
        self._task = task
        self._template = template
        self._labels = labels

    @abstractmethod
    def _add(self, model: ir.Model, stream: Stream) -> tuple[Loss, dict[str, Any]]:
        """Add it to the graph, and return the fields of the bundle that describe it."""

    @abstractmethod
    def _write_weights(self, model: ir.Model, folder: Path, kept: Mapping[str, NDArray[Any]]) -> Iterable[str]:
        """Write the model's weights that are kept, and those that are added; return the names of the latter."""

    def write(self, folder: Path, note: Callable[[str], None] | None) -> None:
        """Write the bundle."""
        import onnx_ir as ir

        from pocketzo.graph.read import describe

        model = ir.load(self._whole.model_path)
        stream = Stream.of(self._whole)
        taps = stream.taps
        loss, fields = self._add(model, stream)
        files = self._write_files(model, folder)
        inputs, outputs = (tuple(map(describe, values)) for values in (model.graph.inputs, model.graph.outputs))
        batch = self._probe | {"labels": np.zeros(1, np.int64)}
        rows = len(batch["input_ids"])
        for value in inputs:
            if value.name == "labels":
                batch["labels"] = np.zeros(
                    [rows, *(size for size in value.shape[1:] if isinstance(size, int))], value.dtype
                )
        batch = {value.name: batch[value.name] for value in inputs}
        write_probe(folder / PROBE, batch)
        if self._whole.tokenizer_path is not None:
            copy_file(self._whole.tokenizer_path, folder / TOKENIZER)
        bundle = replace(
            self._whole,
            path=folder,
            **files,
            frozen=self._frozen(model, files["tensors"]),
            inputs=inputs,
            outputs=outputs,
            loss=loss.output,
            logits=loss.scores,
            task=self._spec(loss, inputs, outputs),
            probe=batch,
            generation=None,
            **fields,
        )
        bundle.write_description()
        if note is not None:
            note(f"{self._trained}: it reads the layers {taps[0].layer} to {taps[-1].layer} of {stream.layers}")
            note(f"loss: {loss_text(bundle)}")

    @property
    def _columns(self) -> int | None:
        """How many scores an example has; None if the training data says so."""
        return 1 if self._task == "regression" else None if self._labels is None else len(self._labels)

    @property
    def _probe(self) -> Probe:
        assert self._whole.probe is not None, "prepare always keeps the batch"
        if "input_ids" not in self._whole.probe:
            raise BundleError("a side head needs a model that reads token ids, with an input 'input_ids'")
        return dict(self._whole.probe)

    def _write_files(self, model: ir.Model, folder: Path) -> Files:
        """Write the weights that the graph reads, and the graph that points to them."""
        from pocketzo.graph.read import to_bytes

        initializers = model.graph.initializers
        arrays = {name: array for name, array in map_tensors(self._whole.weights_path).items() if name in initializers}
        sets = self._write_weights(model, folder, arrays)
        write_file(folder / MODEL, to_bytes(model))
        return files_of(folder, dict.fromkeys(sets, (self._trained,)))

    def _frozen(self, model: ir.Model, tensors: Sequence[TensorSpec]) -> tuple[FrozenSpec, ...]:
        """Return what is not trained: what was not, and the weights that could be."""
        names = {*model.graph.initializers}
        known = [spec for spec in self._whole.frozen if spec.name in names]
        could = {spec.name for spec in self._whole.tensors if spec.trainable}
        reason = f"request: {self._trained} alone is trained"
        return *known, *(
            FrozenSpec(spec.name, spec.dtype, int(np.prod(spec.shape)), reason)
            for spec in tensors
            if spec.name in could
        )

    def _spec(self, loss: Loss, inputs: Sequence[Any], outputs: Sequence[Any]) -> TaskSpec | None:
        if self._template is None:
            return task_for(inputs, outputs, loss.scores, labels=self._labels, loss=loss.kind, threshold=loss.threshold)
        settings: dict[str, Any] = {
            "template": self._template,
            "label_words": [],
            "label_tokens": [],
            "mask_token": None,
            "calibration": None,
            "loss": loss.kind,
        }
        return TaskSpec("prompt", settings if self._labels is None else {"labels": list(self._labels), **settings})


class _Head(_Beside):
    """A side head, in the file of all weights."""

    _trained = SIDE_HEAD

    def _add(self, model: ir.Model, stream: Stream) -> tuple[Loss, dict[str, Any]]:
        from pocketzo.graph.side import add_side_head

        loss, described = add_side_head(model, stream.taps, self._columns, HEAD_TASKS[self._task], causal=stream.causal)
        return loss, {"side": SideHead(described, stream.layers, stream.causal)}

    def _write_weights(self, model: ir.Model, folder: Path, kept: Mapping[str, NDArray[Any]]) -> Iterable[str]:
        from pocketzo.graph.extract import point_to_weights

        added = {
            name: value.const_value for name, value in model.graph.initializers.items() if name.startswith("side.")
        }
        new = {name: tensor.numpy() for name, tensor in added.items() if tensor is not None}
        write(folder / WEIGHTS, [*kept.items(), *new.items()])
        point_to_weights(model, WEIGHTS, read_header(folder / WEIGHTS))
        return new


class _Adapter(_Beside):
    """A parallel adapter, in a file of its own, as of all sets that are added."""

    def __init__(
        self, whole: Bundle, task: str, template: str | None, labels: tuple[str, ...] | None, part: ParallelAdapter
    ) -> None:
        super().__init__(whole, task, template, labels)
        self._trained = part.text
        self._units = part.units
        self._added: list[Added] = []

    def _add(self, model: ir.Model, stream: Stream) -> tuple[Loss, dict[str, Any]]:
        from pocketzo.trainable.parallel import add_parallel

        assert self._columns is not None, "checked before"
        loss, self._added, described = add_parallel(
            model, stream.taps, self._units, self._columns, HEAD_TASKS[self._task], self._trained
        )
        return loss, {"added": (described,)}

    def _write_weights(self, model: ir.Model, folder: Path, kept: Mapping[str, NDArray[Any]]) -> Iterable[str]:
        from pocketzo.graph.extract import point_to_weights

        new = {one.name: one for one in self._added}
        ids = tensor_ids([*kept, *new])
        write(folder / WEIGHTS, kept.items())
        write(folder / ADAPTER, ((name, one.initial(ids[name])) for name, one in new.items()))
        for name in (WEIGHTS, ADAPTER):
            point_to_weights(model, name, read_header(folder / name))
        return new
