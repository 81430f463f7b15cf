"""Time to an accuracy: MeZO on all parameters of all-MiniLM-L6-v2, SST-2 from a zero head, PocketZO and PyTorch.

    python bench/accuracy.py [SST2_FOLDER] [--target 0.65] [--steps 400] [--seeds 0 1] [--json FILE] [--plot PNG]

Both start from the same weights, with the same hyper-parameters, batches and threads. Only the noise differs, and the
steps to the target vary with it: compare the seconds per step first. A run ends at the target. There are 1,024 training
sentences; dev (872) is evaluated every --every steps, and only reported. Evaluating and loading are not timed. The
accuracy reached here is below that of a linear probe (sst2.py does better): this script compares two implementations of
the same steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch_peers
from machine import Run, peer
from models import SHAPES
from sst2 import SST2, Batches, split, subset
from tables import accuracy_table

import pocketzo as pz
from pocketzo.demo import minilm
from pocketzo.export.bert import build_onnx

HEAD = 10  # lr and eps of the head, as multiples of the body's


class System:
    """One of the two implementations: a step on a batch, and the accuracy on dev."""

    def __init__(self, name: str, step: Callable[[Any], float], accuracy: Callable[[], float]) -> None:
        self.name, self.step, self.accuracy = name, step, accuracy


def ours(bundle: pz.Bundle, dev: pz.Dataset, arguments: argparse.Namespace, seed: int) -> System:
    pz.kernels.set_threads(arguments.threads)
    model = pz.load(bundle, threads=arguments.threads)
    groups = [pz.ParamGroup("^classifier", lr=HEAD, eps=HEAD)]
    optimizer = pz.MeZO(model, lr=arguments.lr, eps=arguments.eps, groups=groups, seed=seed)
    return System(
        "pocketzo",
        lambda batch: optimizer.step(lambda m: m.loss(batch)).loss,
        lambda: pz.evaluate(model, dev)["accuracy"],
    )


def by_torch(bundle: pz.Bundle, dev: pz.Dataset, arguments: argparse.Namespace, seed: int) -> System | None:
    torch = peer("torch")
    if torch is None:
        return None
    torch.set_num_threads(arguments.threads)
    mezo = torch_peers.MeZO(
        torch,
        bundle.path,
        SHAPES["minilm"],
        lr=arguments.lr,
        eps=arguments.eps,
        groups={"classifier": HEAD},
        seed=seed,
    )

    def accuracy() -> float:
        right = 0
        for at in range(0, len(dev), 32):
            batch = dev.batch(np.arange(at, min(at + 32, len(dev))))
            right += int((mezo.logits(batch).argmax(-1).numpy() == batch["labels"]).sum())
        return right / len(dev)

    return System("torch", mezo.step, accuracy)


def train(system: System, batches: Batches, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Take steps until the target is reached; return a point of the curve for each evaluation."""
    curve = [{"step": 0, "seconds": 0.0, "loss": None, "accuracy": system.accuracy()}]
    losses: list[float] = []
    seconds = 0.0
    for step in range(arguments.steps):
        batch = batches.batch(np.array([step % len(batches)]))
        began = time.perf_counter()
        losses.append(system.step(batch))
        seconds += time.perf_counter() - began
        if (step + 1) % arguments.every == 0:
            accuracy = system.accuracy()
            curve.append({"step": step + 1, "seconds": seconds, "loss": float(np.mean(losses)), "accuracy": accuracy})
            losses = []
            if accuracy >= arguments.target:
                break
    return curve


def draw(report: dict[str, Any], path: Path) -> None:
    pyplot = peer("matplotlib.pyplot")
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for run in report["results"]["runs"]:
        color = {"pocketzo": "C0", "torch": "C1"}[run["system"]]
        label = {"pocketzo": "PocketZO", "torch": "MeZO in PyTorch"}[run["system"]]
        x, y = ([point[key] for point in run["curve"]] for key in ("seconds", "accuracy"))
        axes.plot(x, y, color=color, label=label if run["seed"] == report["results"]["runs"][0]["seed"] else None)
    axes.axhline(report["results"]["target"], color="grey", linewidth=0.8)
    axes.set(xlabel="seconds of training", ylabel="dev accuracy", title="SST-2, MiniLM, zero head")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=SST2, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--checkpoint", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--systems", nargs="+", choices=("pocketzo", "torch"), default=("pocketzo", "torch"))
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--steps", type=int, default=400, help="the most that a run takes")
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the noise, one run each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves (needs matplotlib)")
    arguments = parser.parse_args()
    if not (arguments.data / "train.tsv").is_file():
        print(f"skipped: no train.tsv in {arguments.data}; SST-2 is not part of this project", file=sys.stderr)
        return

    run = Run()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = minilm.find_checkpoint(arguments.checkpoint)
        build_onnx(checkpoint, folder / "model.onnx", num_labels=2)
        bundle = pz.prepare(
            folder / "model.onnx", folder / "bundle", tokenizer=checkpoint.tokenizer, labels=("0", "1"), max_length=128
        )
        chosen, _ = split(arguments.data / "train.tsv")
        training = pz.load_dataset(subset(arguments.data / "train.tsv", chosen, folder / "train.tsv"), bundle)
        dev = pz.load_dataset(arguments.data / "dev.tsv", bundle)
        batches = Batches(training, seed=0)
        for seed in arguments.seeds:
            for name in arguments.systems:
                system = {"pocketzo": ours, "torch": by_torch}[name](bundle, dev, arguments, seed)
                if system is not None:
                    curve = train(system, batches, arguments)
                    runs.append({"system": name, "seed": seed, "curve": curve})
                    end = curve[-1]
                    print(
                        f"{name}, seed {seed}: {end['accuracy']:.1%} after {end['step']} steps, {end['seconds']:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    settings = {name: getattr(arguments, name) for name in ("target", "steps", "every", "lr", "eps", "threads")}
    report = run.finish({**settings, "runs": runs}, arguments.json)
    print("\n".join(accuracy_table(report)))
    if arguments.plot is not None:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
