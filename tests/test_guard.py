"""A run whose training loss rises clearly ends, and keeps all of its steps (train/guard.py)."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.train.guard import Guard, Rise


def guard(losses: object, steps: int | None = None) -> Guard:
    array = np.asarray(losses, float)
    found = Guard(len(array) if steps is None else steps)
    for step, loss in enumerate(array, 1):
        found.add(step, float(loss))
    return found


def test_a_clear_rise_is_described() -> None:
    losses = np.r_[np.full(40, 2.0), np.full(40, 1.0), np.full(40, 1.8)] + np.tile([0.01, -0.01], 60)
    rise = guard(losses, 120).rise
    assert rise is not None
    assert (rise.best, rise.now) == pytest.approx((1.0, 1.8))
    assert (rise.best_step, rise.step, rise.window) == (60, 120, 20)
    assert rise.error == pytest.approx(0.01 * (2 / 19) ** 0.5)
    windows = "from 1 (mean of steps 41 to 60) to 1.8 (steps 101 to 120)"
    assert rise.text("loss") == f"the training loss rose {windows}, with a standard error of 0.0032"


@pytest.mark.parametrize(
    ("last", "noise"),
    [
        (1.4, 0.01),  # less than half of what was gained
        (1.8, 1.5),  # within five standard errors
        (1.04, 0.0),  # less than 5 %, and the first window is the best
    ],
)
def test_less_than_that_is_none(last: float, noise: float) -> None:
    first = 1.0 if last < 1.1 else 2.0
    losses = np.r_[np.full(40, first), np.full(40, 1.0), np.full(40, last)] + noise * np.tile([1, -1], 60)
    assert guard(losses, 120).rise is None


def test_noise_alone_ends_no_run() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = Guard(1000)
        for step, loss in enumerate(rng.lognormal(0.0, 1.0, 1000), 1):
            found.add(step, loss)
            assert found.rise is None, seed


def test_losses_that_are_not_finite_count_for_nothing() -> None:
    losses = np.r_[np.full(40, 1.0), np.full(20, np.nan), np.full(20, 3.0)]
    losses[[5, 65, 70]] = np.inf
    found = guard(losses, 80)
    assert found.rise is not None
    assert found.rise.now == 3.0
    assert guard(losses[:60], 80).rise is None


def test_lines_of_a_run_count_as_its_steps() -> None:
    losses = np.r_[np.full(40, 1.0), np.full(40, 2.0)]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses.tolist(), 1)]
    assert Guard(80, [{"step": 0, "eval": {}}, *lines, {"step": 80, "sample": {}}]).rise == guard(losses, 80).rise
    assert Guard(80, [{"step": 3, "loss": None}, {"step": 20, "loss": "bad"}]).rise is None


# ---- runs ------------------------------------------------------------------------------------------------------------


def train(bundle: Path, data: Path, run: Path, *more: str, lr: str = "0.3") -> list[str]:
    words = ["train", str(bundle), "--data", str(data), "-o", str(run), "--steps", "400", "--lr", lr, "--threads", "1"]
    own = ["--batch-size", "32", "--schedule", "constant"]
    result = CliRunner().invoke(cli, [*words, *own, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def test_a_rate_that_ruins_a_run_ends_it(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lines = train(tiny_bundle, tiny_data, run)
    past = pz.Run(run)
    assert past.steps < 400
    assert past.steps % 20 == 0
    at = next(number for number, line in enumerate(lines) if line.startswith("ended after step"))
    assert lines[at].startswith(f"ended after step {past.steps} of 400: the training loss rose from ")
    assert lines[at].endswith(f"; to go on all the same: pocketzo train --resume {run} --no-guard")
    assert sum(line.startswith(("try: a tenth of the lr", "try: a third of the lr, --lr 0.1")) for line in lines) == 1
    step = int(shlex.split(lines[-1])[-1])
    assert lines[-1].endswith(f"pocketzo replay {run} -o tuned --step {step}")
    past.replay(tmp_path / "tuned", step=step)
    # Resuming it ends it at once, unless it is told to go on; all steps replay to the bits of the weights in memory.
    trainer = pz.Trainer.resume(run, pz.load_dataset(tiny_data, pz.Bundle.read(tiny_bundle)))
    trainer.guarded = True
    trainer.fit()
    assert isinstance(trainer.rise, Rise)
    assert trainer.optimizer.step_number == past.steps
    result = CliRunner().invoke(cli, ["train", "--resume", str(run), "--no-guard"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "ended after" not in result.stdout
    assert pz.Run(run).steps == 400


def test_a_run_without_guard_goes_on(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_bundle, tiny_data, tmp_path / "run", "--no-guard")
    assert pz.Run(tmp_path / "run").steps == 400


def test_a_good_rate_is_not_ended(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    lines = train(tiny_bundle, tiny_data, tmp_path / "run", lr="0.01")
    assert pz.Run(tmp_path / "run").steps == 400
    assert not any(line.startswith("ended") for line in lines)


def test_a_killed_run_ends_where_it_would_have(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    bundle = pz.Bundle.read(tiny_bundle)
    data = pz.load_dataset(tiny_data, bundle)

    def trainer(run: Path) -> pz.Trainer:
        model = pz.load(bundle, threads=1)
        made = pz.Trainer(model, pz.FZOO(model, lr=0.3), data, steps=400, run=run)
        made.guarded = True
        return made

    whole = trainer(tmp_path / "whole")
    whole.fit()
    first = trainer(tmp_path / "parts")

    def stop(progress: pz.Progress) -> None:
        first.stop_requested = progress.info.step == whole.optimizer.step_number - 7

    first.callback = stop
    first.fit()
    again = pz.Trainer.resume(tmp_path / "parts", data)
    again.guarded = True
    again.fit()
    assert again.optimizer.step_number == whole.optimizer.step_number < 400
    assert again.rise == whole.rise
