"""What is fuzzed: the kinds of files, the mutations of each, and what PocketZO does with a mutated file."""

from __future__ import annotations

import contextlib
import dis
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pocketzo as pz
from fuzz.files import checkpoint, data_bundle
from fuzz.mutate import (
    Mutator,
    mutate_bytes,
    mutate_entries,
    mutate_external,
    mutate_header,
    mutate_json,
    mutate_jsonl,
    mutate_npz,
    mutate_onnx,
    mutate_safetensors,
    mutate_text,
)
from pocketzo.export.bert import build_onnx
from pocketzo.formats.activations import Segment

PACKAGE = Path(pz.__file__).parent
DATA = "data/classification/data.tsv"


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes
    ----------
    files : callable
        Returns the files to mutate, given the folder that :func:`fuzz.files.build` wrote.
    mutators : tuple of Mutator
        One is chosen for each case.
    use : callable
        Does with the mutated file, in a copy of the folder, what a user would.
    """

    files: Callable[[Path], list[Path]]
    mutators: tuple[Mutator, ...]
    use: Callable[[Path, Path], None]


def train(bundle: Path, folder: Path) -> None:
    """Load a bundle and take two steps."""
    model = pz.load(bundle, threads=1, verify="fast")
    outputs = [value.name for value in model.bundle.outputs if value.is_float]
    optimizer = pz.MeZO(model, lr=0.01)
    if model.bundle.loss is not None and model.bundle.task is not None and model.bundle.tokenizer is not None:
        examples = pz.load_dataset(folder / DATA, model.bundle).batch(np.arange(2))
        optimizer.step(lambda model: model.loss(examples))
    else:
        from pocketzo.runtime.outputs import probe_batch

        batch = probe_batch(model.bundle)
        for _ in range(2):
            optimizer.step(lambda model: float(sum(np.square(v).mean() for v in model.run(batch, outputs).values())))


def use_onnx(path: Path, folder: Path) -> None:
    pz.prepare(path if path.suffix == ".onnx" else path.with_suffix(".onnx"), folder / "out")
    train(folder / "out", folder)


def use_bundle(path: Path, folder: Path) -> None:
    train(folder / "bundle", folder)


def use_sealed_bundle(path: Path, folder: Path) -> None:
    """Use a bundle whose description has the right checksums."""
    description = folder / "bundle/bundle.json"
    fields = json.loads(description.read_text())
    graph, weights = ((folder / "bundle" / name).read_bytes() for name in ("model.onnx", "weights.safetensors"))
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]
    for name, data in (("graph", graph), ("base", weights), ("header", header)):
        fields[f"{name}_sha256"] = hashlib.sha256(data).hexdigest()
    description.write_text(json.dumps(fields))
    train(folder / "bundle", folder)


def use_probe(path: Path, folder: Path) -> None:
    if path.parent == folder:
        pz.prepare(folder / "tiny.onnx", folder / "out", probe=path)
    train(path.parent if path.parent != folder else folder / "out", folder)


def use_tokenizer(path: Path, folder: Path) -> None:
    if path.parent == folder:
        pz.prepare(folder / "tiny.onnx", folder / "out", tokenizer=path)
    train(path.parent if path.parent != folder else folder / "out", folder)


def use_checkpoint(path: Path, folder: Path) -> None:
    build_onnx(checkpoint(folder), folder / "bert.onnx", 3)
    use_onnx(folder / "bert.onnx", folder)


def use_run(path: Path, folder: Path) -> None:
    run = pz.Run(folder / "run")
    _ = run.best_step
    run.replay(folder / "replayed")
    data = pz.load_dataset(folder / DATA, pz.Bundle.read(folder / "bundle"))
    trainer = pz.Trainer.resume(folder / "run", data, eval=data)
    trainer.fit()


def use_sealed_snapshot(path: Path, folder: Path) -> None:
    """Use a run whose snapshots have the right checksums, and perhaps the mutated state of a method."""
    (snapshot,) = (folder / "run/snapshots").iterdir()
    if path.parent == folder:
        shutil.copy(path, snapshot)
    description = snapshot / "snapshot.json"
    fields = json.loads(description.read_text())
    files = (file for file in snapshot.glob("*.safetensors"))
    fields["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    description.write_text(json.dumps(fields))
    use_run(path, folder)


def use_segment(path: Path, _: Path) -> None:
    segment = Segment(path)
    for key in segment.entries:
        segment.read(key)


def use_sealed_segment(path: Path, folder: Path) -> None:
    """Use a segment of activations that has the right checksum of its description, if its end can be found."""
    data = bytearray(path.read_bytes())
    end = 12 + int.from_bytes(data[8:12], "little")
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        end += 40 * json.loads(data[12:end])["count"]
        data[end : end + 4] = zlib.crc32(data[:end]).to_bytes(4, "little")
        path.write_bytes(data)
    use_segment(path, folder)


def use_data(path: Path, folder: Path) -> None:
    bundle = data_bundle(folder, path.parent.name)
    for require in (True, False):
        data = pz.load_dataset(path, bundle, require_labels=require)
    data.batch(np.arange(min(4, len(data))))


def under(*patterns: str) -> Callable[[Path], list[Path]]:
    return lambda folder: sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


TARGETS: dict[str, Target] = {
    "onnx": Target(under("models/*.onnx"), (mutate_onnx, mutate_onnx, mutate_bytes), use_onnx),
    "external": Target(under("external/*.onnx"), (mutate_external, mutate_external, mutate_onnx), use_onnx),
    "external data": Target(under("external/*.data"), (mutate_bytes,), use_onnx),
    "checkpoint": Target(under("checkpoint/*"), (mutate_safetensors, mutate_bytes), use_checkpoint),
    "graph": Target(under("bundle/model.onnx"), (mutate_onnx, mutate_bytes), use_sealed_bundle),
    "description": Target(under("bundle/bundle.json"), (mutate_json, mutate_json, mutate_bytes), use_bundle),
    "weights": Target(under("bundle/weights.safetensors"), (mutate_safetensors, mutate_bytes), use_sealed_bundle),
    "probe": Target(under("probe.npz", "bundle/probe.npz"), (mutate_npz, mutate_npz, mutate_bytes), use_probe),
    "tokenizer": Target(
        under("tokenizer.json", "bundle/tokenizer.json"), (mutate_json, mutate_json, mutate_bytes), use_tokenizer
    ),
    "journal": Target(under("run/journal.pzj"), (mutate_header, mutate_entries, mutate_bytes), use_run),
    "snapshot": Target(
        under("state.safetensors", "run/snapshots/*/*.safetensors"),
        (mutate_safetensors, mutate_bytes),
        use_sealed_snapshot,
    ),
    "snapshot.json": Target(under("run/snapshots/*/*.json"), (mutate_json, mutate_bytes), use_run),
    "segment": Target(under("activations.pza"), (mutate_bytes,), use_segment),
    "sealed segment": Target(under("activations.pza"), (mutate_bytes,), use_sealed_segment),
    "metrics": Target(under("run/metrics.jsonl"), (mutate_jsonl, mutate_jsonl, mutate_text, mutate_bytes), use_run),
    "npz": Target(under("data/*/data.npz"), (mutate_npz, mutate_npz, mutate_bytes), use_data),
    "jsonl": Target(under("data/*/data.jsonl"), (mutate_jsonl, mutate_jsonl, mutate_text), use_data),
    "text": Target(under("data/*/data.tsv", "data/*/data.csv"), (mutate_text,), use_data),
}


def is_own(error: BaseException) -> bool:
    """Whether PocketZO raises an error on purpose: of the right type, by a raise statement of its own, on one line."""
    if not isinstance(error, (pz.Error, ValueError, TypeError)) or "\n" in str(error):
        return False
    traced = error.__traceback__
    while traced is not None and traced.tb_next is not None:
        traced = traced.tb_next
    if traced is None:
        return False
    code = traced.tb_frame.f_code
    raises = code.co_code[traced.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and Path(code.co_filename).is_relative_to(PACKAGE)
