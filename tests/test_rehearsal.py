from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOCABULARY
from graphs import model_of, node, weight
from onnx import TensorProto, numpy_helper

import pocketzo as pz
from pocketzo.train.rehearsal import Rehearsal, largest_batches, pass_seconds

LENGTH = 32  # that bert-old's table of positions has
WORDS = 20  # that bert-old's table of tokens has at least


class Rows:
    """Data of some lengths, which notes what it is asked."""

    fingerprint = "rows"

    def __init__(self, lengths: list[int], extremes: list[int] | None = None) -> None:
        self.lengths = np.array(lengths, np.int32)
        if extremes is not None:
            self.extremes = lambda: extremes

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Any) -> dict[str, Any]:
        width = int(self.lengths[indices].max())
        return {"input_ids": np.ones((len(indices), width), np.int64)}


def npz(path: Path, lengths: list[int], ids: Mapping[int, int] = {}) -> Path:
    """Write examples of some lengths, all of token 1, but for the last token of some."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = mask.astype(np.int64)
    for row, token in ids.items():
        tokens[row, lengths[row] - 1] = token
    np.savez(path, input_ids=tokens, attention_mask=mask.astype(np.int64), labels=np.arange(len(lengths)) % 2)
    return path


@pytest.fixture
def bert(bundles: Callable[[str], pz.Bundle]) -> pz.Model:
    return pz.load(bundles("bert-old"), threads=1)


def trainer(model: pz.Model, data: Any, **options: Any) -> pz.Trainer:
    optimizer = pz.MeZO(model, lr=0.01, seed=3)
    return pz.Trainer(model, optimizer, data, **{"batch_size": 4, "steps": 8, **options})


# ---- the largest batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "extremes", "size", "expected"),
    [
        ([3, 9, 5, 9, 7], None, 3, [[1, 3, 4]]),
        ([3, 9, 5, 9, 7], [0, 2], 3, [[1, 0, 2]]),
        ([3, 9, 5, 9, 7], [0, 2, 0], 2, [[1, 0], [2, 3]]),
        ([3, 9], [0], 5, [[1, 0, 1, 0, 1]]),
        ([4, 4, 4], [2, 1], 1, [[0], [2], [1]]),
    ],
)
def test_the_largest_batch_has_the_longest_and_the_extreme_examples(
    lengths: list[int], extremes: list[int] | None, size: int, expected: list[list[int]]
) -> None:
    assert [indices.tolist() for indices in largest_batches(Rows(lengths, extremes), size)] == expected


def test_extremes_of_a_dataset(tmp_path: Path, tiny_bundle: Path) -> None:
    path = npz(tmp_path / "data.npz", [3, 5, 2, 4], {0: 7, 3: 9})
    data = pz.load_dataset(path, pz.Bundle.read(tiny_bundle))
    assert sorted(set(data.extremes())) == [1, 3]  # the first label 1, and token 9
    assert data.where(2) == f"{path}, row 2"


def test_time_is_interpolated_between_the_usual_batch_and_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def forward(batch: Any) -> None:
        clock[0] += 1.0 + 0.5 * batch["input_ids"].shape[1]

    monkeypatch.setattr("pocketzo.train.rehearsal.time.perf_counter", lambda: clock[0])
    data = Rows([2, 2, 2, 4, 20, 6])
    rehearsal = Rehearsal(None, data, 1, forward)  # type: ignore[arg-type]
    assert rehearsal.largest == 11.0
    mean = rehearsal.mean(range(6), lambda step: np.array([step]))
    assert mean == pytest.approx(1.0 + 0.5 * data.lengths.mean())
    assert Rehearsal(None, Rows([3, 3]), 1, forward).mean(range(2), lambda step: np.array([step])) == 2.5  # type: ignore[arg-type]


def test_the_forecast_counts_steps_forwards_and_evaluations(
    tiny_bundle: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    run = model.run

    def slow(*arguments: Any, **_: Any) -> Any:
        time.sleep(0.01)
        return run(*arguments)

    monkeypatch.setattr(model, "run", slow)
    forecast = trainer(model, data, eval=data, eval_every=2, steps=7).rehearse()
    assert (forecast.longest, forecast.where, forecast.evaluations) == (8, f"{tiny_data}, row 0", 4)
    assert forecast.forward_seconds >= 0.01
    assert forecast.memory is None or forecast.memory > 1e6
    least = 0.01 * (7 * 2 + 4 * 30)  # 30 batches of 4 an evaluation
    assert least < forecast.seconds < 20 * least
    assert pass_seconds(pz.FZOO(model, lr=0.1, subset=pz.Block(0.25))) > 0


def test_a_rehearsal_changes_no_weight_and_writes_nothing(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    before = model.weights.sha256()
    rehearsed = trainer(model, data, eval=data, run=tmp_path / "run")
    forecast = rehearsed.rehearse()
    assert model.weights.sha256() == before
    assert not (tmp_path / "run").exists()
    rehearsed.fit()
    assert rehearsed.forecast is forecast, "fit rehearsed once more"
    assert [line["step"] for line in pz.Run(tmp_path / "run").metrics() if "eval" in line] == [0, 8]


# ---- an example that the model cannot be run on ----------------------------------------------------------------------


def test_an_example_that_is_too_long_is_named_before_the_first_step(bert: pz.Model, tmp_path: Path) -> None:
    lengths = [5] * 60
    lengths[41], lengths[50] = LENGTH + 4, LENGTH + 1
    path = npz(tmp_path / "late.npz", lengths)
    data = pz.load_dataset(path, bert.bundle)
    message = (
        rf"late.npz, row 41: {LENGTH + 4} tokens, and the model takes at most {LENGTH} \(and 1 other longer than "
        rf"that\): prepare the model with --max-length {LENGTH}, which cuts longer texts"
    )
    with pytest.raises(pz.DataError, match=message):
        trainer(bert, data, run=tmp_path / "run").fit()
    assert not (tmp_path / "run").exists(), "a run was begun"
    lengths[41] = lengths[50] = LENGTH
    trainer(bert, pz.load_dataset(npz(path, lengths), bert.bundle), run=tmp_path / "run").fit()
    assert pz.Run(tmp_path / "run").steps == 8


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_value_that_the_model_does_not_have_is_named_before_the_first_step(tmp_path: Path, batch_size: int) -> None:
    nodes = [
        node("Mul", "codes two", "index"),  # so that the rows of the table do not say what codes there are
        node("Gather", "table index", "rows"),
        node("ReduceMean", "rows", "features", axes=[1], keepdims=0),
        node("MatMul", "features fc.weight", "logits"),
    ]
    weights = [weight("table", 20, 6), weight("fc.weight", 6, 3), numpy_helper.from_array(np.array(2), "two")]
    graph = model_of(tmp_path / "model.onnx", nodes, weights, inputs=[("codes", TensorProto.INT64, ("batch", 4))])
    model = pz.load(pz.prepare(graph, tmp_path / "bundle", train="fc"), threads=1)
    codes = np.ones((60, 4), np.int64)
    codes[17, 2] = 10
    np.savez(tmp_path / "data.npz", codes=codes, labels=np.arange(60) % 3)
    data = pz.load_dataset(tmp_path / "data.npz", model.bundle)
    message = r"data.npz, row 17: the model cannot be run on this example \(largest codes 10, labels 2\): "
    with pytest.raises(pz.DataError, match=message):
        trainer(model, data, batch_size=batch_size).rehearse()


def test_a_bad_example_of_the_evaluation_is_named(bert: pz.Model, tmp_path: Path) -> None:
    good = pz.load_dataset(npz(tmp_path / "good.npz", [5] * 9), bert.bundle)
    bad = pz.load_dataset(npz(tmp_path / "bad.npz", [5] * 8 + [LENGTH + 1]), bert.bundle)
    for attempt in (lambda: pz.evaluate(bert, bad), trainer(bert, good, eval=bad).rehearse):
        with pytest.raises(pz.DataError, match=rf"bad.npz, row 8: {LENGTH + 1} tokens, and .* at most {LENGTH}:"):
            attempt()


def test_a_failure_in_a_step_is_named_and_the_step_undone(
    tiny_bundle: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    began = trainer(model, data, run=tmp_path / "run")
    began.rehearse()
    run = model.run
    bad = int(began._order(5)[2])

    def fails(batch: Any, outputs: Any = None, **_: Any) -> Any:
        if (batch["input_ids"] == data.batch(np.array([bad]))["input_ids"]).all(axis=1).any():
            raise pz.Error("no")
        return run(batch, outputs)

    monkeypatch.setattr(model, "run", fails)
    with pytest.raises(pz.DataError, match=rf"{tiny_data.name}, row {bad}: the model cannot be run on this example"):
        began.fit()
    assert pz.Run(tmp_path / "run").steps == 5


def test_an_error_that_no_example_has_alone_is_passed_on(
    tiny_bundle: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    run = model.run

    def fails(batch: Any, outputs: Any = None, **_: Any) -> Any:
        if len(batch["labels"]) > 1:
            raise pz.Error("bad allocation")
        return run(batch, outputs)

    monkeypatch.setattr(model, "run", fails)
    with pytest.raises(pz.Error, match=r"^bad allocation$"):
        trainer(model, data).rehearse()


def test_a_resumed_run_rehearses_too(bert: pz.Model, tmp_path: Path) -> None:
    data = pz.load_dataset(npz(tmp_path / "data.npz", [5] * 30), bert.bundle)
    began = trainer(bert, data, run=tmp_path / "run")

    def stop(progress: pz.Progress) -> None:
        began.stop_requested = progress.info.step == 2

    began.callback = stop
    began.fit()
    resumed = pz.Trainer.resume(tmp_path / "run", data)

    def fails(batch: Any, outputs: Any = None, **_: Any) -> Any:
        raise pz.MemoryLimitError("no room")

    resumed.model.run = fails  # type: ignore[assignment, method-assign]
    with pytest.raises(pz.MemoryLimitError, match=r"no room \(the longest example has 5 tokens: .*data.npz, row 0\)"):
        resumed.fit()
    assert pz.Run(tmp_path / "run").steps == 3


# ---- truncated texts -------------------------------------------------------------------------------------------------


def test_texts_that_are_cut_are_counted_and_lines_are_known(tiny_onnx: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(os.fspath(tmp_path / "tokenizer.json"))
    bundle = pz.prepare(tiny_onnx, tmp_path / "bundle", tokenizer=tmp_path / "tokenizer.json", max_length=4)
    texts = ["w1 w2", "w1 w2 w3 w4", "w1 w2 w3 w4 w5", "w1 " * 50]
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{i % 3}\n" for i, text in enumerate(texts)))
    data = pz.load_dataset(path, bundle)
    assert data.cut == 2
    assert data.where(3) == f"{path}, line 5"
