"""What a run guarantees: it says beforehand what it needs, and afterwards whether it helped."""

from __future__ import annotations

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
    lengths = [5] * 20 + [MOST - 3, 30, 5, 14]
    data = pz.load_dataset(ragged(tmp_path / "late.npz", lengths), model.bundle)
    trainer = pz.Trainer(model, pz.MeZO(model, lr=0.01), data, steps=50, batch_size=2, run=tmp_path / "run")
    message = rf"late\.npz, row 21: 30 tokens, and the model takes at most {MOST} \(and 1 other longer than that\)"
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
    def run(self: pz.Model, batch: Any, outputs: Any = None, **_: Any) -> Any:
        if len(batch["input_ids"]) > 4:
            raise pz.Error("too much at once")
        return {"loss": 1.0}

    monkeypatch.setattr(pz.Model, "run", run)
    with pytest.raises(pz.Error, match="too much at once"):
        pz.Trainer(model, pz.MeZO(model, lr=0.01), data, steps=2, batch_size=8).fit()


# ---- after the last step ---------------------------------------------------------------------------------------------


def test_the_base_can_be_the_best_and_nan_never_is(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    trainer = pz.Trainer(
        model, pz.MeZO(model, lr=300.0), data, eval=data, eval_every=1, steps=8, run=tmp_path / "run", metric="loss"
    )
    trainer.fit()
    run = pz.Run(tmp_path / "run")
    assert run.best_step == 0
    run.replay(tmp_path / "best", step=0)
    assert pz.Bundle.read(tmp_path / "best").base_sha256 == model.bundle.base_sha256
    assert run.evaluations()[0]["loss"] == pytest.approx(pz.evaluate(pz.load(run.base()), data)["loss"], rel=1e-5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text + '{"step": 8, "eval": {"count": 120, "loss": null, "accuracy": null}}\n')
    assert pz.Run(tmp_path / "run").best_step == 0
    metrics.unlink()
    assert pz.Run(tmp_path / "run").evaluations().keys() == {0}, "the header has that of the base"


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


def test_numpy_numbers_are_taken_and_recorded(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    numbers: Any = {"lr": np.float32(0.5), "seed": np.uint64(2**63), "queries": np.int32(2)}
    group, schedule = {"eps": np.float32(2)}, {"steps": np.int64(9), "warmup": np.uint8(1)}
    parts: Any = {"groups": [pz.ParamGroup("dense", **group)], "schedule": pz.Schedule("linear", **schedule)}  # type: ignore[arg-type]
    optimizer = pz.MeZO(model, **numbers, **parts)
    pz.Trainer(model, optimizer, data, steps=np.int64(2), run=tmp_path / "run").fit()  # type: ignore[arg-type]
    assert optimizer.step_number == 2
    recipe = pz.Run(tmp_path / "run").recipe
    assert (recipe.loop.steps, recipe.method["seed"], recipe.method["groups"][0]["eps"]) == (2, 2**63, 2.0)
    pz.Run(tmp_path / "run").replay(tmp_path / "out")
    assert pz.load(tmp_path / "out", threads=1).weights.sha256() == model.weights.sha256()


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
