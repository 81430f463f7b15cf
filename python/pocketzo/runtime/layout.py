"""The layout of onnxruntime's prepacked matrices."""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo._core import Packing, packed_hash
from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.onnx_proto import onnx_messages

OTHER_OPERATORS: Final = ["GemmActivationFusion", "MatMulAddFusion", "MatMulScaleFusion", "MatmulTransposeFusion"]
"""onnxruntime's optimisations that turn a product into another operator, by whose name packed bytes are found."""
FLOAT: Final = 1  # TensorProto.FLOAT
_PANEL: Final = 16
MAPS: Final = Path("/proc/self/maps")


@dataclass(frozen=True)
class Layout:
    """How this runtime packs, as :class:`_core.Packing` describes it.

    Attributes
    ----------
    depth : int
        Rows of a block.
    pad : int
        What the number of columns is rounded up to a multiple of.
    """

    depth: int
    pad: int

    def packing(self, rows: int, columns: int, *, transposed: bool) -> Packing:
        """Return where the elements of one matrix are."""
        stride = -(-columns // self.pad) * self.pad
        return Packing(rows=rows, columns=columns, stride=stride, depth=self.depth, transposed=transposed)

    def locate(self, packing: Packing, at: int) -> int | None:
        """Return the logical number of the element at a place in packed memory; None for padding."""
        stride = packing.size // packing.rows
        block, rest = divmod(at, self.depth * stride)
        height = min(self.depth, packing.rows - block * self.depth)
        panel, rest = divmod(rest, _PANEL * height)
        row, column = block * self.depth + rest // _PANEL, panel * _PANEL + rest % _PANEL
        if column >= packing.columns:
            return None
        return column * packing.rows + row if packing.transposed else row * packing.columns + column


@dataclass(frozen=True)
class Matrix:
    """A weight that is the second factor of one product.

    Attributes
    ----------
    name : str
        Of the weight.
    operator : str
        "MatMul" or "Gemm".
    shared : bool
        Whether another node reads the weight, too. It is then also kept as it is stored: a tied embedding.
    packing : Packing
    """

    name: str
    operator: str
    shared: bool
    packing: Packing


@dataclass(frozen=True)
class Location:
    """Memory that a session multiplies by."""

    memory: NDArray[np.float32]
    packing: Packing


@functools.cache
def detect_layout() -> Layout:
    """Have the runtime pack a ramp and find out where each value went.

    Raises
    ------
    NotPrepackableError
        It does not pack, or in a way that is not understood.
    """
    if not os.access(MAPS, os.R_OK):
        raise NotPrepackableError(f"the system does not tell what is mapped where ({MAPS})")
    operators = ("MatMul", False), ("Gemm", False), ("Gemm", True)
    found = {_pack_ramp(operator, transposed=transposed) for operator, transposed in operators}
    if len(found) > 1:
        raise NotPrepackableError(
            f"onnxruntime {ort.__version__} prepacks operators differently: {sorted(map(str, found))}"
        )
    return found.pop()


def _pack_ramp(operator: str, *, transposed: bool) -> Layout:
    rows, columns = 600, 70  # two blocks of 256 and a part, four panels of 16 and a part
    ramp = np.arange(1, rows * columns + 1, dtype=np.float32)
    messages = onnx_messages()
    model = messages.Model(ir_version=8, opset_import=[messages.Opset(version=17)])
    graph = model.graph
    graph.name = "ramp"
    node = graph.node.add(op_type=operator, input=["x", "w"], output=["y"])
    if transposed:
        node.attribute.add(name="transB", i=1, type=2)
    for value, width in ((graph.input.add(name="x"), rows), (graph.output.add(name="y"), columns)):
        value.type.tensor_type.elem_type = FLOAT
        value.type.tensor_type.shape.dim.add(dim_param="n")
        value.type.tensor_type.shape.dim.add(dim_value=width)
    weight = graph.initializer.add(name="w", data_type=FLOAT, dims=[columns, rows] if transposed else [rows, columns])
    weight.raw_data = ramp.tobytes()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        with tempfile.TemporaryDirectory(prefix="pocketzo-") as folder:
            options.optimized_model_filepath = os.path.join(folder, "packed.onnx")  # noqa: PTH118
            for key, value in (
                ("save_external_prepacked_constant_initializers", "1"),
                ("optimized_model_external_initializers_file_name", "packed.bin"),
                ("optimized_model_external_initializers_min_size_in_bytes", "0"),
            ):
                options.add_session_config_entry(f"session.{key}", value)
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            saved = messages.Model.FromString(Path(folder, "packed.onnx").read_bytes())
            blob = Path(folder, "packed.bin").read_bytes()
    except OSError as error:
        raise NotPrepackableError(f"no temporary file can be made: {error}") from None
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise NotPrepackableError(f"onnxruntime {ort.__version__} does not save prepacked weights: {error}") from None
    entries = {entry.key: entry.value for tensor in saved.graph.initializer for entry in tensor.external_data}
    if "prepacked_0" not in entries:
        raise NotPrepackableError(f"onnxruntime {ort.__version__} does not prepack a {operator} on this processor")
    key, _, rest = entries["prepacked_0"].partition("|")
    offset, length = (int(number) for number in rest.split(";")[:2])
    packed = np.frombuffer(blob, np.float32, length // 4, offset)
    if key != f"{operator}+{packed_hash(packed)}" or "|" in rest:
        raise NotPrepackableError(
            f"onnxruntime {ort.__version__} names prepacked weights in a way that is not known: {key}"
        )
    for depth, pad in itertools.product((256, 128, 512, 64), (16, 32, 64)):
        layout = Layout(depth, pad)
        if layout.packing(rows, columns, transposed=transposed).size != len(packed):
            continue
        expected = np.zeros_like(packed)
        layout.packing(rows, columns, transposed=transposed).pack(expected, ramp, 0)
        if np.array_equal(expected, packed):
            return layout
    raise NotPrepackableError(f"onnxruntime {ort.__version__} prepacks a {operator} in a layout that is not known")


def matrices(bundle: Bundle) -> list[Matrix]:
    """Return the weights of a bundle that can be prepacked.

    Raises
    ------
    NotPrepackableError
        There are none, or the graph uses them in a way that would leave a copy behind.
    """
    return find_matrices(
        bundle, onnx_messages().Model.FromString(bundle.model_path.read_bytes()).graph, detect_layout()
    )


def find_matrices(bundle: Bundle, graph: Any, layout: Layout) -> list[Matrix]:
    """Return the matrices of a graph that can be prepacked; see :func:`matrices`."""
    shapes = {spec.name: spec.shape for spec in bundle.tensors if spec.dtype == "float32" and len(spec.shape) == 2}
    if bundle.is_fp16:
        raise NotPrepackableError("fp16 weights are read as they are stored")
    inputs = {value.name for value in graph.input}
    uses: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise NotPrepackableError(f"the graph has control flow ({node.op_type})")
        for index, name in enumerate(node.input):
            if name in shapes:
                uses.setdefault(name, []).append((node, index))
    found = []
    for name, readers in uses.items():
        products = [node for node, index in readers if index == 1 and node.op_type in ("MatMul", "Gemm")]
        if not products:
            continue
        if len(products) > 1 or name in inputs:
            raise NotPrepackableError(f"{name} is a factor of {len(products)} products, and each would prepack a copy")
        (node,) = products
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        rows, columns = reversed(shapes[name]) if transposed else shapes[name]
        packing = layout.packing(rows, columns, transposed=transposed)
        found.append(Matrix(name, node.op_type, len(readers) > 1, packing))
    if not found:
        raise NotPrepackableError("the graph multiplies by no weight")
    return found
