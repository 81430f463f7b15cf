from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import safetensors.numpy
from graphs import (
    BERTS,
    MODELS,
    TIED,
    Live,
    inputs_of,
    labels_for,
    run,
)
from onnx import TensorProto, numpy_helper

from pocketzo.formats.bundle import Bundle
from pocketzo.prepare import prepare

Array = npt.NDArray[Any]

# The exporter drops the biases of Gemm nodes that are zeros, so that there is nothing to train.
DROPPED = {"fresh-new": {"bert.pooler.dense.bias", "classifier.bias"}}
# Tied parameters: torch names them once, by the first of their names, the exporters by any.
SAME = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "model.lm_head.weight": "model.transformer.wte.weight",
}


@pytest.mark.parametrize("name", BERTS + TIED)
def test_outputs_are_those_of_torch_and_of_the_original(bundles: Callable[[str], Bundle], name: str) -> None:
    feed = inputs_of(name)
    with np.load(MODELS / f"{name}.npz") as file:
        expected = file["logits"]
    labels = labels_for(expected)
    original = run(MODELS / f"{name}.onnx", feed)
    prepared = run(bundles(name).model_path, feed | {"labels": labels})
    np.testing.assert_allclose(prepared["logits"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prepared["logits"], original["logits"], rtol=1e-5, atol=1e-6)
    logits = expected.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, labels[..., None], -1).mean()
    assert prepared["loss"].shape == ()
    assert prepared["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", BERTS + TIED)
def test_every_trainable_tensor_is_live(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    feed = inputs_of(name)
    with np.load(MODELS / f"{name}.npz") as file:
        feed["labels"] = labels_for(file["logits"])
    assert Live(bundle).dead(bundle, feed) == []


@pytest.mark.parametrize("name", BERTS + TIED)
def test_every_parameter_of_the_torch_module_is_there(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    loaded = safetensors.numpy.load_file(bundle.weights_path)
    with np.load(MODELS / f"{name}.npz") as file:
        parameters = {
            SAME.get(key, key): (shape, total, square)
            for key, shape, total, square in zip(
                file["names"], file["shapes"], file["sums"], file["squares"], strict=True
            )
            if key not in DROPPED.get(name, ())
        }
    assert {SAME.get(tensor.name, tensor.name) for tensor in bundle.tensors} == set(parameters)
    for tensor in bundle.tensors:
        array = loaded[tensor.name].astype(np.float64)
        shape, total, square = parameters[SAME.get(tensor.name, tensor.name)]
        assert tensor.trainable
        assert "x".join(map(str, sorted(tensor.shape))) == shape
        assert array.sum() == pytest.approx(total, rel=1e-6, abs=1e-6)
        assert np.square(array).sum() == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize("name", BERTS + TIED)
def test_the_graph_points_to_aligned_weights_and_keeps_none(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    model = onnx.load(bundle.model_path, load_external_data=False)
    onnx.checker.check_model(os.fspath(bundle.model_path))
    loaded = safetensors.numpy.load_file(bundle.weights_path)
    content = bundle.weights_path.read_bytes()
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert [tensor.name for tensor in external] == [tensor.name for tensor in bundle.tensors]
    for tensor in external:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        offset = int(fields["offset"])
        assert fields["location"] == "weights.safetensors"
        assert offset % 64 == 0
        assert content[offset : offset + int(fields["length"])] == loaded[tensor.name].tobytes()
    inline = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor not in external]
    assert not [array for array in inline if array.dtype.kind == "f" and array.size > 1]
    assert bundle.model_path.stat().st_size < (MODELS / f"{name}.onnx").stat().st_size


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_is_one_tensor(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    shapes = Counter(tuple(sorted(tensor.shape)) for tensor in bundle.tensors)
    assert shapes[16, 64] == (3 if "gpt2" in name else 1)  # GPT-2 has two layers of that size besides
    model = onnx.load(bundle.model_path, load_external_data=False)
    table = next(
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in {tensor.name for tensor in bundle.tensors if tensor.shape == (64, 16)}
    )
    readers = [node for node in model.graph.node if table in node.input]
    assert sorted(node.op_type for node in readers) == ["Gather", "Gemm"]


@pytest.mark.parametrize("name", ["fresh-old", "fresh-new"])
def test_merged_weights_are_separate_again(bundles: Callable[[str], Bundle], name: str) -> None:
    """Writing one of two parameters that were merged must not be the same as writing the other."""
    bundle = bundles(name)
    live = Live(bundle)
    feed = inputs_of(name) | {"labels": np.array([0, 1])}
    rng = np.random.default_rng(0)
    for array in live.weights.values():
        array += rng.normal(0, 0.2, array.shape).astype(np.float32)
    results = [live.outputs(feed)[0].tobytes()]
    for name in "query.bias", "value.bias":
        for layer in range(2):
            array = live.weights[f"bert.encoder.layer.{layer}.attention.self.{name}"]
            kept = array.copy()
            array += np.arange(16, dtype=np.float32)
            results.append(live.outputs(feed)[0].tobytes())
            array[...] = kept
    assert len(set(results)) == len(results) == 5


def test_both_exporters_give_the_same_names_and_ids(bundles: Callable[[str], Bundle]) -> None:
    old, new, unfolded = (
        {tensor.name: (tensor.id, tensor.shape) for tensor in bundles(name).tensors}
        for name in ("bert-old", "bert-new", "bert-old-unfolded")
    )
    assert old == new == unfolded


def test_preparing_twice_changes_nothing(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    first = bundles("mlm-old")
    second = prepare(first.model_path, tmp_path / "second")
    assert second.tensors == first.tensors
    assert second.base_sha256 == first.base_sha256
    assert (second.inputs, second.outputs, second.loss) == (first.inputs, first.outputs, first.loss)


def test_the_same_model_makes_the_same_bytes(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    again = prepare(MODELS / "bert-new.onnx", tmp_path / "again")
    first = bundles("bert-new")
    assert (again.graph_sha256, again.base_sha256) == (first.graph_sha256, first.base_sha256)


def test_weights_in_external_data_are_found(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    model = onnx.load(MODELS / "bert-old.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert prepare(tmp_path / "model.onnx", tmp_path / "out").base_sha256 == bundles("bert-old").base_sha256


def test_a_file_of_external_data_for_each_tensor(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    model = onnx.load(MODELS / "bert-old.onnx")
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert prepare(tmp_path / "model.onnx", tmp_path / "out").base_sha256 == bundles("bert-old").base_sha256
