"""The learning rate that is found before the first step (train/sweep.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pocketzo as pz
from pocketzo.optim.methods import METHODS
from pocketzo.train import trainer as trainer_module
from pocketzo.train.sweep import MOST, NOISE, Sweep, find_lr


def image(model: pz.Model) -> dict[str, bytes]:
    return {name: view.tobytes() for name, view in model.weights.items()}


def found(optimizer: pz.Optimizer, data: pz.Dataset, objective: Callable[[pz.Model], float], **options: Any) -> Sweep:
    """Find the rate for an objective of the weights alone."""
    assert isinstance(optimizer.model, pz.Model)
    model, plan = optimizer.model, {"batch_size": 8, "steps": 400, **options}
    return find_lr(optimizer, model, data, lambda batch: objective, lambda batch: objective(model), **plan)


def bowl(scale: float, curvature: float = 3.0) -> Callable[[pz.Model], float]:
    """Return a quadratic loss of all weights, whose gradient at the bundle's weights is not 0."""

    def loss(model: pz.Model) -> float:
        squares = sum(float(np.sum((np.float64(1.0) * view - 0.05) ** 2)) for view in model.weights.values())
        return scale * (1.0 + curvature / 2 * squares / 100)

    return loss


@pytest.mark.parametrize("prepack", ["auto", False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exact", [False, True])
def test_the_weights_keep_their_bits(
    tiny_bundle: Path, data: pz.Dataset, method: str, prepack: Any, exact: bool
) -> None:
    model = pz.load(tiny_bundle, threads=1, prepack=prepack)
    before = image(model)
    optimizer = METHODS[method](model, exact=exact)
    trainer = pz.Trainer(model, optimizer, data, batch_size=8, steps=200)
    told: list[tuple[int, int]] = []
    sweep = trainer.find_lr(lambda *both: told.append(both))
    assert sweep.because is None
    assert told == sorted(told)
    assert told[-1] == (sweep.forwards, 200 * optimizer.forwards // 10)
    assert image(model) == before
    assert optimizer.lr == sweep.lr
    assert (optimizer.step_number, optimizer.next_draw) == (0, 0)


@pytest.mark.filterwarnings("ignore:this processor does not compute in fp16")
def test_the_weights_keep_their_bits_in_float16(tiny_onnx: Path, tmp_path: Path, data: pz.Dataset) -> None:
    pz.prepare(tiny_onnx, tmp_path / "base", dtype="float16")
    model = pz.load(tmp_path / "base", threads=1)
    before = image(model)
    sweep = pz.Trainer(model, pz.FZOO(model, eps=1e-2), data, batch_size=8, steps=200).find_lr()
    assert sweep.because is None
    assert image(model) == before


def test_the_weights_keep_their_bits_after_an_error(tiny_bundle: Path, data: pz.Dataset) -> None:
    model = pz.load(tiny_bundle, threads=1)
    before = image(model)
    for failing in 3, 65, 70, 75:
        calls = 0

        def objective(outputs: Any, batch: Any, at: int = failing) -> float:
            nonlocal calls
            calls += 1
            if calls == at:
                raise RuntimeError("as asked")
            return float(outputs["logits"][0, 0] ** 2)

        trainer = pz.Trainer(model, pz.MeZO(model), data, batch_size=8, steps=1000, objective=objective)
        with pytest.raises(RuntimeError, match="as asked"):
            trainer.find_lr()
        assert image(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [10, 40, 100, 150, 1000])
def test_a_sweep_takes_a_tenth_of_the_forwards_at_most(
    tiny_bundle: Path, data: pz.Dataset, method: str, steps: int
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    calls = 0

    def objective(outputs: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        return float(np.square(outputs["logits"]).mean())

    optimizer = METHODS[method](model)
    sweep = pz.Trainer(model, optimizer, data, batch_size=8, steps=steps, objective=objective).find_lr()
    assert calls == sweep.forwards <= MOST * steps * optimizer.forwards
    if sweep.because is not None:
        assert (sweep.lr, calls) == (optimizer.default_lr, 0)
        assert steps * optimizer.forwards < 200
        assert "too few" in sweep.because


@pytest.mark.parametrize("schedule", [None, pz.Schedule("linear", 400), pz.Schedule("cosine", 400)])
def test_the_noise_of_the_run_costs_what_is_said(tiny_bundle: Path, data: pz.Dataset, schedule: Any) -> None:
    # sum of lr^2 g^2 z H z / 2 over the run, where H = 0.03, and g^2 is the square of the gradient
    model = pz.load(tiny_bundle, threads=1)
    loss, count = bowl(1.0), sum(view.size for view in model.weights.values())
    squares = sum(float(np.sum((np.float64(view) - 0.05) ** 2)) for view in model.weights.values()) * 0.03**2
    sweep = found(pz.MeZO(model, schedule=schedule, eps=1e-2), data, loss)
    decay = sum((schedule or pz.Schedule())(step) ** 2 for step in range(400))
    expected = math.sqrt(NOISE * loss(model) / (decay * 0.03 * count * squares / 2))
    assert sweep.noise == pytest.approx(expected, rel=0.4)  # of 32 squares of Gaussian numbers
    assert sweep.minimum == pytest.approx(1 / (0.03 * count), rel=0.6)
    assert sweep.noise is not None
    assert sweep.noise / 4 <= sweep.lr * 1.05
    assert sweep.lr <= sweep.noise
    # a linear or cosine schedule has a mean of a half, so that its peak may be the minimum itself
    share = 0.5 if schedule is None else 1.0
    assert sweep.minimum is not None
    within = min(max(share * sweep.minimum, sweep.noise / 2), sweep.noise)
    assert sweep.lr == pytest.approx(within, rel=0.05)


@pytest.mark.parametrize(("method", "power"), [("mezo", -1), ("fzoo", 0), ("momentum", 0), ("sign", 0), ("lozo", -1)])
def test_the_rate_follows_the_scale_of_the_loss(tiny_bundle: Path, data: pz.Dataset, method: str, power: int) -> None:
    model = pz.load(tiny_bundle, threads=1)
    rates = [found(METHODS[method](model, eps=1e-2), data, bowl(scale)).lr for scale in (1.0, 1024.0)]
    assert rates[1] == pytest.approx(rates[0] * 1024.0**power, rel=0.1)


@pytest.mark.parametrize(("eps", "rel"), [(1e-5, 0.1), (1e-4, 0.05), (1e-3, 0.05), (1e-1, 0.05)])
def test_the_rate_does_not_depend_on_eps(tiny_bundle: Path, data: pz.Dataset, eps: float, rel: float) -> None:
    # Where the sweep begins does; too few evaluations are left to come near the limit by a factor of 3 each. From 1e-5
    # on the rise is measured along fewer sums of steps, which is seen in the second digit.
    model = pz.load(tiny_bundle, threads=1)
    sweeps = [found(pz.MeZO(model, eps=each), data, bowl(1.0)) for each in (eps, 1e-2)]
    assert sweeps[0].noise == pytest.approx(sweeps[1].noise, rel=rel)
    assert sweeps[0].minimum == pytest.approx(sweeps[1].minimum, rel=0.1)
    assert sweeps[0].lr == pytest.approx(sweeps[1].lr, rel=0.1)


def test_the_curvature_down_the_slope_is_not_taken_for_noise(tiny_bundle: Path, data: pz.Dataset) -> None:
    """In a ravine, all steps go along it: their sum meets a curvature that the noise of each does not."""
    model = pz.load(tiny_bundle, threads=1)
    start = {name: view.astype(np.float64) for name, view in model.weights.items()}

    def ravine(model: pz.Model) -> float:
        along = sum(float(np.sum(view - start[name])) for name, view in model.weights.items())
        return 1.0 - along + 50.0 * along**2

    sweep = found(pz.MeZO(model, eps=1e-4), data, ravine)
    first, *others = (rise for rise in sweep.rises if rise is not None)
    assert len(others) >= 1
    assert all(abs(rise) < 0.5 * first for rise in others)
    low = max(lr for lr, forth, back in sweep.curve if (forth or 0.0) + (back or 0.0) < 2 * NOISE)
    # the sum of all K steps is one of K that are orthogonal, and the others stand for the rest
    assert sweep.noise is not None
    rise = (first + (sweep.steps - 1) * float(np.mean(others))) / sweep.steps
    assert sweep.noise == pytest.approx(low * math.sqrt(NOISE / rise * sweep.steps / 400), rel=0.05)
    along_the_sum_of_all = low * math.sqrt(NOISE / first * sweep.steps / 400)
    assert sweep.noise > 2 * along_the_sum_of_all


def test_a_long_run_gets_a_lower_rate(tiny_bundle: Path, data: pz.Dataset) -> None:
    model = pz.load(tiny_bundle, threads=1)
    short, long = (found(pz.FZOO(model, eps=1e-2), data, bowl(1.0), steps=steps) for steps in (200, 20_000))
    assert long.noise is not None
    assert short.noise is not None
    assert long.noise == pytest.approx(short.noise / 10, rel=0.3)


@pytest.mark.parametrize(
    ("loss", "because"),
    [
        (lambda _: 1.0, "all losses of a step were equal"),
        (lambda _: math.nan, "all losses of a step were equal, or not"),
    ],
)
def test_losses_that_say_nothing_leave_the_default(
    tiny_bundle: Path, data: pz.Dataset, loss: Callable[[pz.Model], float], because: str
) -> None:
    optimizer = pz.MeZO(pz.load(tiny_bundle, threads=1))
    sweep = found(optimizer, data, loss)
    assert sweep.lr == optimizer.default_lr
    assert because in str(sweep.because)


def test_a_loss_that_explodes_is_kept_away_from(tiny_bundle: Path, data: pz.Dataset) -> None:
    model = pz.load(tiny_bundle, threads=1)
    start = {name: np.array(view) for name, view in model.weights.items()}

    def cliff(model: pz.Model) -> float:
        moved = math.sqrt(sum(float(np.sum((model.weights[name] - view) ** 2)) for name, view in start.items()))
        return bowl(1.0)(model) if moved < 1.0 else math.inf

    sweep = found(pz.Sign(model, eps=1e-3), data, cliff)
    size = math.sqrt(sum(view.size for view in start.values()))
    assert sweep.lr * math.sqrt(400) * size < 1.0  # the random walk of the run stays before the cliff
    assert any(forth is None for _, forth, _ in sweep.curve)


def test_other_weights_than_the_bundles_are_refused(tiny_bundle: Path, data: pz.Dataset) -> None:
    model = pz.load(tiny_bundle, threads=1)
    model.weights["dense.bias"] = 1.0
    before = image(model)
    with pytest.raises(ValueError, match="the weights in memory are not those of"):
        pz.Trainer(model, pz.MeZO(model), data, batch_size=8, steps=400).find_lr()
    assert image(model) == before
    pz.Trainer(model, pz.MeZO(model, exact=True), data, batch_size=8, steps=400).find_lr()
    assert image(model) == before


def test_no_step_is_taken_without_a_rate(tiny_bundle: Path) -> None:
    optimizer = pz.MeZO(pz.load(tiny_bundle, threads=1))
    with pytest.raises(ValueError, match="lr is 'auto', and no step can be taken before a Trainer has found it"):
        optimizer.step(lambda _: 1.0)
    with pytest.raises(TypeError, match="lr must be a number or 'auto', got 'much'"):
        pz.MeZO(optimizer.model, lr="much")  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{"pace": pz.Pace(0.1, most=8)}, {"candidates": 5}, {"subset": pz.Block(0.5)}])
def test_a_sweep_with_other_ways_to_take_directions(tiny_bundle: Path, data: pz.Dataset, more: dict[str, Any]) -> None:
    model = pz.load(tiny_bundle, threads=1)
    before, calls = image(model), 0

    def objective(outputs: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        return float(np.square(outputs["logits"]).mean())

    optimizer = pz.MeZO(model, **more)
    sweep = pz.Trainer(model, optimizer, data, batch_size=8, steps=150, objective=objective).find_lr()
    assert sweep.because is None
    assert calls == sweep.forwards <= MOST * 150 * optimizer.forwards
    assert image(model) == before


def test_a_run_keeps_its_rate_and_resumes_without_a_sweep(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    whole = pz.Trainer(model, pz.FZOO(model, seed=2), data, batch_size=8, steps=50, run=tmp_path / "run")
    whole.fit()
    assert whole.sweep is not None
    assert whole.sweep.because is None
    run = pz.Run(tmp_path / "run")
    assert run.recipe.method["lr"] == whole.sweep.lr
    assert run.recipe.sweep is not None
    assert run.recipe.sweep["noise"] == whole.sweep.noise

    model = pz.load(tiny_bundle, threads=1)
    half = pz.Trainer(model, pz.FZOO(model, seed=2), data, batch_size=8, steps=50, run=tmp_path / "half")
    half.callback = lambda progress: setattr(half, "stop_requested", progress.info.step == 19)
    half.fit()
    monkeypatch.setattr(trainer_module, "find_lr", None)
    resumed = pz.Trainer.resume(tmp_path / "half", data)
    resumed.fit()
    assert image(resumed.model) == image(whole.model)
    run.replay(tmp_path / "tuned")
    assert image(pz.load(tmp_path / "tuned", threads=1)) == image(whole.model)


def test_a_given_rate_is_not_in_the_header(tiny_bundle: Path, data: pz.Dataset, tmp_path: Path) -> None:
    model = pz.load(tiny_bundle, threads=1)
    trainer = pz.Trainer(model, pz.MeZO(model, lr=1e-3), data, batch_size=8, steps=2, run=tmp_path / "run")
    trainer.fit()
    assert "sweep" not in pz.Run(tmp_path / "run").recipe.header()
    with pytest.raises(ValueError, match="taken steps already"):
        trainer.find_lr()
