from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from graphs import MODELS
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper, save
from sizes import SIZE

import pocketzo as pz

pytest_plugins = ["skips"]

os.environ.pop("PYTHONUNBUFFERED", None)  # CI sets it for its log, and users run programs without it

VOCABULARY, WIDTH, HIDDEN, CLASSES = 50, 24, 40, 3

if SIZE == "small":
    settings.register_profile("small", max_examples=10, deadline=None)
    settings.load_profile("small")


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # for child processes, too


def write_tiny_onnx(path: Path, classes: int = CLASSES) -> None:
    """A bag-of-words classifier with a hidden layer: small, but with every kind of weight that a transformer has."""
    rng = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> TensorProto:
        scale = 1 / np.sqrt(shape[0]) if len(shape) > 1 else 0.1
        return numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(np.float32), name)

    nodes = [
        helper.make_node("Gather", ["embedding.weight", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["tokens", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "one"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("LayerNormalization", ["mean", "norm.weight", "norm.bias"], ["normed"], epsilon=1e-5),
        helper.make_node("MatMul", ["normed", "dense.weight"], ["dense_0"]),
        helper.make_node("Add", ["dense_0", "dense.bias"], ["dense_1"]),
        helper.make_node("Tanh", ["dense_1"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "classifier.weight", "classifier.bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
            for n in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [
            weight("embedding.weight", VOCABULARY, WIDTH),
            numpy_helper.from_array(np.ones(WIDTH, np.float32), "norm.weight"),
            numpy_helper.from_array(np.zeros(WIDTH, np.float32), "norm.bias"),
            weight("dense.weight", WIDTH, HIDDEN),
            weight("dense.bias", HIDDEN),
            weight("classifier.weight", HIDDEN, classes),
            weight("classifier.bias", classes),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, path)


def write_tiny_data(path: Path) -> None:
    """120 examples (.npz of token ids) whose class a linear model can find."""
    rng = np.random.default_rng(3)
    ids = rng.integers(1, VOCABULARY, (120, 8))
    labels = (ids[:, 0] * 7 + ids[:, 1]) % CLASSES
    ids[np.arange(120), 2] = labels + 1
    np.savez(path, input_ids=ids, labels=labels)


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 3,000 parameters with 3 classes, as an exporter would write it."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    write_tiny_onnx(path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_onnx: Path) -> Path:
    """The same, prepared; not to be changed."""
    folder = tiny_onnx.parent
    pz.prepare(tiny_onnx, folder / "bundle", labels=["red", "green", "blue"], max_length=16)
    return folder / "bundle"


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pz.Bundle]:
    """Prepares a model of ``models/`` by its name; not to be changed."""
    folder = tmp_path_factory.mktemp("bundles")

    def get(name: str) -> pz.Bundle:
        if not (folder / name).exists():
            pz.prepare(MODELS / f"{name}.onnx", folder / name)
        return pz.Bundle.read(folder / name)

    return get


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`write_tiny_data`; not to be changed."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_tiny_data(path)
    return path


@pytest.fixture
def data(tiny_bundle: Path, tiny_data: Path) -> pz.Dataset:
    return pz.load_dataset(tiny_data, pz.Bundle.read(tiny_bundle))


@pytest.fixture
def model(tiny_bundle: Path) -> pz.Model:
    return pz.load(tiny_bundle, threads=1)


@pytest.fixture
def quiet_quantiser() -> Iterator[None]:
    """Drop what onnxruntime's quantiser writes to the root logger."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
