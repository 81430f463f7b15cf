"""Side heads: taps of any graph, the bundle against the head in numpy, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from graphs import BERTS, MODELS, TIED, run
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.data.columns import Columns
from pocketzo.data.names import class_names
from pocketzo.errors import BundleError, DataError, JournalError
from pocketzo.prepare.head import prepare_head
from pocketzo.runtime.onnx_proto import read_graph
from pocketzo.runtime.subgraph import keep_values
from pocketzo.train.head.fit import Fit, Fitter
from pocketzo.train.head.head import Head
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.run import RECORD, HeadRun, with_labels
from pocketzo.train.head.states import Backbone, States

Array = npt.NDArray[Any]
SIZE = 16  # of a hidden state of tests/models


def prepared(name: str, out: Path, **options: Any) -> pz.Bundle:
    return prepare_head(MODELS / f"{name}.onnx", out / "base", **options)


def examples(path: Path, rows: int = 40, classes: int = 3, length: int = 6) -> Path:
    """Write token ids of which the first decides the class, as they are in the data of the core's own tests."""
    random = np.random.default_rng(7)
    ids = random.integers(5, 30, (rows, length))
    labels = np.arange(rows) % classes
    ids[:, 1] = 5 + labels
    mask = np.ones_like(ids)
    mask[::3, 4:] = 0
    np.savez(path, input_ids=ids, attention_mask=mask, labels=labels)
    return path


def fit(bundle: pz.Bundle, data: pz.Dataset, folder: Path, seed: int = 0) -> Fit:
    return Fitter(bundle, Kept.of(bundle, data, threads=1, folder=folder), seed=seed, told=lambda *_: None).fit()


# ---- taps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BERTS, *TIED])
def test_taps_of_exports(name: str, tmp_path: Path) -> None:
    side = prepared(name, tmp_path).side
    assert side is not None
    layers = 1 if name.startswith(("gpt2", "opt")) else 2
    assert [tap.layer for tap in side.taps] == list(range(1, layers + 1))
    assert {tap.size for tap in side.taps} == {SIZE}
    assert side.causal == name.startswith(("gpt2", "opt"))


def write_decoder(kind: str, path: Path) -> Path:
    match kind:
        case "llama":
            return decoders.write_llama(path, decoders.llama_weights(kv_heads=2), 2)
        case "qwen3":
            return decoders.write_llama(path, decoders.llama_weights(kv_heads=2, norms=True, tied=True), 2)
        case "qwen2-vl":
            return decoders.write_qwen2_vl(path, decoders.llama_weights(kv_heads=2, bias=True), 2)
        case "gpt2":
            return decoders.write_gpt2(path, decoders.gpt2_weights())
        case "merged":
            return decoders.write_merged(path, decoders.gpt2_weights())
    return decoders.write_genai(path, decoders.llama_weights(kv_heads=2), 2)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2-vl", "gpt2", "merged", "genai"])
def test_taps_of_decoders(kind: str, tmp_path: Path) -> None:
    bundle = prepare_head(write_decoder(kind, tmp_path / "model.onnx"), tmp_path / "base")
    assert bundle.side is not None
    assert [tap.layer for tap in bundle.side.taps] == [1, 2]
    assert bundle.side.causal
    taps = states(bundle, {name: array for name, array in (bundle.probe or {}).items() if name != "labels"})
    np.testing.assert_allclose(np.square(taps[1]).mean(axis=-1), 1, rtol=1e-3)  # the sum of the stream, normalised
    assert not any(name.startswith("lm_head") for name in (spec.name for spec in bundle.tensors))


def states(bundle: pz.Bundle, feed: dict[str, Array]) -> dict[int, Array]:
    """Return the taps by plain onnxruntime, each by a graph that ends there."""
    assert bundle.side is not None
    found = {}
    for tap in bundle.side.taps:
        model = read_graph(bundle.model_path)
        keep_values(model.graph, [f"side.{tap.layer}.tap"])
        path = bundle.path / "tap.onnx"
        path.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        (found[tap.layer],) = session.run(None, {name: array for name, array in feed.items() if name in names})
        path.unlink()
    return found


def test_the_last_tap_of_an_encoder_is_its_last_hidden_state(tmp_path: Path) -> None:
    """And the first is what the second layer reads."""
    model = onnx.load(MODELS / "bert-old.onnx")
    hidden = "/bert/encoder/layer.{}/output/LayerNorm/Add_1_output_0"
    for layer in (0, 1):
        model.graph.output.append(helper.make_tensor_value_info(hidden.format(layer), TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "hidden.onnx")
    bundle = prepared("bert-old", tmp_path)
    feed = {name: array for name, array in (bundle.probe or {}).items() if name != "labels"}
    expected = run(tmp_path / "hidden.onnx", feed)
    for layer, got in states(bundle, feed).items():
        np.testing.assert_allclose(got, expected[hidden.format(layer - 1)], atol=1e-5)


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    model = onnx.load(MODELS / "bert-old.onnx")
    hidden = "/bert/encoder/layer.1/output/LayerNorm/Add_1_output_0"
    last = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", SIZE])
    model.graph.node.append(helper.make_node("Identity", [hidden], ["last_hidden_state"]))
    del model.graph.output[:]
    model.graph.output.append(last)
    onnx.save(model, tmp_path / "model.onnx")
    bundle = prepare_head(tmp_path / "model.onnx", tmp_path / "base", labels=["a", "b"])
    assert bundle.labels == ("a", "b")
    assert bundle.trainable.keys() == {"side-head"}
    assert {spec.reason.partition(":")[0] for spec in bundle.frozen} <= {"request", "constant", "buffer"}


def test_a_graph_without_attention_is_refused(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.ones((30, 4), np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", 4])],
        [table],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(BundleError, match="no residual stream was found"):
        prepare_head(tmp_path / "m.onnx", tmp_path / "base")
    assert not (tmp_path / "base").exists()


# ---- the bundle ------------------------------------------------------------------------------------------------------


def random_head(bundle: pz.Bundle, layers: tuple[int, ...], columns: int, *, last: bool) -> Head:
    assert bundle.side is not None
    random = np.random.default_rng(3)
    size = bundle.side.taps[0].size
    queries = 1 if columns <= 2 else columns

    def array(*shape: int) -> npt.NDArray[np.float32]:
        return random.normal(scale=0.3, size=shape).astype(np.float32)

    weights: list[npt.NDArray[np.float32]] = [array(size, columns) for _ in layers]
    alone = [array(size, columns) * np.float32(last) for _ in layers]
    return Head(layers, weights, [array(size, queries) for _ in layers], array(columns), alone)


@pytest.mark.parametrize(
    ("layers", "columns", "last"), [((1, 2), 3, True), ((1,), 2, True), ((2,), 3, False), ((1,), 3, True)]
)
def test_the_bundle_computes_what_the_head_does(
    layers: tuple[int, ...], columns: int, last: bool, tmp_path: Path
) -> None:
    base = prepare_head(write_decoder("llama", tmp_path / "model.onnx"), tmp_path / "base")
    head = random_head(base, layers, columns, last=last)
    labels = tuple("abc"[:columns])
    record = HeadRun.of(base, head, labels, {})
    record.write(tmp_path / "run", head)
    again, read = HeadRun.read(tmp_path / "run")
    again.write_bundle(read, tmp_path / "tuned")
    tuned = pz.Bundle.read(tmp_path / "tuned")
    assert tuned.labels == labels
    data = pz.load_dataset(examples(tmp_path / "data.npz", classes=columns), tuned)
    feed = dict(data.batch(np.arange(7)))
    taps = states(base, feed)
    found = States(np.arange(7), feed["attention_mask"] != 0, [taps[1], taps[2]])
    expected = head.scores(found, (1, 2))
    outputs = run(tuned.model_path, feed)
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-5)
    top = expected - expected.max(axis=1, keepdims=True)
    loss = np.log(np.exp(top).sum(axis=1)) - top[np.arange(7), feed["labels"]]
    np.testing.assert_allclose(outputs["loss"], loss.mean(), rtol=1e-5)
    names = {spec.name for spec in tuned.tensors}
    assert ("model.layers.1.mlp.up_proj.MatMul" in str(names)) == (layers[-1] == 2)  # layers behind are cut
    assert pz.evaluate(pz.load(tuned, threads=1, verify="full"), data).keys() == {"count", "accuracy", "loss"}


def test_a_run_repeats_and_its_bundle_too(tmp_path: Path) -> None:
    base = with_labels(prepared("bert-new", tmp_path), "abc")
    data = pz.load_dataset(examples(tmp_path / "data.npz"), base)
    first, second = (fit(base, data, tmp_path) for _ in range(2))
    for number, one in enumerate((first, second)):
        record = HeadRun.of(base, one.head, "abc", {})
        record.write_bundle(one.head, tmp_path / f"tuned-{number}")
    for name in ("model.onnx", "weights.safetensors", "bundle.json"):
        assert (tmp_path / "tuned-0" / name).read_bytes() == (tmp_path / "tuned-1" / name).read_bytes()
    assert pz.evaluate(pz.load(tmp_path / "tuned-0", threads=1), data)["accuracy"] > 0.9
    other = fit(base, data, tmp_path, seed=1)
    assert [trial.loss for trial in other.trials] != [trial.loss for trial in first.trials]


def test_layers_are_not_run_behind_the_last_tap(tmp_path: Path) -> None:
    bundle = prepared("bert-old", tmp_path)
    data = pz.load_dataset(examples(tmp_path / "data.npz"), bundle)
    counts = []
    for layers in ([1], [1, 2]):
        model = read_graph(bundle.model_path)
        keep_values(model.graph, [f"side.{layer}.tap" for layer in layers])
        counts.append(sum(node.op_type == "Softmax" for node in model.graph.node))
        batches = list(Backbone(bundle, layers, 1).run(data))
        assert sorted(np.concatenate([one.examples for one in batches])) == list(range(40))
    assert counts == [1, 2]


def test_numbers_and_sets_of_labels(tmp_path: Path) -> None:
    path = examples(tmp_path / "data.npz")
    with np.load(path) as file:
        arrays = dict(file)
    first = arrays["labels"]
    for task, labels, metric, least in (
        ("regression", 10 + 4 * first.astype(np.float32), "r2", 0.8),
        ("multi-label", np.stack([first == 1, first > 0], axis=1).astype(np.float32), "micro-f1", 0.9),
    ):
        folder = tmp_path / task
        folder.mkdir()
        names = ["a", "b"] if task == "multi-label" else None
        base = prepared("bert-new", folder, task=task, labels=names)
        np.savez(folder / "data.npz", **{**arrays, "labels": labels})
        data = pz.load_dataset(folder / "data.npz", base)
        found = fit(base, data, tmp_path)
        HeadRun.of(base, found.head, names, {}).write_bundle(found.head, folder / "tuned")
        assert pz.evaluate(pz.load(folder / "tuned", threads=1), data)[metric] > least


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "choice"}, "is for the tasks"),
        ({"task": "prompt"}, "a template belongs to the task 'prompt'"),
        ({"template": "{text} is {mask}"}, "leave {mask} out"),
        ({"task": "regression", "labels": ["a", "b"]}, "the task 'regression' has none"),
        ({"task": "multi-label"}, "needs labels"),
        ({"labels": ["a"]}, "two or more"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepared("bert-old", tmp_path, **options)


def test_a_model_without_a_mask_is_refused(tmp_path: Path) -> None:
    model = onnx.load(MODELS / "bert-old.onnx")
    shape = helper.make_node("Shape", ["input_ids"], ["mask_shape"])
    one = numpy_helper.from_array(np.ones(1, np.int64))
    mask = helper.make_node("ConstantOfShape", ["mask_shape"], ["attention_mask"], value=one)
    kept = [value for value in model.graph.input if value.name != "attention_mask"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    nodes = [shape, mask, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="needs an input 'attention_mask'"):
        prepare_head(tmp_path / "model.onnx", tmp_path / "base")


def test_one_class_and_few_examples_are_refused(tmp_path: Path) -> None:
    base = with_labels(prepared("bert-old", tmp_path), "ab")
    few = pz.load_dataset(examples(tmp_path / "few.npz", rows=4, classes=2), base)
    with pytest.raises(DataError, match="takes 5 examples: got 4"):
        fit(base, few, tmp_path)
    same = pz.load_dataset(examples(tmp_path / "same.npz", rows=8, classes=1), base)
    with pytest.raises(DataError, match="all 8 examples have one class"):
        fit(base, same, tmp_path)


def test_damaged_and_foreign_runs(tmp_path: Path) -> None:
    base = prepared("bert-old", tmp_path)
    head = random_head(base, (1,), 3, last=False)
    HeadRun.of(base, head, "abc", {}).write(tmp_path / "run", head)
    other = prepare_head(MODELS / "bert-new.onnx", tmp_path / "other")
    record, read = HeadRun.read(tmp_path / "run")
    with pytest.raises(JournalError, match="not the file that the head was fitted to"):
        record.write_bundle(read, tmp_path / "tuned", bundle=other.path)
    parameters = tmp_path / "run" / "head.safetensors"
    content = bytearray(parameters.read_bytes())
    content[-1] ^= 1
    parameters.write_bytes(content)
    with pytest.raises(JournalError, match="not the head that"):
        HeadRun.read(tmp_path / "run")
    (tmp_path / "run" / RECORD).write_text("{")
    with pytest.raises(JournalError, match="damaged"):
        HeadRun.read(tmp_path / "run")


# ---- names of classes, and the commands ------------------------------------------------------------------------------


def command(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_names_of_classes(tmp_path: Path) -> None:
    base = prepared("bert-old", tmp_path)
    path = tmp_path / "data.tsv"
    for labels, expected in (("b a b", ("a", "b")), ("10 9 2", ("2", "9", "10"))):
        path.write_text("".join(f"text\t{label}\n" for label in labels.split()))
        assert class_names(path, base, Columns()) == expected
    path.write_text("text\nmore\n")
    with pytest.raises(DataError, match="no labels"):
        class_names(path, base, Columns())


def test_the_commands(tmp_path: Path) -> None:
    data = examples(tmp_path / "data.npz")
    base, folder, out = (str(tmp_path / name) for name in ("base", "run", "tuned"))

    model = str(MODELS / "bert-new.onnx")
    refused = command("prepare", model, "-o", base, "--train", "all", "--task", "classification", code=1)
    assert "the task 'classification' is for train='side-head', got 'all'" in refused
    assert "frozen" in command("prepare", model, "-o", base, "--train", "side-head", "--loss", "bce", code=1)
    command("prepare", model, "-o", base, "--task", "classification")
    assert "--lr is for training in steps" in command(
        "train", base, "--data", str(data), "-o", folder, "--lr", "1", code=2
    )
    printed = command("train", base, "--data", str(data), "--eval", str(data), "-o", folder, "--threads", "1")
    assert "linear probe" in printed
    assert "side head" in printed
    command("replay", folder, "-o", out)
    shown = json.loads(command("eval", out, "--data", str(data), "--json"))
    assert shown["accuracy"] > 0.9
    assert json.loads(command("eval", folder, "--data", str(data), "--json")) == shown
    results = json.loads((tmp_path / "run" / RECORD).read_text())["results"]
    assert results["eval"]["accuracy"] == pytest.approx(shown["accuracy"])
    about = command("info", folder)
    assert "linear probe" in about
    assert f"{Path(base)}" in about.replace("\n", "")
    described = json.loads(command("info", folder, "--json"))
    assert (described["kind"], described["eval"]) == ("side head", results["eval"])
    assert described["parameters"] == sum(array.size for array in HeadRun.read(tmp_path / "run")[1].tensors().values())
    assert "it generates no text" in command("generate", folder, "--prompt", "a", code=1)
    assert "--average belong to a run of steps" in command("eval", folder, "--data", str(data), "--best", code=2)
    assert "no empty folder" in command("train", base, "--data", str(data), "-o", folder, code=1)


def test_a_prompt_from_raw_text(tmp_path: Path) -> None:
    """Three commands, with the names of the classes from the training data."""
    names = {f"w{number}": number for number in range(decoders.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(names, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))  # beside the model, where it is found
    model = write_decoder("llama", tmp_path / "model.onnx")
    random = np.random.default_rng(5)
    lines = []
    for number in range(60):
        words = [f"w{one}" for one in random.integers(10, 30, 2 + number % 3)]
        lines.append(f"{'w8' if number % 2 else 'w9'} {' '.join(words)}\t{'good' if number % 2 else 'bad'}\n")
    (tmp_path / "train.tsv").write_text("".join(lines[:40]))
    (tmp_path / "dev.tsv").write_text("".join(lines[40:]))
    base, folder = str(tmp_path / "base"), str(tmp_path / "run")
    command("prepare", str(model), "-o", base, "--task", "prompt", "--template", "w1 {text} w2", "--max-length", "12")
    printed = command("train", base, "--data", str(tmp_path / "train.tsv"), "-o", folder, "--threads", "1")
    assert "2 classes" in printed
    command("replay", folder, "-o", str(tmp_path / "tuned"))
    tuned = pz.Bundle.read(tmp_path / "tuned")
    assert tuned.labels == ("bad", "good")
    assert tuned.task is not None
    assert tuned.task.name == "prompt"
    data = pz.load_dataset(tmp_path / "dev.tsv", tuned)
    assert data.lengths is not None
    assert data.lengths.max() == 7  # 1 + 1 + 4 + 1 words
    shown = json.loads(command("eval", str(tmp_path / "tuned"), "--data", str(tmp_path / "dev.tsv"), "--json"))
    assert shown["accuracy"] > 0.8
    (tmp_path / "dev.tsv").write_text("w8 w11\tugly\n")
    assert "unknown label 'ugly'" in command("eval", folder, "--data", str(tmp_path / "dev.tsv"), code=1)
