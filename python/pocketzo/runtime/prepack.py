"""Prepacked weights that are live: the session multiplies by the memory that the kernels write.

onnxruntime multiplies faster by a second factor that it has prepacked. By default it prepacks a copy, and later writes
to the weight have no effect. It can also map packed bytes from a file. :func:`open_session` gives it a file of holes
(:mod:`pocketzo.runtime.holes`) and then replaces the mappings by fresh memory at the same addresses. The weights are
written there in the prepacked layout, so that there is one copy of each.

The layout is not part of onnxruntime's interface. :func:`pocketzo.runtime.layout.detect_layout` detects it; where it is
unknown, :class:`NotPrepackableError` is raised, and the plain layout is used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnxruntime as ort

from pocketzo._core import remap
from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.staging import scratch_folder
from pocketzo.machine.mappings import file_mappings
from pocketzo.runtime.holes import embed_constants, whole_pages, write_holes
from pocketzo.runtime.layout import Layout, Location, detect_layout
from pocketzo.runtime.lookups import Feeding, take_lookups
from pocketzo.runtime.matrices import Matrix, find_matrices
from pocketzo.runtime.onnx_proto import EXTERNAL, FLOAT, declare, onnx_messages, read_graph
from pocketzo.runtime.session import Session, create_session
from pocketzo.runtime.slices import Slices, cut_losses
from pocketzo.runtime.variables import declare_inputs

_SIDE: Final = 64  # of the matrices by which onnxruntime's ways are detected


@dataclass(frozen=True)
class Plan:
    """Which weights of a bundle are to be prepacked, and in which layout.

    Attributes
    ----------
    bundle : Bundle
    model : message
        The graph's file, parsed.
    layout : Layout
    matrices : tuple of Matrix
        At least one.
    """

    bundle: Bundle
    model: Any
    layout: Layout
    matrices: tuple[Matrix, ...]

    @property
    def only_prepacked(self) -> set[str]:
        """Names of the weights that are not kept as they are stored."""
        return {matrix.name for matrix in self.matrices if not matrix.shared}


def plan_prepacking(bundle: Bundle, model: Any = None) -> Plan:
    """Find the weights to prepack in a bundle's graph, or in another one over its weights.

    Raises
    ------
    NotPrepackableError
        The graph, onnxruntime or the system does not allow it; says why.
    """
    layout = detect_layout()
    model = read_graph(bundle.model_path) if model is None else model
    return Plan(bundle, model, layout, find_matrices(bundle, model.graph, layout))


def open_session(
    plan: Plan, values: Mapping[str, ort.OrtValue], threads: int
) -> tuple[Session, dict[str, Location], Slices]:
    """Create a session that multiplies by prepacked memory.

    Parameters
    ----------
    plan : Plan
    values : mapping of str to OrtValue
        All float32 weights except those that are only prepacked, with the values that constants have; they must
        outlive the session.
    threads : int

    Returns
    -------
    session : Session
    locations : dict of str to Location
        By weight. The memory is zero, and must be written before the session runs; it keeps the session alive.
    slices : Slices
        The result of :func:`cut_losses`.

    Raises
    ------
    NotPrepackableError
        onnxruntime or the system does not allow it; says why.
    """
    model = onnx_messages().Model()
    model.CopyFrom(plan.model)
    lookups = take_lookups(model.graph, {matrix.name: matrix.width for matrix in plan.matrices if matrix.looked_up})
    slices = cut_losses(model, {matrix.name: matrix.packing.columns for matrix in plan.matrices})
    try:
        with scratch_folder() as folder:
            declare_inputs(model.graph, plan.bundle, without={matrix.name for matrix in plan.matrices})
            together = _finds_together(plan.layout)
            offsets = write_holes(folder / "holes.bin", model.graph, plan.matrices, plan.layout, together=together)
            embed_constants(model.graph, plan.bundle)
            (folder / "model.onnx").write_bytes(model.SerializeToString())
            session = create_session(folder / "model.onnx", values, threads, prepacked=True)
            mapped = file_mappings(folder / "holes.bin")
    except OSError as error:
        raise NotPrepackableError(f"no temporary file can be made or mapped: {error}") from None
    addresses = {}
    for matrix in plan.matrices:
        addresses[matrix.name], length = mapped.get(offsets[matrix.name], (0, 0))
        if length < matrix.nbytes:
            raise NotPrepackableError(f"onnxruntime {ort.__version__} did not map the prepacked weight {matrix.name}")
    locations = {}
    for run in _adjacent(plan.matrices, addresses):
        begin, last = addresses[run[0].name], run[-1]
        memory = remap(begin, (addresses[last.name] - begin + last.nbytes) // 4, session)
        for matrix in run:
            at = (addresses[matrix.name] - begin) // 4
            locations[matrix.name] = Location(memory[at : at + matrix.packing.size], matrix.packing)
    feeds = lookups or slices.count > 1
    return Feeding(session, lookups, locations, slices) if feeds else session, locations, slices


@functools.cache
def _finds_together(layout: Layout) -> bool:
    """Return whether onnxruntime finds packed bytes that another tensor names; version 1.29 does not, 1.32 does."""
    messages = onnx_messages()
    model = messages.Model(ir_version=8, opset_import=[messages.Opset(version=17)])
    graph = model.graph
    graph.name = "two products"
    matrices = []
    for name in ("a", "b"):
        node = graph.node.add(op_type="MatMul", input=[f"x{name}", name], output=[f"y{name}"])
        declare(graph.input, node.input[0], FLOAT, [_SIDE, _SIDE])
        declare(graph.output, node.output[0], FLOAT, [_SIDE, _SIDE])
        graph.initializer.add(name=name, data_type=FLOAT, dims=[_SIDE, _SIDE], data_location=EXTERNAL)
        packing = layout.packing(_SIDE, _SIDE, transposed=False)
        matrices.append(Matrix(name, "MatMul", shared=False, looked_up=False, packing=packing))
    with scratch_folder() as folder:
        offsets = write_holes(folder / "holes.bin", graph, matrices, layout, together=True)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        session = create_session(folder / "model.onnx", {}, 1, prepacked=True)
        mapped = file_mappings(folder / "holes.bin")
        del session
    return all(mapped.get(offset, (0, 0))[1] >= 4 * _SIDE**2 for offset in offsets.values())


def _adjacent(matrices: Sequence[Matrix], addresses: Mapping[str, int]) -> list[list[Matrix]]:
    """Return the matrices in runs whose pages follow each other.

    A run is replaced as a whole, so that its memory may have huge pages across matrices.
    """
    runs: list[list[Matrix]] = []
    for matrix in sorted(matrices, key=lambda matrix: addresses[matrix.name]):
        last = runs[-1][-1] if runs else None
        if last is not None and addresses[last.name] + whole_pages(last.nbytes) == addresses[matrix.name]:
            runs[-1].append(matrix)
        else:
            runs.append([matrix])
    return runs
