"""Time and peak memory of a MeZO step of a language model, beside two plain forwards of the same graph.

    python bench/language.py BUNDLE [--batch 16x32] [--threads 1] [--rounds 5] [--json FILE]

    forwards    two forwards of the whole batch by onnxruntime with its default settings: the lower bound of a step
    prepacked   a MeZO step over all weights, the batch in parts as in training, in onnxruntime's prepacked layout
    plain       the same, the weights in the model's own layout

BUNDLE is prepared for causal-lm. Every token but the first of each row counts. Each system runs in a process of its
own; they take turns, one step each, and the ratios are medians over the rounds. Besides seconds there is the CPU time
of the process, whose ratio is closer to the truth where other programs use the machine. The peak (VmHWM) includes
loading.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import Run, peak_rss

SYSTEMS = ("forwards", "prepacked", "plain")
LR = 1e-6


def batch_of(rows: int, width: int, words: int) -> dict[str, Any]:
    """Return random tokens, with the inputs that say which of them count."""
    ids = np.random.default_rng(1).integers(0, words, (rows, width))
    places = np.arange(rows * width).reshape(rows, width)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(width), (rows, 1)),
        "positions": places[:, :-1].ravel(),
        "targets": ids[:, 1:].ravel(),
    }


def start(system: str, path: Path, rows: int, width: int, threads: int) -> Callable[[], object]:
    """Load a system, and return its step."""
    if system == "forwards":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        words = 1000  # of any vocabulary
        feed = {name: array for name, array in batch_of(rows, width, words).items() if name in names}
        return lambda: [session.run(["loss"], feed) for _ in range(2)]

    import pocketzo as pz
    from pocketzo.tasks.objective import Objective, metric_objective
    from pocketzo.tasks.registry import task_of

    pz.kernels.set_threads(threads)
    model = pz.load(path, threads=threads, prepack=system == "prepacked")
    objective = Objective(metric_objective("loss", model.bundle), task_of(model.bundle), None)
    optimizer = pz.MeZO(model, lr=LR)
    batch = batch_of(rows, width, 1000)
    return lambda: optimizer.step(lambda live: objective(live, batch))


def worker(system: str, path: str, *numbers: str) -> None:
    """Take a step for each line of input, and answer with its seconds, its CPU time and the peak of the process."""
    step = start(system, Path(path), *map(int, numbers))
    step()
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        step()
        found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "peak": peak_rss()}
        print(json.dumps(found), flush=True)


def ask(process: subprocess.Popen[str]) -> dict[str, float]:
    """Have a worker take a step."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """Read a line of a worker."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a worker ended with exit code {process.wait()}")
    found: dict[str, float] = json.loads(line)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", default="16x32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = Run()
    settings = [str(arguments.bundle), *arguments.batch.split("x"), str(arguments.threads)]
    processes = []
    for system in SYSTEMS:
        command = [sys.executable, __file__, "--worker", system, *settings]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        answer(processes[-1])
    rounds = [[ask(process) for process in processes] for _ in range(arguments.rounds)]
    for process in processes:
        process.communicate()
    weights = (arguments.bundle / "weights.safetensors").stat().st_size
    results: dict[str, Any] = {"weights": weights, "batch": arguments.batch, "threads": arguments.threads}
    print(f"weights {weights / 1e6:.0f} MB, {arguments.batch} tokens, {arguments.threads} threads")
    for number, system in enumerate(SYSTEMS):
        cell = {key: float(np.median([one[number][key] for one in rounds])) for key in ("seconds", "cpu")} | {
            f"{key}_ratio": float(np.median([one[number][key] / one[0][key] for one in rounds]))
            for key in ("seconds", "cpu")
        }
        results[system] = cell | {"peak": rounds[-1][number]["peak"]}
        print(
            f"{system:10} {cell['seconds']:7.3f} s, {cell['seconds_ratio']:.3f} x; CPU {cell['cpu']:7.3f} s, "
            f"{cell['cpu_ratio']:.3f} x; peak {results[system]['peak'] / 1e6:.0f} MB, "
            f"weights + {(results[system]['peak'] - weights) / 1e6:.0f} MB"
        )
    run.finish(results, arguments.json)


if __name__ == "__main__":
    main()
