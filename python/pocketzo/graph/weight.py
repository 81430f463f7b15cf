"""Tensors of a graph: constants inside the graph, and weights stored outside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array: TypeAlias = npt.NDArray[Any]
Use: TypeAlias = tuple[ir.Node, int]
"""A node that reads a tensor, and the index of its input."""


@dataclass(eq=False)
class Constant:
    """A floating-point tensor of a graph, or a view of one.

    Attributes
    ----------
    value : Value
        Its value in the graph.
    array : ndarray
        The elements; often a view of a mapped file.
    root : Value
        The tensor that it is a view of; its own value if it is not a view.
    label : str or None
        Its parameter name, if the exporter kept it.
    """

    value: ir.Value
    array: Array
    root: ir.Value
    label: str | None


@dataclass(eq=False)
class Weight:
    """A floating-point or a large tensor of a graph, to be stored outside of it.

    Attributes
    ----------
    name : str
    array : ndarray
        The elements; often a view of a mapped file.
    inline : bool
        Whether it stays in the graph instead, or nothing reads it.
    parameter : bool
        Whether an operator uses it as a weight.
    frozen : str or None
        Why it cannot be trained, "kind" or "kind: detail"; None if it can.
    counted : bool
        Whether its elements count; False for another stored form of a tensor that counts.
    uses, transposed : list of Use
        The uses that read it as it is stored, and those that read it transposed.
    storage_dtype : str or None
        Storage type, if it differs from the array's.
    """

    name: str
    array: Array
    inline: bool = False
    parameter: bool = False
    frozen: str | None = None
    counted: bool = True
    uses: list[Use] = field(default_factory=list)
    transposed: list[Use] = field(default_factory=list)
    storage_dtype: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage type."""
        return np.dtype(self.storage_dtype or self.array.dtype)


@dataclass(eq=False)
class Draft:
    """A graph from which weights are being taken.

    Attributes
    ----------
    graph : Graph
    constants : dict of Value to Constant
        The floating-point constants of the graph.
    large : list of Weight
        Constants of other types that are too large to stay in the graph.
    constant_nodes : set of Node
        Nodes that compute from constants alone.
    not_weights : dict of Use to str
        Why a constant is no weight of a node that reads it, "kind" or "kind: detail".
    inline : list of Weight
        Floating-point constants that stay in the graph.
    """

    graph: ir.Graph
    constants: dict[ir.Value, Constant] = field(default_factory=dict)
    large: list[Weight] = field(default_factory=list)
    constant_nodes: set[ir.Node] = field(default_factory=set)
    not_weights: dict[Use, str] = field(default_factory=dict)
    inline: list[Weight] = field(default_factory=list)
