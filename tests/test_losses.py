"""Regression, multi-label and binary classification, from a data file to the tuned bundle."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOCABULARY, write_tiny_onnx
from described import write_tokenizer
from graphs import run as run_plainly
from onnx import helper, load, save
from sklearn import metrics as sklearn  # type: ignore[import-untyped]

import pocketzo as pz
from pocketzo.errors import DataError
from pocketzo.formats.bundle import Bundle
from pocketzo.tasks.objective import metric_objective
from pocketzo.tasks.registry import task_of

KINDS: dict[str, dict[str, Any]] = {
    "regression": {"columns": 1, "loss": "mse"},
    "several numbers": {"columns": 3, "loss": "mse"},
    "yes or no": {"columns": 1, "loss": "bce", "labels": ["no", "yes"]},
    "yes or no by Sigmoid": {"columns": 1, "ends": "Sigmoid", "labels": ["no", "yes"]},
    "several labels": {"columns": 3, "loss": "bce", "labels": ["sport", "art", "war"]},
    "several labels by Sigmoid": {"columns": 3, "ends": "Sigmoid", "labels": ["sport", "art", "war"]},
    "classes by Softmax": {"columns": 3, "ends": "Softmax", "labels": ["a", "b", "c"]},
}


def prepared(folder: Path, kind: str, **options: Any) -> Bundle:
    given = KINDS[kind] | options
    path = folder / f"{kind}.onnx"
    write_tiny_onnx(path, given.pop("columns"))
    if (op := given.pop("ends", None)) is not None:
        model = load(path)
        model.graph.node.append(helper.make_node(op, ["logits"], ["output"]))
        model.graph.output[0].name = "output"
        save(model, path)
    write_tokenizer(folder / "tokenizer.json")
    return pz.prepare(path, folder / kind, tokenizer=folder / "tokenizer.json", **given)


def labels_of(bundle: Bundle, ids: Any) -> Any:
    """Return labels that follow from the first tokens."""
    spec = next(value for value in bundle.inputs if value.name == "labels")
    task = task_of(bundle)
    first = ids[:, : 1 if len(spec.shape) == 1 else spec.shape[1]]
    if task.name == "regression":
        labels = first / VOCABULARY
    else:
        labels = first % 3 if task.loss == "cross-entropy" else first > VOCABULARY / 2
    return labels.astype(spec.dtype).reshape(len(ids), *spec.shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_training(tmp_path: Path, kind: str) -> None:
    bundle = prepared(tmp_path, kind)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (64, 6))
    labels = labels_of(bundle, ids)
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=labels)
    data = pz.load_dataset(tmp_path / "data.npz", bundle)
    batch = data.batch(np.arange(64))
    np.testing.assert_array_equal(batch["labels"], labels)

    model = pz.load(bundle, threads=1)
    before = model.loss(batch)
    optimizer = pz.FZOO(model, lr=2e-3, queries=16, seed=1)
    trainer = pz.Trainer(model, optimizer, data, eval=data, batch_size=64, steps=3, run=tmp_path / "run")
    trainer.fit()
    assert model.loss(batch) < before

    # The journal gives the same weights, and plain onnxruntime the same outputs.
    model.save(tmp_path / "tuned")
    run = pz.Run(tmp_path / "run")
    run.replay(tmp_path / "replayed", bundle=bundle.path)
    tuned, replayed = (tmp_path / name / "weights.safetensors" for name in ("tuned", "replayed"))
    assert tuned.read_bytes() == replayed.read_bytes()
    outputs = run_plainly(tmp_path / "tuned" / "model.onnx", dict(batch))
    assert outputs["loss"] == pytest.approx(model.loss(batch), rel=1e-5)
    np.testing.assert_allclose(
        outputs[bundle.logits or ""], model.run(batch)[bundle.logits or ""], rtol=1e-5, atol=1e-6
    )

    unlabelled = model.run({name: array for name, array in batch.items() if name != "labels"})
    np.testing.assert_array_equal(unlabelled[bundle.logits or ""], model.run(batch)[bundle.logits or ""])
    assert "loss" not in unlabelled

    # The evaluation of the run is what scikit-learn says of those outputs.
    task = task_of(bundle)
    result = pz.evaluate(model, data, batch_size=20, metrics=task.metrics)
    for name in task.shown:
        logged = [line["eval"][name] for line in run.metrics() if "eval" in line]
        assert logged[-1] == pytest.approx(result[name], rel=1e-5, abs=1e-6)
    scores = model.run(batch)[bundle.logits or ""]
    if task.name == "regression":
        scores = scores.reshape(labels.shape)
        assert result["r2"] == pytest.approx(sklearn.r2_score(labels, scores), rel=1e-4)
        assert result["mse"] == pytest.approx(result["loss"], rel=1e-4)
        assert "perplexity" not in result
    elif task.name == "multi-label":
        sets = scores > (0.5 if "Sigmoid" in kind else 0)
        assert result["micro-f1"] == pytest.approx(sklearn.f1_score(labels, sets, average="micro"), rel=1e-9)
        assert "perplexity" not in result
    else:
        predicted = scores.argmax(-1) if scores.shape[-1] > 1 else scores[:, 0] > (0.5 if "Sigmoid" in kind else 0)
        assert result["accuracy"] == pytest.approx(np.mean(predicted == labels), rel=1e-9)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-9)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_without_a_loss_a_metric_or_a_function_is_minimised(tmp_path: Path, metric: str) -> None:
    write_tiny_onnx(tmp_path / "m.onnx")
    bundle = pz.prepare(tmp_path / "m.onnx", tmp_path / "base", loss="none")
    assert [value.name for value in bundle.inputs] == ["input_ids", "attention_mask"]
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (32, 6))
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=ids[:, 0] % 3)
    data = pz.load_dataset(tmp_path / "data.npz", bundle)
    batch = data.batch(np.arange(32))
    assert batch["labels"].tolist() == (ids[:, 0] % 3).tolist()  # for the metric: the graph has no such input
    model = pz.load(bundle, threads=1)
    expected = 1 - pz.evaluate(model, data, metrics=[metric])[metric]
    objective = metric_objective(metric, bundle)
    assert objective(model.run(batch, objective.outputs), batch) == pytest.approx(expected)
    trainer = pz.Trainer(model, pz.MeZO(model, lr=0.01), data, eval=data, batch_size=32, steps=2, objective=metric)
    trainer.fit()
    with pytest.raises(ValueError, match="the graph has no loss output; give an objective"):
        pz.Trainer(model, pz.MeZO(model, lr=0.01), data, steps=2)
    own = pz.Trainer(
        model,
        pz.MeZO(model, lr=0.01),
        data,
        batch_size=32,
        steps=2,
        objective=lambda outputs, inputs: float(outputs["logits"].sum() * inputs["labels"].sum()),
    )
    own.fit()
    assert own.optimizer.step_number == 2


def test_token_labels_without_a_loss(tmp_path: Path) -> None:
    models = Path(__file__).parent / "models"
    bundle = pz.prepare(models / "gpt2-old.onnx", tmp_path / "base", loss="none")
    assert (bundle.loss, bundle.logits) == (None, "logits")
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(1, 20, (2, 4, 6))
    labels[:, 4:] = -100
    arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    np.savez(tmp_path / "data.npz", labels=labels, **arrays)
    data = pz.load_dataset(tmp_path / "data.npz", bundle)
    assert data.batch(np.array([1, 3]))["labels"].tolist() == labels[[1, 3]].tolist()
    model = pz.load(bundle, threads=1)
    predicted = model.run(data.batch(np.arange(4)))["logits"].argmax(-1)
    accuracy = pz.evaluate(model, data, metrics=["accuracy"])["accuracy"]
    assert accuracy == pytest.approx(np.mean((predicted == labels)[:, :4]))


# ---- labels of a data file -------------------------------------------------------------------------------------------


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def values(path: Path, bundle: Bundle) -> Any:
    data = pz.load_dataset(path, bundle)
    labels = data.batch(np.arange(len(data)))["labels"]
    assert data.label_ids is None
    assert labels.dtype == np.float32
    return labels.tolist()


def test_numbers(tmp_path: Path) -> None:
    one, three = (prepared(tmp_path, kind) for kind in ("regression", "several numbers"))
    expected = [3.5, -1.0, 1e-3]
    for name, content in {
        "a.tsv": "good film\t3.5\nbad film\t-1\nfilm\t1e-3\n",
        "b.csv": 'Sentence,Score\n"good, film",3.5\nbad film," -1 "\nfilm,.001\n',
        "c.jsonl": '{"text": "a", "label": 3.5}\n{"text": "b", "label": "-1"}\n{"text": "film", "target": 0.001}\n',
    }.items():
        assert values(write(tmp_path / name, content), one) == pytest.approx(expected), name
    np.savez(tmp_path / "d.npz", input_ids=np.ones((3, 4), np.int64), labels=np.array(expected)[:, None])
    assert values(tmp_path / "d.npz", one) == pytest.approx(expected)
    # -100 is a number, and no label that is ignored.
    task = task_of(one)
    found = task.found({"logits": np.zeros((2, 1), np.float32)}, {"labels": np.array([-100, 1], np.float32)})
    assert found.labels is not None
    assert found.labels.tolist() == [-100, 1]

    rows = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]
    for name, content in {
        "a.tsv": "good film\t1 2 .5\nbad film\t0, -1, 3\n",
        "c.jsonl": '{"text": "a", "label": [1, 2, 0.5]}\n{"text": "b", "label": "0,-1,3"}\n',
    }.items():
        assert values(write(tmp_path / name, content), three) == rows, name


@pytest.mark.parametrize(
    ("kind", "label", "reason"),
    [
        ("regression", "abc", "the label must be a number, found 'abc'"),
        ("regression", "", "the label must be a number, found ''"),
        ("regression", "nan", "the label must be a number, found 'nan'"),
        ("regression", "inf", "the label must be a number, found 'inf'"),
        ("regression", "1_000", "the label must be a number, found '1_000'"),
        ("regression", "1e39", "the label must be a number, found '1e39'"),
        ("regression", 10**400, "the label must be a number, found '1000"),
        ("regression", True, "the label must be a number, found bool"),
        ("regression", [1.0], "the label must be a number, found list"),
        ("several numbers", "1 2", "the label must be 3 numbers, found 2"),
        ("several numbers", 1.0, "the label must be 3 numbers, found float"),
        ("several numbers", [1, 2, "x"], "the label must be a number, found 'x'"),
        ("several labels", "sport, music", r"unknown label 'music': expected 'sport', 'art', 'war', 0 to 2"),
        ("several labels", ["sport", 3], "unknown label '3'"),
        ("several labels", "art art", "the label 'art' is given twice"),
        ("several labels", 0.5, "the labels must be a list or a string, found float"),
        ("several labels", [0.5], "the label must be a name or an integer, found float"),
        ("several labels", None, "'labels' is null"),
        ("yes or no", "maybe", "unknown label 'maybe': expected 'no', 'yes', 0 to 1"),
        ("yes or no", 2, "unknown label '2'"),
    ],
)
def test_bad_labels_are_named_with_file_and_line(tmp_path: Path, kind: str, label: object, reason: str) -> None:
    bundle = prepared(tmp_path, kind)
    good: dict[str, Any] = {"regression": 1, "several numbers": [1, 2, 3], "yes or no": "yes"}
    lines = [{"text": "good film", "labels": good.get(kind, [])}, {"text": "bad film", "labels": label}]
    path = write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=rf"data\.jsonl, line 2: {reason}"):
        pz.load_dataset(path, bundle)


def test_sets_of_labels(tmp_path: Path) -> None:
    bundle = prepared(tmp_path, "several labels")
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    for name, content in {
        "a.tsv": "good film\tsport,war\nbad film\t\nfilm\tart\n",
        "b.tsv": "good film\twar sport\nbad film\t \nfilm\t1\n",
        "c.csv": 'Text,Labels\ngood film,"sport, war"\nbad film,\nfilm,art\n',
        "d.jsonl": '{"text": "a", "labels": ["war", 0]}\n{"text": "b", "labels": []}\n{"text": "film", "label": 1}\n',
    }.items():
        assert values(write(tmp_path / name, content), bundle) == expected, name
    np.savez(tmp_path / "e.npz", input_ids=np.ones((3, 4), np.int64), labels=np.array(expected, bool))
    assert values(tmp_path / "e.npz", bundle) == expected
    spaces = prepared(tmp_path, "several labels by Sigmoid", labels=["no war", "art", "war"])
    content = "a\tno war,art\nb\tno war\nfilm\t\n"
    assert values(write(tmp_path / "f.tsv", content), spaces) == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("kind", "labels", "reason"),
    [
        ("several labels", [[0, 1, 0], [0, 2, 1]], "row 1: the labels must be 0 or 1, found 2"),
        ("several labels", [[0, 1, 0], [0, 0.5, 1]], "row 1: the labels must be 0 or 1, found 0.5"),
        ("several labels", [[0, 1], [0, 0]], "row 0: the labels must be 0 or 1 for each of 3 labels, found 2 values"),
        ("several labels", [0, 1], "row 0: the labels must be 0 or 1 for each of 3 labels, found one value"),
        ("regression", [1.0, math.nan], "row 1: the label must be a number, found 'nan'"),
        ("regression", [[1.0, 2.0], [1.0, 2.0]], "row 0: the label must have 1 columns, found 2"),
        ("several numbers", [1.0, 2.0], "row 0: the label must have 3 columns, found 1"),
        ("yes or no", [0, 2], "row 1: unknown label '2'"),
        ("yes or no", [0.0, 1.0], "row 0: the label must be a name or an integer, found float"),
    ],
)
def test_bad_arrays_of_labels(tmp_path: Path, kind: str, labels: Any, reason: str) -> None:
    bundle = prepared(tmp_path, kind)
    np.savez(tmp_path / "a.npz", input_ids=np.ones((2, 4), np.int64), labels=np.array(labels))
    with pytest.raises(DataError, match=rf"a\.npz, {reason}"):
        pz.load_dataset(tmp_path / "a.npz", bundle)


def test_a_metric_of_another_task_is_refused(tmp_path: Path) -> None:
    task = task_of(prepared(tmp_path, "regression"))
    assert task.metrics == ("r2", "loss", "pearson", "mse", "mae")
    assert task.shown == ("r2", "loss")
    with pytest.raises(
        ValueError, match="the task 'regression' has no metric 'accuracy'; it has r2, pearson, mse, mae, "
    ):
        task.metric("accuracy")


# ---- the command line ------------------------------------------------------------------------------------------------


def pocketzo(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pocketzo", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_command_line(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "m.onnx", 1)
    write_tokenizer(tmp_path / "tokenizer.json")
    base = tmp_path / "base"
    words = ("prepare", tmp_path / "m.onnx", "-o", base, "--tokenizer", tmp_path / "tokenizer.json")
    refused = pocketzo(*words)
    assert refused.returncode != 0
    assert "m.onnx: the output 'logits' (float32 [batch, 1]) has one column" in refused.stderr
    assert not base.exists()
    done = pocketzo(*words, "--loss", "mse")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loss: mse of 'logits' (as stated)\n"
    assert "next: pocketzo train" in done.stdout
    info = pocketzo("info", base).stdout
    assert re.search(r"^task +regression *$", info, re.MULTILINE)
    assert re.search(r"^loss +mse of 'logits' *$", info, re.MULTILINE)
    assert json.loads(pocketzo("info", base, "--json").stdout)["task"]["settings"] == {"loss": "mse"}

    data = write(tmp_path / "train.tsv", "good film\t1\nbad film\t-1\nthe film\t0\n")
    options = ("--data", data, "--eval", data, "--threads", 1, "--steps", 2, "--batch-size", 3)
    done = pocketzo("train", base, *options, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^r2 +-?\d", done.stdout, re.MULTILINE)
    result = json.loads(pocketzo("eval", tmp_path / "run", "--data", data, "--json").stdout)
    assert list(result) == ["r2", "loss", "count"]
    shown = pocketzo("eval", tmp_path / "run", "--data", data, "--metric", "mse,mae,pearson").stdout
    assert re.match(r"mse [\d.]+ · mae [\d.]+ · pearson -?[\d.]+ · 3 examples", shown)
    done = pocketzo("train", base, *options, "-o", tmp_path / "mae", "--objective", "mae")
    assert done.returncode == 0, done.stderr
    wrong = write(tmp_path / "wrong.tsv", "good film\t1\nbad film\tabc\n")
    done = pocketzo("eval", base, "--data", wrong)
    assert done.stderr == f"pocketzo: error: {wrong}, line 2: the label must be a number, found 'abc'\n"
    done = pocketzo("eval", base, "--data", data, "--metric", "f1")
    assert "the task 'regression' has no metric 'f1'; it has r2, pearson, mse, mae, loss" in done.stderr


def test_the_command_line_without_a_loss(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "m.onnx")
    base = tmp_path / "base"
    done = pocketzo("prepare", tmp_path / "m.onnx", "-o", base, "--loss", "none")
    assert done.stderr == "loss: none (as stated)\n"
    assert "-o runs/first --objective accuracy" in done.stdout
    assert re.search(r"^loss +none *$", pocketzo("info", base).stdout, re.MULTILINE)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (32, 6))
    data = tmp_path / "data.npz"
    np.savez(data, input_ids=ids, labels=ids[:, 0] % 3)
    options = ("--data", data, "--eval", data, "--threads", 1, "--steps", 2, "-o", tmp_path / "run")
    done = pocketzo("train", base, *options)
    assert done.returncode != 0
    assert f"{base}: the bundle has no loss to train by: prepare the model with --loss" in done.stderr
    assert not (tmp_path / "run").exists()
    done = pocketzo("train", base, *options, "--objective", "accuracy", "--eps", 0.1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^accuracy +[\d.]+ %", done.stdout, re.MULTILINE)
    result = json.loads(pocketzo("eval", tmp_path / "run", "--data", data, "--json").stdout)
    assert result["accuracy"] is not None
    assert (result["loss"], result["count"]) == (None, 32)
    # Without scores there is no metric either.
    write_tiny_onnx(tmp_path / "one.onnx", 1)
    done = pocketzo("prepare", tmp_path / "one.onnx", "-o", tmp_path / "one", "--loss", "none")
    assert "next: train by a function of your own" in done.stdout
