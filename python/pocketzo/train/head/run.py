"""The run folder of a head: its parameters, what they were chosen by, and the bundle that they make."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from pocketzo.errors import BundleError, JournalError
from pocketzo.formats import strict_json
from pocketzo.formats.bundle import MODEL, WEIGHTS, Bundle, TaskSpec, files_of
from pocketzo.formats.bundle_writer import staged_bundle
from pocketzo.formats.fields import FieldError, Fields
from pocketzo.formats.files import copy_file, make_folder, write_file
from pocketzo.formats.probe import PROBE
from pocketzo.formats.safetensors import file_sha256, map_tensors, read_header, write
from pocketzo.formats.staging import staged_folder
from pocketzo.machine.paths import local_path, portable_path
from pocketzo.runtime.onnx_proto import read_graph
from pocketzo.runtime.subgraph import keep_taps, point_to, set_columns
from pocketzo.train.head.head import Head
from pocketzo.train.head.kept import Kept
from pocketzo.train.run import check_file

RECORD: Final = "head.json"
PARAMETERS: Final = "head.safetensors"
KEPT: Final = "examples.safetensors"
"""What is kept of the examples, if it was asked for."""
FORMAT: Final = "pocketzo-head"
VERSION: Final = 1


def with_labels(bundle: Bundle, labels: Sequence[str]) -> Bundle:
    """Return the description of a bundle with the names of its classes."""
    spec = TaskSpec("classification") if bundle.task is None else bundle.task
    outputs = tuple(
        replace(value, shape=(*value.shape[:-1], len(labels))) if value.name == bundle.logits else value
        for value in bundle.outputs
    )
    task = TaskSpec(spec.name, {**spec.settings, "labels": list(labels)})
    return replace(bundle, task=task, outputs=outputs)


@dataclass(frozen=True)
class HeadRun:
    """A head, and the bundle that it belongs to.

    Attributes
    ----------
    bundle : str
        Path of the base bundle, as it was.
    graph_sha256, weights_sha256 : str
        Of the base bundle.
    labels : tuple of str or None
        The names of the classes.
    layers : tuple of int
        The taps that the head reads.
    results : dict
        What the choice was made by, and evaluations; nothing is computed from it.
    """

    bundle: str
    graph_sha256: str
    weights_sha256: str
    labels: tuple[str, ...] | None
    layers: tuple[int, ...]
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Bundle, head: Head, labels: Sequence[str] | None, results: dict[str, Any]) -> Self:
        """Describe a head that was fitted to a bundle."""
        return cls(
            portable_path(os.fspath(base.path.resolve())),
            base.graph_sha256,
            file_sha256(base.weights_path),
            None if labels is None else tuple(labels),
            head.layers,
            results,
        )

    def write(self, folder: Path, head: Head, kept: Kept | None = None) -> None:
        """Write the folder of a run, new or in the place of an empty one."""
        target = folder.resolve()
        make_folder(target.parent)
        with staged_folder(target, (RECORD, PARAMETERS, KEPT), replace=True) as staged:
            head.save(staged / PARAMETERS)
            if kept is not None:
                kept.save(staged / KEPT)
            digest = file_sha256(staged / PARAMETERS)
            fields = {"format": FORMAT, "version": VERSION, "head_sha256": digest, **asdict(self)}
            write_file(staged / RECORD, f"{json.dumps(fields, indent=1, ensure_ascii=False)}\n".encode())

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, Head]:
        """Read the files of a run.

        Raises
        ------
        JournalError
            A file is missing or damaged.
        """
        path = folder / RECORD
        try:
            values = strict_json.parse(path.read_bytes())
            if values.get("format") != FORMAT or values.get("version") != VERSION:
                raise ValueError(f"not a head of version {VERSION}")
            fields = Fields(values)
            run = cls(
                fields.text("bundle"),
                fields.sha256("graph_sha256"),
                fields.sha256("weights_sha256"),
                None if values.get("labels") is None else fields.names("labels"),
                fields.shape("layers"),
                fields.object("results").plain(),
            )
            digest = fields.sha256("head_sha256")
        except (ValueError, FieldError) as error:
            raise JournalError(f"{path}: damaged: {error}") from None
        parameters = folder / PARAMETERS
        if not parameters.is_file() or file_sha256(parameters) != digest:
            raise JournalError(f"{parameters}: missing, or not the head that {RECORD} describes")
        return run, Head.read(parameters, run.layers)

    def base(self, bundle: Path | None = None) -> Bundle:
        """Return the base bundle, after checking its graph and weights; `bundle` is its path, if it was moved."""
        base = Bundle.read(Path(local_path(self.bundle)) if bundle is None else bundle)
        for path, expected in ((base.model_path, self.graph_sha256), (base.weights_path, self.weights_sha256)):
            check_file(path, expected, "file that the head was fitted to")
        return base

    def write_bundle(self, head: Head, out: Path, *, bundle: Path | None = None, overwrite: bool = False) -> None:
        """Write the bundle with the head: its graph ends behind the last tap that the head reads.

        It has the weights alone that this graph reads, and is the same, bit for bit, on every machine.
        """
        base = self.base(bundle)
        side = base.side
        if side is None:
            raise BundleError(f"{base.path}: there is no side head in its graph")
        described = base if self.labels is None else with_labels(base, self.labels)
        with staged_bundle(out, overwrite=overwrite, base=base) as folder:
            model = read_graph(base.model_path)
            keep_taps(model.graph, self.layers)
            set_columns(model.graph, len(head.bias))
            kept = {tensor.name for tensor in model.graph.initializer}
            arrays = {name: array for name, array in map_tensors(base.weights_path).items() if name in kept}
            arrays |= {name: array for name, array in head.tensors().items() if name in arrays}
            write(folder / WEIGHTS, list(arrays.items()))
            point_to(model.graph, read_header(folder / WEIGHTS))
            write_file(folder / MODEL, model.SerializeToString(deterministic=True))
            for name in (base.tokenizer, None if base.probe is None else PROBE):
                if name is not None:
                    copy_file(base.path / name, folder / name)
            replace(
                described,
                path=folder,
                **files_of(folder, {spec.name: spec.sets for spec in base.tensors}),
                frozen=tuple(spec for spec in base.frozen if spec.name in kept),
                side=replace(side, taps=tuple(tap for tap in side.taps if tap.layer in self.layers)),
            ).write_description()
            Bundle.read(folder)
