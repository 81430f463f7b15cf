"""A float16 bundle opens in plain onnxruntime with its default options: a crash there ends the user's app."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import model_of, node, weight
from onnx import TensorProto, numpy_helper

from pocketzo import load, prepare

OPEN = """
import sys
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x = np.load(sys.argv[2])
print(float(session.run(None, {"x": x})[0].sum()))
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


def opened(path: Path, folder: Path, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """Open and run a graph in a process of its own, with default options."""
    np.save(folder / "x.npy", x)
    command = [sys.executable, "-c", OPEN, str(path), str(folder / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return float(done.stdout)


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
    if source == "float16":
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    bundle = prepare(path, tmp_path / "out", dtype="float16", loss="none")
    x = np.random.default_rng(1).normal(size=[4] * len(permutation)).astype(np.float32)
    matrix = numpy_helper.to_array(weight("w", 4, 4)).astype(np.float64)
    turned = np.transpose(x, permutation).astype(np.float64)
    expected = float((matrix @ turned if left else turned @ matrix).sum())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor does not compute in fp16")
        load(bundle, threads=1, verify="full")
    assert opened(bundle.model_path, tmp_path, x) == pytest.approx(expected, abs=0.1)


def test_a_float32_graph_stays_as_it_is(tmp_path: Path) -> None:
    bundle = prepare(transposed(tmp_path / "m.onnx", (1, 0, 2)), tmp_path / "out", loss="none")
    assert [one.op_type for one in onnx.load(bundle.model_path, load_external_data=False).graph.node] == [
        "Transpose",
        "MatMul",
    ]
