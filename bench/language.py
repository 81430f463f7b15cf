"""Time and peak memory of a MeZO step of a language model, beside two plain forwards of the same graph.

    python bench/language.py BUNDLE [--batch 16x32] [--threads 1 2] [--rounds 5] [--json FILE]

    forwards    two forwards of the whole batch by onnxruntime with its default settings: the lower bound of a step
    prepacked   a MeZO step over all weights with the defaults of training: onnxruntime's prepacked layout, and logits
                of at most 32 MB at a time
    whole       the same with room for all logits of the batch, as by --activation-memory 128
    signs       the same with directions of signs, as by --distribution rademacher
    plain       as prepacked, but with the weights in the model's own layout, and the batch in parts

BUNDLE is prepared for causal-lm. Every token but the first of each row counts. Each system runs in a process of its
own; they take turns, one step each, and the ratios are medians over the rounds. Besides seconds there is the CPU time
of the process, whose ratio is closer to the truth where other programs use the machine. The peak (VmHWM) includes
loading.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run
from step import System, Worker, ended, worker

SYSTEMS = ("forwards", "prepacked", "whole", "signs", "plain")
LR = 1e-6
ROOM = 128_000_000
WORDS = 1000  # tokens of any vocabulary


def batch_of(rows: int, width: int) -> dict[str, Any]:
    """Return random tokens, with the inputs that say which of them count."""
    ids = np.random.default_rng(1).integers(0, WORDS, (rows, width))
    places = np.arange(rows * width).reshape(rows, width)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(width), (rows, 1)),
        "positions": places[:, :-1].ravel(),
        "targets": ids[:, 1:].ravel(),
    }


def start(system: str, _: str, bundle: Path, batch: str, threads: int) -> System:
    """Load a system; see :func:`step.start`."""
    inputs = batch_of(*map(int, batch.split("x")))
    if system == "forwards":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        feed = {name: array for name, array in inputs.items() if name in names}

        def forwards() -> float:
            session.run(["loss"], feed)
            return float(session.run(["loss"], feed)[0])

        return System(forwards, forwards())

    import pocketzo as pz
    from pocketzo.tasks.objective import Objective, metric_objective
    from pocketzo.tasks.registry import task_of

    pz.kernels.set_threads(threads)
    model = pz.load(bundle, threads=threads, prepack=system != "plain")
    room = ROOM if system in ("whole", "signs") else None
    objective = Objective(metric_objective("loss", model.bundle), task_of(model.bundle), room)
    optimizer = pz.MeZO(model, lr=LR, distribution="rademacher" if system == "signs" else "gaussian")
    return System(lambda: optimizer.step(lambda live: objective(live, inputs)), objective(model, inputs))


def measure(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Time the systems with a number of threads; return a cell for each."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(ended(Worker(system, "SmolLM2", arguments.bundle, arguments.batch, threads, __file__)))
            for system in SYSTEMS
        ]
        for _ in range(arguments.rounds):
            for each in workers:
                each.measure(1, warm=0)
        peaks = [each.finish()["peak"] for each in workers]
    first, cells = workers[0], {}
    for each, peak in zip(workers, peaks, strict=True):
        times = {"seconds": each.rounds, "cpu": each.cpu}
        of_first = {"seconds": first.rounds, "cpu": first.cpu}
        cells[each.system] = {key: float(np.median(taken)) for key, taken in times.items()} | {
            f"{key}_ratio": float(np.median(np.divide(taken, of_first[key]))) for key, taken in times.items()
        }
        cells[each.system]["peak"] = peak
    return cells


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:], start=start)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", default="16x32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = Run()
    weights = (arguments.bundle / "weights.safetensors").stat().st_size
    results: dict[str, Any] = {"weights": weights, "batch": arguments.batch, "threads": {}}
    for threads in arguments.threads:
        print(f"weights {weights / 1e6:.0f} MB, {arguments.batch} tokens, {threads} threads")
        results["threads"][str(threads)] = measure(arguments, threads)
        for system, cell in results["threads"][str(threads)].items():
            print(
                f"{system:10} {cell['seconds']:7.3f} s, {cell['seconds_ratio']:.3f} x; CPU {cell['cpu']:7.3f} s, "
                f"{cell['cpu_ratio']:.3f} x; peak {cell['peak'] / 1e6:.0f} MB, "
                f"weights + {(cell['peak'] - weights) / 1e6:.0f} MB"
            )
    run.finish(results, arguments.json)


if __name__ == "__main__":
    main()
