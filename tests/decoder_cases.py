"""The tiny decoders of decoders.py as cases of tests: float and quantised, with their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from decoders import (
    HEADS,
    SIZE,
    VOCABULARY,
    Array,
    gpt2_weights,
    llama_weights,
    write_genai,
    write_gpt2,
    write_llama,
    write_merged,
)
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import pocketzo as pz

LLAMA = llama_weights(kv_heads=2)
GPT2 = gpt2_weights()
QWEN2 = llama_weights(kv_heads=2, bias=True, tied=True)
QWEN3 = llama_weights(kv_heads=2, norms=True, tied=True)
FLOATS: dict[str, Callable[[Path], Path]] = {
    "gpt2": lambda path: write_gpt2(path, GPT2),
    "llama": lambda path: write_llama(path, LLAMA, 2),
    "llama, a head each": lambda path: write_llama(path, llama_weights(kv_heads=HEADS), HEADS),
    "qwen2": lambda path: write_llama(path, QWEN2, 2),
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
            batch[value.name] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, mask.shape[1] - ids.shape[1] :]
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
    """Random sentences, padded on the right, with the tokens shifted by one as labels and empty caches."""

    path: Path = Path()  # the model that the batches are for
    lengths: Array = field(default_factory=lambda: np.array([7, 5, 6, 7, 3, 7, 4, 6]))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(9)
        self.mask = (np.arange(7) < self.lengths[:, None]).astype(np.int64)
        self.ids = rng.integers(1, VOCABULARY, self.mask.shape) * self.mask
        self.labels = np.full_like(self.ids, -100)
        self.labels[:, :-1] = np.where(self.mask[:, 1:] == 1, self.ids[:, 1:], -100)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def batch(self, indices: Array) -> pz.Batch:
        arrays = batch_of(self.path, self.ids[indices], self.mask[indices]) | {"labels": self.labels[indices]}
        return pz.Batch(arrays, np.asarray(indices))

    def save(self, path: Path) -> Path:
        np.savez(path, input_ids=self.ids, attention_mask=self.mask, labels=self.labels)
        return path


# ---- quantised -------------------------------------------------------------------------------------------------------


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        data = Sentences(path)
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


QUANTISED: dict[str, tuple[Callable[[Path, Path], None], str, float]] = {
    "int4": (lambda source, path: blocks(source, path, 4, "MatMul"), "MatMulNBits", 1e-4),
    "int4 with its table": (
        lambda source, path: blocks(source, path, 4, "MatMul", "Gather"),
        "GatherBlockQuantized",
        1e-4,
    ),
    "int8 in blocks": (lambda source, path: blocks(source, path, 8, "MatMul"), "MatMulNBits", 1e-4),
    "dynamic int8": (dynamic, "DynamicQuantizeLinear", 5e-2),  # activations are rounded to 256 values
    "QDQ": (qdq, "DequantizeLinear", 5e-2),
}
"""By name: what quantises a file, an operator that it leads to, and by how much outputs may differ."""
