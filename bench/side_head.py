"""The side head beside the linear probe: SST-2 and the demo's messages with MiniLM, SST-2 with a prompted decoder.

    python bench/side_head.py [SST2_FOLDER] [--decoder model.onnx] [--seeds 3] [--extra] [--json FILE]

Everything is chosen by cross-validation on the training data: the layers, the pooling, the penalty, and whether
attention pooling pays. What is held out is looked at once a seed. SST-2: the 1,024 training sentences of sst2.py, dev.
A seed decides the folds, the order of the examples and the dropped tokens. With --extra it draws the 1,024 training
sentences, and what is held out is 1,000 other sentences of the training file too, which no sample has: nothing about a
head was ever chosen on them.

Seconds are from the raw text to the bundle with the head: tokens, backbone, cross-validation, fit, writing. The model
is prepared before. If OpenBLAS shares its cores with other work, OPENBLAS_NUM_THREADS=1 is much faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, write
from sst2 import PER_CLASS, SST2, split, subset

import pocketzo as pz
from pocketzo.demo import minilm
from pocketzo.demo.run import LABELS, messages
from pocketzo.export.bert import build_onnx
from pocketzo.prepare.head import prepare_head
from pocketzo.train.head.evaluate import evaluate_heads
from pocketzo.train.head.fit import Fitter
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.run import HeadRun

PROMPT = "Review: {text}\nSentiment:"


def samples(train: Path, count: int, folder: Path) -> tuple[list[Path], Path]:
    """Write samples of 1,024 training sentences, and 1,000 others that none of them has."""
    first, extra = split(train)
    lines = train.read_text(encoding="utf-8").splitlines()
    labels = np.array([int(line.rpartition("\t")[2]) for line in lines])
    free = np.setdiff1d(np.arange(len(lines)), extra)
    found = [first]
    for seed in range(1, count):
        random = np.random.default_rng(seed)
        found.append(np.concatenate([random.permutation(free[labels[free] == label])[:PER_CLASS] for label in (0, 1)]))
    paths = [subset(train, chosen, folder / f"train-{seed}.tsv") for seed, chosen in enumerate(found)]
    return paths, subset(train, extra, folder / "extra.tsv")


def measure(
    task: str, bundle: pz.Bundle, trains: Sequence[Path], held_out: Mapping[str, Path], threads: int, folder: Path
) -> list[dict[str, Any]]:
    """Fit a head by each seed, to its training file, and print a line of the table for each held-out file."""
    rows = []
    for seed, train in enumerate(trains):
        began, used = time.perf_counter(), time.process_time()
        data = pz.load_dataset(train, bundle)
        kept = Kept.of(bundle, data, threads=threads, folder=folder)
        found = Fitter(bundle, kept, seed=seed, told=lambda *_: None).fit()
        tuned = folder / f"tuned-{seed}"
        HeadRun.of(bundle, found.head, bundle.labels, {}).write_bundle(found.head, tuned, overwrite=True)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        assert bundle.side is not None
        best = found.trials[0]
        for suffix, path in held_out.items():
            name = f"{task}{suffix}"
            evaluated = pz.load_dataset(path, bundle)
            head, probe = evaluate_heads(bundle, [found.head, found.probe], evaluated, threads=threads)
            row = {
                "task": name,
                "seed": seed,
                "head": head,
                "probe": probe,
                "layers": found.head.layers,
                "pooling": best.features.pooling,
                "l2": best.l2,
                "attention": found.pays,
                "loss": best.loss if found.attention is None else min(best.loss, float(found.attention.mean())),
                "probe_loss": found.probe_trial.loss,
                "seconds": seconds,
                "cpu_seconds": cpu,
            }
            rows.append(row)
            print(
                f"| {name} | {seed} | {probe['accuracy']:.1%} / {probe['loss']:.3f} | {head['accuracy']:.1%} / "
                f"{head['loss']:.3f} | {best.features.text}, penalty {best.l2:g}{', attention' * found.pays} | "
                f"{found.head.layers[-1]} of {bundle.side.layers} | {seconds:.0f} s | {cpu:.0f} s |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=SST2, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--checkpoint", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--decoder", type=Path, action="append", default=[], help="a decoder's export; repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["minilm", "decoder"], help="measure a part")
    parser.add_argument("--extra", action="store_true", help="SST-2 alone: other samples, and other held-out sentences")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    print("| task | seed | linear probe | side head | chosen | layers run | time | CPU time |")
    print("|---" * 8 + "|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trains, extra = samples(arguments.data / "train.tsv", arguments.seeds, folder)
        held_out = {"": arguments.data / "dev.tsv"}
        if arguments.extra:
            held_out |= {", extra": extra}
        else:
            trains = trains[:1] * arguments.seeds
        if arguments.only != "decoder":
            checkpoint = minilm.find_checkpoint(arguments.checkpoint)
            build_onnx(checkpoint, folder / "model.onnx", num_labels=2)
            of_messages = [messages("train")] * arguments.seeds, {"": messages("test")}
            for name, labels, parts in (
                ("SST-2, MiniLM", ("0", "1"), (trains, held_out)),
                *([] if arguments.extra else [("messages, MiniLM", LABELS, of_messages)]),
            ):
                bundle = prepare_head(
                    folder / "model.onnx", folder / name, tokenizer=checkpoint.tokenizer, labels=labels, max_length=128
                )
                rows += measure(name, bundle, *parts, arguments.threads, folder)
        for model in arguments.decoder if arguments.only != "minilm" else []:
            name = f"SST-2, {model.parent.name}"
            bundle = prepare_head(model, folder / model.parent.name, labels=("0", "1"), template=PROMPT, max_length=128)
            rows += measure(name, bundle, trains, held_out, arguments.threads, folder)
    print()
    for name in dict.fromkeys(row["task"] for row in rows):
        means = (np.mean([row[kind]["accuracy"] for row in rows if row["task"] == name]) for kind in ("probe", "head"))
        print(f"{name}: mean of {arguments.seeds} seeds: probe {next(means):.2%}, head {next(means):.2%}")
    write(arguments.json, {"rows": rows, "seeds": arguments.seeds, "threads": arguments.threads})


if __name__ == "__main__":
    main()
