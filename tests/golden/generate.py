"""Write the golden files of this folder: cd tests && python -m golden.generate.

They hold every part of the formats of docs/formats.md at least once. The losses are checksums of the weights, which
are the same on every machine. test_formats.py writes them again, compares each byte, and has them read by
independent_reader.py.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

import pocketzo as pz
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.journal import Entry, Journal
from pocketzo.formats.snapshot import write_snapshot
from pocketzo.optim.block import Block
from pocketzo.runtime.weights import Weights
from pocketzo.train.recipe import BaseModel, DataUsed, Loop, Recipe, Session, Source
from pocketzo.train.writer import RunWriter

GOLDEN = Path(__file__).parent
BUNDLES: Mapping[str, Mapping[str, Any]] = {
    "bundle": {"dtype": "float32"},
    "bundle-fp16": {"dtype": "float16"},
    "bundle-adapter": {"train": "lora:r=2,targets=tête,train=B+norm"},
}
STEPS = 6
SNAPSHOT = 4
STATE = {"momentum": np.arange(6, dtype=np.float32).reshape(2, 3) / 8, "count": np.array(4)}
SEED = 0x9E3779B97F4A7C15  # no double holds it


@dataclass(frozen=True)
class Case:
    """A run: from which bundle, by which method."""

    make: Callable[..., pz.Optimizer]
    settings: Mapping[str, Any]
    bundle: str = "bundle"


CASES = {
    "mezo": Case(pz.MeZO, {}),
    "mezo-queries": Case(pz.MeZO, {"queries": 3}),
    "mezo-decay": Case(pz.MeZO, {"weight_decay": 0.25, "schedule": pz.Schedule("linear", STEPS, warmup=2)}),
    "mezo-groups": Case(
        pz.MeZO,
        {
            "groups": [pz.ParamGroup("tête", lr=10, eps=3), pz.ParamGroup("[nt]", lr=0.1)],
            "trainable": "tête|norm",
            "weight_decay": 0.1,
        },
    ),
    "block": Case(pz.MeZO, {"subset": Block(0.5), "queries": 2, "distribution": "rademacher"}),
    "fzoo": Case(pz.FZOO, {"lr": 2.0**-10}),
    "momentum": Case(pz.Momentum, {"lr": 2.0**-7, "schedule": pz.Schedule("cosine", STEPS), "weight_decay": 0.1}),
    "momentum-block": Case(pz.Momentum, {"lr": 2.0**-7, "momentum": 0.5, "subset": Block(0.5), "queries": 2}),
    "lozo": Case(pz.LOZO, {"rank": 3, "interval": 2, "queries": 2, "weight_decay": 0.1, "subset": Block(0.7)}),
    "fp16-lozo": Case(pz.LOZO, {"interval": 4, "distribution": "rademacher", "weight_decay": 0.1}, "bundle-fp16"),
    "fp16-momentum": Case(
        pz.Momentum, {"lr": 2.0**-7, "queries": 3, "distribution": "rademacher", "weight_decay": 0.1}, "bundle-fp16"
    ),
    "fp16-mezo": Case(pz.MeZO, {"weight_decay": 0.1}, "bundle-fp16"),
    "fp16-fzoo": Case(
        pz.FZOO, {"queries": 3, "distribution": "gaussian", "weight_decay": 0.1, "lr": 2.0**-10}, "bundle-fp16"
    ),
    "adapter": Case(pz.MeZO, {"queries": 2, "weight_decay": 0.25}, "bundle-adapter"),
}
SNAPSHOTS = ("mezo", "momentum")
DRAWS = {5: 0.5, 2**64 - 2: -0.25, 1 << 40: 2.0**-7}  # of several clients, in an order of their own


def write_model(path: Path) -> None:
    """Write a classifier of bags of words, with matrices and vectors, and names that are not ASCII."""
    rng = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32), name)

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("Gather", ["embedding.weight", "input_ids"], ["tokens"]),
        helper.make_node("ReduceMean", ["tokens"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("LayerNormalization", ["mean", "norm.weight", "norm.bias"], ["normed"]),
        helper.make_node("MatMul", ["normed", "tête.weight"], ["scores"]),
        helper.make_node("Add", ["scores", "tête.bias"], ["logits"]),
    ]
    weights = [
        weight("embedding.weight", 72, 30),
        weight("norm.weight", 30),
        weight("norm.bias", 30),
        weight("tête.weight", 30, 3),
        weight("tête.bias", 3),
    ]
    graph = helper.make_graph(nodes, "golden", [ids], [logits], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


class Unloaded:
    """The weights of a bundle without a session, which steps can move."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.weights = Weights(bundle)
        self.weights.read()


def checksum(model: Unloaded | pz.Model) -> float:
    content = b"".join(model.weights[name].tobytes() for name in model.weights)
    return zlib.crc32(content) / 2**32


def recipe(bundle: Bundle, optimizer: pz.Optimizer) -> Recipe:
    return Recipe(
        model=BaseModel(
            f"/golden/{bundle.path.name}",
            bundle.graph_sha256,
            bundle.base_sha256,
            None if bundle.adapter is None else bundle.adapter.sha256,
        ),
        method=optimizer.settings(),
        loop=Loop(
            steps=STEPS,
            batch_size=8,
            eval_every=None,
            metric="accuracy",
            patience=None,
            snapshot_every=SNAPSHOT,
            group_by_length=False,
            max_skipped=10,
            objective=None,
        ),
        session=Session(threads=1, forward_seconds={"1": 0.25, "2": 0.5}, prepacked=False),
        data=DataUsed(train="0" * 64, eval=None, source=Source(train="/golden/train.jsonl")),
    )


def record(case: Case, bundle: Bundle, run: Path) -> dict[str, Any]:
    """Write a run of which the fourth step is undone; return what is expected of its readers."""
    model = Unloaded(bundle)
    optimizer = case.make(model, **{"lr": 2.0**-13, "seed": SEED, **case.settings})
    writer = RunWriter.begin(run, recipe(bundle, optimizer))
    entries: list[Entry] = []

    def keep(entry: Entry) -> None:
        writer.append(entry)
        entries.append(entry)

    while (step := optimizer.step_number) < STEPS:
        info = optimizer.step(lambda model: math.nan if step == 3 else checksum(model), keep)
        writer.log({"step": step + 1, "loss": None if info.skipped else info.loss, "lr": info.lr, "seconds": 0.25})
        if run.name in SNAPSHOTS and step + 1 == SNAPSHOT:
            writer.log({"step": step + 1, "eval": {"accuracy": 0.5, "loss": None}})
            writer.snapshot(optimizer)
    writer.close()
    if run.name != "mezo":
        (run / "metrics.jsonl").unlink()
    return expected(bundle, model, entries)


def merge(bundle: Bundle, run: Path) -> dict[str, Any]:
    """Write a run whose draws do not count up."""
    model = Unloaded(bundle)
    optimizer = pz.MeZO(model, lr=1.0, queries=3, seed=SEED)
    entries = [Entry(1.0, DRAWS), Entry(0.5, {0: -1.5})]
    writer = RunWriter.begin(run, recipe(bundle, optimizer))
    for entry in entries:
        writer.append(entry)
    writer.close()
    (run / "metrics.jsonl").unlink()
    optimizer.replay(entries)
    return expected(bundle, model, entries)


def expected(bundle: Bundle, model: Unloaded, entries: list[Entry]) -> dict[str, Any]:
    return {
        "bundle": bundle.path.name,
        "weights_sha256": model.weights.sha256(),
        "entries": [[entry.lr, list(entry.coefficients.items())] for entry in entries],
    }


def write_bundles(out: Path, names: Collection[str] = BUNDLES.keys()) -> None:
    """Write the bundles. Their graphs differ with the version of onnx, so that those of another day are other files."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model.onnx")
        for name in names:
            labels = ["rouge", "bleu", "vert très pâle"]
            options = BUNDLES[name]
            pz.prepare(Path(folder) / "model.onnx", out / name, labels=labels, max_length=16, overwrite=True, **options)


def write_runs(bundles: Path, out: Path) -> None:
    """Write all else."""
    read = {name: Bundle.read(bundles / name) for name in BUNDLES}
    found = {name: record(case, read[case.bundle], out / "runs" / name) for name, case in CASES.items()}
    found["draws"] = merge(read["bundle"], out / "runs" / "draws")
    position = Journal.open(out / "runs" / "mezo" / "journal.pzj", write=False).position(SNAPSHOT)
    weights = out / "runs" / "mezo" / "snapshots" / f"step-{SNAPSHOT:08d}" / "weights.safetensors"
    write_snapshot(out / "state", position, partial(shutil.copyfile, weights), STATE)
    text = ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    (out / "expected.json").write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    for name in "runs", "state":
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
    write_bundles(GOLDEN, [name for name in BUNDLES if not (GOLDEN / name).exists()])
    write_runs(GOLDEN, GOLDEN)
