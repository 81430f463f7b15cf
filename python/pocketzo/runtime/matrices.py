"""The weights of a graph that can be prepacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pocketzo._core import Packing
from pocketzo.errors import NothingToPrepackError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.layout import Layout
from pocketzo.runtime.lookups import lookup_of

PRODUCTS: Final = "MatMul", "Gemm"
"""Operators that multiply by a prepacked second factor."""


@dataclass(frozen=True)
class Matrix:
    """A weight that is the second factor of one product.

    Attributes
    ----------
    name : str
        Of the weight.
    operator : str
        One of :data:`PRODUCTS`.
    shared : bool
        Whether other nodes read the weight, too. It is then also kept in the plain layout.
    looked_up : bool
        Whether nodes look up its rows by an input of the graph, as in an embedding that is also the output projection.
        If nothing else reads it, they are looked up in the prepacked layout.
    packing : Packing
    """

    name: str
    operator: str
    shared: bool
    looked_up: bool
    packing: Packing

    @property
    def width(self) -> int:
        """Elements of a row of the weight."""
        return self.packing.rows if self.packing.transposed else self.packing.columns

    @property
    def nbytes(self) -> int:
        """Size of the prepacked memory in bytes."""
        return 4 * self.packing.size


def find_matrices(bundle: Bundle, graph: Any, layout: Layout) -> tuple[Matrix, ...]:
    """Return the weights of a bundle's graph that can be prepacked.

    Raises
    ------
    NotPrepackableError
        There are none, or the graph uses them in a way that would leave a copy behind.
    """
    if bundle.is_fp16:
        raise NotPrepackableError("fp16 weights are read as they are stored")
    shapes = {spec.name: spec.shape for spec in bundle.tensors if spec.dtype == "float32" and len(spec.shape) == 2}
    inputs = {value.name for value in graph.input}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise NotPrepackableError(f"the graph has control flow ({node.op_type})")
        for index, name in enumerate(node.input):
            if name in shapes:
                readers.setdefault(name, []).append((node, index))
    found = []
    for name, nodes in readers.items():
        products = [node for node, index in nodes if index == 1 and node.op_type in PRODUCTS]
        if not products:
            continue
        if name in inputs:
            raise NotPrepackableError(f"{name} is an input of the graph, and only constants are prepacked")
        if len(products) > 1:
            raise NotPrepackableError(f"{name} is a factor of {len(products)} products, and each would prepack a copy")
        (node,) = products
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        rows, columns = reversed(shapes[name]) if transposed else shapes[name]
        packing = layout.packing(rows, columns, transposed=transposed)
        others = [lookup_of(graph, other) if index == 0 else None for other, index in nodes if other is not node]
        found.append(Matrix(name, node.op_type, None in others, bool(others) and None not in others, packing))
    if not found:
        raise NothingToPrepackError("the graph multiplies by no weight")
    return tuple(found)
