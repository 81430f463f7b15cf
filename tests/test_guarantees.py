"""What a run guarantees: it says beforehand what it needs, and afterwards whether it helped."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import write_tiny_onnx
from onnx import helper, numpy_helper

import pocketzo as pz
from pocketzo.formats.journal import Entry, Journal
from pocketzo.optim.methods import from_settings
from pocketzo.tasks.evaluate import Evaluation
from pocketzo.tasks.metrics import METRICS, Found
from pocketzo.train.verdict import compare_batches, compare_evaluations, compare_losses, compare_values

MOST = 12  # tokens that the model of these tests takes


def write_limited_onnx(path: Path) -> None:
    """The tiny classifier with position embeddings for 12 tokens: a longer text fails in the run."""
    write_tiny_onnx(path)
    model = onnx.load(path)
    graph = model.graph
    zeros = numpy_helper.from_array(np.zeros((MOST, 24), np.float32), "positions.weight")
    graph.initializer.extend(
        [
            zeros,
            numpy_helper.from_array(np.array(0), "zero"),
            numpy_helper.from_array(np.array(1), "step"),
            numpy_helper.from_array(np.array([1]), "second"),
        ]
    )
    before = [
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "step"], ["length"]),
        helper.make_node("Range", ["zero", "length", "step"], ["position"]),
        helper.make_node("Gather", ["positions.weight", "position"], ["position_vectors"]),
    ]
    at = next(i for i, node in enumerate(graph.node) if node.output[0] == "tokens")
    graph.node[at].output[0] = "words"
    for node in [helper.make_node("Add", ["words", "position_vectors"], ["tokens"]), *reversed(before)]:
        graph.node.insert(at + 1, node)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limited")
    write_limited_onnx(folder / "limited.onnx")
    pz.prepare(folder / "limited.onnx", folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def model(tiny_bundle: Path) -> pz.Model:
    return pz.load(tiny_bundle, threads=1, verify="fast")


@pytest.fixture
def data(tiny_data: Path, tiny_bundle: Path) -> pz.Dataset:
    return pz.load_dataset(tiny_data, pz.Bundle.read(tiny_bundle))


def ragged(path: Path, lengths: list[int]) -> Path:
    width = max(lengths)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    np.savez(path, input_ids=mask, attention_mask=mask, labels=np.arange(len(lengths)) % 3)
    return path


# ---- before the first step -------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_is_named_before_the_first_step(limited: Path, tmp_path: Path) -> None:
    model = pz.load(limited, threads=1, verify="fast")
    lengths = [5] * 20 + [MOST, 30, 5, 14]
    data = pz.load_dataset(ragged(tmp_path / "late.npz", lengths), model.bundle)
    trainer = pz.Trainer(model, pz.MeZO(model, lr=0.01), data, steps=50, batch_size=2, run=tmp_path / "run")
    message = rf"late\.npz, row 21: 30 tokens, and the model can be run on {MOST} at most \(and 1 other examples\)"
    with pytest.raises(pz.DataError, match=message):
        trainer.fit()
    assert not (tmp_path / "run").exists()
    held_out = pz.load_dataset(ragged(tmp_path / "good.npz", [5] * 4), model.bundle)
    trainer = pz.Trainer(model, pz.MeZO(model, lr=0.01), held_out, eval=data, steps=2, run=tmp_path / "run")
    with pytest.raises(pz.DataError, match=r"late\.npz, row 21"):
        trainer.fit()


def test_a_batch_that_fails_although_each_example_works_says_why(
    model: pz.Model, data: pz.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: pz.Model, batch: Any, outputs: Any = None) -> Any:
        if len(batch["input_ids"]) > 4:
            raise pz.Error("too much at once")
        return {"loss": 1.0}

    monkeypatch.setattr(pz.Model, "run", run)
    with pytest.raises(pz.Error, match="too much at once"):
        pz.Trainer(model, pz.MeZO(model, lr=0.01), data, steps=2, batch_size=8).fit()


def test_the_forecast_tries_the_longest_batch(limited: Path, tmp_path: Path) -> None:
    model = pz.load(limited, threads=1, verify="fast")
    lengths = [3, 4, MOST, 5, 11, 3]
    data = pz.load_dataset(ragged(tmp_path / "data.npz", lengths), model.bundle)
    seen: list[tuple[int, ...]] = []
    original = pz.Model.run
    trainer = pz.Trainer(model, pz.MeZO(model, lr=0.01), data, steps=1000, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:

        def run(model: pz.Model, batch: Any, outputs: Any = None) -> Any:
            seen.append(batch["input_ids"].shape)
            return original(model, batch, outputs)

        patch.setattr(pz.Model, "run", run)
        found = trainer.forecast()
    assert found is not None
    assert (2, MOST) in seen
    assert (found.examples, found.tokens, found.steps) == (2, MOST, 1000)
    assert found.forward_seconds > 0
    # 2,000 forward passes and 2,000 passes over 3,000 weights, each quicker than the longest batch took at its best.
    assert 0 < found.seconds < 1000
    assert trainer.forecast() is found


def test_weights_that_are_not_finite_are_named(tiny_bundle: Path, data: pz.Dataset, tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        model = pz.load(tiny_bundle, threads=1, verify="fast")
        dense = model.weights["dense.weight"].copy()
        dense[3, 4] = value
        model.weights["dense.weight"] = dense
        model.save(tmp_path / f"bad-{value}")
        bad = pz.load(tmp_path / f"bad-{value}", threads=1, verify="fast")
        with pytest.raises(pz.TrainingError, match=r"1 of 960 elements of weight 'dense\.weight' are not finite"):
            pz.Trainer(bad, pz.MeZO(bad, lr=0.01), data, steps=2, run=tmp_path / "run").fit()
        assert not (tmp_path / "run").exists()
        others = pz.MeZO(bad, lr=0.01, trainable="classifier")
        pz.Trainer(bad, others, data, steps=1, objective=lambda outputs, batch: 1.0).fit()


@pytest.mark.parametrize(
    ("eps", "message"), [(1e30, "would round the weights by about"), (1e-30, "would change no weight")]
)
def test_an_eps_that_ruins_or_changes_nothing_is_refused(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, eps: float, message: str
) -> None:
    before = model.weights.sha256()
    with pytest.raises(ValueError, match=message) as caught:
        pz.Trainer(model, pz.MeZO(model, lr=0.01, eps=eps), data, steps=2, run=tmp_path / "run").fit()
    assert model.weights.sha256() == before
    # What the message recommends is taken.
    limit = float(str(caught.value).rpartition(" ")[2])
    pz.Trainer(model, pz.MeZO(model, lr=0.0, eps=limit * (0.9 if eps > 1 else 1.1)), data, steps=1).fit()


# ---- after the last step ---------------------------------------------------------------------------------------------


def test_a_run_that_ruins_the_weights_says_where_the_good_ones_are(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    optimizer = pz.MeZO(model, lr=1e38, schedule=pz.Schedule("linear", steps=400, warmup=3))
    trainer = pz.Trainer(model, optimizer, data, eval=data, eval_every=1, steps=400, run=tmp_path / "run")
    with pytest.raises(pz.TrainingError, match="It was last finite in step") as caught:
        trainer.fit()
    step = int(str(caught.value).partition("--step ")[2].split()[0])
    run = pz.Run(tmp_path / "run")
    run.replay(tmp_path / "good", step=step)
    good = pz.load(tmp_path / "good", threads=1, verify="fast")
    assert math.isfinite(pz.evaluate(good, data)["loss"])
    assert run.best_step is not None
    assert run.best_step <= step + 1


def test_the_base_can_be_the_best_and_nan_never_is(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    trainer = pz.Trainer(
        model, pz.MeZO(model, lr=300.0), data, eval=data, eval_every=1, steps=8, run=tmp_path / "run", metric="loss"
    )
    trainer.fit()
    run = pz.Run(tmp_path / "run")
    assert run.best_step == 0
    run.replay(tmp_path / "best", step=0)
    assert pz.Bundle.read(tmp_path / "best").base_sha256 == model.bundle.base_sha256
    assert run.evaluations()[0]["loss"] == pytest.approx(trainer.before()["loss"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text + '{"step": 8, "eval": {"count": 120, "loss": null, "accuracy": null}}\n')
    assert pz.Run(tmp_path / "run").best_step == 0
    verdict = trainer.history.verdict()
    assert verdict is not None
    assert verdict.outcome == "worse"
    assert verdict.text.startswith("loss rose from ")
    assert verdict.advice is not None


def test_a_run_that_helps_and_one_that_does_nothing(model: pz.Model, data: pz.Dataset) -> None:
    still = pz.Trainer(model, pz.MeZO(model, lr=1e-9), data, eval=data, steps=10, eval_every=10, batch_size=12)
    still.fit()
    verdict = still.history.verdict()
    assert verdict is not None
    assert (verdict.outcome, verdict.what) == ("not moved", "accuracy")
    optimizer = pz.FZOO(model, lr=0.02, queries=8)
    good = pz.Trainer(model, optimizer, data, eval=data, steps=150, eval_every=150, batch_size=24)
    good.fit()
    verdict = good.history.verdict()
    assert verdict is not None
    assert (verdict.outcome, verdict.advice) == ("better", None)
    assert verdict.after > verdict.before + 2 * verdict.error > verdict.before


def found(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], losses: list[float]) -> Evaluation:
    whole = Found(float(np.mean(losses)), predictions, labels)
    values = {name: METRICS[name](whole) for name in ("accuracy", "loss")}
    return Evaluation(values, whole, np.array(losses), np.ones(len(losses)))


def test_the_standard_error_is_that_of_the_paired_differences() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 1000)
    first = np.where(rng.random(1000) < 0.7, labels, 1 - labels)
    second = np.where(rng.random(1000) < 0.05, labels, first)
    losses = rng.normal(1.0, 0.5, 64)
    before = found(first, labels, losses.tolist())
    after = found(second, labels, (losses - 0.01 + rng.normal(0, 0.02, 64)).tolist())
    verdict = compare_evaluations(METRICS["accuracy"], before, after)
    paired = ((second == labels).astype(float) - (first == labels)).std() / math.sqrt(1000)
    assert verdict.error == pytest.approx(paired, rel=0.2)
    verdict = compare_evaluations(METRICS["loss"], before, after)
    assert verdict.error == pytest.approx(0.02 / 8, rel=0.25)  # not 0.5 / 8
    assert verdict.outcome == "better"


def test_values_alone_are_compared_as_independent_shares() -> None:
    verdict = compare_values(METRICS["accuracy"], 0.5, 0.53, 100)
    assert verdict.error == pytest.approx(math.sqrt((0.25 + 0.2491) / 100))
    assert verdict.outcome == "not moved"
    assert compare_values(METRICS["accuracy"], 0.5, 0.9, 100).outcome == "better"
    assert compare_values(METRICS["loss"], 0.5, math.nan, 100).outcome == "worse"


def test_training_losses_are_compared_where_there_is_no_evaluation(model: pz.Model, data: pz.Dataset) -> None:
    assert compare_losses("loss", [1.0] * 19) is None
    batches = compare_batches("loss", [1.0, 2.0, 3.0, 4.0], [0.9, 1.91, 2.89, 3.9])
    assert batches.error == pytest.approx(0.00816 / 2, rel=0.01)  # that of -0.1, -0.09, -0.11, -0.1
    assert batches.outcome == "better"
    assert compare_batches("loss", [1.0, 1.1], [1e6, 9e6]).outcome == "worse"
    verdict = compare_losses("loss", [1.0, 1.1] * 10 + [0.2, 0.3] * 10)
    assert verdict is not None
    assert (verdict.outcome, verdict.what) == ("better", "training loss")
    verdict = compare_losses("loss", [1.0, 1.1] * 100 + [math.nan] * 20)
    assert verdict is not None
    assert verdict.outcome == "worse"
    trainer = pz.Trainer(model, pz.MeZO(model, lr=1e6), data, steps=400, batch_size=8)
    trainer.fit()
    assert min(trainer.history.batches[1]) > 1000 > max(trainer.history.batches[0])
    verdict = trainer.history.verdict()
    assert verdict is not None
    assert verdict.outcome == "worse"


# ---- arguments -------------------------------------------------------------------------------------------------------

WRONG_TYPES: list[Callable[[pz.Model, pz.Dataset], object]] = [
    lambda m, d: pz.MeZO(m, lr=0.1, seed=1.5),  # type: ignore[arg-type]
    lambda m, d: pz.MeZO(m, lr=0.1, seed=True),
    lambda m, d: pz.MeZO(m, lr="0.1"),  # type: ignore[arg-type]
    lambda m, d: pz.MeZO(m, lr=True),
    lambda m, d: pz.MeZO(m, lr=0.1, eps=None),  # type: ignore[arg-type]
    lambda m, d: pz.FZOO(m, lr=0.1, queries=8.0),  # type: ignore[arg-type]
    lambda m, d: pz.MeZO(m, lr=0.1, weight_decay="x"),  # type: ignore[arg-type]
    lambda m, d: pz.ParamGroup("x", lr="10"),  # type: ignore[arg-type]
    lambda m, d: pz.Schedule("linear", steps=10.5),  # type: ignore[arg-type]
    lambda m, d: pz.Block("half"),  # type: ignore[arg-type]
    lambda m, d: pz.Trainer(m, pz.MeZO(m, lr=0.1), d, steps=10.0),  # type: ignore[arg-type]
    lambda m, d: pz.Trainer(m, pz.MeZO(m, lr=0.1), d, batch_size=True),
    lambda m, d: pz.Trainer(m, pz.MeZO(m, lr=0.1), d, group_by_length=1),  # type: ignore[arg-type]
    lambda m, d: pz.evaluate(m, d, batch_size=2.5),  # type: ignore[arg-type]
    lambda m, d: pz.load(m.bundle, threads=1.0),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("make", WRONG_TYPES)
def test_an_argument_of_a_wrong_type_is_a_type_error(
    model: pz.Model, data: pz.Dataset, make: Callable[[pz.Model, pz.Dataset], object]
) -> None:
    with pytest.raises(TypeError, match="must be"):
        make(model, data)


def test_numpy_numbers_are_taken(model: pz.Model, data: pz.Dataset) -> None:
    optimizer = pz.MeZO(model, lr=np.float32(0.5), seed=np.uint64(2**63), queries=np.int32(2))  # type: ignore[arg-type]
    pz.Trainer(model, optimizer, data, steps=np.int64(2)).fit()  # type: ignore[arg-type]
    assert optimizer.step_number == 2


def test_settings_that_fit_no_optimizer_are_refused(model: pz.Model) -> None:
    settings = pz.MeZO(model, lr=0.1).settings()
    with pytest.raises(ValueError, match=r"a group's pattern must be a regular expression, got '\(': missing \)"):
        from_settings(model, {**settings, "groups": [{"pattern": "("}]})
    with pytest.raises(ValueError, match="no trainable weight 'missing'"):
        from_settings(model, {**settings, "trained": [*settings["trained"], "missing"]})
    with pytest.raises(ValueError, match="trainable must be a regular expression"):
        pz.MeZO(model, lr=0.1, trainable="(")


def test_the_last_draw_leaves_none(model: pz.Model) -> None:
    optimizer = pz.MeZO(model, lr=0.1)
    optimizer.skip([Entry(0.1, {2**64 - 2: 0.0})])
    optimizer.step(lambda model: 1.0)
    before = model.weights.sha256()
    with pytest.raises(ValueError, match="no draws are left after draw 18446744073709551615"):
        optimizer.step(lambda model: 1.0)
    assert model.weights.sha256() == before


def test_of_two_that_create_a_journal_at_once_one_is_refused(tmp_path: Path) -> None:
    for round_number in range(20):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        outcomes: list[str] = []
        start = threading.Barrier(2)

        def create(name: str, folder: Path = folder, start: Any = start, outcomes: list[str] = outcomes) -> None:
            start.wait()
            try:
                journal = Journal.create(folder / "journal.pzj", {"name": name})
            except pz.JournalError:
                outcomes.append("refused")
            else:
                outcomes.append(name)
                journal.close()

        threads = [threading.Thread(target=create, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 2
        (winner,) = set(outcomes) - {"refused"}
        assert outcomes.count("refused") == 1
        assert Journal.open(folder / "journal.pzj", write=False).header["name"] == winner
