"""Bundles of language models: the training graph gives the losses of the export's logits, and the export generates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoder_cases import FLOATS, MATMULS, QUANTISED, Sentences, batch_of, op_types, plain, qdq
from decoders import VOCABULARY, Array

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

WORDS = [f"w{n}" for n in range(VOCABULARY)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # onnxruntime's quantiser writes to the root logger
    yield
    logging.disable(logging.NOTSET)


@dataclass
class Continued(Sentences):
    """The sentences as a batch of causal-lm: every real token but the first of its sentence is predicted."""

    def batch(self, indices: Array) -> pz.Batch:
        ids, mask = self.ids[indices], self.mask[indices]
        rows, columns = np.nonzero(mask[:, 1:])
        arrays = batch_of(self.path, ids, mask) | {
            "positions": rows * ids.shape[1] + columns,
            "targets": ids[rows, columns + 1],
        }
        return pz.Batch(arrays, np.asarray(indices))


def token_losses(logits: Array, batch: pz.Batch) -> Array:
    rows = logits.reshape(-1, VOCABULARY)[batch["positions"]].astype(np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return np.asarray(-log_p[np.arange(len(rows)), batch["targets"]])


def warm(path: Path, data: Sentences) -> dict[str, Array]:
    """Return the outputs for a token and a cache of the tokens before it."""
    ids = data.ids[data.lengths == 7]
    mask = np.ones_like(ids)
    start = plain(path, batch_of(path, ids[:, :-1], mask[:, :-1]))
    return plain(path, batch_of(path, ids[:, -1:], mask, start))


def of_every_token(path: Path, batch: dict[str, Array]) -> list[str]:
    """Return the names of values with an element for every token of a batch and word of the vocabulary."""
    proto = onnx.load(path, load_external_data=False)
    values = [value for node in proto.graph.node for value in node.output if value]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(value) for value in values)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    got = session.run(None, {value.name: batch[value.name] for value in session.get_inputs()})
    size = batch["input_ids"].size * VOCABULARY
    return [name for name, value in zip(values, got, strict=True) if value.size == size and VOCABULARY in value.shape]


def accept(path: Path, folder: Path, tolerance: float, **options: Any) -> pz.Bundle:
    """Prepare a decoder for causal-lm, compare both graphs with the export, train 3 steps and replay the journal."""
    data = Continued(path)
    everything = data.batch(np.arange(len(data)))
    expected = token_losses(plain(path, everything)["logits"], everything)
    bound = tolerance * np.abs(expected).max()

    bundle = pz.prepare(path, folder / "base", task="causal-lm", **options)
    assert (bundle.loss, bundle.logits) == ("loss", None)
    assert [value.name for value in bundle.outputs] == ["token_losses", "loss"]
    assert not any(value.name.startswith(("past", "use_cache", "labels")) for value in bundle.inputs)
    assert "If" not in op_types(onnx.load(bundle.model_path, load_external_data=False).graph)
    assert bundle.frozen == pz.prepare(path, folder / "other", **options).frozen
    model = pz.load(bundle, threads=1)
    outputs = model.run(everything)
    np.testing.assert_allclose(outputs["token_losses"], expected, rtol=0, atol=bound)
    np.testing.assert_allclose(outputs["loss"], outputs["token_losses"].mean(), rtol=1e-5)
    few = {**everything, "positions": everything["positions"][:2], "targets": everything["targets"][:2]}
    assert of_every_token(bundle.model_path, few) == []
    assert "logits" in of_every_token(bundle.generate_path, few)

    if not options:  # the same nodes, over the same numbers
        for name, value in warm(path, data).items():
            np.testing.assert_array_equal(warm(bundle.generate_path, data)[name], value)
    optimizer = pz.MeZO(model, lr=1e-3, seed=4)
    run = folder / "run"
    pz.Trainer(model, optimizer, data, steps=3, batch_size=4, run=run).fit()
    model.save(folder / "tuned")
    pz.Run(run).replay(folder / "replayed")
    tuned, replayed, base = (folder / name / "weights.safetensors" for name in ("tuned", "replayed", "base"))
    assert file_sha256(tuned) == file_sha256(replayed) != file_sha256(base)

    trained = model.run(everything)["token_losses"]
    assert np.abs(trained - expected).max() > bound / 100
    logits = plain(folder / "tuned" / "generate.onnx", everything)["logits"]
    np.testing.assert_allclose(trained, token_losses(logits, everything), rtol=0, atol=bound)
    return bundle


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_decoder_trains_and_generates(name: str, tmp_path: Path) -> None:
    bundle = accept(FLOATS[name](tmp_path / "m.onnx"), tmp_path, 1e-4)
    assert bundle.task is not None
    assert (bundle.task.name, bundle.task.settings) == ("causal-lm", {"loss": "cross-entropy"})
    assert pz.load(bundle).prepacked  # as no branch is left


@pytest.mark.parametrize(("quantise", "operator", "tolerance"), QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "merged gpt2", "genai"])
@pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")
def test_a_quantised_decoder_trains_and_generates(
    name: str, quantise: Callable[[Path, Path], None], operator: str, tolerance: float, tmp_path: Path
) -> None:
    if (name, quantise) == ("merged gpt2", qdq):
        return  # onnxruntime's quantiser leaves branches alone
    path = tmp_path / "m.onnx"
    quantise((FLOATS if quantise is qdq else MATMULS)[name](tmp_path / "float.onnx"), path)
    bundle = accept(path, tmp_path, tolerance)
    assert operator in op_types(onnx.load(bundle.model_path, load_external_data=False).graph)


@pytest.mark.parametrize("name", ["gpt2", "llama", "merged gpt2"])
@pytest.mark.filterwarnings("ignore:this processor does not compute in fp16")
def test_a_decoder_in_float16_trains_and_generates(name: str, tmp_path: Path) -> None:
    accept(FLOATS[name](tmp_path / "m.onnx"), tmp_path, 5e-2, dtype="float16")
