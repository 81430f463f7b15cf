"""The layout of onnxruntime's prepacked matrices. It is not documented, and so it is detected."""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo._core import Packing, packed_hash
from pocketzo.errors import NotPrepackableError, joined_lines
from pocketzo.formats.staging import scratch_folder
from pocketzo.machine.mappings import MAPS
from pocketzo.runtime.onnx_proto import FLOAT, INT, declare, onnx_messages

_PANEL: Final = 16
_DEPTHS: Final = 256, 128, 512, 64
_PADS: Final = 16, 32, 64


@dataclass(frozen=True)
class Layout:
    """The layout of all prepacked matrices; :class:`_core.Packing` describes that of one matrix.

    Attributes
    ----------
    depth : int
        Rows of a block.
    pad : int
        The number of columns is rounded up to a multiple of this.
    """

    depth: int
    pad: int

    def packing(self, rows: int, columns: int, *, transposed: bool) -> Packing:
        """Return where the elements of a matrix of ``rows`` x ``columns`` are."""
        stride = -(-columns // self.pad) * self.pad
        return Packing(rows=rows, columns=columns, stride=stride, depth=self.depth, transposed=transposed)

    def locate(self, packing: Packing, at: int) -> int | None:
        """Return the logical index of the element at an index in prepacked memory; None for padding."""
        stride = packing.size // packing.rows
        block, rest = divmod(at, self.depth * stride)
        height = min(self.depth, packing.rows - block * self.depth)
        panel, rest = divmod(rest, _PANEL * height)
        row, column = block * self.depth + rest // _PANEL, panel * _PANEL + rest % _PANEL
        if column >= packing.columns:
            return None
        return column * packing.rows + row if packing.transposed else row * packing.columns + column


@dataclass(frozen=True)
class Location:
    """Prepacked memory of one weight.

    Attributes
    ----------
    memory : ndarray of float32, shape (packing.size,)
        What a session multiplies by.
    packing : Packing
    """

    memory: NDArray[np.float32]
    packing: Packing


@functools.cache
def detect_layout() -> Layout:
    """Have onnxruntime prepack a ramp, and return the layout that puts each value where onnxruntime has put it.

    Raises
    ------
    NotPrepackableError
        onnxruntime does not prepack, or in a layout that is not known here, or the system does not allow it.
    """
    if not os.access(MAPS, os.R_OK):
        raise NotPrepackableError(f"the mappings of this process cannot be read ({MAPS})")
    operators = ("MatMul", False), ("Gemm", False), ("Gemm", True)
    found = {_operator_layout(operator, transposed=transposed) for operator, transposed in operators}
    if len(found) > 1:
        raise NotPrepackableError(
            f"onnxruntime {ort.__version__} prepacks operators differently: {sorted(map(str, found))}"
        )
    return found.pop()


def _operator_layout(operator: str, *, transposed: bool) -> Layout:
    rows, columns = 600, 70  # two blocks of 256 and a part, four panels of 16 and a part
    ramp = np.arange(1, rows * columns + 1, dtype=np.float32)
    packed = _prepack(operator, ramp.reshape((columns, rows) if transposed else (rows, columns)), transposed=transposed)
    for depth, pad in itertools.product(_DEPTHS, _PADS):
        layout = Layout(depth, pad)
        packing = layout.packing(rows, columns, transposed=transposed)
        if packing.size != len(packed):
            continue
        expected = np.zeros_like(packed)
        packing.pack(expected, ramp, 0)
        if np.array_equal(expected, packed):
            return layout
    raise NotPrepackableError(f"onnxruntime {ort.__version__} prepacks a {operator} in a layout that is not known")


def _prepack(operator: str, weight: NDArray[np.float32], *, transposed: bool) -> NDArray[np.float32]:
    """Return a weight as onnxruntime prepacks it."""
    model = product_model(operator, weight, transposed=transposed)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        with scratch_folder() as folder:
            options.optimized_model_filepath = os.fspath(folder / "packed.onnx")
            for key, value in (
                ("save_external_prepacked_constant_initializers", "1"),
                ("optimized_model_external_initializers_file_name", "packed.bin"),
                ("optimized_model_external_initializers_min_size_in_bytes", "0"),
            ):
                options.add_session_config_entry(f"session.{key}", value)
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            saved = onnx_messages().Model.FromString((folder / "packed.onnx").read_bytes())
            blob = (folder / "packed.bin").read_bytes()
    except OSError as error:
        raise NotPrepackableError(f"no temporary file can be made: {error}") from None
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise NotPrepackableError(
            f"onnxruntime {ort.__version__} does not save prepacked weights: {joined_lines(error)}"
        ) from None
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
    return packed


def product_model(operator: str, weight: NDArray[np.float32], *, transposed: bool) -> Any:
    """Return a model that multiplies its input by a weight."""
    messages = onnx_messages()
    model = messages.Model(ir_version=8, opset_import=[messages.Opset(version=17)])
    graph = model.graph
    graph.name = "ramp"
    node = graph.node.add(op_type=operator, input=["x", "w"], output=["y"])
    if transposed:
        node.attribute.add(name="transB", i=1, type=INT)
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    declare(graph.input, "x", FLOAT, ["n", rows])
    declare(graph.output, "y", FLOAT, ["n", columns])
    graph.initializer.add(name="w", data_type=FLOAT, dims=weight.shape, raw_data=weight.tobytes())
    return model
