"""Sets of ``--train``: they begin as the base, train, replay bit for bit, and plain onnxruntime agrees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.numpy
from decoders import Array
from test_decoders import FLOATS, MATMULS, plain
from test_language_models import QUANTISED, Sentences, token_losses

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # onnxruntime's quantiser writes to the root logger
    yield
    logging.disable(logging.NOTSET)


def write_quantised(name: str, of: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        source = MATMULS[of](path.with_name("source.onnx"))
        QUANTISED[name][0](source, path)
        return path

    return write


DECODERS: dict[str, Callable[[Path], Path]] = FLOATS | {
    f"{of}, {name}": write_quantised(name, of)
    for of in ("llama", "gpt2", "genai")
    for name in ("int4", "int8 in blocks", "dynamic int8", "QDQ")
}
ENCODERS = ["bert-old", "bert-new", "bert-old-unfolded", "fresh-new"]
ADDED = ["lora:r=2", "ia3", "adapter:4"]


def unoptimised(path: Path, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph as it is: fusions that an added node prevents round otherwise."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feed[v.name] for v in session.get_inputs()}), strict=True))


def check_training(bundle: pz.Bundle, folder: Path, data: Any) -> pz.Model:
    """Train 3 steps, and check that they move the sets alone, and that the journal gives the same again."""
    model = pz.load(bundle, threads=1)
    pz.Trainer(model, pz.MeZO(model, lr=1e-2, seed=4), data, steps=3, batch_size=4, run=folder / "run").fit()
    model.save(folder / "tuned")
    before, after = (
        safetensors.numpy.load_file(path / "weights.safetensors") for path in (bundle.path, folder / "tuned")
    )
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert moved == {tensor.name for tensor in bundle.tensors if tensor.trainable}
    pz.Run(folder / "run").replay(folder / "replayed")
    tuned, replayed = (folder / name / "weights.safetensors" for name in ("tuned", "replayed"))
    assert file_sha256(tuned) == file_sha256(replayed)
    return model


@pytest.mark.parametrize("train", ADDED)
@pytest.mark.parametrize("name", DECODERS)
def test_a_set_is_added_to_a_decoder(name: str, train: str, tmp_path: Path) -> None:
    path = DECODERS[name](tmp_path / "m.onnx")
    data = Sentences(path)
    everything = data.batch(np.arange(len(data)))
    base = pz.prepare(path, tmp_path / "base", task="causal-lm", train="norm")
    bundle = pz.prepare(path, tmp_path / "added", task="causal-lm", train=train)
    assert set(bundle.trainable) == {train}
    assert all(tensor.dtype == "float32" for tensor in bundle.tensors if tensor.trainable)
    frozen = {tensor.name for tensor in bundle.frozen}
    assert {tensor.name for tensor in base.tensors if tensor.trainable} <= frozen

    for file in ("model.onnx", "generate.onnx"):
        expected = unoptimised(base.path / file, everything)
        for key, value in unoptimised(bundle.path / file, everything).items():
            np.testing.assert_array_equal(value, expected[key])

    model = check_training(bundle, tmp_path, data)
    tolerance = next((bound for kind, (_, _, bound) in QUANTISED.items() if name.endswith(kind)), 1e-4)
    trained = model.run(everything)["token_losses"]
    bound = tolerance * np.abs(trained).max()
    assert np.abs(trained - pz.load(base, threads=1).run(everything)["token_losses"]).max() > 1e-5
    logits = plain(tmp_path / "tuned" / "generate.onnx", everything)["logits"]
    np.testing.assert_allclose(trained, token_losses(logits, everything), rtol=0, atol=bound)
