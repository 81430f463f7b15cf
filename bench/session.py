"""Effect of each session option on a step, and of running a noise pass and a forward at the same time.

    python bench/session.py [--models DIR] [--shapes bert-base] [--batches 1x16 8x64] [--rounds 4] [--json FILE]

Each variant changes one of PocketZO's settings, in a process of its own, and takes MeZO steps in turn with the others,
as in step.py. At the end a forward and a noise pass over all weights run at the same time.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import step
from machine import Run
from models import SHAPES, make_batch, make_bundle
from tables import session_table

SPIN, STOP = "session.intra_op.allow_spinning", "session.force_spinning_stop"
VARIANTS: dict[str, dict[str, Any]] = {
    "PocketZO's settings": {},
    "threads do not spin": {"entries": {SPIN: "0"}},
    "threads spin on after a run": {"entries": {STOP: "0"}},
    "no arena": {"options": {"enable_cpu_mem_arena": False}},
    "memory planned by shape": {"options": {"enable_mem_pattern": True}},
    "graph optimisation: extended": {"level": "ORT_ENABLE_EXTENDED"},
    "graph optimisation: basic": {"level": "ORT_ENABLE_BASIC"},
    "denormals are zero": {"entries": {"session.set_denormal_as_zero": "1"}},
    "one thread for the session": {"threads": 1},
    "plain layout": {"system": "plain"},
    "plain layout, one thread for the session": {"system": "plain", "threads": 1},
}


def worker(variant: str, shape: str, bundle: str, batch: str, threads: str) -> None:
    import onnxruntime as ort

    from pocketzo.runtime import load, session
    from pocketzo.runtime.loader import Loader

    change = VARIANTS.get(variant, {"system": variant})
    session._OPTIONS.update(change.get("options", {}))
    session._ENTRIES.update(change.get("entries", {}))
    if "level" in change:
        session._LEVEL = getattr(ort.GraphOptimizationLevel, change["level"])
    if "threads" in change:

        def fewer(*arguments: Any, **settings: Any) -> Loader:
            return Loader(*arguments, **{**settings, "threads": change["threads"]})

        load.Loader = fewer  # type: ignore[assignment,attr-defined]  # the kernels keep their threads
    step.worker(change.get("system", "prepacked"), shape, bundle, batch, threads)


def overlap(shape: str, bundle: Path, batch: str, threads: int, rounds: int) -> dict[str, Any]:
    """Time a forward, a noise pass over the same weights, and both at once; return the medians of all rounds."""
    import pocketzo as pz

    pz.kernels.set_threads(threads)
    model = pz.load(bundle, threads=threads, verify="fast")
    optimizer = pz.MeZO(model, lr=0, eps=1e-6)
    inputs = make_batch(shape, *map(int, batch.split("x")))

    def forward() -> None:
        model.loss(inputs)

    def noise() -> None:
        optimizer._move(optimizer._parts, {}, {0: 1.0})

    def both() -> None:
        thread = threading.Thread(target=noise)
        thread.start()
        forward()
        thread.join()

    def timed(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    timed(both)
    times = np.median([[timed(work) for work in (forward, noise, both)] for _ in range(5 * rounds)], axis=0).tolist()
    return {"batch": batch, **dict(zip(("forward", "pass", "both"), times, strict=True))}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, help="keep the prepared models in this folder (default: a temporary one)"
    )
    parser.add_argument("--shapes", choices=SHAPES, default="bert-base")
    parser.add_argument("--batches", nargs="+", metavar="BxT", default=["1x16", "8x64"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    run = Run()
    shape, systems = arguments.shapes, ["forwards", *VARIANTS]
    plan: dict[str, Any] = {"threads": arguments.threads, "rounds": arguments.rounds}
    with step.models_folder(arguments.models) as folder:
        bundle = make_bundle(shape, folder)
        cells = [step.measure(shape, bundle, batch, systems, script=__file__, **plan) for batch in arguments.batches]
        together = [overlap(shape, bundle, batch, **plan) for batch in arguments.batches]
    print("\n".join(session_table(run.finish({"cells": cells, "overlap": together}, arguments.json))))


if __name__ == "__main__":
    main()
