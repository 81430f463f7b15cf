from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sizes import full_or_small

import pocketzo as pz
from pocketzo.data.order import Data, Order
from pocketzo.formats.journal import Journal
from pocketzo.optim.methods import METHODS
from pocketzo.runtime.weights import Weights
from pocketzo.train.recipe import Recipe
from pocketzo.train.verdict import verdict, worse_than_before


def image(weights: Weights) -> bytes:
    return b"".join(weights._bytes())


def train(model: pz.Model, data: Data, run: Path | None, **options: Any) -> pz.Trainer:
    settings: dict[str, Any] = {"steps": 30, "batch_size": 8, **options}
    optimizer = settings.pop("optimizer", None) or pz.MeZO(model, lr=0.02, seed=3)
    trainer = pz.Trainer(model, optimizer, data, run=run, **settings)
    trainer.fit()
    return trainer


# ---- the order of the data -------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 50))
    lengths = draw(st.none() | st.lists(st.integers(1, 9), min_size=size, max_size=size))
    return {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "size": size,
        "batch_size": draw(st.integers(1, 70)),
        "lengths": None if lengths is None else np.array(lengths, np.int32),
    }


@given(orders(), st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_a_batch_is_a_function_of_its_arguments(arguments: dict[str, Any], steps: list[int]) -> None:
    order = Order(**arguments)
    for step in steps:
        indices = order(step)
        assert indices.shape == (arguments["batch_size"],)
        assert indices.min() >= 0
        assert indices.max() < arguments["size"]
        np.testing.assert_array_equal(indices, Order(**arguments)(step))


@given(orders())
def test_every_example_comes_once_an_epoch(arguments: dict[str, Any]) -> None:
    size, batch_size = arguments["size"], arguments["batch_size"]
    order = Order(**arguments)
    seen = np.concatenate([order(i) for i in range(math.lcm(size, batch_size) // batch_size)])
    for epoch in seen.reshape(-1, size):
        assert sorted(epoch) == list(range(size))


def test_epochs_and_seeds_differ_and_the_order_is_pinned() -> None:
    first, second = (Order(seed=1, size=100, batch_size=100)(i).tolist() for i in (0, 1))
    assert first != second
    assert first != Order(seed=2, size=100, batch_size=100)(0).tolist()
    # A journal does not hold the order, so it may never change; the noise below it is pinned by the answer file.
    z = pz.kernels.noise(100, seed=1, tensor=0xFFFFFFFF, draw=0)
    assert first == np.argsort(z, kind="stable").tolist()


def test_batches_of_similar_length_are_pinned() -> None:
    order = Order(seed=1, size=21, batch_size=2, lengths=np.arange(21) % 5)
    pairs = [order(step).tolist() for step in range(21)]
    # fmt: off
    assert pairs == [
        [13, 8], [9, 19], [5, 11], [17, 12], [10, 6], [7, 2], [0, 15], [20, 16], [18, 4], [3, 14], [1, 9],
        [18, 14], [6, 2], [0, 7], [5, 16], [3, 8], [10, 4], [12, 17], [13, 19], [1, 11], [20, 15],
    ]
    # fmt: on


def test_batches_of_similar_length_come_in_another_order_each_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    order = Order(seed=1, size=4000, batch_size=10, lengths=lengths)
    longest = np.array([lengths[order(step)].max() for step in range(800)]).reshape(2, 400)
    assert abs(np.corrcoef(longest)[0, 1]) < 0.2
    for epoch in longest:
        assert abs(np.corrcoef(epoch[1:], epoch[:-1])[0, 1]) < 0.2
    members = [{frozenset(order(step).tolist()) for step in range(at, at + 400)} for at in (0, 400)]
    assert not members[0] & members[1]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_is_recorded(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    before = pz.evaluate(model, data)
    seen: list[pz.Progress] = []
    train(model, data, tmp_path / "run", steps=300, eval=data, eval_every=100, batch_size=32, callback=seen.append)
    after = pz.evaluate(model, data)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"] + 0.2
    assert [progress.info.step for progress in seen] == list(range(300))
    assert [i + 1 for i, progress in enumerate(seen) if progress.evaluation] == [100, 200, 300]

    run = pz.Run(tmp_path / "run")
    assert run.steps == 300
    lines = run.metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 301))
    evaluations = {line["step"]: line["eval"] for line in lines if "eval" in line}
    assert run.evaluations() == evaluations
    assert list(evaluations) == [0, 100, 200, 300]
    assert evaluations[0] == pytest.approx(before, rel=1e-6)
    assert evaluations[300] == pytest.approx(after, rel=1e-6)
    assert evaluations[run.best_step]["accuracy"] == max(e["accuracy"] for e in evaluations.values())


def test_evaluation_agrees_with_a_plain_mean(model: pz.Model, data: pz.Dataset) -> None:
    everything = data.batch(np.arange(len(data)))
    logits = model.run(everything)["logits"].astype(np.float64)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    losses = -np.log(shifted / shifted.sum(-1, keepdims=True))[np.arange(len(data)), everything["labels"]]
    got = pz.evaluate(model, data, batch_size=7)
    assert got["count"] == 120
    assert got["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert got["accuracy"] == (logits.argmax(-1) == everything["labels"]).mean()


def test_the_last_batch_counts_by_its_size(model: pz.Model, data: pz.Dataset) -> None:
    assert pz.evaluate(model, data, batch_size=119)["loss"] == pytest.approx(
        pz.evaluate(model, data, batch_size=120)["loss"], rel=1e-6
    )


def test_looking_does_not_change_what_follows(tiny_bundle: Path, data: pz.Dataset, tmp_path: Path) -> None:
    def look(progress: pz.Progress) -> None:
        pz.evaluate(looked, data)
        looked.save(tmp_path / "look", overwrite=True)

    plain, looked = pz.load(tiny_bundle, threads=1), pz.load(tiny_bundle, threads=1)
    train(plain, data, None)
    train(looked, data, tmp_path / "run", eval=data, eval_every=3, snapshot_every=4, callback=look)
    assert image(plain.weights) == image(looked.weights)


def test_journal_of_a_thousand_steps_is_small_and_replays_on_any_set(
    tiny_bundle: Path, model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    train(model, data, tmp_path / "run", steps=1000, batch_size=2)
    assert (tmp_path / "run" / "journal.pzj").stat().st_size < 32_000
    names = pz.kernels.available()
    for name in names:
        pz.kernels.use(name)
        try:
            pz.Run(tmp_path / "run").replay(tmp_path / name)
        finally:
            pz.kernels.use(names[0])
        assert (tmp_path / name / "weights.safetensors").read_bytes() == image(model.weights), name
    again = pz.load(tmp_path / "scalar", threads=1)
    assert pz.evaluate(again, data) == pz.evaluate(model, data)


def test_replay_of_any_step_with_and_without_snapshot(
    tiny_bundle: Path, model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    images = [image(model.weights)]
    train(model, data, tmp_path / "run", snapshot_every=7, callback=lambda _: images.append(image(model.weights)))
    run = pz.Run(tmp_path / "run")
    names = sorted(os.fspath(path.relative_to(run.path / "snapshots")) for path in run.path.glob("snapshots/*/*"))
    assert names == ["step-00000028/snapshot.json", "step-00000028/weights.safetensors"]
    for step in (0, 1, 27, 28, 29, 30):
        run.replay(tmp_path / "out", step=step, overwrite=True)
        assert (tmp_path / "out" / "weights.safetensors").read_bytes() == images[step], step
    with pytest.raises(ValueError, match=r"step must be in 0 \.\. 30"):
        run.replay(tmp_path / "out", step=31, overwrite=True)


def test_another_base_is_refused(tiny_bundle: Path, model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    train(model, data, tmp_path / "run", steps=2)
    model.save(tmp_path / "other")
    with pytest.raises(pz.JournalError, match=r"not the weights that the run .* started from"):
        pz.Run(tmp_path / "run").replay(tmp_path / "out", bundle=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    shutil.copytree(tiny_bundle, tmp_path / "moved")
    pz.Run(tmp_path / "run").replay(tmp_path / "out", bundle=tmp_path / "moved")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == image(model.weights)


def test_other_data_is_refused(model: pz.Model, data: pz.Dataset, tiny_bundle: Path, tmp_path: Path) -> None:
    train(model, data, tmp_path / "run", steps=2)
    np.savez(tmp_path / "other.npz", input_ids=np.ones((4, 3), np.int64), labels=np.array([0, 1, 2, 0]))
    other = pz.load_dataset(tmp_path / "other.npz", pz.Bundle.read(tiny_bundle))
    with pytest.raises(pz.JournalError, match="the train data is not that of the run"):
        pz.Trainer.resume(tmp_path / "run", other)
    with pytest.raises(pz.JournalError, match="the eval data is not that of the run"):
        pz.Trainer.resume(tmp_path / "run", data, eval=data)


def test_a_resume_reads_the_metrics_once(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, data, tmp_path / "run", steps=4, eval=data, eval_every=2)
    read: list[Path] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    trainer = pz.Trainer.resume(tmp_path / "run", data, eval=data)
    trainer.fit()
    assert trainer.evaluations.keys() == {0, 2, 4}
    assert read.count(tmp_path / "run" / "metrics.jsonl") == 1


def test_a_run_is_not_overwritten(tiny_bundle: Path, model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    train(model, data, tmp_path / "run", steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(pz.JournalError, match="is there already: resume that run"):
        train(pz.load(tiny_bundle, threads=1), data, tmp_path / "run", steps=2)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_damaged_snapshot_is_passed_over(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    train(model, data, tmp_path / "run", snapshot_every=7)
    snapshot = tmp_path / "run" / "snapshots" / "step-00000028" / "weights.safetensors"
    content = bytearray(snapshot.read_bytes())
    content[-9] ^= 1
    snapshot.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000028/weights.safetensors: damaged: SHA-256 is"):
        pz.Run(tmp_path / "run").replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == image(model.weights)


def test_snapshots_of_another_run_are_not_used(tiny_bundle: Path, data: pz.Dataset, tmp_path: Path) -> None:
    for lr, snapshots in (0.1, 7), (0.02, None):
        model = pz.load(tiny_bundle, threads=1)
        train(model, data, tmp_path / f"{lr}", optimizer=pz.MeZO(model, lr=lr), snapshot_every=snapshots)
    shutil.copytree(tmp_path / "0.1" / "snapshots", tmp_path / "0.02" / "snapshots")
    with pytest.warns(UserWarning, match=r"passed over: .*snapshot\.json: run is"):
        pz.Run(tmp_path / "0.02").replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == image(model.weights)


@pytest.mark.parametrize("name", ["metrics.jsonl", "snapshots"])
def test_what_is_left_of_another_run_is_not_removed(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, name: str
) -> None:
    train(model, data, tmp_path / "run", steps=3, snapshot_every=3)
    for path in (tmp_path / "run").iterdir():
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(pz.JournalError, match=f"{name} is there already, of a run without a journal"):
        train(pz.load(model.bundle, threads=1), data, tmp_path / "run", steps=3)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_the_bundles_are_refused(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    model.weights["classifier.weight"] = 0.25
    with pytest.raises(ValueError, match="the weights in memory are not those of"):
        train(model, data, tmp_path / "run", steps=2)
    assert not (tmp_path / "run").exists()


def test_resume_does_not_build_on_weights_that_were_moved(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    train(model, data, tmp_path / "run")
    resumed = pz.Trainer.resume(tmp_path / "run", data, model=model)
    resumed.fit()
    pz.Run(tmp_path / "run").replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == image(model.weights)


def test_the_metric_is_one_that_the_graph_gives(model: pz.Model, data: pz.Dataset) -> None:
    model.bundle = dataclasses.replace(model.bundle, logits=None)
    optimizer = pz.MeZO(model, lr=0.02, seed=3)
    trainer = pz.Trainer(model, optimizer, data, eval=data, steps=90, batch_size=32, eval_every=10, patience=8)
    trainer.fit()
    assert trainer.loop.metric == "loss"
    assert optimizer.step_number == 90
    with pytest.raises(ValueError, match="no output that gives the metric 'accuracy'"):
        pz.Trainer(model, optimizer, data, eval=data, eval_every=1, patience=1, metric="accuracy")


def test_an_optimizer_of_another_model_is_refused(model: pz.Model, tiny_bundle: Path, data: pz.Dataset) -> None:
    with pytest.raises(ValueError, match="the optimizer moves the weights of another model"):
        pz.Trainer(pz.load(tiny_bundle, threads=1), pz.MeZO(model, lr=0.1), data, steps=1)


def test_tokens_without_a_label_do_not_count(tmp_path: Path) -> None:
    bundle = pz.prepare(Path(__file__).parent / "models" / "gpt2-old.onnx", tmp_path / "bundle")
    model = pz.load(bundle, threads=1)
    ids = np.random.default_rng(0).integers(1, 20, (5, 6))
    arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    arrays = {value.name: arrays[value.name] for value in bundle.inputs if value.name in arrays}
    assert bundle.logits is not None
    labels = model.run(arrays, [bundle.logits])[bundle.logits].argmax(-1)
    labels[0, 1:] = labels[3, 2:] = -100
    labels[4, 0] = (labels[4, 0] + 1) % 20
    np.savez(tmp_path / "data.npz", labels=labels, **arrays)
    data = pz.load_dataset(tmp_path / "data.npz", bundle)
    found = [pz.evaluate(model, data, batch_size=size) for size in (1, 2, 5)]
    counted = int((labels != -100).sum())
    for result in found:
        assert result["accuracy"] == pytest.approx((counted - 1) / counted)
        assert result["loss"] == pytest.approx(found[-1]["loss"], rel=1e-5)


def test_after_an_objective_that_raised_the_step_is_taken_again(
    tiny_bundle: Path, model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    whole = pz.load(tiny_bundle, threads=1)
    train(whole, data, None)
    calls = 0

    def objective(outputs: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise MemoryError("for once")
        return float(outputs["loss"])

    with pytest.raises(MemoryError, match="for once"):
        train(model, data, tmp_path / "run", objective=objective)
    assert pz.Run(tmp_path / "run").steps == 9
    resumed = pz.Trainer.resume(tmp_path / "run", data, objective=objective)
    resumed.fit()
    assert image(resumed.model.weights) == image(whole.weights)


def test_grouping_by_length_takes_padding_away_and_resumes_to_the_same_bits(tiny_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.arange(16) < rng.integers(2, 17, 500)[:, None]
    ids = rng.integers(1, 50, mask.shape)
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask.astype(int), labels=rng.integers(0, 3, 500))
    data = pz.load_dataset(tmp_path / "d.npz", pz.Bundle.read(tiny_bundle))

    def train_grouped(run: str, callback: Callable[[pz.Progress], None] | None = None) -> tuple[pz.Trainer, int]:
        model = pz.load(tiny_bundle, threads=1)
        tokens = 0

        def objective(outputs: Any, batch: Any) -> float:
            nonlocal tokens
            tokens += batch["input_ids"].size
            return float(outputs["loss"])

        settings: dict[str, Any] = {"steps": 125, "batch_size": 8, "run": tmp_path / run, "objective": objective}
        optimizer = pz.MeZO(model, lr=0.02)
        trainer = pz.Trainer(model, optimizer, data, group_by_length=run != "plain", callback=callback, **settings)
        trainer.fit()
        return trainer, tokens // 2

    whole, grouped = train_grouped("whole")
    _, plain = train_grouped("plain")
    least = 2 * int(mask.sum())  # two epochs without any padding
    assert grouped - least < 0.25 * (plain - least)

    def stop(progress: pz.Progress) -> None:
        if progress.info.step == 70:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train_grouped("stopped", stop)
    with pytest.raises(pz.JournalError, match="the run minimised a function of its caller: give it as the objective"):
        pz.Trainer.resume(tmp_path / "stopped", data)
    resumed = pz.Trainer.resume(tmp_path / "stopped", data, objective=lambda outputs, _: float(outputs["loss"]))
    assert resumed.loop.group_by_length
    resumed.fit()
    assert image(resumed.model.weights) == image(whole.model.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["loop"].pop("group_by_length"), "header.loop.group_by_length is missing"),
        (lambda header: header.update(more=1), "header has 'more', a setting that this version of PocketZO does"),
        (lambda header: header["loop"].update(steps="30"), "header.loop.steps is '30', expected int"),
        (lambda header: header["loop"].update(steps=True), "header.loop.steps is True, expected int"),
        (lambda header: header["loop"].update(patience=1.5), r"header.loop.patience is 1.5, expected int \| None"),
        (
            lambda header: header["session"].update(forward_seconds={"1": "fast"}),
            r"header.session.forward_seconds is \{'1': 'fast'\}, expected dict\[str, float\] \| None",
        ),
        (lambda header: header["loop"].update(steps=0), "header.loop: steps must be at least 1, got 0"),
        (lambda header: header.update(data=None), "header.data is None, expected an object"),
    ],
)
def test_a_header_of_another_kind_is_refused(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    train(model, data, tmp_path / "run", steps=1)
    header = Journal.open(tmp_path / "run" / "journal.pzj", write=False).header
    change(header)
    (tmp_path / "other").mkdir()
    Journal.create(tmp_path / "other" / "journal.pzj", header).close()
    with pytest.raises(pz.JournalError, match=f"other/journal.pzj: {message}"):
        pz.Run(tmp_path / "other")


def test_a_field_that_has_a_default_may_be_missing_and_a_float_may_have_no_fraction(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    train(model, data, tmp_path / "run", steps=1)
    run = pz.Run(tmp_path / "run")
    header = run.recipe.header()
    del header["data"]["source"]["before"]
    header["session"]["forward_seconds"] = {"1": 2}
    expected = dataclasses.replace(
        run.recipe, session=dataclasses.replace(run.recipe.session, forward_seconds={"1": 2})
    )
    assert Recipe.read(header, Path("journal.pzj")) == expected


def test_a_method_that_is_not_known_is_an_error_that_names_the_journal(
    model: pz.Model, data: pz.Dataset, tiny_bundle: Path, tmp_path: Path
) -> None:
    train(model, data, tmp_path / "run", steps=1)
    header = Journal.open(tmp_path / "run" / "journal.pzj", write=False).header
    header["method"]["method"] = "adam"
    (tmp_path / "other").mkdir()
    Journal.create(tmp_path / "other" / "journal.pzj", header).close()
    with pytest.raises(pz.JournalError, match=r"other/journal.pzj: header.method: .* KeyError: 'adam'"):
        pz.Run(tmp_path / "other").replay(tmp_path / "out")


class Counting(pz.MeZO):
    """Has a state from step to step that an update depends on, as momentum has."""

    method = "counting"

    def __init__(self, model: pz.Model, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.total = np.zeros(1)

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]

    def probe(self, draws: Sequence[int], lr: float) -> Any:
        coefficients = yield from super().probe(draws, lr)
        if all(map(math.isfinite, coefficients.values())):
            self.total += 1
        return {draw: value / float(self.total[0] or 1) for draw, value in coefficients.items()}


def test_a_resumed_run_has_the_state_of_its_snapshot(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "counting", Counting)
    images = []
    for name, stop in ("whole", 31), ("run", 14):
        model = pz.load(tiny_bundle, threads=1)
        trainer = pz.Trainer(
            model, Counting(model, lr=0.02), data, run=tmp_path / name, steps=30, batch_size=8, snapshot_every=7
        )

        def end(progress: pz.Progress, trainer: pz.Trainer = trainer, stop: int = stop) -> None:
            trainer.stop_requested = progress.info.step == stop - 1

        trainer.callback = end
        trainer.fit()
        images.append(image(model.weights))
    resumed = pz.Trainer.resume(tmp_path / "run", data)
    assert isinstance(resumed.optimizer, Counting)
    assert resumed.optimizer.total == 14
    resumed.fit()
    assert image(resumed.model.weights) == images[0] != images[1]
    state = tmp_path / "run" / "snapshots" / "step-00000028" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="state.safetensors: damaged"):
        pz.Run(tmp_path / "run").replay(tmp_path / "out")


def test_a_run_that_fails_in_its_first_step_leaves_no_journal(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path
) -> None:
    for fails_at, left in (0, set()), (1, {"journal.pzj", "metrics.jsonl"}):
        model = pz.load(tiny_bundle, threads=1)
        calls = iter(range(100))

        def objective(outputs: Any, batch: Any, calls: Any = calls, fails_at: int = fails_at) -> float:
            if next(calls) >= 2 * fails_at:
                raise RuntimeError("out of luck")
            return 1.0

        with pytest.raises(RuntimeError, match="out of luck"):
            train(model, data, tmp_path / f"{fails_at}", objective=objective)
        assert {path.name for path in (tmp_path / f"{fails_at}").iterdir()} == left


# ---- the next batch --------------------------------------------------------------------------------------------------


class Watched:
    """Data that notes how it is asked, and that nobody asks twice at once."""

    fingerprint = "watched"

    def __init__(self, data: pz.Dataset, fails: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.threads: set[threading.Thread] = set()
        self._data = data
        self._fails = fails
        self._alone = threading.Lock()

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, indices: Any) -> Any:
        assert self._alone.acquire(blocking=False)
        time.sleep(1e-3)
        self.asked.append(indices.tolist())
        self.threads.add(threading.current_thread())
        self._alone.release()
        if len(self.asked) == self._fails:
            raise OSError(5, "the card has gone")
        return self._data.batch(indices)


def test_the_next_batch_is_made_while_a_step_runs(model: pz.Model, data: pz.Dataset) -> None:
    watched = Watched(data)
    order = Order(seed=3, size=len(data), batch_size=8)
    calls = 0

    def objective(outputs: Any, batch: Any) -> float:
        nonlocal calls
        step, calls = calls // 2, calls + 1
        deadline = time.monotonic() + 20
        while len(watched.asked) < min(step + 3, 6):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        np.testing.assert_array_equal(batch["input_ids"], data.batch(order(step))["input_ids"])
        return float(outputs["loss"])

    before = threading.enumerate()
    train(model, watched, None, steps=5, objective=objective)
    assert calls == 10
    assert watched.asked == [list(range(8)), *(order(step).tolist() for step in range(5))]
    assert threading.enumerate() == before
    assert len(watched.threads) == 2, "that of the rehearsal, and one for all steps"


def test_data_is_asked_by_one_at_a_time(model: pz.Model, data: pz.Dataset) -> None:
    watched = Watched(data)
    train(
        model, watched, None, steps=5, eval=watched, eval_every=1, objective=lambda outputs, batch: 1.0, batch_size=120
    )
    assert len(watched.asked) == 1 + 5 + 30 * 6, "the rehearsal, the steps, and 30 batches of 4 an evaluation"


def test_a_batch_that_fails_ends_the_run_at_its_step(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    before = threading.enumerate()
    done: list[int] = []
    with pytest.raises(OSError, match="the card has gone"):
        train(
            # After the rehearsal and an evaluation of the first batch in parts of one example.
            model,
            Watched(data, fails=1 + 8 + 6),
            tmp_path / "run",
            callback=lambda progress: done.append(progress.info.step),
        )
    assert done == list(range(5))
    assert pz.Run(tmp_path / "run").steps == 5
    assert [line["step"] for line in pz.Run(tmp_path / "run").metrics()] == list(range(6))
    assert threading.enumerate() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_outlives_a_run_that_is_broken_off(
    model: pz.Model, data: pz.Dataset, error: type[BaseException]
) -> None:
    def objective(outputs: Any, batch: Any) -> float:
        raise error

    before = threading.enumerate()
    with pytest.raises(error):
        train(model, data, None, objective=objective)
    assert threading.enumerate() == before


# ---- ends that come early --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        lambda m: pz.MeZO(m, lr=0.02),
        lambda m: pz.FZOO(m, lr=0.02, queries=3),
        lambda m: pz.Momentum(m, lr=0.005, weight_decay=0.1, schedule=pz.Schedule("linear", 30)),
    ],
)
@pytest.mark.parametrize("stop", [1, 6, 7, 8, 29])
def test_resume_after_a_stop_gives_the_same_bits(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path, method: Callable[[pz.Model], pz.Optimizer], stop: int
) -> None:
    options: dict[str, Any] = {"eval": data, "eval_every": 6, "snapshot_every": 7}
    whole = pz.load(tiny_bundle, threads=1)
    train(whole, data, tmp_path / "whole", optimizer=method(whole), **options)

    stopped = pz.load(tiny_bundle, threads=1)
    trainer = pz.Trainer(
        stopped,
        method(stopped),
        data,
        run=tmp_path / "run",
        steps=30,
        batch_size=8,
        callback=lambda p: at(p),
        **options,
    )

    def at(progress: pz.Progress) -> None:
        trainer.stop_requested = progress.info.step + 1 == stop

    trainer.fit()
    assert pz.Run(tmp_path / "run").steps == stop
    resumed = pz.Trainer.resume(tmp_path / "run", data, eval=data)
    resumed.fit()
    assert image(resumed.model.weights) == image(whole.weights)
    journals = [(tmp_path / name / "journal.pzj").read_bytes() for name in ("whole", "run")]
    assert journals[0] == journals[1]

    def told(name: str) -> list[dict[str, Any]]:
        lines = pz.Run(tmp_path / name).metrics()
        for line in lines:
            line.pop("seconds", None)
        return lines

    assert told("run") == told("whole")


def test_resume_goes_on_from_a_torn_record(tiny_bundle: Path, data: pz.Dataset, tmp_path: Path) -> None:
    whole = pz.load(tiny_bundle, threads=1)
    train(whole, data, tmp_path / "run", optimizer=pz.FZOO(whole, lr=0.02, queries=3))
    path = tmp_path / "run" / "journal.pzj"
    path.write_bytes(path.read_bytes()[:-37])  # of the last step's 48
    with pytest.warns(UserWarning, match="the last 11 bytes are an incomplete entry"):
        resumed = pz.Trainer.resume(tmp_path / "run", data)
    assert resumed.optimizer.step_number == 29
    resumed.fit()
    assert image(resumed.model.weights) == image(whole.weights)


def test_patience(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    optimizer = pz.MeZO(model, lr=0.0)
    train(model, data, tmp_path / "run", optimizer=optimizer, eval=data, eval_every=2, patience=3)
    assert pz.Run(tmp_path / "run").steps == 6  # the evaluation before the first step is the best, and three follow
    assert pz.Run(tmp_path / "run").best_step == 0


def test_without_an_evaluation_no_step_is_the_best(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    train(model, data, tmp_path / "run", steps=2)
    assert pz.Run(tmp_path / "run").best_step is None


@pytest.mark.parametrize("with_journal", [True, False])
def test_a_run_that_an_update_ruined_ends_before_it(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, with_journal: bool
) -> None:
    images = [image(model.weights)]
    ruined = False

    def objective(outputs: Any, batch: Any) -> float:
        return math.nan if ruined else float(outputs["loss"])

    def ruin(progress: pz.Progress) -> None:
        nonlocal ruined
        ruined = progress.info.step + 1 >= 4
        images.append(image(model.weights))

    run = tmp_path / "run" if with_journal else None
    kept = "run now ends after step 3" if with_journal else "weights in memory are those after step 4"
    message = rf"not finite in the last 3 steps \(up to step 7\): the update of step 4 ruined the weights; the {kept}"
    with pytest.raises(pz.TrainingError, match=message):
        train(model, data, run, objective=objective, max_skipped=3, callback=ruin)
    if run is None:
        assert image(model.weights) == images[7]
        return
    assert pz.Run(run).steps == 3
    assert image(model.weights) == images[3]
    pz.Run(run).replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == images[3]
    assert [line["loss"] is None for line in pz.Run(run).metrics()] == [False] * 4 + [True] * 3


def test_losses_that_are_infinite_beside_the_weights_alone_end_the_run_and_keep_it(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    calls = 0

    def objective(outputs: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        return math.nan if 8 < calls <= 14 else float(outputs["loss"])

    with pytest.raises(pz.TrainingError, match=r"up to step 7\), though it is with weights .* Try a smaller eps"):
        train(model, data, tmp_path / "run", objective=objective, max_skipped=3)
    assert pz.Run(tmp_path / "run").steps == 7
    pz.Run(tmp_path / "run").replay(tmp_path / "out")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == image(model.weights)


def test_losses_that_were_never_finite_are_not_called_the_runs_fault(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(pz.TrainingError, match="nor is it with the weights of the bundle: there is no label"):
        train(model, data, tmp_path / "run", objective=lambda outputs, batch: math.nan, max_skipped=2)


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("lr", [1e6, 1e30, 3e38])
def test_a_learning_rate_far_too_large_is_never_silent(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, steps: int, evaluated: bool, lr: float
) -> None:
    options: dict[str, Any] = {"eval": data, "eval_every": 1} if evaluated else {}
    optimizer = pz.FZOO(model, lr=lr, seed=1)
    before = image(model.weights)
    try:
        train(model, data, tmp_path / "run", optimizer=optimizer, steps=steps, **options)
    except pz.TrainingError as error:
        assert lr == 3e38
        assert "the update of step 1 ruined the weights" in str(error)  # noqa: PT017
        assert image(model.weights) == before
        return
    run = pz.Run(tmp_path / "run")
    said = worse_than_before(run, steps)
    assert said is not None
    assert verdict(run)[-1].startswith(f"try: a tenth of the lr, --lr {lr / 10:g}")
    if lr == 3e38:
        assert evaluated
        assert steps < 40
        assert run.best_step == 0, "NaN never wins"
        assert "accuracy went from" in said
        assert "to nan" in said


def test_an_objective_without_gradient(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    def errors(outputs: Any, batch: Any) -> float:
        return float((outputs["logits"].argmax(-1) != batch["labels"]).mean())

    before = pz.evaluate(model, data)["accuracy"]
    optimizer = pz.FZOO(model, lr=0.01, eps=0.05, seed=2)
    train(model, data, None, objective=errors, optimizer=optimizer, batch_size=120, steps=100)
    assert pz.evaluate(model, data)["accuracy"] > before + 0.2


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "loss", "perplexity"])
def test_any_metric_is_an_objective_and_a_resumed_run_knows_it(
    tiny_bundle: Path, model: pz.Model, data: pz.Dataset, tmp_path: Path, name: str
) -> None:
    options: dict[str, Any] = {"objective": name, "batch_size": 120, "steps": 12, "eval": data, "eval_every": 4}

    def optimizer(model: pz.Model) -> pz.Optimizer:
        return pz.FZOO(model, lr=0.01, eps=0.05, seed=2)

    train(model, data, None, optimizer=optimizer(model), **options)
    interrupted = pz.load(tiny_bundle, threads=1)
    trainer = pz.Trainer(interrupted, optimizer(interrupted), data, run=tmp_path / "run", **options)

    def stop(progress: pz.Progress) -> None:
        trainer.stop_requested = progress.info.step == 5

    trainer.callback = stop
    trainer.fit()
    with pytest.raises(pz.JournalError, match=f"the run minimised the metric '{name}', and no function"):
        pz.Trainer.resume(tmp_path / "run", data, eval=data, objective=lambda outputs, batch: 0.0)
    resumed = pz.Trainer.resume(tmp_path / "run", data, eval=data)
    assert (resumed.loop.objective, resumed.loop.metric) == (name, "accuracy" if name == "loss" else name)
    resumed.fit()
    assert image(resumed.model.weights) == image(model.weights)
    lines = pz.Run(tmp_path / "run").metrics()
    assert all(name in line["eval"] for line in lines if "eval" in line)


def test_the_best_evaluation_is_the_lowest_where_lower_is_better(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    optimizer = pz.MeZO(model, lr=0.3, seed=3)  # too large: the loss rises again
    trainer = train(
        model,
        data,
        tmp_path / "run",
        optimizer=optimizer,
        eval=data,
        eval_every=1,
        steps=60,
        metric="perplexity",
        patience=5,
    )
    run = pz.Run(tmp_path / "run")
    found = {step: float(values["perplexity"] or 0) for step, values in run.evaluations().items()}
    assert run.best_step is not None
    assert found[run.best_step] == min(found.values())
    assert run.steps == run.best_step + 5 < trainer.loop.steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "recall"}, "metric must be one of accuracy, f1, matthews, .*, got 'recall'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"metric": "recall"}, "metric must be one of accuracy, f1, matthews, .*, got 'recall'"),
        ({"patience": 2}, "patience needs eval and eval_every"),
        ({"group_by_length": True}, "group_by_length needs train.lengths"),
    ],
)
def test_bad_settings(model: pz.Model, data: pz.Dataset, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model, Watched(data), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 9.5},
        {"steps": True},
        {"batch_size": "8"},
        {"eval_every": 1.0},
        {"snapshot_every": True},
        {"max_skipped": None},
        {"group_by_length": 1},
    ],
    ids=lambda options: f"{options}",
)
def test_settings_of_the_wrong_type(model: pz.Model, data: pz.Dataset, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be (an int|a bool), got"):
        train(model, data, None, **options)
    with pytest.raises(TypeError, match=r"batch_size must be an int, got 2\.5"):
        pz.evaluate(model, data, batch_size=2.5)  # type: ignore[arg-type]


# ---- killed ----------------------------------------------------------------------------------------------------------

WORKER = """
import sys
import time
import pocketzo as pz
bundle, data, run, steps, last = sys.argv[1:]
from pathlib import Path
train = pz.load_dataset(data, pz.Bundle.read(bundle))
if (Path(run) / "journal.pzj").exists():
    trainer = pz.Trainer.resume(run, train, eval=train)
else:
    model = pz.load(bundle, threads=1)
    optimizer = pz.FZOO(model, lr=0.003, seed=9, queries=3)
    trainer = pz.Trainer(
        model, optimizer, train, eval=train, run=run, steps=int(steps), batch_size=8, eval_every=50, snapshot_every=70
    )
def wait_to_be_killed(progress):
    while progress.info.step + 1 == int(last) < int(steps):
        time.sleep(1)
trainer.callback = wait_to_be_killed
print("training", flush=True)
trainer.fit()
trainer.model.save(Path(run) / "tuned")
"""


def test_killed_again_and_again_and_resumed_the_bits_are_the_same(
    tiny_bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    steps, kills = full_or_small((3000, 20), (300, 3))

    def command(run: str, last: int = steps) -> list[str]:
        arguments = map(os.fspath, (tiny_bundle, tiny_data, tmp_path / run))
        return [sys.executable, "-W", "ignore", "-c", WORKER, *arguments, str(steps), str(last)]

    subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL)
    journal = tmp_path / "run" / "journal.pzj"
    header = (tmp_path / "whole" / "journal.pzj").stat().st_size - 48 * steps
    seed = int(os.environ.get("POCKETZO_KILL_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"POCKETZO_KILL_SEED={seed}")  # for when and at which steps it is killed
    rng = np.random.default_rng(seed)

    def recorded() -> int:
        return (journal.stat().st_size - header) // 48 if journal.exists() else 0

    for kill in range(kills):
        # where this life waits for its end, so that there is something left to the next
        last = (kill + 1) * steps // (kills + 1)
        enough, delay = rng.integers(max(kill - 1, 0) * steps // (kills + 1), last + 1), rng.uniform(0, 0.5)
        with subprocess.Popen(command("run", last), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if kill % 3 == 2:  # now and then it dies while it loads or replays
                time.sleep(delay)
            else:
                process.stdout.readline()
                while recorded() < enough:
                    time.sleep(0.001)
                time.sleep(delay / 250)  # so that it is killed at any point of a step
            print(f"kill {kill}: {delay:.3f} s after the start" if kill % 3 == 2 else f"kill {kill}: at step {enough}")
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    assert 0 < pz.Run(tmp_path / "run").steps < steps
    subprocess.run(command("run"), check=True, stdout=subprocess.DEVNULL)
    whole, killed = ((tmp_path / name / "tuned" / "weights.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == killed
    evaluations = [
        [
            line
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "eval" in line
        ]
        for name in ("whole", "run")
    ]
    assert evaluations[0] == evaluations[1]
    assert pz.Run(tmp_path / "run").steps == steps


def test_a_run_killed_before_its_first_evaluation_was_written_repeats_it(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    train(model, data, tmp_path / "whole", eval=data, steps=2)
    header = Journal.open(tmp_path / "whole" / "journal.pzj", write=False).header
    (tmp_path / "killed").mkdir()
    Journal.create(tmp_path / "killed" / "journal.pzj", header).close()
    pz.Trainer.resume(tmp_path / "killed", data, eval=data).fit()
    whole, killed = (
        [line for line in pz.Run(tmp_path / name).metrics() if "eval" in line] for name in ("whole", "killed")
    )
    assert [line["step"] for line in killed] == [0, 2]
    assert killed == whole
