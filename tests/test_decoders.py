"""Decoders with caches, float and quantised: they train, replay bit for bit, and plain onnxruntime agrees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_cases import (
    FLOATS,
    GPT2,
    LLAMA,
    MATMULS,
    QUANTISED,
    QWEN2,
    QWEN3,
    Sentences,
    batch_of,
    op_types,
    plain,
    qdq,
)
from decoders import LAYERS, Array, Weights

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:.*prepacked, which is slower")  # where a graph has branches

# ---- the models are what they say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_a_cache_and_one_token_give_the_same_as_all_tokens(name: str, tmp_path: Path) -> None:
    path = FLOATS[name](tmp_path / "m.onnx")
    data = Sentences(path)
    ids = data.ids[data.lengths == 7]
    mask = np.ones_like(ids)
    whole = plain(path, batch_of(path, ids, mask))
    start = plain(path, batch_of(path, ids[:, :-1], mask[:, :-1]))
    last = plain(path, batch_of(path, ids[:, -1:], mask, start))
    np.testing.assert_allclose(last["logits"][:, 0], whole["logits"][:, -1], rtol=1e-3, atol=1e-4)
    for n in range(LAYERS):
        np.testing.assert_allclose(last[f"present.{n}.key"], whole[f"present.{n}.key"], rtol=1e-3, atol=1e-4)


def test_both_forms_of_llama_agree(tmp_path: Path) -> None:
    """One rotates and masks by itself, the other leaves it to onnxruntime."""
    outputs = []
    for name in ("llama", "genai"):
        path = FLOATS[name](tmp_path / f"{name}.onnx")
        data = Sentences(path)
        outputs.append(plain(path, batch_of(path, data.ids, data.mask))["logits"][data.mask == 1])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


def test_both_branches_agree(tmp_path: Path) -> None:
    path = FLOATS["merged gpt2"](tmp_path / "m.onnx")
    data = Sentences(path)
    batch = batch_of(path, data.ids, data.mask)
    both = [plain(path, batch | {"use_cache_branch": np.array([flag])})["logits"] for flag in (False, True)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4, atol=1e-5)


# ---- they train ------------------------------------------------------------------------------------------------------


def accept(path: Path, folder: Path, tolerance: float) -> pz.Bundle:
    """Prepare a decoder, train 3 steps by its loss, replay the journal, and compare with plain onnxruntime."""
    data = Sentences(path)
    everything = data.batch(np.arange(len(data)))
    real = data.mask == 1
    expected = plain(path, everything)["logits"][real]
    bound = tolerance * np.abs(expected).max()

    bundle = pz.prepare(path, folder / "base")
    assert (bundle.loss, bundle.logits) == ("loss", "logits")
    np.testing.assert_allclose(plain(bundle.model_path, everything)["logits"][real], expected, rtol=0, atol=bound)
    model = pz.load(bundle, threads=1)
    outputs = model.run(everything, ["logits", "loss"])
    np.testing.assert_allclose(outputs["logits"][real], expected, rtol=0, atol=bound)
    np.testing.assert_allclose(outputs["loss"], cross_entropy(outputs["logits"], data.labels), rtol=1e-4)

    optimizer = pz.MeZO(model, lr=1e-3, seed=4)
    run = folder / "run"
    pz.Trainer(model, optimizer, data, steps=3, batch_size=4, run=run).fit()
    model.save(folder / "tuned")
    pz.Run(run).replay(folder / "replayed")
    tuned, replayed, base = (folder / name / "weights.safetensors" for name in ("tuned", "replayed", "base"))
    assert file_sha256(tuned) == file_sha256(replayed) != file_sha256(base)

    got = model.run(everything, ["logits"])["logits"][real]
    np.testing.assert_allclose(
        plain(folder / "tuned" / "model.onnx", everything)["logits"][real], got, rtol=0, atol=bound
    )
    assert np.abs(got - expected).max() > 1e-3 * np.abs(expected).max()  # so that a session of the old weights fails
    return bundle


def cross_entropy(logits: Array, labels: Array) -> float:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))[labels != -100]
    return float(-log_p[np.arange(len(log_p)), labels[labels != -100]].mean())


def trained(bundle: pz.Bundle) -> set[str]:
    return {tensor.name for tensor in bundle.tensors if tensor.trainable}


def elements(weights: Weights) -> int:
    return sum(array.size for array in weights.values())


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt2", GPT2),
        ("llama", LLAMA),
        ("qwen2", QWEN2),
        ("qwen3", QWEN3),
        ("merged gpt2", GPT2),
        ("genai", LLAMA),
    ],
)
def test_all_weights_of_a_decoder_train(name: str, weights: Weights, tmp_path: Path) -> None:
    bundle = accept(FLOATS[name](tmp_path / "m.onnx"), tmp_path, 1e-4)
    sizes = [int(np.prod(tensor.shape)) for tensor in bundle.tensors if tensor.trainable]
    assert sum(sizes) == elements(weights)  # a tied table once, in both branches; no frequencies, no rotary tables


# ---- quantised -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # onnxruntime's quantiser writes to the root logger
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("quantise", "operator", "tolerance"), QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize(
    ("name", "weights"),
    [("gpt2", GPT2), ("llama", LLAMA), ("qwen2", QWEN2), ("qwen3", QWEN3), ("merged gpt2", GPT2), ("genai", LLAMA)],
)
def test_what_is_float_in_a_quantised_decoder_trains(
    name: str, weights: Weights, quantise: Callable[[Path, Path], None], operator: str, tolerance: float, tmp_path: Path
) -> None:
    if (name, quantise) == ("merged gpt2", qdq):
        return  # onnxruntime's quantiser leaves branches alone
    path = tmp_path / "m.onnx"
    quantise((FLOATS if quantise is qdq else MATMULS)[name](tmp_path / "float.onnx"), path)
    assert operator in op_types(onnx.load(path).graph)
    bundle = accept(path, tmp_path, tolerance)
    integers = {tensor.name for tensor in bundle.frozen if tensor.kind == "quantised"}
    assert integers
    vectors = {key for key, array in weights.items() if array.ndim == 1}
    assert {key for key in vectors if f"{key}_quantized" not in integers} <= trained(bundle)
    assert trained(bundle) < weights.keys() | {tensor.name for tensor in bundle.tensors if len(tensor.shape) == 2}
