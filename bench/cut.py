"""A step behind a cut, over a warm cache, against the same step of the whole model.

    python bench/cut.py BUNDLE[@REGEX] ... [--batches 16x32] [--against BUNDLE] [--rounds 5] [--json FILE]
    python bench/cut.py BUNDLE --dtypes --data FILE [--examples 256]

Each BUNDLE is trained behind its first layers: ``prepare --train lora:layers=20-``, or ``last:2+head``; REGEX narrows
what is trained, as ``train --trainable``. A step is one of MeZO, with its update. The model that is cut and the whole
one take turns in one process, over the same batch of random tokens; times are of the CPU, of one thread, so that other
processes disturb them less, and medians of the rounds. A language model computes logits at one position of each row.
With --against the whole model is that of another bundle, such as one of the same export that trains all weights. The
peaks are those of processes that take three steps, with all that comes before: importing, planning the cut, loading,
and filling the cache.

--dtypes: the loss of examples over caches of each type, against that of the whole model, and the bytes of a token.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from machine import Rows, Run, peak_rss
from tables import cut_table

import pocketzo as pz
from pocketzo.data.load import load_dataset
from pocketzo.formats.activations import Dtype
from pocketzo.optim.groups import select
from pocketzo.runtime.activations import ActivationCache, layout_of
from pocketzo.runtime.embeddings import embedding_rows
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.train.cached import fill

Report = dict[str, Any]
EPS, LR = 1e-3, 1e-7


def batch_of(bundle: pz.Bundle, examples: int, tokens: int) -> dict[str, Any]:
    """Return random texts of one length; of a language model, the last position of each counts."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for spec in bundle.inputs:
        if spec.name == "input_ids":
            found[spec.name] = rng.integers(0, embedding_rows(bundle).get("input_ids", 1000), (examples, tokens))
        elif spec.name == "attention_mask":
            found[spec.name] = np.ones((examples, tokens))
        elif spec.name == "position_ids":
            found[spec.name] = np.tile(np.arange(tokens), (examples, 1))
        elif spec.name == "positions":
            found[spec.name] = np.arange(1, examples + 1) * tokens - 2
        elif spec.name in ("labels", "targets"):
            found[spec.name] = np.zeros(examples)
        else:
            found[spec.name] = np.zeros((examples, tokens))
        found[spec.name] = found[spec.name].astype(spec.dtype)
    return found


def cut_of(bundle: pz.Bundle, pattern: str | None) -> pz.Cut:
    """Return where a bundle is cut, if what matches a pattern is trained."""
    return pz.plan_cut(bundle, {tensor.name for tensor in select(bundle, pattern)})


def compare(text: str, examples: int, tokens: int, rounds: int, against: Path | None) -> Report:
    """Return the seconds of a step of the model that is cut and of the whole one, which may be another bundle's."""
    path, _, pattern = text.partition("@")
    bundle = pz.Bundle.read(path)
    cut = cut_of(bundle, pattern or None)
    other = bundle if against is None else pz.Bundle.read(against)
    models = {"cut": pz.load(bundle, threads=1, cut=cut), "whole": pz.load(other, threads=1)}
    batches = {name: batch_of(model.bundle, examples, tokens) for name, model in models.items()}
    objectives = {
        name: OnBatch(Objective(metric_objective("loss", one.bundle), task_of(one.bundle)), batches[name], 1)
        for name, one in models.items()
    }
    assert models["cut"].halves is not None
    patterns = {"cut": pattern or None, "whole": pattern or None if against is None else None}
    steps = {name: pz.MeZO(model, lr=LR, eps=EPS, trainable=patterns[name], seed=1) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        models["cut"].halves.store = ActivationCache(Path(folder), layout_of(cut, "fp32"))
        losses = {name: model.loss(batches[name]) for name, model in models.items()}
        models["cut"].halves.store.flush()
        models["cut"].halves.release()
        for _ in range(rounds + 1):  # the first is to warm up
            for name, optimizer in steps.items():
                started = time.process_time()
                optimizer.step(objectives[name])
                seconds[name].append(time.process_time() - started)
    del models, steps, objectives
    medians = {name: float(np.median(taken[1:])) for name, taken in seconds.items()}
    return {
        "bundle": text,
        "batch": f"{examples}x{tokens}",
        "saved": cut.saved(examples, tokens),
        "against": None if against is None else against.name,
        "loss_difference": abs(losses["cut"] - losses["whole"]) if against is None else None,
        "bytes_a_token": cut.nbytes(1),
        "seconds": medians,
        "peaks": {
            "cut": peak_of(path, pattern, examples, tokens, whole=False),
            "whole": peak_of(str(other.path), pattern if against is None else "", examples, tokens, whole=True),
        },
    }


def peak_of(path: str, pattern: str, examples: int, tokens: int, *, whole: bool) -> int:
    """Return the peak of a new process that trains a model, behind its cut or whole, in bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (path, pattern, examples, tokens, whole))


def _peak(path: str, pattern: str, examples: int, tokens: int, whole: bool) -> int:
    bundle = pz.Bundle.read(path)
    model = pz.load(bundle, threads=1, cut=None if whole else cut_of(bundle, pattern or None))
    batch = batch_of(model.bundle, examples, tokens)
    objective = OnBatch(Objective(metric_objective("loss", model.bundle), task_of(model.bundle)), batch, 1)
    optimizer = pz.MeZO(model, lr=LR, eps=EPS, trainable=pattern or None, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        if model.halves is not None:
            model.halves.store = ActivationCache(Path(folder), layout_of(model.halves.cut, "fp32"))
            model.halves.fill(batch)
            model.halves.store.flush()
            model.halves.release()
        for _ in range(3):
            optimizer.step(objective)
    return peak_rss()


def compare_types(path: str, data: Path, count: int) -> Report:
    """Return the mean loss over caches of each type, and how far the losses of batches are from the whole model's."""
    bundle = pz.Bundle.read(path)
    cut = pz.plan_cut(bundle)
    examples = load_dataset(data, bundle)
    batches = [examples.batch(np.arange(at, at + 16)) for at in range(0, min(count, len(examples) - 16), 16)]
    model = pz.load(bundle, threads=1, cut=cut)
    assert model.halves is not None
    report: Report = {}
    expected: list[float] = []
    print("| type | bytes a token | mean loss | largest difference of a batch |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in get_args(Dtype):
            layout = layout_of(cut, dtype)
            model.halves.store = ActivationCache(Path(folder), layout)
            if dtype == "fp32":
                fill(model, examples)
            losses = [model.loss(batch) for batch in batches]
            expected = expected or losses
            worst = float(np.abs(np.subtract(losses, expected)).max())
            size = layout.nbytes(2) - layout.nbytes(1)
            report[dtype] = {"bytes_a_token": size, "loss": float(np.mean(losses)), "worst": worst}
            print(f"| {dtype} | {size:,} | {np.mean(losses):.5f} | {worst:.2g} |", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[@REGEX]")
    parser.add_argument("--batches", nargs="+", default=["16x32"], metavar="EXAMPLESxTOKENS")
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="whose whole step is the one to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", action="store_true", help="compare types of cached numbers")
    parser.add_argument("--data", type=Path, help="examples, for --dtypes")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--json", type=Path, help="file of the rows, which is extended; of --dtypes, written")
    arguments = parser.parse_args()
    run = Run()
    if arguments.dtypes:
        run.finish({"dtypes": compare_types(arguments.bundles[0], arguments.data, arguments.examples)}, arguments.json)
        return
    rows = Rows(run, arguments.json, {"rounds": arguments.rounds})
    against = None if arguments.against is None else arguments.against.name
    for text in arguments.bundles:
        for batch in arguments.batches:
            if not rows.has(bundle=text, batch=batch, against=against):
                examples, tokens = map(int, batch.split("x"))
                rows.add(compare(text, examples, tokens, arguments.rounds, arguments.against))
    print("\n".join(cut_table(run.finish({"rows": rows.rows}, None))))


if __name__ == "__main__":
    main()
