"""The mean of the weights over the last steps of a run, replayed from its journal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pocketzo as pz

METHODS: dict[str, Callable[[pz.Model], pz.Optimizer]] = {
    "mezo": lambda m: pz.MeZO(m, lr=0.01, queries=2, groups=[pz.ParamGroup("classifier", lr=5, eps=2)]),
    "decay": lambda m: pz.MeZO(m, lr=0.01, weight_decay=0.1, exact=True),
    "fzoo": lambda m: pz.FZOO(m, lr=0.01, queries=3, schedule=pz.Schedule("linear", 20)),
    "momentum": lambda m: pz.Momentum(m, lr=0.01),
    "lozo": lambda m: pz.LOZO(m, lr=0.01, interval=3),
    "sign": lambda m: pz.Sign(m, lr=0.01, subset=pz.Block(0.5)),
}
STEPS = 20


def run_of(
    make: Callable[[pz.Model], pz.Optimizer], bundle: Path, data: pz.Dataset, path: Path, **options: Any
) -> list[dict[str, Any]]:
    """Train, and return the weights after each step."""
    model = pz.load(bundle, threads=1)
    seen = [dict(model.weights)]
    trainer = pz.Trainer(model, make(model), data, batch_size=8, steps=STEPS, run=path, **options)
    trainer.callback = lambda _: seen.append(dict(model.weights))
    trainer.fit()
    return seen


def replayed(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    pz.Run(path).replay(out, **options)
    return pz.Bundle.read(out).map_tensors()


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_mean_of_the_weights_after_each_step(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path, method: str
) -> None:
    seen = run_of(METHODS[method], tiny_bundle, data, tmp_path / "run", snapshot_every=18)
    for step, average, first in ((20, 0.5, 11), (20, 1.0, 1), (20, 0.01, 20), (16, 0.25, 13), (19, 0.1, 18)):
        found = replayed(tmp_path / "run", tmp_path / "out", step=step, average=average)
        for name, values in found.items():
            mean = np.mean([weights[name] for weights in seen[first : step + 1]], axis=0, dtype=np.float64)
            size = np.abs(seen[step][name] - seen[first - 1][name]).max()
            np.testing.assert_allclose(values, mean, atol=max(2e-6, 0.003 * size), err_msg=f"{name} {average}")
            if average > 0.1:
                assert np.abs(seen[step][name] - mean).max() > 0.003 * size  # the last weights would not pass


@pytest.mark.parametrize("method", METHODS)
def test_its_bits_do_not_depend_on_instruction_set_or_snapshot(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path, method: str
) -> None:
    run = tmp_path / "run"
    run_of(METHODS[method], tiny_bundle, data, run, snapshot_every=9)
    images = set()
    for isa in pz.kernels.available():
        for with_snapshot in (True, False):
            if not with_snapshot:
                shutil.rmtree(run / "snapshots", ignore_errors=True)
            try:
                pz.kernels.use(isa)
                found = replayed(run, tmp_path / "out", average=0.1)
            finally:
                pz.kernels.use(pz.kernels.available()[0])
            images.add(b"".join(values.tobytes() for values in found.values()))
    model = pz.load(tiny_bundle, threads=1)
    pz.Run(run).replay_onto(model, average=0.1)  # prepacked
    images.add(b"".join(model.weights[name].tobytes() for name in found))
    assert len(images) == 1


@pytest.mark.parametrize("average", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_is_more_than_0_and_at_most_1(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path, average: float
) -> None:
    run_of(METHODS["mezo"], tiny_bundle, data, tmp_path / "run")
    with pytest.raises(ValueError, match="average must be"):
        pz.Run(tmp_path / "run").replay(tmp_path / "out", average=average)
    assert not (tmp_path / "out").exists()
