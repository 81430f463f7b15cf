"""A tensor to be stored outside of the graph, and the graph from which tensors are being taken."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto

Array = npt.NDArray[Any]


class Use(NamedTuple):
    """An input of a node that reads a tensor."""

    node: NodeProto
    position: int


@dataclass
class Weight:
    """A tensor to be stored outside of the graph.

    Attributes
    ----------
    name : str
    array : ndarray
        The elements; often a view of a mapped file.
    parameter : bool
        Whether an operator uses it as a weight, so that it can be trained.
    dead : str or None
        A node that the runtime computes once, when it loads the graph, so that later writes are not seen.
    uses, transposed : list of Use
        Who reads it as it is stored, and who reads it transposed.
    stored : str or None
        The type in which it is to be stored, if it is another one than the array's.
    """

    name: str
    array: Array
    parameter: bool = False
    dead: str | None = None
    uses: list[Use] = field(default_factory=list)
    transposed: list[Use] = field(default_factory=list)
    stored: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which it is to be stored."""
        return np.dtype(self.stored or self.array.dtype)


@dataclass
class Draft:
    """A graph from which weights are being taken.

    Attributes
    ----------
    tensors : dict of str to ndarray
        All floating-point constants by the name of the value that the graph knows them by.
    large : list of Weight
        Constants of other types that are too large to stay in the graph.
    root : dict of str to str
        The tensor that each is a view of.
    label : dict of str to (str or None)
        The name of the parameter that each is, where the exporter kept it.
    uses : dict of str to list of Use
        Who reads each.
    readers : dict of str to list of NodeProto
        Who reads each value.
    constant_nodes : set of int
        The id() of each node that computes from constants alone.
    """

    graph: GraphProto
    tensors: dict[str, Array] = field(default_factory=dict)
    large: list[Weight] = field(default_factory=list)
    root: dict[str, str] = field(default_factory=dict)
    label: dict[str, str | None] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    readers: defaultdict[str, list[NodeProto]] = field(default_factory=lambda: defaultdict(list))
    # Nodes are told apart by id(): protobuf hands out one wrapper for a message as long as somebody holds it.
    nodes: list[NodeProto] = field(default_factory=list)
    constant_nodes: set[int] = field(default_factory=set)
