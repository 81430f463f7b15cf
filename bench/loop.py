"""Time that the training loop itself takes per step: all of it runs except forwards and noise passes.

    python bench/loop.py [--models DIR] [--steps 3000] [--json FILE]

Batches have 32 rows of 4 to 64 tokens; the journal and metrics.jsonl are written. The target is under 1 ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from machine import Run, spread
from models import make_bundle
from numpy.typing import NDArray
from step import models_folder
from tables import loop_table

import pocketzo as pz
from pocketzo import _core
from pocketzo.tasks.objective import Objective

METHODS = {"mezo": pz.MeZO, "fzoo": pz.FZOO}
GROUPS = {"1 part": {}, "4 parts": {"groups": [pz.ParamGroup("classifier", lr=10, eps=10)], "weight_decay": 0.1}}
JOURNAL_STEPS = 1000  # of the run whose journal size the README quotes


class Idle(Objective):
    """Losses without forward passes, which differ."""

    calls: ClassVar[int] = 0

    def __call__(self, model: pz.Model, batch: Mapping[str, NDArray[Any]]) -> float:
        Idle.calls += 1
        return 1.0 + 1e-3 * (Idle.calls % 7)


def measure(model: pz.Model, data: pz.Dataset, method: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train without forwards and noise passes; return the spread of the seconds per step, and the journal's bytes."""
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = pz.Trainer(
            model,
            METHODS[method](model, lr=1e-5, **settings),
            data,
            steps=steps,
            batch_size=32,
            run=Path(folder, "run"),
            callback=lambda _: ticks.append(time.perf_counter()),
        )
        trainer.objective = Idle(trainer.objective.function, trainer.objective.task)
        trainer.fit()
        (journal,) = Path(folder, "run").glob("journal*")
        size = journal.stat().st_size
    return {**spread(np.diff(ticks).tolist()), "steps": steps, "journal": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="keep the prepared model in this folder (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    run = Run()
    rng = np.random.default_rng(0)
    mask = (np.arange(64) < rng.integers(4, 64, 10_000)[:, None]).astype(np.int64)
    rows = []
    with models_folder(arguments.models) as folder, tempfile.TemporaryDirectory() as examples:
        model = pz.load(make_bundle("minilm", folder), verify="fast")
        np.savez(
            Path(examples, "data.npz"),
            input_ids=rng.integers(1, 50, mask.shape),
            attention_mask=mask,
            token_type_ids=np.zeros_like(mask),
            labels=rng.integers(0, 2, len(mask)),
        )
        data = pz.load_dataset(Path(examples, "data.npz"), model.bundle)
        _core.Segments.apply = lambda self, terms: None  # type: ignore[method-assign]
        for method in METHODS:
            for parts, settings in GROUPS.items():
                rows.append(
                    {"method": method, "parts": parts, **measure(model, data, method, settings, arguments.steps)}
                )
        journal = measure(model, data, "mezo", {}, JOURNAL_STEPS)["journal"]
    results = {"rows": rows, "journal": {"method": "mezo", "steps": JOURNAL_STEPS, "bytes": journal}}
    print("\n".join(loop_table(run.finish(results, arguments.json))))


if __name__ == "__main__":
    main()
