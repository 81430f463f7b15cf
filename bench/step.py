"""Time and peak memory of a MeZO step: PocketZO, MeZO in PyTorch as its paper's code does it, and two plain forwards.

    python bench/step.py [--models DIR] [--shapes minilm ...] [--batches 8x64 ...] [--systems torch ...] [--json FILE]

    forwards    two forwards by onnxruntime with its default settings, loss output only: the lower bound of a step
    running     two forwards by PocketZO's session, without training
    prepacked   a MeZO step of PocketZO, the weights in onnxruntime's prepacked layout
    plain       a MeZO step of PocketZO, the weights in the model's own layout
    torch       a MeZO step in PyTorch (torch_peers.py)

The models have the shapes of well-known ones and random weights. Each system runs in a process of its own, a new one
for every shape and batch. All systems are loaded, and then measured in turn for several rounds, a few steps at a time.
If memory cannot hold all of them at once, each is measured beside the forwards alone. Peak memory (VmHWM) includes
loading.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from machine import Run, peer, spread, status
from models import SHAPES, activations, make_batch, make_bundle, parameters
from tables import step_table

SYSTEMS = ("forwards", "running", "prepacked", "plain", "torch")
BATCHES = ("1x16", "8x64", "16x128")
# Approximate peak memory in multiples of the weights' size; decides which systems are loaded at the same time.
HELD = {"forwards": 1.2, "running": 1.15, "prepacked": 1.15, "plain": 1.15, "default": 1.15, "torch": 2.0}
LR = 1e-6
# The systems of methods.py: each makes an optimizer, given the package and a model.
METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "MeZO": lambda pz, model: pz.MeZO(model, lr=LR),
    "MeZO, queries=4": lambda pz, model: pz.MeZO(model, lr=LR, queries=4),
    "MeZO, block=0.25": lambda pz, model: pz.MeZO(model, lr=LR, subset=pz.Block(0.25)),
    "momentum": lambda pz, model: pz.Momentum(model, lr=LR),
    "FZOO": lambda pz, model: pz.FZOO(model, lr=LR),
    "FZOO, block=0.25": lambda pz, model: pz.FZOO(model, lr=LR, subset=pz.Block(0.25)),
}
SAME_LOSS = 1e-3  # relative tolerance of the check that all systems compute the same model
PATIENCE = 30  # seconds; once a group has taken as long, three rounds are enough
TORCH_PATIENCE = 12  # seconds; once its steps have taken as long, torch skips the remaining rounds

Cell = dict[str, Any]


# ---- in the child process of one system


class UnusableError(Exception):
    """A system cannot run here; the message gives the reason."""


class System(NamedTuple):
    """A loaded system."""

    step: Callable[[], object]
    loss: float  # before the first step
    forwards: int = 2  # of a step


def start(
    system: str, shape: str, bundle: Path, batch: str, threads: int, inputs: dict[str, Any] | None = None
) -> System:
    """Load a system of this script, of memory.py, methods.py or paper.py; the last one brings its own inputs."""
    inputs = inputs or make_batch(shape, *map(int, batch.split("x")))
    if system in ("torch", "adamw"):
        import torch
        import torch_peers

        torch.set_num_threads(threads)
        method = torch_peers.MeZO if system == "torch" else torch_peers.AdamW
        theirs = method(torch, bundle, SHAPES[shape], lr=LR)
        return System(lambda: theirs.step(inputs), theirs.loss(inputs))
    if system == "forwards":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])

        def forwards() -> float:
            session.run(["loss"], inputs)
            return float(session.run(["loss"], inputs)[0])

        return System(forwards, forwards())

    import pocketzo as pz

    pz.kernels.set_threads(threads)
    prepack: bool | Literal["auto"] = system == "prepacked" if system in ("prepacked", "plain") else "auto"
    try:
        model = pz.load(bundle, threads=threads, prepack=prepack)
    except pz.Error as error:
        raise UnusableError(str(error)) from None
    loss = model.loss(inputs)
    if system == "running":
        return System(lambda: (model.loss(inputs), model.loss(inputs)), loss)
    optimizer = METHODS.get(system, METHODS["MeZO"])(pz, model)
    return System(lambda: optimizer.step(lambda m: m.loss(inputs)), loss, optimizer.forwards)


class Sampler:
    """Samples the parts of the resident memory every 10 ms, and keeps the largest sample."""

    def __init__(self) -> None:
        self.largest = status()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.wait(0.01):
            now = status()
            if now["VmRSS"] > self.largest["VmRSS"]:
                self.largest = now

    def stop(self) -> dict[str, int]:
        self.done.set()
        self.thread.join()
        return self.largest


def worker(
    system: str,
    shape: str,
    bundle: str,
    batch: str,
    threads: str,
    *,
    start: Callable[[str, str, Path, str, int], System] = start,
) -> None:
    """Take as many steps as each input line says and answer with their times; at the end, report the memory."""
    sampler = Sampler()
    began = time.perf_counter()
    try:
        step, loss, forwards = start(system, shape, Path(bundle), batch, int(threads))
    except UnusableError as error:
        print(json.dumps({"error": str(error)}))
        return
    loading = time.perf_counter() - began
    for _ in range(2):
        began = time.perf_counter()
        step()
        warm = time.perf_counter() - began
        if warm > 1:
            break
    sample = sampler.stop()
    print(json.dumps({"loading": loading, "loss": loss, "forwards": forwards, "warm": warm}), flush=True)
    for line in sys.stdin:
        seconds, cpu = [], []
        for _ in range(int(line)):
            began, used = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
        print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)
    peak = status()["VmHWM"]
    print(json.dumps({"peak": peak, "at_peak": {key: sample[key] for key in ("RssAnon", "RssFile", "RssShmem")}}))


# ---- in the parent process


class Worker:
    """A system in a child process; the seconds and the CPU time of each step, by round."""

    def __init__(self, system: str, shape: str, bundle: Path, batch: str, threads: int, script: str) -> None:
        command = [sys.executable, script, "--worker", system, shape, str(bundle), batch, str(threads)]
        self.system = system
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started: dict[str, Any] = self._answer()
        self.rounds: list[list[float]] = []
        self.cpu: list[list[float]] = []

    def measure(self, steps: int, warm: int) -> None:
        self._ask(f"{steps + warm}\n")
        answer = self._answer()
        self.rounds.append(answer["seconds"][warm:])
        self.cpu.append(answer["cpu"][warm:])

    def finish(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.close()
        answer = self._answer()
        self.process.wait()
        return answer

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.system} ended with exit code {self.process.wait()}")
        return json.loads(line)


@contextmanager
def ended(worker: Worker) -> Iterator[Worker]:
    """End the process even if a measurement fails."""
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def groups(systems: Sequence[str], weights: int) -> list[list[str]]:
    """Return which systems are loaded at the same time."""
    budget = 0.85 * available_memory()

    def held(group: Sequence[str]) -> float:
        return sum(HELD.get(system, 1.2) * weights + 4e8 for system in group)

    if held(systems) <= budget:
        return [list(systems)]
    others = [system for system in systems if system != "forwards"]
    result = []
    for system in others:
        pair = [name for name in systems if name in ("forwards", system)]
        if system != "torch" and held(pair) <= budget:
            result.append(pair)
        elif held([system]) <= budget:
            result.append([system])
        else:
            print(f"skipped: {system} needs about {held([system]) / 1e9:.0f} GB of memory", file=sys.stderr, flush=True)
    return result or [[system] for system in systems]


def measure(
    shape: str,
    bundle: Path,
    batch: str,
    systems: Sequence[str],
    *,
    threads: int = 2,
    rounds: int = 5,
    script: str = __file__,
) -> Cell:
    """Measure systems on one batch of one model; ``script`` is the file that each child process runs."""
    count, tokens = map(int, batch.split("x"))
    weights = 4 * parameters(bundle)
    rows: dict[str, Any] = {}
    reference: float | None = None
    for group in groups(systems, weights):
        with ExitStack() as stack:
            workers = [
                stack.enter_context(ended(Worker(name, shape, bundle, batch, threads, script))) for name in group
            ]
            for each in list(workers):
                if "error" in each.started:
                    print(f"skipped: {shape}, {batch}, {each.system}: {each.started['error']}", file=sys.stderr)
                    workers.remove(each)
                    continue
                loss = each.started["loss"]
                reference = loss if reference is None else reference
                if abs(loss - reference) > SAME_LOSS * abs(reference):
                    sys.exit(f"{shape}, {batch}: {each.system} starts at a loss of {loss}, the others at {reference}")
            began = time.perf_counter()
            for number in range(rounds):
                if number >= 3 and time.perf_counter() - began > PATIENCE:
                    break
                for each in workers:
                    if each.system != "torch" or sum(map(sum, each.rounds)) < TORCH_PATIENCE:
                        warm = each.started["warm"]
                        each.measure(max(1, min(20, int(0.4 / warm))), warm=int(warm < 0.5))
            forwards = next((each.rounds for each in workers if each.system == "forwards"), None)
            for each in workers:
                seconds = [value for part in each.rounds for value in part]
                row = {"system": each.system, **spread(seconds), **each.started, **each.finish()}
                if forwards is not None:
                    pairs = zip(each.rounds, forwards, strict=False)
                    row["ratio"] = spread([np.median(mine) / np.median(two) for mine, two in pairs])
                # With several groups, the forwards are measured several times; the first measurement is kept.
                rows.setdefault(each.system, row)
    return {
        "shape": shape,
        "batch": batch,
        "threads": threads,
        "parameters": weights // 4,
        "weights": weights,
        "activations": activations(bundle, count, tokens),
        "rows": [rows[system] for system in systems if system in rows],
    }


def usable(systems: Sequence[str]) -> list[str]:
    """Return the systems that can be measured here; report those that are skipped."""
    of_torch = {"torch", "adamw"} & {*systems}
    return list(systems) if not of_torch or peer("torch") else [name for name in systems if name not in of_torch]


def planned(shape: str, batch: str) -> list[str]:
    """Return the systems measured by default: running only at 8 x 64, and torch not on OPT at 1 x 16 (minutes)."""
    return [
        system
        for system in SYSTEMS
        if not (system == "running" and (batch != "8x64" or SHAPES[shape].causal))
        and not (system == "torch" and batch == "1x16" and SHAPES[shape].causal)
    ]


@contextmanager
def models_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, help="keep the prepared models in this folder (default: a temporary one)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--batches", nargs="+", metavar="BxT", help=f"default: {' '.join(BATCHES)}; OPT without the last"
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all, except those that take too long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    run = Run()
    cells = []
    systems = usable(arguments.systems or SYSTEMS)
    with models_folder(arguments.models) as folder:
        for shape in arguments.shapes:
            bundle = make_bundle(shape, folder)
            for batch in arguments.batches or (BATCHES[:2] if SHAPES[shape].causal else BATCHES):
                began = time.perf_counter()
                chosen = arguments.systems or planned(shape, batch)
                chosen = [name for name in chosen if name in systems]
                cells.append(measure(shape, bundle, batch, chosen, threads=arguments.threads, rounds=arguments.rounds))
                run.finish({"cells": cells}, arguments.json)
                took = time.perf_counter() - began
                print(f"{shape}, {batch}: measured in {took:.0f} s", file=sys.stderr, flush=True)
            if arguments.models is None:
                shutil.rmtree(bundle)
    print("\n".join(step_table(run.finish({"cells": cells}, arguments.json))))


if __name__ == "__main__":
    main()
