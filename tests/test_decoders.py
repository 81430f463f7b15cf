"""Decoders with caches, float and quantised: they train, replay bit for bit, and plain onnxruntime agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoders import (
    HEADS,
    LAYERS,
    SIZE,
    VOCABULARY,
    Array,
    Weights,
    gpt2_weights,
    keep_last,
    llama_weights,
    write_genai,
    write_gpt2,
    write_llama,
    write_merged,
    write_qwen2_vl,
)
from described import PAD, write_tokenizer
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from tokenizers import Tokenizer

import pocketzo as pz
from pocketzo.data.dataset import fixed_batch
from pocketzo.formats.safetensors import file_sha256

pytestmark = [
    pytest.mark.usefixtures("quiet_quantiser"),
    pytest.mark.filterwarnings("ignore:.*prepacked, which is slower"),  # where a graph has branches
]

LLAMA = llama_weights(kv_heads=2)
GPT2 = gpt2_weights()
QWEN2 = llama_weights(kv_heads=2, bias=True, tied=True)
QWEN3 = llama_weights(kv_heads=2, norms=True, tied=True)
FLOATS: dict[str, Callable[[Path], Path]] = {
    "gpt2": lambda path: write_gpt2(path, GPT2),
    "llama": lambda path: write_llama(path, LLAMA, 2),
    "llama, a head each": lambda path: write_llama(path, llama_weights(kv_heads=HEADS), HEADS),
    "qwen2": lambda path: write_llama(path, QWEN2, 2),
    "qwen2-vl": lambda path: write_qwen2_vl(path, QWEN2, 2),
    "qwen3": lambda path: write_llama(path, QWEN3, 2),
    "merged gpt2": lambda path: write_merged(path, GPT2),
    "genai": lambda path: write_genai(path, LLAMA, 2),
}
MATMULS = FLOATS | {  # Gemm is quantised by some only, and by blocks by none
    "gpt2": lambda path: write_gpt2(path, GPT2, gemm=False),
    "merged gpt2": lambda path: write_merged(path, GPT2, gemm=False),
}


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_of(path: Path, ids: Array, mask: Array, past: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Return the inputs of a decoder; `mask` covers what is in the caches too."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
    for value in session.get_inputs():
        if value.name == "position_ids":
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, mask.shape[1] - ids.shape[1] :]
            batch[value.name] = positions if len(value.shape) == 2 else np.stack([positions] * value.shape[0])
        elif value.name == "use_cache_branch":
            batch[value.name] = np.array([past is not None])
        elif value.name.startswith("past_key_values"):
            empty = np.zeros((len(ids), value.shape[1], 0, SIZE), np.float32)
            batch[value.name] = empty if past is None else past[value.name.replace("past_key_values", "present")]
    return batch


def plain(path: Path, batch: Mapping[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs() if value.name != "loss"]
    wanted = {value.name for value in session.get_inputs()}
    given = {"labels": np.zeros_like(batch["input_ids"]), **batch}
    feed = {name: array for name, array in given.items() if name in wanted}
    return dict(zip(outputs, session.run(outputs, feed), strict=True))


@dataclass
class Sentences:
    """Random sentences, padded on the right, with the tokens shifted by one as labels."""

    lengths: Array = field(default_factory=lambda: np.array([7, 5, 6, 7, 3, 7, 4, 6]))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(9)
        self.mask = (np.arange(7) < self.lengths[:, None]).astype(np.int64)
        self.ids = rng.integers(1, VOCABULARY, self.mask.shape) * self.mask
        self.labels = np.full_like(self.ids, -100)
        self.labels[:, :-1] = np.where(self.mask[:, 1:] == 1, self.ids[:, 1:], -100)

    def save(self, path: Path) -> Path:
        np.savez(path, input_ids=self.ids, attention_mask=self.mask, labels=self.labels)
        return path


# ---- the models are what they say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_a_cache_and_one_token_give_the_same_as_all_tokens(name: str, tmp_path: Path) -> None:
    path = FLOATS[name](tmp_path / "m.onnx")
    data = Sentences()
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
        data = Sentences()
        outputs.append(plain(path, batch_of(path, data.ids, data.mask))["logits"][data.mask == 1])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


def test_both_branches_agree(tmp_path: Path) -> None:
    path = FLOATS["merged gpt2"](tmp_path / "m.onnx")
    data = Sentences()
    batch = batch_of(path, data.ids, data.mask)
    both = [plain(path, batch | {"use_cache_branch": np.array([flag])})["logits"] for flag in (False, True)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4, atol=1e-5)


# ---- they train ------------------------------------------------------------------------------------------------------


def accept(path: Path, folder: Path, tolerance: float) -> pz.Bundle:
    """Prepare a decoder, train 3 steps by its loss, replay the journal, and compare with plain onnxruntime."""
    data = Sentences()
    everything = batch_of(path, data.ids, data.mask) | {"labels": data.labels}
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

    examples = pz.load_dataset(data.save(folder / "data.npz"), bundle)
    read = examples.batch(np.arange(len(examples)))
    assert read.keys() == everything.keys()
    for name, array in read.items():
        both = array, everything[name]
        got, wanted = (each[..., real] for each in both) if name == "position_ids" else both  # any of padding
        np.testing.assert_array_equal(got, wanted, strict=True)

    optimizer = pz.MeZO(model, lr=1e-3, seed=4)
    run = folder / "run"
    pz.Trainer(model, optimizer, examples, steps=3, batch_size=4, run=run).fit()
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
        ("qwen2-vl", QWEN2),
        ("qwen3", QWEN3),
        ("merged gpt2", GPT2),
        ("genai", LLAMA),
    ],
)
def test_all_weights_of_a_decoder_train(name: str, weights: Weights, tmp_path: Path) -> None:
    bundle = accept(FLOATS[name](tmp_path / "m.onnx"), tmp_path, 1e-4)
    assert fixed_batch(bundle) is None  # though flags and positions may have a first axis of fixed size
    sizes = [int(np.prod(tensor.shape)) for tensor in bundle.tensors if tensor.trainable]
    assert sum(sizes) == elements(weights)  # a tied table once, in both branches; no frequencies, no rotary tables


@pytest.mark.parametrize("name", ["num_logits_to_keep", "logits_to_keep"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_decoder_that_keeps_some_logits_trains_on_all(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    data = Sentences().save(tmp_path / "data.npz")
    results = []
    for folder in (tmp_path / "plain", tmp_path / "kept"):
        folder.mkdir()
        path = FLOATS["genai"](folder / "m.onnx")
        if folder.name == "kept":
            model = onnx.load(path)
            keep_last(model.graph, name, shape)
            onnx.save(model, path)
        bundle = pz.prepare(path, folder / "base")
        assert (name in [spec.name for spec in bundle.inputs]) == (folder.name == "kept")
        loaded = pz.load(bundle, threads=1)
        examples = pz.load_dataset(data, bundle)
        pz.Trainer(loaded, pz.MeZO(loaded, lr=1e-3, seed=4), examples, steps=2, activation_memory=10_000).fit()
        results.append(pz.evaluate(loaded, examples)["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_positions_by_section_may_be_given_by_token(tmp_path: Path) -> None:
    bundle = pz.prepare(FLOATS["qwen2-vl"](tmp_path / "m.onnx"), tmp_path / "base")
    data = Sentences()
    positions = np.arange(7) + np.arange(8)[:, None]
    given: dict[str, Any] = {"input_ids": data.ids, "attention_mask": data.mask, "labels": data.labels}
    np.savez(tmp_path / "data.npz", position_ids=positions, **given)
    examples = pz.load_dataset(tmp_path / "data.npz", bundle)
    batch = examples.batch(np.array([3, 0]))
    np.testing.assert_array_equal(batch["position_ids"], np.stack([positions[[3, 0]]] * 3), strict=True)
    model = pz.load(bundle, threads=1)
    assert pz.evaluate(model, examples, batch_size=3)["loss"] == pytest.approx(
        pz.evaluate(model, examples, batch_size=8)["loss"], rel=1e-5
    )
    np.savez(tmp_path / "data.npz", position_ids=np.stack([positions] * 8), **given)
    with pytest.raises(pz.DataError, match=r"'position_ids' must be integers \[n, length\]"):
        pz.load_dataset(tmp_path / "data.npz", bundle)


# ---- what cannot be trained, or not as it comes ----------------------------------------------------------------------


def test_scores_of_the_last_token_alone_have_no_loss(tmp_path: Path) -> None:
    path = FLOATS["genai"](tmp_path / "m.onnx")
    model = onnx.load(path)
    head = model.graph.node.pop()
    for name, number in (("from", -1), ("to", 2**31 - 1), ("axis", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    last = helper.make_node("Slice", [head.input[0], "from", "to", "axis"], ["last"])
    model.graph.node.extend([last, helper.make_node("MatMul", ["last", head.input[1]], ["logits"])])
    onnx.save(model, path)
    with pytest.raises(pz.BundleError, match=r"'logits' has scores of 1 of 8 tokens.*--loss none"):
        pz.prepare(path, tmp_path / "base")
    assert pz.prepare(path, tmp_path / "base", loss="none").loss is None


def test_padding_comes_last_where_the_model_counts_tokens(tmp_path: Path) -> None:
    data = Sentences()
    for array in (data.ids, data.mask, data.labels):
        array[...] = [np.roll(row, 7 - length) for row, length in zip(array, data.lengths, strict=True)]
    data.save(tmp_path / "left.npz")
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(direction="left", pad_id=PAD)
    tokenizer.no_truncation()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, left in (("llama", True), ("genai", False)):
        path = FLOATS[name](tmp_path / f"{name}.onnx")
        bundle = pz.prepare(path, tmp_path / name, tokenizer=tmp_path / "tokenizer.json")
        batch = pz.encode_texts(["a", "a film"], bundle).batch(np.arange(2))
        assert batch["attention_mask"].tolist() == [[0, 1, 1, 1] if left else [1, 1, 1, 0], [1, 1, 1, 1]]
        if left:
            assert len(pz.load_dataset(tmp_path / "left.npz", bundle)) == 8
        else:
            with pytest.raises(pz.DataError, match=r"row 1: 'attention_mask' begins with padding.*4 other"):
                pz.load_dataset(tmp_path / "left.npz", bundle)


# ---- quantised -------------------------------------------------------------------------------------------------------


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        data = Sentences()
        self.feeds = iter([batch_of(path, data.ids, data.mask)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


def blocks(source: Path, path: Path, bits: int, *kinds: str) -> None:
    axes = tuple((kind, {"MatMul": 0, "Gather": 1}[kind]) for kind in kinds)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=32, is_symmetric=True, op_types_to_quantize=kinds, quant_axes=axes
    )
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def dynamic(source: Path, path: Path) -> None:
    quantize_dynamic(source, path, extra_options={"DefaultTensorType": TensorProto.FLOAT, "EnableSubgraph": True})


def qdq(source: Path, path: Path) -> None:
    quantize_static(
        source,
        path,
        Calibration(source),
        quant_format=QuantFormat.QDQ,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def op_types(graph: onnx.GraphProto) -> set[str]:
    found = {node.op_type for node in graph.node}
    for node in graph.node:
        for attribute in node.attribute:
            found |= op_types(attribute.g)
    return found


@pytest.mark.parametrize(
    ("quantise", "operator", "tolerance"),
    [
        (lambda source, path: blocks(source, path, 4, "MatMul"), "MatMulNBits", 1e-4),
        (lambda source, path: blocks(source, path, 4, "MatMul", "Gather"), "GatherBlockQuantized", 1e-4),
        (lambda source, path: blocks(source, path, 8, "MatMul"), "MatMulNBits", 1e-4),
        (dynamic, "DynamicQuantizeLinear", 5e-2),  # activations are rounded to 256 values
        (qdq, "DequantizeLinear", 5e-2),
    ],
    ids=["int4", "int4 with its table", "int8 in blocks", "dynamic int8", "QDQ"],
)
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
