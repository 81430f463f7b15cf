"""A float16 bundle opens in plain onnxruntime with its default options: a crash there ends the user's app."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, model_of, node, run, weight
from onnx import TensorProto, helper, numpy_helper

from pocketzo import Bundle, load, prepare

OPEN = """
import sys
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x = np.load(sys.argv[2])
np.save(sys.argv[3], session.run(None, {"x": x})[0])
"""
PERMUTATIONS = [(1, 0, 2), (1, 2, 0), (1, 2, 0, 3), (1, 2, 3, 0), (1, 2, 3, 0, 4), (1, 2, 3, 4, 0)]


def transposed(path: Path, permutation: tuple[int, ...], *, left: bool = False, between: str | None = None) -> Path:
    """Write a model of Transpose, perhaps a node between, and MatMul by a matrix."""
    nodes = [node("Transpose", "x", "t", perm=permutation)]
    if between is not None:
        nodes.append(node(between, "t", "between"))
    last = nodes[-1].output[0]
    nodes.append(node("MatMul", f"w {last}" if left else f"{last} w", "y"))
    shape = [4] * len(permutation)
    return model_of(path, nodes, [weight("w", 4, 4)], inputs=[("x", TensorProto.FLOAT, shape)], outputs=[("y", shape)])


def opened(path: Path, folder: Path, x: Array) -> Array:
    """Open and run a graph in a process of its own, with default options."""
    np.save(folder / "x.npy", x)
    command = [sys.executable, "-c", OPEN, str(path), str(folder / "x.npy"), str(folder / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    output: Array = np.load(folder / "y.npy")
    return output


def check(source: Path, bundle: Bundle, folder: Path, x: Array) -> None:
    """Check that a bundle in plain onnxruntime computes what a float32 graph does, and that its weights are live."""
    expected = run(source, {"x": x})["y"]
    np.testing.assert_allclose(
        opened(bundle.model_path, folder, x), expected, rtol=0, atol=1e-2 * np.abs(expected).max()
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor does not compute in fp16")
        load(bundle, threads=1, verify="full")


@pytest.mark.parametrize("source", ["float32", "float16"])
@pytest.mark.parametrize(
    ("permutation", "left", "between"),
    [(permutation, left, None) for permutation in PERMUTATIONS for left in (False, True)]
    + [((1, 0, 2), False, "Identity")],
)
def test_a_transpose_before_a_product(
    tmp_path: Path, permutation: tuple[int, ...], left: bool, between: str | None, source: str
) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = transposed(tmp_path / "m.onnx", permutation, left=left, between=between)
    taken = path
    if source == "float16":
        taken = tmp_path / "fp16.onnx"
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), taken)
    bundle = prepare(taken, tmp_path / "out", dtype="float16", loss="none")
    check(path, bundle, tmp_path, np.random.default_rng(1).normal(size=[4] * len(permutation)).astype(np.float32))


def constant(name: str, value: object) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


SWAP = node("Transpose", "x", "t", perm=[1, 0, 2])  # of x [2, 3, 4]
PRODUCT = node("MatMul", "r w", "y")
RELATED = {
    "mul": [SWAP, node("Mul", "t half", "r"), PRODUCT],
    "mul, constant first": [SWAP, node("Mul", "half t", "r"), PRODUCT],
    "div": [SWAP, node("Div", "t half", "r"), PRODUCT],
    "add": [SWAP, node("Add", "t zero", "r"), PRODUCT],
    "sub": [SWAP, node("Sub", "t zero", "r"), PRODUCT],
    "dropout": [SWAP, node("Dropout", "t", "r"), PRODUCT],
    "expand": [SWAP, node("Expand", "t ones", "r"), PRODUCT],
    "reshape": [SWAP, node("Reshape", "t sizes", "r"), PRODUCT],
    "two": [node("Transpose", "x", "s", perm=[0, 2, 1]), node("Transpose", "s", "r", perm=[2, 0, 1]), PRODUCT],
    "two, one reverses": [node("Transpose", "x", "s"), node("Transpose", "s", "r", perm=[1, 2, 0]), PRODUCT],
    "two, others between": [
        node("Transpose", "x", "s", perm=[1, 2, 0]),
        node("Softmax", "s", "soft", axis=-1),
        node("Unsqueeze", "soft axis", "deeper"),
        node("Squeeze", "deeper axis", "again"),
        node("Transpose", "again", "r", perm=[0, 2, 1]),
        PRODUCT,
    ],
    "vector": [SWAP, node("MatMul", "t b", "y")],
    "rank 4": [SWAP, node("MatMul", "t v", "y")],
    "computed matrix": [
        node("Transpose", "x", "t", perm=[1, 2, 0]),
        node("ReduceMean", "x", "mean", axes=[1], keepdims=0),
        node("Add", "mean b", "m"),
        node("MatMul", "t m", "y"),
    ],
    "fused": [SWAP, helper.make_node("FusedMatMul", ["t", "w"], ["y"], domain="com.microsoft", alpha=0.5)],
}


@pytest.mark.parametrize("kind", RELATED)
def test_what_the_runtime_makes_the_same(tmp_path: Path, kind: str) -> None:
    read = {name for each in RELATED[kind] for name in each.input}
    weights = [weight("w", 4, 4), weight("b", 4), weight("v", 2, 3, 4, 4)]
    scalars = [constant(name, np.float32(value)) for name, value in (("half", 0.5), ("zero", 0))]
    shapes = [constant("sizes", [3, 2, 4]), constant("ones", [1, 1, 1]), constant("axis", [0])]
    rank = {"vector": 2, "rank 4": 4}.get(kind, 3)
    path = model_of(
        tmp_path / "m.onnx",
        RELATED[kind],
        [each for each in (*weights, *scalars, *shapes) if each.name in read],
        inputs=[("x", TensorProto.FLOAT, (2, 3, 4))],
        outputs=[("y", [f"axis{i}" for i in range(rank)])],
    )
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    bundle = prepare(path, tmp_path / "out", dtype="float16", loss="none", probe={"x": x})
    check(path, bundle, tmp_path, x)


def test_a_product_in_a_subgraph(tmp_path: Path) -> None:
    def branch(name: str, factor: str) -> onnx.GraphProto:
        nodes = [
            node("Transpose", "x", f"{name}.t", perm=[1, 0, 2]),
            node("MatMul", f"{name}.t {factor}", f"{name}.y"),
        ]
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        node("If", "positive", "y", then_branch=branch("then", "w"), else_branch=branch("else", "v")),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("w", 4, 4), weight("v", 4, 4), constant("zero", np.float32(0))],
        inputs=[("x", TensorProto.FLOAT, (2, 3, 4))],
        outputs=[("y", (3, 2, 4))],
    )
    bundle = prepare(path, tmp_path / "out", dtype="float16", loss="none")
    x = np.abs(np.random.default_rng(1).normal(size=(2, 3, 4))).astype(np.float32)
    for sign in (1, -1):
        check(path, bundle, tmp_path, sign * x)


def test_a_float32_graph_stays_as_it_is(tmp_path: Path) -> None:
    bundle = prepare(transposed(tmp_path / "m.onnx", (1, 0, 2)), tmp_path / "out", loss="none")
    assert [one.op_type for one in onnx.load(bundle.model_path, load_external_data=False).graph.node] == [
        "Transpose",
        "MatMul",
    ]


def test_a_transpose_that_is_not_merged_is_left_alone(tmp_path: Path) -> None:
    nodes = [node("Transpose", "x", "t", perm=[0, 2, 1]), node("MatMul", "t w", "y")]
    inputs, outputs = [("x", TensorProto.FLOAT, (2, 4, 3))], [("y", (2, 3, 4))]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("w", 4, 4)], inputs=inputs, outputs=outputs)
    bundle = prepare(path, tmp_path / "out", dtype="float16", loss="none")
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    assert [one.op_type for one in graph.node] == ["Cast", "Transpose", "MatMul", "Cast"]
