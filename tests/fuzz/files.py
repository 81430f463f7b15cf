"""The valid files that are mutated, one or more of each kind that PocketZO reads."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import CLASSES, VOCABULARY, write_tiny_data, write_tiny_onnx
from described import described_bundle

import pocketzo as pz
from pocketzo.export.bert import Checkpoint
from pocketzo.formats import safetensors
from pocketzo.formats.activations import Layout, New, StoredValue, write_segment
from pocketzo.formats.bundle import TaskSpec, ValueSpec

MODELS = Path(__file__).parent.parent / "models"
WORDS = ("it", "is", "good", "bad", "not", "the", "a", "film", "très", "!")
LABELS = ("red", "green", "blue")
TASKS = ("classification", "token-classification", "multi-label", "regression")


def build(folder: Path) -> None:
    """Write a valid file of each kind."""
    write_tiny_onnx(folder / "tiny.onnx")
    _build_segment(folder / "activations.pza")
    (folder / "models").mkdir()
    for path in (*MODELS.glob("*.onnx"), *MODELS.glob("*.onnx.data"), folder / "tiny.onnx"):
        shutil.copy(path, folder / "models")
    (folder / "external").mkdir()
    onnx.save(
        onnx.load(folder / "tiny.onnx"),
        folder / "external/tiny.onnx",
        save_as_external_data=True,
        location="tiny.data",
        size_threshold=64,
    )
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
        folder / "tiny.onnx", folder / "bundle", tokenizer=folder / "tokenizer.json", labels=list(LABELS)
    )
    shutil.copy(folder / "bundle/probe.npz", folder)
    safetensors.write(folder / "state.safetensors", [("momentum", np.ones((3, 4), np.float32))])
    _build_checkpoint(folder)
    for task in TASKS:
        (folder / "data" / task).mkdir(parents=True)
        _build_data(folder / "data" / task, task)
    _build_run(bundle, folder)


def data_bundle(folder: Path, task: str) -> pz.Bundle:
    """Return a bundle of a task, for reading data; only that of classification has a model."""
    if task == "classification":
        return pz.Bundle.read(folder / "bundle")
    bundle = described_bundle(folder, task=task, labels=LABELS, classes=CLASSES)
    if task == "token-classification":
        return bundle
    inputs = (*bundle.inputs[:-1], ValueSpec("labels", "float32", ("batch", CLASSES)))
    outputs = (bundle.outputs[0], ValueSpec("logits", "float32", ("batch", CLASSES)))
    spec = TaskSpec(task, {"labels": list(LABELS)} if task == "multi-label" else {})
    return dataclasses.replace(bundle, inputs=inputs, outputs=outputs, task=spec)


def checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint of a BERT encoder."""
    weights = folder / "checkpoint/model.safetensors"
    return Checkpoint(weights, folder / "tokenizer.json", layers=2, heads=2, hidden_size=16, layer_norm_eps=1e-3)


def _build_checkpoint(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    prefix = "tiny/weights/"
    with np.load(MODELS / "minilm_expected.npz") as arrays:
        weights = [(name.removeprefix(prefix), arrays[name]) for name in arrays.files if name.startswith(prefix)]
    safetensors.write(checkpoint(folder).weights, weights)


def _build_data(folder: Path, task: str) -> None:
    rng = random.Random(task)
    rows = []
    for _ in range(12):
        words = rng.choices(WORDS, k=6)
        label: Any = rng.choice(LABELS)
        match task:
            case "token-classification":
                label = rng.choices(LABELS, k=6)
            case "multi-label":
                label = rng.sample(LABELS, k=rng.randrange(4))
            case "regression":
                label = [round(rng.uniform(-2, 2), 2) for _ in range(CLASSES)]
        rows.append((words if task == "token-classification" else " ".join(words), label))

    def plain(value: Any) -> str:
        separator = "," if task in ("multi-label", "regression") else " "
        return value if isinstance(value, str) else separator.join(map(str, value))

    text, names = ("tokens", "labels") if task == "token-classification" else ("text", "label")
    lines = [(plain(a) if isinstance(a, str) else " ".join(a), plain(b)) for a, b in rows]
    (folder / "data.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in [(text, names), *lines]))
    (folder / "data.csv").write_text(f"{text},{names}\n" + "".join(f'"{a}","{b}"\n' for a, b in lines))
    (folder / "data.jsonl").write_text("".join(json.dumps({text: a, names: b}) + "\n" for a, b in rows))
    if task == "classification":
        write_tiny_data(folder / "data.npz")
        return
    numbers = np.random.default_rng(0)
    shape = (12, 6) if task == "token-classification" else (12, CLASSES)
    labels = numbers.integers(0, 2, shape)
    np.savez(
        folder / "data.npz",
        input_ids=numbers.integers(0, VOCABULARY, (12, 6)),
        attention_mask=np.ones((12, 6), np.int64),
        labels=labels.astype(np.float32) if task == "regression" else labels,
    )


def _build_segment(path: Path) -> None:
    rng = np.random.default_rng(2)
    layout = Layout(
        bytes(32), "int8", (StoredValue("hidden", "float32", (None, 20)), StoredValue("x", "float16", (3,)))
    )
    entries = {}
    for tokens in range(1, 6):
        arrays = [rng.normal(size=value.shape(tokens)).astype(value.dtype) for value in layout.values]
        entries[bytes([tokens] * 16)] = New(tokens, layout.encode(arrays))
    write_segment(path, layout, entries)


def _build_run(bundle: pz.Bundle, folder: Path) -> None:
    model = pz.load(bundle, threads=1, verify="fast")
    data = pz.load_dataset(folder / "data/classification/data.tsv", bundle)
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
