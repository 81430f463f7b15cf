"""Tasks: which one a graph is for, what it reads, what its metrics are made of, and metrics as objectives."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from described import CLS, PAD, SEP, described_bundle, write_tokenizer
from sklearn import metrics as sklearn  # type: ignore[import-untyped]
from tokenizers import Tokenizer

import pocketzo as pz
from pocketzo.data.columns import Columns
from pocketzo.errors import BundleError, DataError, TrainingError
from pocketzo.formats.bundle import Bundle, TaskSpec, ValueSpec
from pocketzo.tasks.base import IGNORED
from pocketzo.tasks.causal_lm import CausalLM
from pocketzo.tasks.choice import Choice
from pocketzo.tasks.classification import Classification
from pocketzo.tasks.multi_label import MultiLabel
from pocketzo.tasks.objective import metric_objective
from pocketzo.tasks.prompt import Prompt
from pocketzo.tasks.registry import TASKS, task_for, task_of
from pocketzo.tasks.regression import Regression
from pocketzo.tasks.tokens import TokenClassification

MODELS = Path(__file__).parent / "models"
CE = {"loss": "cross-entropy"}

# ---- which task a graph is for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "labels", "spec"),
    [
        ("bert-old", ["a", "b", "c"], TaskSpec("classification", {"labels": ["a", "b", "c"]} | CE)),
        ("bert-old", None, TaskSpec("classification", CE)),
        ("gpt2-old", None, TaskSpec("token-classification", CE)),
    ],
)
def test_preparing_finds_the_task(model: str, labels: list[str] | None, spec: TaskSpec, tmp_path: Path) -> None:
    bundle = pz.prepare(MODELS / f"{model}.onnx", tmp_path / "bundle", labels=labels)
    assert bundle.task == Bundle.read(tmp_path / "bundle").task == spec
    assert type(task_of(bundle)) is TASKS[spec.name]


def spec(name: str, dtype: str, *shape: int | str) -> ValueSpec:
    return ValueSpec(name, dtype, shape)


@pytest.mark.parametrize(
    ("label_input", "scores", "settings", "name"),
    [
        (("int64", "b"), ("float32", "b", 3), {}, "classification"),
        (("int64", "b"), ("float32", "b", 3), CE, "classification"),
        (("int32", "b"), None, {}, "classification"),
        (None, ("float32", "b", 3), {}, "classification"),
        (("int64", "b"), ("float32", "b", 1), {"loss": "bce", "threshold": 0.0}, "classification"),
        (None, ("float32", "b"), {"threshold": 0.5}, "classification"),
        (("int64", "b", "s"), ("float32", "b", "s", 3), {}, "token-classification"),
        (("int64", "b", "s"), ("float32", "b", "s", 3), CE, "token-classification"),
        (("int64", "b", "s"), None, {}, "token-classification"),
        (None, ("float16", "b", "s", 3), {}, "token-classification"),
        (("float32", "b", 3), ("float32", "b", 3), {"loss": "bce", "threshold": 0.0}, "multi-label"),
        (None, ("float32", "b", 3), {"threshold": 0.5}, "multi-label"),
        (("float32", "b"), ("float32", "b"), {"loss": "mse"}, "regression"),
        (("float32", "b"), ("float32", "b", 1), {"loss": "mse"}, "regression"),
        (("float32", "b", 3), ("float32", "b", 3), {"loss": "mse"}, "regression"),
        # With a loss of the graph's own, a regression looks like several labels an example, and one like another.
        (("float32", "b"), ("float32", "b", 1), {}, None),
        (("int64", "b"), ("float32", "b", 1), {}, None),
        (("float32", "b", 3), ("float32", "b", 3), {}, None),
        (("int64", "b", 3), ("float32", "b", 3), {}, None),
        (("int64", "b"), ("float32", "b", "s", 3), {}, None),
        (("int64",), ("float32", "b", 3), {}, None),
        (None, None, {}, None),
    ],
)
def test_a_task_for_a_graph(label_input: Any, scores: Any, settings: Any, name: str | None) -> None:
    inputs = [spec("x", "float32", "b", 4)] + ([] if label_input is None else [spec("labels", *label_input)])
    outputs = [spec("loss", "float32")] + ([] if scores is None else [spec("scores", *scores)])
    found = task_for(inputs, outputs, None if scores is None else "scores", **settings)
    assert found == (None if name is None else TaskSpec(name, settings))
    if name not in (None, "regression"):
        named = task_for(inputs, outputs, None if scores is None else "scores", labels=("a", "b", "c"), **settings)
        assert named is not None
        assert named.settings == {"labels": ["a", "b", "c"]} | settings


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (TaskSpec("poetry"), "unknown task 'poetry'; this PocketZO knows classification, token-classification, "),
        (TaskSpec("classification", {"lables": ["a", "b"]}), "setting 'lables' of task 'classification' is unknown"),
        (
            TaskSpec("classification", {"labels": ["a", "b", "c"]}),
            "task 'classification': 'labels' has 3 names, and the scores have 2 classes",
        ),
        (TaskSpec("classification", {"loss": "mse"}), "task 'classification': 'loss' must be 'cross-entropy' or 'bce'"),
        (
            TaskSpec("classification", {"threshold": "no"}),
            "task 'classification': 'threshold' must be a number, got 'no'",
        ),
        (TaskSpec("regression", {"labels": ["a"]}), "setting 'labels' of task 'regression' is unknown"),
    ],
)
def test_a_task_that_does_not_fit_the_bundle_is_refused(task: TaskSpec, reason: str, tmp_path: Path) -> None:
    bundle = dataclasses.replace(described_bundle(tmp_path), task=task)
    with pytest.raises(BundleError, match=f"^{tmp_path}/bundle.json: {reason}"):
        task_of(bundle)


def test_without_a_task_there_are_labels_but_no_metrics_but_the_loss(tmp_path: Path) -> None:
    shape = ("batch", "sequence")
    bundle = described_bundle(tmp_path, inputs={"input_ids": ("int64", shape), "labels": ("float32", ("batch",))})
    task = task_of(dataclasses.replace(bundle, task=None))
    assert task.label_input is None
    assert task.metrics == ("loss", "perplexity")
    assert task.metric().name == "loss"
    with pytest.raises(ValueError, match="no output that gives the metric 'f1'"):
        task.metric("f1")


def test_metrics_follow_from_what_the_graph_gives(tmp_path: Path) -> None:
    bundle = described_bundle(tmp_path)
    task = task_of(bundle)
    assert task.metrics == ("accuracy", "loss", "f1", "matthews", "perplexity")
    assert task.shown == ("accuracy", "loss")
    assert task.outputs([task.metric("f1")]) == ("logits",)
    assert task.outputs([task.metric("perplexity"), task.metric("f1")]) == ("loss", "logits")
    without_loss = task_of(dataclasses.replace(bundle, loss=None))
    assert without_loss.metrics == ("accuracy", "f1", "matthews")
    without_logits = task_of(dataclasses.replace(bundle, logits=None))
    assert (without_logits.metrics, without_logits.metric().name) == (("loss", "perplexity"), "loss")
    neither = task_of(dataclasses.replace(bundle, loss=None, logits=None))
    assert neither.metrics == neither.shown == ()


# ---- token labels ----------------------------------------------------------------------------------------------------

TAGS = ("O", "GOOD", "FILM")
RECORDS: list[dict[str, Any]] = [
    {"tokens": ["the", "good-film", "is"], "labels": ["O", "GOOD", 0]},
    {"tokens": ["xy", "film"], "labels": [-100, "FILM"]},
]
# [CLS] the good - film is [SEP]; [CLS] x ##y film [SEP]: the first token of a word has its label.
BY_TOKEN = [[-100, 0, 1, -100, -100, 0, -100], [-100, -100, -100, 2, -100, -100, -100]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def tagger(folder: Path) -> Bundle:
    return described_bundle(folder, task="token-classification", labels=TAGS, classes=3)


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def jsonl(folder: Path, *records: dict[str, Any]) -> Path:
    return write(folder, "data.jsonl", "\n".join(map(json.dumps, records)))


def test_words_and_their_labels(tmp_path: Path, folder: Path, tagger: Bundle) -> None:
    data = pz.load_dataset(jsonl(tmp_path, *RECORDS), tagger)
    batch = data.batch(np.array([0, 1]))
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids", "labels"]
    assert batch["labels"].tolist() == BY_TOKEN
    assert batch["labels"].dtype == np.int64
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.no_padding()
    oracle.no_truncation()
    ids = oracle.encode(["the", "good-film", "is"], is_pretokenized=True).ids
    assert batch["input_ids"].tolist() == [ids, [CLS, *batch["input_ids"][1, 1:4].tolist(), SEP, PAD, PAD]]
    assert data.label_ids is None
    assert data.labels == TAGS
    assert data.batch(np.array([1]))["labels"].tolist() == [BY_TOKEN[1][:5]]


def test_the_same_words_from_any_file_are_the_same_data(tmp_path: Path, tagger: Bundle) -> None:
    expected = pz.load_dataset(jsonl(tmp_path, *RECORDS), tagger)
    rows = [(" ".join(r["tokens"]), " ".join(map(str, r["labels"]))) for r in RECORDS]
    files = {
        "plain.tsv": "".join(f"{words}\t{labels}\n" for words, labels in rows),
        "header.tsv": "id\ttags\tWords\n" + "".join(f"7\t{labels}\t{words}\n" for words, labels in rows),
        "plain.csv": "".join(f"{words},{labels}\n" for words, labels in rows),
        "strings.jsonl": "\n".join(json.dumps({"text": words, "label": labels}) for words, labels in rows),
    }
    for name, content in files.items():
        assert pz.load_dataset(write(tmp_path, name, content), tagger).fingerprint == expected.fingerprint, name
    given = pz.load_dataset(
        jsonl(tmp_path, *({"w": r["tokens"], "y": r["labels"]} for r in RECORDS)),
        tagger,
        columns=Columns(text="w", label="y"),
    )
    assert given.fingerprint == expected.fingerprint
    everything = expected.batch(np.array([0, 1]))
    arrays: dict[str, Any] = {"input_ids": everything["input_ids"], "attention_mask": everything["attention_mask"]}
    np.savez(tmp_path / "ids.npz", **arrays, tags=everything["labels"].astype(np.int16))
    from_arrays = pz.load_dataset(tmp_path / "ids.npz", tagger)
    assert from_arrays.fingerprint == expected.fingerprint
    assert from_arrays.batch(np.array([1]))["labels"].tolist() == [BY_TOKEN[1][:5]]


def test_labels_of_tokens_that_are_cut_away_go_with_them(tmp_path: Path, folder: Path) -> None:
    bundle = described_bundle(folder, task="token-classification", labels=TAGS, classes=3, max_length=4)
    data = pz.load_dataset(jsonl(tmp_path, *RECORDS), bundle)
    assert data.batch(np.array([0]))["labels"].tolist() == [[-100, 0, 1, -100]]


def test_labels_are_padded_as_tokens_are(tmp_path: Path, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(direction="left", pad_id=PAD)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    bundle = described_bundle(tmp_path, task="token-classification", labels=TAGS, classes=3)
    batch = pz.load_dataset(jsonl(tmp_path, *RECORDS), bundle).batch(np.array([1, 0]))
    assert batch["labels"][0].tolist() == [-100, -100, *BY_TOKEN[1][:5]]
    assert batch["input_ids"][0, :3].tolist() == [PAD, PAD, CLS]


def test_words_without_labels(tmp_path: Path, tagger: Bundle) -> None:
    path = jsonl(tmp_path, *({"tokens": record["tokens"]} for record in RECORDS))
    data = pz.load_dataset(path, tagger, require_labels=False)
    assert "labels" not in data.batch(np.array([0]))
    assert data.fingerprint == pz.encode_texts(["the good-film is", "xy film"], tagger).fingerprint
    with pytest.raises(
        DataError, match=r"line 1: no 'labels' among the columns 'tokens': name the column by --label-column \(and"
    ):
        pz.load_dataset(path, tagger)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"tokens": ["a", "b"], "labels": [0]}, "1 labels for 2 words"),
        ({"tokens": ["a"], "labels": ["VERB"]}, "unknown label 'VERB': expected 'O', 'GOOD', 'FILM', 0 to 2"),
        ({"tokens": ["a"], "labels": [3]}, "unknown label '3'"),
        ({"tokens": ["a"], "labels": [True]}, "the label must be a name or an integer, found bool"),
        ({"tokens": ["a"], "labels": 1}, "'labels' must be a list or a string, found int"),
        ({"tokens": [], "labels": []}, "'tokens' is empty"),
        ({"tokens": " ", "labels": "O"}, "'tokens' is empty"),
        ({"tokens": ["a", " "], "labels": [0, 0]}, "'tokens' is empty"),
        ({"tokens": ["a", 7], "labels": [0, 0]}, "'tokens' must hold strings, found int"),
        ({"tokens": ["a\ud800"], "labels": [0]}, r"not a character: U\+D800"),
        ({"labels": [0]}, "no 'tokens' among the columns 'labels'"),
        ({"tokens": None, "labels": [0]}, "'tokens' is null"),
    ],
)
def test_bad_words(tmp_path: Path, tagger: Bundle, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl, line 2: {reason}"):
        pz.load_dataset(jsonl(tmp_path, RECORDS[0], record), tagger)


def test_a_column_that_the_task_does_not_read_is_refused(tmp_path: Path, tagger: Bundle) -> None:
    with pytest.raises(ValueError, match="task 'token-classification' reads no column for 'text_pair'"):
        pz.load_dataset(jsonl(tmp_path, *RECORDS), tagger, columns=Columns(text_pair="b"))


IDS = np.array([[2, 6, 3], [2, 7, 3]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (
            [[0, 1, 2], [0, 3, -100]],
            "row 1: unknown label 3 at position 1: expected 0 to 2, or -100 where there is none",
        ),
        ([[0, 1, 2], [-1, 0, -100]], "row 1: unknown label -1"),
        ([[0, 1, 2], [0, 1, 2]], "row 1: a label where 'attention_mask' keeps no token"),
        (
            [[0.0, 1, 2], [0, 1, -100]],
            r"'labels' must be integers \[n, length\], a class number or -100 by token",
        ),
        ([0, 1], r"array 'labels' must be integers \[n, length\], .* found int64 of shape \[2\]"),
        (
            [[0, 1], [0, 1]],
            r"'labels' must be integers \[n, length\], the same for all of a model's token inputs",
        ),
        (None, "no 'labels' among the columns 'input_ids', 'attention_mask'"),
    ],
)
def test_bad_arrays_of_labels(tmp_path: Path, tagger: Bundle, labels: Any, reason: str) -> None:
    given: dict[str, Any] = {} if labels is None else {"labels": np.array(labels)}
    np.savez(tmp_path / "a.npz", input_ids=IDS, attention_mask=MASK, **given)
    with pytest.raises(DataError, match=reason):
        pz.load_dataset(tmp_path / "a.npz", tagger)
    if labels is None:
        data = pz.load_dataset(tmp_path / "a.npz", tagger, require_labels=False)
        assert "labels" not in data.batch(np.array([0]))


# ---- evaluating ------------------------------------------------------------------------------------------------------

EVERY = ["accuracy", "f1", "matthews", "loss", "perplexity"]


@pytest.fixture
def data(tiny_data: Path, model: pz.Model) -> pz.Dataset:
    return pz.load_dataset(tiny_data, model.bundle)


def of_scikit_learn(labels: Any, predictions: Any) -> dict[str, float]:
    return {
        "accuracy": sklearn.accuracy_score(labels, predictions),
        "f1": sklearn.f1_score(labels, predictions, average="macro"),
        "matthews": sklearn.matthews_corrcoef(labels, predictions),
    }


@pytest.mark.parametrize("batch_size", [1, 7, 120])
def test_metrics_of_a_model_are_of_all_examples_together(model: pz.Model, data: pz.Dataset, batch_size: int) -> None:
    got = pz.evaluate(model, data, batch_size=batch_size, metrics=EVERY)
    assert list(got) == ["count", *EVERY]
    batch = data.batch(np.arange(120))
    for name, expected in of_scikit_learn(batch["labels"], model.run(batch)["logits"].argmax(-1)).items():
        assert got[name] == pytest.approx(expected, rel=1e-12), name
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]), rel=1e-12)
    plain = pz.evaluate(model, data, batch_size=batch_size)
    assert plain == {name: got[name] for name in ("count", "accuracy", "loss")}
    assert pz.evaluate(model, data, batch_size=batch_size, metrics=["f1"]) == {"count": 120, "f1": got["f1"]}


def test_metrics_of_tokens_pass_over_those_without_a_label(tmp_path: Path) -> None:
    bundle = pz.prepare(MODELS / "gpt2-old.onnx", tmp_path / "bundle")
    model = pz.load(bundle, threads=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (9, 6))
    labels = np.where(rng.random(ids.shape) < 0.5, rng.integers(0, 20, ids.shape), IGNORED)
    labels[4] = IGNORED  # an example in which nothing counts
    arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    arrays = {value.name: arrays[value.name] for value in bundle.inputs if value.name in arrays}
    np.savez(tmp_path / "data.npz", labels=labels, **arrays)
    data = pz.load_dataset(tmp_path / "data.npz", bundle)
    counted = labels != IGNORED
    predictions = model.run(data.batch(np.arange(9)))["logits"].argmax(-1)
    expected = of_scikit_learn(labels[counted], predictions[counted])
    for size in (1, 4, 9):
        got = pz.evaluate(model, data, batch_size=size, metrics=EVERY)
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert got["loss"] == pytest.approx(model.loss(data.batch(np.arange(9))), rel=1e-5)
    np.savez(tmp_path / "none.npz", labels=np.full_like(labels, IGNORED), **arrays)
    nothing = pz.evaluate(model, pz.load_dataset(tmp_path / "none.npz", bundle), metrics=EVERY)
    assert nothing["count"] == 9
    assert all(math.isnan(nothing[name]) for name in EVERY)


def test_a_model_that_gives_infinity_has_no_predictions(model: pz.Model, data: pz.Dataset) -> None:
    for value in (np.inf, -np.inf):  # of all classes, of which the first one would win
        model.weights["classifier.bias"] = np.full(3, value, np.float32)
        got = pz.evaluate(model, data, metrics=["accuracy", "f1", "matthews"])
        assert all(math.isnan(got[name]) for name in ("accuracy", "f1", "matthews"))
    model.weights["classifier.bias"] = np.array([0, -np.inf, 0], np.float32)  # a class that is ruled out
    assert math.isfinite(pz.evaluate(model, data, metrics=["accuracy"])["accuracy"])


@pytest.mark.parametrize(("kind", "threshold"), [(Classification, None), (Classification, 0.0), (MultiLabel, 0.0)])
def test_scores_that_are_not_finite_are_no_prediction(kind: Any, threshold: float | None) -> None:
    task = object.__new__(kind)  # predictions need no bundle
    task.threshold = threshold
    columns = 1 if kind is Classification and threshold is not None else 2
    for bad in (np.nan, np.inf):
        scores = np.ones((2, columns))
        scores[1, -1] = bad
        found = task.predictions(scores).reshape(2, -1)
        assert found[0].min() >= 0
        assert found[1].min() == -1


def test_a_model_that_gives_nan_has_no_metrics(model: pz.Model, data: pz.Dataset) -> None:
    model.weights["classifier.bias"] = np.array([0, np.nan, 0], np.float32)
    got = pz.evaluate(model, data, metrics=EVERY)
    assert all(math.isnan(got[name]) for name in EVERY)
    batch = data.batch(np.arange(4))
    assert math.isnan(metric_objective("accuracy", model.bundle)(model.run(batch), batch))


def test_what_cannot_be_evaluated_is_said(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric must be one of accuracy, .* got 'recall'"):
        pz.evaluate(model, data, metrics=["recall"])
    np.savez(tmp_path / "unlabelled.npz", input_ids=np.ones((3, 4), np.int64))
    unlabelled = pz.load_dataset(tmp_path / "unlabelled.npz", model.bundle, require_labels=False)
    with pytest.raises(TrainingError, match="the data has no labels, without which there is no loss"):
        pz.evaluate(model, unlabelled)
    with pytest.raises(TrainingError, match="the data has no labels, which the metric 'f1' needs"):
        pz.evaluate(model, unlabelled, metrics=["f1"])
    model.bundle = dataclasses.replace(model.bundle, logits=None)
    assert set(pz.evaluate(model, data)) == {"count", "loss"}
    with pytest.raises(ValueError, match="the graph has no output that gives the metric 'accuracy'"):
        pz.evaluate(model, data, metrics=["accuracy"])
    model.bundle = dataclasses.replace(model.bundle, loss=None)
    with pytest.raises(TrainingError, match="neither a loss nor logits to evaluate"):
        pz.evaluate(model, data)


# ---- metrics as objectives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_an_objective_is_its_metric_of_the_batch_to_be_minimised(model: pz.Model, data: pz.Dataset, name: str) -> None:
    value = pz.evaluate(model, data, batch_size=120, metrics=[name])[name]
    batch = data.batch(np.arange(120))
    minimised = metric_objective(name, model.bundle)
    cost = minimised(model.run(batch, minimised.outputs), batch)
    assert cost == (value if name in ("loss", "perplexity") else 1 - value)
    assert cost == minimised(model.run(batch), dict(batch))
    assert minimised.outputs == (("loss",) if name in ("loss", "perplexity") else ("logits",))


def test_an_objective_needs_labels_and_its_output(model: pz.Model, data: pz.Dataset) -> None:
    batch = {name: values for name, values in data.batch(np.arange(3)).items() if name != "labels"}
    with pytest.raises(ValueError, match="metric 'f1' needs predictions and labels"):
        metric_objective("f1", model.bundle)(model.run(batch), batch)
    with pytest.raises(ValueError, match="no output that gives the metric 'f1'"):
        metric_objective("f1", dataclasses.replace(model.bundle, logits=None))
    with pytest.raises(ValueError, match="metric must be one of"):
        metric_objective("F1", model.bundle)


def test_each_task_says_what_it_is() -> None:
    assert list(TASKS.values()) == [
        Classification,
        TokenClassification,
        MultiLabel,
        Regression,
        Prompt,
        CausalLM,
        Choice,
    ]
    assert all(task.name == name for name, task in TASKS.items())
    for task in TASKS.values():
        assert set(task.columns) <= {field.name for field in dataclasses.fields(Columns)}
        for names in task.headerless.values():
            assert set(names) <= {name for names in task.columns.values() for name in names}
