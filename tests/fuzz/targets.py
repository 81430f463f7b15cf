"""What is fuzzed: a valid file, its mutations, and what PocketZO does with the mutated file."""

from __future__ import annotations

import json
import random
import shutil
import struct
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import write_tiny_data, write_tiny_onnx

import pocketzo as pz
from fuzz.mutate import Mutator, mutate_bytes, mutate_json, mutate_npz, mutate_onnx, mutate_text

PACKAGE = Path(pz.__file__).parent
MODELS = Path(__file__).parent.parent / "models"
WORDS = ("it", "is", "good", "bad", "not", "the", "a", "film", "très", "!")


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes
    ----------
    files : callable
        Returns the files to mutate, given the folder that :func:`build` wrote.
    mutators : tuple of Mutator
        One is chosen for each case.
    use : callable
        Does with the mutated file, in a copy of the folder, what a user would.
    """

    files: Callable[[Path], list[Path]]
    mutators: tuple[Mutator, ...]
    use: Callable[[Path, Path], None]


def build(folder: Path) -> None:
    """Write a valid file of each kind."""
    write_tiny_onnx(folder / "tiny.onnx")
    write_tiny_data(folder / "data.npz")
    (folder / "models").mkdir()
    for path in MODELS.glob("*.onnx"):
        if path.stat().st_size < 300_000:
            shutil.copy(path, folder / "models")
    shutil.copy(folder / "tiny.onnx", folder / "models")
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(("[UNK]", *WORDS))}, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    bundle = pz.prepare(
        folder / "tiny.onnx", folder / "bundle", tokenizer=folder / "tokenizer.json", labels=["red", "green", "blue"]
    )
    rng = random.Random(0)
    rows = [(" ".join(rng.choices(WORDS, k=6)), rng.choice(("red", "green", "blue"))) for _ in range(12)]
    (folder / "data.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    (folder / "data.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    )
    model = pz.load(bundle, threads=1, verify="fast")
    data = pz.load_dataset(folder / "data.tsv", bundle)
    optimizer = pz.MeZO(model, lr=0.01, queries=2)

    def stop(progress: pz.Progress) -> None:
        trainer.stop_requested = progress.info.step == 5  # the rest is there to be resumed

    trainer = pz.Trainer(
        model,
        optimizer,
        data,
        eval=data,
        run=folder / "run",
        steps=8,
        batch_size=4,
        eval_every=2,
        snapshot_every=4,
        callback=stop,
    )
    trainer.fit()


def train(bundle: Path, folder: Path) -> None:
    """Load a bundle and take two steps."""
    model = pz.load(bundle, threads=1, verify="fast")
    outputs = [value.name for value in model.bundle.outputs if np.dtype(value.dtype).kind == "f"]
    optimizer = pz.MeZO(model, lr=0.01)
    if model.bundle.loss is not None and model.bundle.task is not None and model.bundle.tokenizer is not None:
        examples = pz.load_dataset(folder / "data.tsv", model.bundle).batch(np.arange(2))
        optimizer.step(lambda model: model.loss(examples))
    else:
        from pocketzo.runtime.outputs import probe_batch

        batch = probe_batch(model.bundle)
        for _ in range(2):
            optimizer.step(lambda model: float(sum(np.square(v).mean() for v in model.run(batch, outputs).values())))


def use_onnx(path: Path, folder: Path) -> None:
    pz.prepare(path, folder / "out")
    train(folder / "out", folder)


def use_bundle(path: Path, folder: Path) -> None:
    train(folder / "bundle", folder)


def use_run(path: Path, folder: Path) -> None:
    run = pz.Run(folder / "run")
    _ = run.best_step
    run.replay(folder / "replayed")
    data = pz.load_dataset(folder / "data.tsv", pz.Bundle.read(folder / "bundle"))
    trainer = pz.Trainer.resume(folder / "run", data, eval=data)
    trainer.fit()


def use_data(path: Path, folder: Path) -> None:
    bundle = pz.Bundle.read(folder / "bundle")
    for require in (True, False):
        data = pz.load_dataset(path, bundle, require_labels=require)
    data.batch(np.arange(min(4, len(data))))


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Mutate a journal's header, with its checksum and those of the entries."""
    text, entries = _parts(data)
    return _journal(mutate_json(text, rng), entries)


def mutate_entries(data: bytes, rng: random.Random) -> bytes:
    """Mutate a journal's entries, with their checksums."""
    text, entries = _parts(data)
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(entries))
        match rng.randrange(4):
            case 0:
                entries[at] = mutate_bytes(entries[at], rng)
            case 1:
                count = rng.choice((0, 1, 2, 3, 2**20, 2**32 - 1))
                entries[at] = struct.pack("<I", count) + entries[at][4:]
            case 2:
                words = rng.choice((b"\xff" * 8, b"\0" * 8, b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f"))
                where = rng.randrange(4, len(entries[at]))
                entries[at] = (entries[at][:where] + words + entries[at][where + len(words) :])[: len(entries[at])]
            case _:
                entries.insert(at, entries[rng.randrange(len(entries))])
    return _journal(text, entries)


def _parts(data: bytes) -> tuple[bytes, list[bytes]]:
    size = int.from_bytes(data[4:8], "little")
    entries, at = [], 8 + size + 4
    while at < len(data):
        length = 8 + 12 * int.from_bytes(data[at : at + 4], "little")
        entries.append(data[at : at + length])
        at += length + 4
    return data[8 : 8 + size], entries


def _journal(text: bytes, entries: list[bytes]) -> bytes:
    crc = zlib.crc32(text)
    out = b"PZOJ" + struct.pack("<I", len(text)) + text + struct.pack("<I", crc)
    for entry in entries:
        crc = zlib.crc32(entry, crc)
        out += entry + struct.pack("<I", crc)
    return out


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header of a safetensors file, with its length."""
    size = int.from_bytes(data[:8], "little")
    text = mutate_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def under(pattern: str) -> Callable[[Path], list[Path]]:
    return lambda folder: sorted(path for path in folder.glob(pattern) if path.is_file())


TARGETS: dict[str, Target] = {
    "onnx": Target(under("models/*.onnx"), (mutate_onnx, mutate_onnx, mutate_bytes), use_onnx),
    "graph": Target(under("bundle/model.onnx"), (mutate_onnx, mutate_bytes), use_bundle),
    "description": Target(under("bundle/bundle.json"), (mutate_json, mutate_json, mutate_bytes), use_bundle),
    "weights": Target(under("bundle/weights.safetensors"), (mutate_safetensors, mutate_bytes), use_bundle),
    "tokenizer": Target(under("bundle/tokenizer.json"), (mutate_json, mutate_json, mutate_bytes), use_bundle),
    "journal": Target(under("run/journal.pzj"), (mutate_header, mutate_entries, mutate_bytes), use_run),
    "snapshot": Target(under("run/snapshots/*/*"), (mutate_bytes,), use_run),
    "snapshot.json": Target(under("run/snapshots/*/*.json"), (mutate_json, mutate_bytes), use_run),
    "metrics": Target(under("run/metrics.jsonl"), (mutate_text, mutate_bytes), use_run),
    "npz": Target(under("data.npz"), (mutate_npz, mutate_npz, mutate_bytes), use_data),
    "text": Target(
        lambda folder: [folder / f"data.{kind}" for kind in ("tsv", "csv", "jsonl")], (mutate_text,), use_data
    ),
}


def is_own(error: BaseException) -> bool:
    """Whether PocketZO raises an error on purpose: of the right type, in its own code, on one line."""
    if not isinstance(error, (pz.Error, ValueError, TypeError)) or "\n" in str(error):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
