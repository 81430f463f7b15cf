"""Zeroth order over kept states: the scores along a direction, and what a metric finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from graphs import MODELS

import pocketzo as pz
from pocketzo.cli import app
from pocketzo.errors import BundleError, JournalError
from pocketzo.train.head.attention import Heads, Tokens, forward
from pocketzo.train.head.choose import FOLDS
from pocketzo.train.head.run import RECORD
from pocketzo.train.head.states import States, TokenStates
from pocketzo.train.head.zeroth import Shifts, Zeroth

Array = npt.NDArray[Any]
SIZE, ROWS, LAYERS = 6, 60, (1, 2)


def problem(folder: Path, columns: int, queries: int) -> tuple[Heads, TokenStates, Array, Array]:
    """Return heads that differ by fold, states, folds, and what else is added to the scores."""
    random = np.random.default_rng(11)

    def array(*shape: int) -> npt.NDArray[np.float32]:
        return random.normal(size=shape).astype(np.float32)

    lengths = random.integers(1, 6, ROWS)
    states = TokenStates(LAYERS, (SIZE, SIZE), lengths, folder)
    real = np.arange(lengths.max()) < lengths[:, None]
    states.put(States(np.arange(ROWS), real, [array(*real.shape, SIZE) for _ in LAYERS]))
    heads = Heads(
        [array(SIZE, FOLDS + 1, columns) for _ in LAYERS],
        [array(SIZE, FOLDS + 1, queries) for _ in LAYERS],
        array(FOLDS + 1, columns),
    )
    return heads, states, np.arange(ROWS) % FOLDS, array(ROWS, FOLDS + 1, columns)


@pytest.mark.parametrize(("columns", "queries"), [(1, 1), (3, 3)])
def test_scores_are_those_of_the_shifted_heads(columns: int, queries: int, tmp_path: Path) -> None:
    heads, states, folds, others = problem(tmp_path, columns, queries)
    random = np.random.default_rng(3)
    shifts = Shifts(
        [random.normal(size=(SIZE, FOLDS + 1, queries)).astype(np.float32) for _ in LAYERS],
        random.normal(size=(FOLDS + 1, columns)).astype(np.float32),
    )
    moved, still = Zeroth(heads, others, states, LAYERS, folds).held_out(shifts)
    queries_there: list[Array] = [query + shift for query, shift in zip(heads.queries, shifts.queries, strict=True)]
    examples = np.arange(ROWS)
    numbers, starts = states.rows_of(examples)
    tokens = Tokens([states.at(layer, numbers) for layer in LAYERS], starts)
    for expected, got in ((Heads(heads.weights, queries_there, heads.bias + shifts.bias), moved), (heads, still)):
        scores = (forward(expected, tokens).scores + others)[examples, folds]
        np.testing.assert_allclose(got, scores, rtol=1e-4, atol=1e-4)


def test_a_metric_moves_what_is_wrong_and_is_judged_on_examples_that_it_has_not_seen(tmp_path: Path) -> None:
    heads, states, folds, others = problem(tmp_path, 3, 3)
    zeroth = Zeroth(heads, others, states, LAYERS, folds)
    none = Shifts([np.zeros((SIZE, FOLDS + 1, 3), np.float32) for _ in LAYERS], np.zeros((FOLDS + 1, 3), np.float32))
    labels = zeroth.held_out(none)[0].argmax(axis=1)
    heads.bias[:, 0] += 2
    zeroth = Zeroth(heads, others, states, LAYERS, folds)
    seen: set[int] = set()

    def cost(scores: Array, rows: Array) -> float:
        seen.add(len(rows))
        return float(np.mean(scores.argmax(axis=1) != labels[rows]))

    shifts = zeroth.learn(cost, 0, 400, lambda *_: None)
    after, before = (float(np.mean(scores.argmax(axis=1) == labels)) for scores in zeroth.held_out(shifts))
    assert before < 0.8
    assert after > before + 0.1
    assert seen == {ROWS, ROWS * (FOLDS - 1) // FOLDS}  # all examples, and all without a fold
    again = zeroth.learn(cost, 0, 400, lambda *_: None)
    np.testing.assert_array_equal(shifts.bias, again.bias)
    assert (shifts.bias != zeroth.learn(cost, 1, 400, lambda *_: None).bias).any()


def test_an_example_has_no_part_in_what_judges_it(tmp_path: Path) -> None:
    """Labels of a fold change the other shifts, and not its own."""
    heads, states, folds, others = problem(tmp_path, 3, 3)
    zeroth = Zeroth(heads, others, states, LAYERS, folds)
    labels = np.arange(ROWS) % 3
    found = []
    for moved in (labels, np.where(folds == 2, (labels + 1) % 3, labels)):
        found.append(
            zeroth.learn(
                lambda scores, rows, labels=moved: float(np.mean(scores.argmax(axis=1) != labels[rows])),  # type: ignore[misc]
                0,
                10,
                lambda *_: None,
            ).bias
        )
    same = (found[0] == found[1]).all(axis=1)
    assert list(same) == [False, False, True, False, False, False]


# ---- the face and the command ----------------------------------------------------------------------------------------


def examples(path: Path, rows: int = 60) -> Path:
    """Write token ids of which the first often decides between a frequent class and two rare ones."""
    random = np.random.default_rng(7)
    labels = np.minimum(np.arange(rows) % 6, 2)[::-1]
    ids = random.integers(8, 30, (rows, 6))
    ids[:, 1] = 5 + np.where(random.random(rows) < 0.3, random.integers(0, 3, rows), labels)
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
    return path


def test_the_python_face(tmp_path: Path) -> None:
    data = examples(tmp_path / "data.npz")
    base = pz.prepare(MODELS / "bert-new.onnx", tmp_path / "base", train="side-head")
    steps: list[tuple[int, int]] = []

    def told(stage: str, done: int, count: int, left: float | None) -> None:
        if stage == "zeroth order":
            steps.append((done, count))

    found = pz.train_head(base, data, tmp_path / "run", eval=data, objective="f1", steps=7, threads=1, told=told)
    assert steps == [(step, 7) for step in range(1, 8)]
    assert found.bundle.labels == ("0", "1", "2")
    by = found.fit.by_metric
    assert by is not None
    assert (by.metric.name, by.evaluations) == ("f1", 7 * 8)
    assert by.pays == (by.after > by.before)
    tuned = found.save(tmp_path / "tuned")
    read = pz.load_dataset(data, tuned)
    expected = pz.evaluate(pz.load(tuned, threads=1), read, metrics=["accuracy", "loss", "f1"])
    assert found.evaluation == pytest.approx(expected, rel=1e-4)
    with pytest.raises(JournalError):
        pz.train_head(base, data, tmp_path / "run", threads=1)
    with pytest.raises(ValueError, match="no metric 'r2'"):
        pz.train_head(base, data, tmp_path / "other", objective="r2", threads=1)
    with pytest.raises(BundleError, match="no names of classes"):
        pz.train_head(base, read, tmp_path / "other", threads=1)
    plain = pz.prepare(MODELS / "bert-new.onnx", tmp_path / "plain")
    with pytest.raises(BundleError, match="no side head"):
        pz.train_head(plain, data, tmp_path / "other", threads=1)


@pytest.mark.parametrize(("task", "metric"), [("regression", "mae"), ("multi-label", "macro-f1")])
def test_metrics_of_numbers_and_of_sets(task: str, metric: str, tmp_path: Path) -> None:
    with np.load(examples(tmp_path / "data.npz")) as file:
        arrays = dict(file)
    first = arrays["labels"]
    arrays["labels"] = {
        "regression": 10 + 4 * first.astype(np.float32),
        "multi-label": np.stack([first == 1, first > 0], axis=1).astype(np.float32),
    }[task]
    np.savez(tmp_path / "data.npz", **arrays)
    names = ["a", "b"] if task == "multi-label" else None
    base = pz.prepare(MODELS / "bert-new.onnx", tmp_path / "base", task=task, labels=names)  # type: ignore[arg-type]
    data = pz.load_dataset(tmp_path / "data.npz", base)
    found = pz.train_head(base, data, tmp_path / "run", eval=data, objective=metric, steps=20, threads=1)
    by = found.fit.by_metric
    assert by is not None
    assert np.isfinite([by.before, by.after]).all()
    tuned = found.save(tmp_path / "tuned")
    shown = pz.evaluate(pz.load(tuned, threads=1), data, metrics=[metric])
    assert found.evaluation is not None
    assert found.evaluation[metric] == pytest.approx(shown[metric], rel=1e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(examples(tmp_path / "data.npz"))
    base, run = str(tmp_path / "base"), tmp_path / "run"

    def command(*arguments: str) -> str:
        try:
            app.cli.main(arguments, standalone_mode=False)
        finally:
            captured = capsys.readouterr()
        return captured.out

    command("prepare", str(MODELS / "bert-new.onnx"), "-o", base, "--task", "classification")
    with pytest.raises(Exception, match="--steps is for training in steps"):
        command("train", base, "--data", data, "-o", str(run), "--steps", "5")
    printed = command("train", base, "--data", data, "-o", str(run), "--objective", "f1", "--steps", "5")
    assert "zeroth order, 40 evaluations of the head: f1 of held-out fifths from" in printed
    results = json.loads((run / RECORD).read_text())["results"]["zeroth_order"]
    assert (results["metric"], results["evaluations"]) == ("f1", 40)
    assert results["kept"] == (results["after"] > results["before"])
