"""A model in stages, as processes of Ray on this machine, against the same model in one process.

    python bench/pipeline.py BUNDLE ... [--stages 2 3] [--batch 16x64] [--queries 4] [--microbatches 1] [--rounds 3]
        [--json FILE]

Each stage has one thread, and so has the one process. Both are actors of one Ray cluster and take turns in each round,
over the same batch of random tokens; a round is a step of MeZO, with its update. Reported are the largest difference
of the outputs, whether the losses of all steps are the same, the largest memory of each process, and the seconds of a
step, as medians of the rounds. Stages can be quicker than one process only where as many cores are free. A row is in
the file as soon as it is measured: stopped, the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from cut import batch_of
from machine import Rows, Run

import pocketzo as pz
from pocketzo.machine.memory import process_memory
from pocketzo.pipeline.actors import Actors
from pocketzo.pipeline.chain import busy, chain_of, pooled_model
from pocketzo.pipeline.layout import RAY, stage_memory
from pocketzo.pipeline.optimizer import pooled_method
from pocketzo.pipeline.split import split
from pocketzo.runtime.stages import plan_stages
from pocketzo.tasks.objective import Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of

SETTINGS: dict[str, Any] = {"lr": 1e-7, "eps": 1e-3}


class One:
    """The whole model in a process."""

    def load(self, bundle: str) -> None:
        self._model = pz.load(bundle, threads=1)

    def begin(self, queries: int) -> None:
        self._model.weights.read()
        self._optimizer = pz.MeZO(self._model, queries=queries, **SETTINGS)

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._model.run(batch)

    def step(self, batch: dict[str, Any]) -> tuple[float, ...]:
        return self._optimizer.step(objective(self._model.bundle, batch)).losses

    def peak(self) -> int | None:
        return process_memory()[1]


def objective(bundle: pz.Bundle, batch: dict[str, Any]) -> OnBatch:
    return OnBatch(Objective(metric_objective("loss", bundle), task_of(bundle)), batch, 1)


def measure(bundle: pz.Bundle, count: int, shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    batch = batch_of(bundle, *shape)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [round(stage.weights_nbytes / 1e6, 1) for stage in split(bundle, folder, count)]
        with Actors(folder, count, threads=[1] * count) as workers:
            model = pooled_model(bundle, workers)
            one: Any = ray.remote(One).options(num_cpus=0).remote()
            ray.get(one.load.remote(str(bundle.path)))
            expected, got = ray.get(one.run.remote(batch)), model.run(batch)
            off = {name: float(np.abs(got[name] - values).max()) for name, values in expected.items()}
            ray.get(one.begin.remote(arguments.queries))
            optimizer = pooled_method("mezo")(
                model, queries=arguments.queries, microbatches=arguments.microbatches, **SETTINGS
            )
            alone: list[float] = []
            pooled: list[float] = []
            same = True
            for _ in range(arguments.rounds):
                started = time.perf_counter()
                losses = ray.get(one.step.remote(batch))
                alone.append(time.perf_counter() - started)
                started = time.perf_counter()
                found = optimizer.step(objective(bundle, batch)).losses
                for end in chain_of(model).every("process"):  # the updates are taken, too
                    chain_of(model).result(end)
                pooled.append(time.perf_counter() - started)
                same = same and found == losses
            peaks = [chain_of(model).result(call) for call in chain_of(model).every("peak")]
            peak = ray.get(one.peak.remote())
    passes = optimizer.forwards * arguments.microbatches
    plans = plan_stages(bundle, count)
    predicted = [stage_memory(bundle, plan, *shape, shape[0]) + RAY.process for plan in plans]
    return {
        "bundle": bundle.path.name,
        "stages": count,
        "batch": f"{shape[0]}x{shape[1]}",
        "passes": passes,
        "largest difference": off,
        "losses of all steps the same": same,
        "weights MB": sizes,
        "peak MB of each stage": [round(peak / 1e6, 1) for peak in peaks],
        "predicted MB": [round(nbytes / 1e6, 1) for nbytes in predicted],
        "peak MB of one process": round(peak / 1e6, 1),
        "seconds a step, one process": round(statistics.median(alone), 3),
        "seconds a step, pipeline": round(statistics.median(pooled), 3),
        "ratio": round(statistics.median(alone) / statistics.median(pooled), 2),
        "ratio with free cores": round(count * busy(count, passes), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--batch", default="16x64")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, tokens = map(int, arguments.batch.split("x"))
    settings = {name: getattr(arguments, name) for name in ("batch", "queries", "microbatches", "rounds")}
    found = Rows(Run(), arguments.json, settings)
    for path in arguments.bundles:
        bundle = pz.Bundle.read(path)
        for count in arguments.stages:
            if not found.has(bundle=bundle.path.name, stages=count):
                found.add(measure(bundle, count, (rows, tokens), arguments))
    for row in found.rows:
        for name, value in row.items():
            print(f"{name}: {value}")
        print()


if __name__ == "__main__":
    main()
