"""Every operator that has weights: onnxruntime sees what is written to those that are trainable."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import Live, run, trainable_names
from onnx import TensorProto, helper, numpy_helper

from pocketzo import BundleError
from pocketzo.graph.roles import ROLES
from pocketzo.prepare import prepare

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(0)


def noise(*shape: int) -> Array:
    return RNG.normal(0, 0.5, shape).astype(np.float32)


def integers(dtype: npt.DTypeLike, *shape: int) -> Array:
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=dtype)


@dataclass
class Case:
    """A node: what it reads, in order, of which `weights` are constants, and those of them that can be trained."""

    operator: str
    inputs: str
    weights: Mapping[str, Array]
    feed: Mapping[str, Array]
    trained: str
    domain: str = ""
    opset: int = 17
    rank: int = 3
    outputs: int = 1
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.domain}:{self.operator}:{','.join(self.weights)}"

    @property
    def names(self) -> list[str]:
        return ["" if name == "-" else name for name in self.inputs.split()]

    def node(self) -> onnx.NodeProto:
        outputs = [f"y{index}" for index in range(self.outputs)]
        return helper.make_node(self.operator, self.names, outputs, "node", domain=self.domain, **self.attributes)

    def write(self, path: Path) -> Path:
        graph = helper.make_graph(
            [self.node(), helper.make_node("Identity", ["y0"], ["same"])],  # two outputs, so that no loss is added
            "graph",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in self.feed.items()
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"d{i}" for i in range(self.rank)])
                for name in ("y0", "same")
            ],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


B, S, D, H = 2, 6, 8, 2
X = {"x": noise(B, S, D)}
QKV = {"x": noise(B, S, D), "k": noise(B, S, D), "v": noise(B, S, D)}
IMAGE = {"x": noise(2, 3, 8, 8)}
FLAT = {"x": noise(3, D)}
IDS = {"ids": np.array([[1, 2, 3], [3, 2, 1]], np.int32), "types": np.array([[0, 1, 0], [1, 0, 1]], np.int32)}
ROWS = {"ids": np.array([[1, 2], [3, 4]])}
SCALE = np.array(0.02, np.float32)
POSITIONS = np.arange(10)[:, None] / 10.0 ** np.arange(8)
COS, SIN = np.cos(POSITIONS).astype(np.float32), np.sin(POSITIONS).astype(np.float32)
CACHE = {
    "x": noise(B, S, 64),
    "pk": np.zeros((B, 1, S, 16), np.float32),
    "pv": np.zeros((B, 1, S, 16), np.float32),
    "last": np.full(B, S - 1, np.int32),
    "total": np.array(S, np.int32),
}


def affine(operator: str, feed: Mapping[str, Array], size: int, opset: int = 17, **attributes: Any) -> Case:
    return Case(
        operator,
        "x w b",
        {"w": noise(size), "b": noise(size)},
        feed,
        "w b",
        opset=opset,
        rank=next(iter(feed.values())).ndim,
        attributes=attributes,
    )


def microsoft(
    operator: str,
    inputs: str,
    weights: Mapping[str, Array],
    feed: Mapping[str, Array],
    trained: str,
    *,
    rank: int = 3,
    outputs: int = 1,
    **attributes: Any,
) -> Case:
    return Case(operator, inputs, weights, feed, trained, MICROSOFT, 17, rank, outputs, attributes)


def recurrent(operator: str, gates: int, more: str = "", weights: Mapping[str, Array] | None = None) -> Case:
    shapes = {"w": (1, 5 * gates, D), "r": (1, 5 * gates, 5), "b": (1, 10 * gates)}
    return Case(
        operator,
        f"x w r b {more}",
        {name: noise(*shape) for name, shape in shapes.items()} | dict(weights or {}),
        X,
        "w r b" + " p" * (weights is not None and "p" in weights),
        rank=4,
        attributes={"hidden_size": 5},
    )


CASES = [
    Case("MatMul", "x w", {"w": noise(D, 5)}, X, "w"),
    Case("MatMul", "w x", {"w": noise(5, S)}, X, "w"),
    Case("Gemm", "x w b", {"w": noise(D, 5), "b": noise(5)}, FLAT, "w b", rank=2),
    Case("Gemm", "w x b", {"w": noise(5, 3), "b": noise(D)}, FLAT, "w b", rank=2),
    Case("Einsum", "x w", {"w": noise(D, 5)}, X, "w", attributes={"equation": "bsd,de->bse"}),
    Case("Einsum", "w x", {"w": noise(5, D)}, X, "w", attributes={"equation": "ed,bsd->bse"}),
    Case("Conv", "x w b", {"w": noise(4, 3, 3, 3), "b": noise(4)}, IMAGE, "w b", rank=4),
    Case("Conv", "x w b", {"w": noise(3, 1, 3, 3), "b": noise(3)}, IMAGE, "w b", rank=4, attributes={"group": 3}),
    Case("ConvTranspose", "x w b", {"w": noise(3, 4, 3, 3), "b": noise(4)}, IMAGE, "w b", rank=4),
    Case(
        "DeformConv",
        "x w shift b",
        {"w": noise(4, 3, 3, 3), "b": noise(4)},
        IMAGE | {"shift": noise(2, 18, 6, 6)},
        "w b",
        opset=19,
        rank=4,
    ),
    Case("Gather", "w ids", {"w": noise(6, 4)}, ROWS, "w"),
    Case("GatherND", "w ids", {"w": noise(6, 6, 4)}, ROWS, "w", rank=2),
    Case("Slice", "w from to", {"w": noise(6, 4)}, {"from": np.array([1]), "to": np.array([3])}, "w", rank=2),
    Case("Expand", "w shape", {"w": noise(1, 1, 4)}, {"shape": np.array([2, 3, 4])}, "w"),
    Case("Tile", "w times", {"w": noise(1, 1, 4)}, {"times": np.array([2, 3, 1])}, "w"),
    Case("Concat", "w x", {"w": noise(B, 1, D)}, X, "w", attributes={"axis": 1}),
    Case("Concat", "x w", {"w": noise(B, 1, D)}, X, "w", attributes={"axis": 1}),
    Case("Where", "if w x", {"w": noise(D)}, X | {"if": X["x"] > 0}, "w"),
    Case("Where", "if x w", {"w": noise(D)}, X | {"if": X["x"] > 0}, "w"),
    Case("Add", "x w", {"w": noise(D)}, X, "w"),
    Case("Add", "w x", {"w": noise(S, D)}, X, "w"),
    Case("Mul", "x w", {"w": noise(D)}, X, "w"),
    Case("Mul", "w x", {"w": noise(S, 1)}, X, "w"),
    Case("PRelu", "x w", {"w": noise(3, 1, 1)}, IMAGE, "w", rank=4),
    recurrent("RNN", 1),
    recurrent("GRU", 3),
    recurrent("LSTM", 4),
    recurrent("LSTM", 4, "- h c p", {"h": noise(1, S, 5), "c": noise(1, S, 5), "p": noise(1, 15)}),
    Case(
        "BatchNormalization",
        "x w b mean var",
        {"w": noise(3), "b": noise(3), "mean": noise(3), "var": np.abs(noise(3))},
        IMAGE,
        "w b",
        rank=4,
    ),
    affine("InstanceNormalization", IMAGE, 3),
    affine("GroupNormalization", {"x": noise(2, 4, 5, 5)}, 4, 21, num_groups=2),
    affine("LayerNormalization", X, D),
    Case("RMSNormalization", "x w", {"w": noise(D)}, X, "w", opset=23),
    Case("SimplifiedLayerNormalization", "x w", {"w": noise(D)}, X, "w"),
    Case(
        "Attention",
        "q k v bias",
        {"bias": noise(S, S)},
        {name: noise(B, H, S, 4) for name in "qkv"},
        "bias",
        opset=23,
        rank=4,
    ),
    Case(
        "RotaryEmbedding",
        "x cos sin at",
        {"cos": COS, "sin": SIN},
        {"x": noise(B, H, S, 16), "at": np.arange(S)[None].repeat(B, 0)},
        "",
        opset=23,
        rank=4,
    ),
]
CASES += [
    microsoft(
        "Attention",
        "x w b - - r",
        {"w": noise(D, 3 * D), "b": noise(3 * D), "r": noise(1, H, S, S)},
        X,
        "w b r",
        num_heads=H,
    ),
    microsoft(
        "MultiHeadAttention", "x k v b - r", {"b": noise(3 * D), "r": noise(1, H, S, S)}, QKV, "b r", num_heads=H
    ),
    microsoft(
        "GroupQueryAttention",
        "x - - pk pv last total cos sin - r sink",
        {"cos": COS, "sin": SIN, "r": noise(1, 2, S, S), "sink": noise(2)},
        CACHE,
        "r sink",
        outputs=3,
        num_heads=2,
        kv_num_heads=1,
        do_rotary=1,
    ),
    microsoft(
        "RotaryEmbedding",
        "x at cos sin",
        {"cos": COS, "sin": SIN},
        {"x": noise(B, S, 32), "at": np.arange(S)[None].repeat(B, 0)},
        "",
    ),
    microsoft("FusedMatMul", "x w", {"w": noise(5, D)}, X, "w", transB=1, alpha=1.5),
    microsoft("FusedMatMul", "w x", {"w": noise(5, S)}, X, "w"),
    microsoft("TransposeMatMul", "x w", {"w": noise(5, D)}, X, "w", transB=1),
    microsoft("TransposeMatMul", "w x", {"w": noise(5, S)}, X, "w"),
    microsoft(
        "FusedGemm", "x w b", {"w": noise(5, D), "b": noise(5)}, FLAT, "w b", rank=2, transB=1, activation="Relu"
    ),
    microsoft("FusedGemm", "w x b", {"w": noise(5, 3), "b": noise(D)}, FLAT, "w b", rank=2, activation="Relu"),
    microsoft("FusedConv", "x w b", {"w": noise(4, 3, 3, 3), "b": noise(4)}, IMAGE, "w b", rank=4, activation="Relu"),
    microsoft("BiasGelu", "x b", {"b": noise(D)}, X, "b"),
    microsoft("FastGelu", "x b", {"b": noise(D)}, X, "b"),
    microsoft("QuickGelu", "x", {}, X, ""),
    microsoft(
        "SkipLayerNormalization",
        "x skip w b sb",
        {"skip": noise(B, S, D), "w": noise(D), "b": noise(D), "sb": noise(D)},
        X,
        "skip w b sb",
    ),
    microsoft(
        "SkipSimplifiedLayerNormalization",
        "x skip w sb",
        {"skip": noise(B, S, D), "w": noise(D), "sb": noise(D)},
        X,
        "skip w sb",
    ),
    microsoft(
        "EmbedLayerNormalization",
        "ids types words places kinds w b",
        {"words": noise(9, D), "places": noise(7, D), "kinds": noise(2, D), "w": noise(D), "b": noise(D)},
        IDS,
        "words places kinds w b",
        outputs=2,
    ),
    microsoft(
        "WordConvEmbedding",
        "chars w b table",
        {"w": noise(4, 1, 3, 5), "b": noise(4), "table": noise(9, 5)},
        {"chars": RNG.integers(1, 9, (2, 3, 6)).astype(np.int32)},
        "w b table",
        rank=2,
    ),
    microsoft(
        "CausalConvWithState", "x w b", {"w": noise(D, 1, 3), "b": noise(D)}, {"x": noise(B, D, S)}, "w b", outputs=2
    ),
    microsoft(
        "MoE",
        "x choice w1 b1 w2 b2",
        {"w1": noise(4, 16, D), "b1": noise(4, 16), "w2": noise(4, D, 16), "b2": noise(4, D)},
        {"x": noise(6, D), "choice": noise(6, 4)},
        "w1 b1 w2 b2",
        rank=2,
        k=2,
        activation_type="relu",
    ),
    microsoft(
        "MatMulNBits",
        "x q s - - b",
        {"q": integers(np.uint8, 16, 2, 8), "s": np.abs(noise(32)), "b": noise(16)},
        {"x": noise(B, S, 32)},
        "b",
        K=32,
        N=16,
        bits=4,
        block_size=16,
    ),
    microsoft(
        "DynamicQuantizeMatMul",
        "x q s z b",
        {"q": integers(np.int8, D, 5), "s": SCALE, "z": np.array(0, np.int8), "b": noise(5)},
        X,
        "b",
    ),
    microsoft(
        "MatMulIntegerToFloat",
        "x q xs s - - b",
        {"q": integers(np.int8, D, 5), "xs": SCALE, "s": np.abs(noise(5)), "b": noise(5)},
        {"x": integers(np.uint8, S, D)},
        "b",
        rank=2,
    ),
    microsoft(
        "QAttention",
        "x q b xs s",
        {"q": integers(np.int8, D, 3 * D), "b": noise(3 * D), "xs": SCALE, "s": SCALE},
        {"x": integers(np.uint8, B, S, D)},
        "b",
        num_heads=H,
    ),
    microsoft(
        "DynamicQuantizeLSTM",
        "x w r b - - - - ws wz rs rz",
        {"w": integers(np.int8, 1, D, 20), "r": integers(np.int8, 1, 5, 20), "b": noise(1, 40)}
        | {"ws": SCALE[None], "wz": np.zeros(1, np.int8), "rs": SCALE[None], "rz": np.zeros(1, np.int8)},
        X,
        "b",
        rank=4,
        hidden_size=5,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_written_to_a_weight_is_seen(tmp_path: Path, case: Case) -> None:
    path = case.write(tmp_path / "m.onnx")
    floats = {name for name, array in case.weights.items() if array.dtype.kind == "f"}
    if not case.trained:
        with pytest.raises(BundleError, match="no float32 or float16 weights"):
            prepare(path, tmp_path / "out")
        return
    with warnings.catch_warnings():  # WordConvEmbedding reads memory that it did not write
        warnings.filterwarnings("ignore", ".*differs? from run to run")
        bundle = prepare(path, tmp_path / "out", probe=dict(case.feed))
    assert trainable_names(bundle) == set(case.trained.split())
    assert {tensor.name for tensor in bundle.frozen if tensor.dtype == "float32"} == floats - trainable_names(bundle)
    live = Live(bundle)
    total = sum(case.weights[name].size for name in floats)
    assert total == sum(live.weights[name].size for name in trainable_names(bundle)) + sum(
        tensor.elements for tensor in bundle.frozen if tensor.dtype == "float32"
    )
    feed = dict(case.feed)
    rng = np.random.default_rng(1)
    for name in case.trained.split():
        live.weights[name][...] = rng.normal(0, 0.7, live.weights[name].shape)
    changed = replace(case, weights={**case.weights, **live.weights})
    before, after = (run(one.write(tmp_path / "n.onnx"), feed)["y0"] for one in (case, changed))
    (got, *_) = live.outputs(feed)
    assert not np.allclose(before, after, rtol=1e-2)
    coarse = "Quantize" in case.operator  # it rounds activations to eight bits
    np.testing.assert_allclose(got, after, rtol=1e-3, atol=2e-2 if coarse else 1e-4)
    assert live.dead(bundle, feed) == []


def test_every_role_is_measured() -> None:
    measured = {
        (case.domain, case.operator, index)
        for case in CASES
        for index, name in enumerate(case.names)
        if name in case.trained.split()
    }
    roles = {
        (domain, operator, index)
        for domain, table in ROLES.items()
        for operator, inputs in table.items()
        for index in (inputs if operator != "Concat" else (0, 1))
    }
    assert roles == measured
