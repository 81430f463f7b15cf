"""Embeddings that are read from prepacked memory, so that a tied matrix is there once.

An embedding that is also the output projection is multiplied by in the prepacked layout, which onnxruntime cannot look
rows up in. The rows are looked up here, and given to the session as an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.runtime.layout import Location
from pocketzo.runtime.onnx_proto import FLOAT
from pocketzo.runtime.slices import Slices


@dataclass(frozen=True)
class Lookup:
    """A node that looks up rows.

    Attributes
    ----------
    matrix, ids, rows : str
        The weight, the graph's input of row numbers, and the result.
    """

    matrix: str
    ids: str
    rows: str


def lookup_of(graph: Any, node: Any) -> Lookup | None:
    """Return what a node looks up by an input of the graph; None if it does something else."""
    if node.op_type != "Gather" or node.domain or any(one.name == "axis" and one.i for one in node.attribute):
        return None
    matrix, ids = node.input
    (rows,) = node.output
    inputs = {value.name for value in graph.input}
    return Lookup(matrix, ids, rows) if ids in inputs and rows not in {value.name for value in graph.output} else None


def take_lookups(graph: Any, matrices: Mapping[str, int]) -> list[Lookup]:
    """Replace the nodes that look up rows by inputs of the graph.

    Parameters
    ----------
    graph : message
        Changed in place.
    matrices : mapping of str to int
        The width of each matrix whose rows are looked up elsewhere.
    """
    shapes = {value.name: value.type.tensor_type.shape for value in graph.input}
    found, kept = [], []
    for node in graph.node:
        lookup = lookup_of(graph, node) if node.input and node.input[0] in matrices else None
        if lookup is None:
            kept.append(node)
            continue
        found.append(lookup)
        added = graph.input.add(name=lookup.rows)
        added.type.tensor_type.elem_type = FLOAT
        added.type.tensor_type.shape.CopyFrom(shapes[lookup.ids])
        added.type.tensor_type.shape.dim.add(dim_value=matrices[lookup.matrix])
    del graph.node[:]
    graph.node.extend(kept)
    return found


class Feeding:
    """A session that is given more inputs than the model's: rows that are looked up, and the room of slices.

    Parameters
    ----------
    session : InferenceSession
    lookups : sequence of Lookup
    locations : mapping of str to Location
        Of the matrices whose rows are looked up.
    slices : Slices
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        lookups: Sequence[Lookup],
        locations: Mapping[str, Location],
        slices: Slices,
    ) -> None:
        self._session = session
        self._lookups = [(lookup, locations[lookup.matrix]) for lookup in lookups]
        self._default = slices.feed()

    def run(
        self, names: list[str] | None, feed: Mapping[str, NDArray[Any]], options: ort.RunOptions | None = None
    ) -> list[NDArray[Any]]:
        """Run the session as :meth:`InferenceSession.run` does.

        Raises
        ------
        IndexError
            A matrix has no row of a number.
        """
        rows = {
            lookup.rows: at.packing.take(at.memory, np.ascontiguousarray(feed[lookup.ids], np.int64))
            for lookup, at in self._lookups
            if lookup.ids in feed
        }
        result: list[NDArray[Any]] = self._session.run(names, {**self._default, **feed, **rows}, options)
        return result
