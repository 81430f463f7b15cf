"""Add small trainable tensors to a graph, and nodes that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec, Place
from pocketzo.formats.frozen import FrozenSpec
from pocketzo.graph.attention import Columns, Scope, scopes_of
from pocketzo.graph.build import Builder
from pocketzo.graph.frozen import UNASKED
from pocketzo.graph.layers import Layers
from pocketzo.graph.names import title_of, unique, value_names
from pocketzo.graph.projections import Projection, readers
from pocketzo.graph.weight import Array
from pocketzo.kernels import noise

INITIAL_DRAW: Final = 2**64 - 1
"""The draw of seed 0 that fills tensors with noise, by their own ids; a run's draws count from 0."""


@dataclass(eq=False)
class Added:
    """A float32 tensor that is added to a graph.

    Attributes
    ----------
    name : str
    part : str
        The part of ``--train`` that adds it.
    trained : bool
    shape : tuple of int
    fill : float or ndarray
        What it begins with; noise, if `noise_scale` is not 0.
    noise_scale : float
    """

    name: str
    part: str
    trained: bool
    shape: tuple[int, ...]
    fill: float | Array = 0.0
    noise_scale: float = 0.0

    @property
    def frozen(self) -> FrozenSpec:
        """Its entry among the frozen tensors, if it is not trained."""
        return FrozenSpec(self.name, "float32", prod(self.shape), f"{UNASKED}: train={self.part}")

    def initial(self, tensor_id: int) -> Array:
        """Return what it begins with, float32."""
        if self.noise_scale:
            drawn = noise(prod(self.shape), seed=0, tensor=tensor_id, draw=INITIAL_DRAW)
            return (drawn * np.float32(self.noise_scale)).reshape(self.shape)
        return np.full(self.shape, self.fill, np.float32)


@dataclass(eq=False)
class _Change:
    """What is described of an addition, and the nodes that multiply by the changed weight or add the changed bias."""

    spec: AddedSpec
    stored: list[ir.Value] = field(default_factory=list)
    nodes: set[ir.Node] = field(default_factory=set)


class Editor:
    """Adds tensors and nodes to a graph and its branches; the same tensor once, if both branches have its place.

    Attributes
    ----------
    scopes : list of Scope
        The graphs that have projections.
    added : dict of str to Added
    taken : set of str
        The names of the graph's values.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.scopes = [scope for scope in scopes_of(graph) if scope.projections]
        self.added: dict[str, Added] = {}
        self._changes: dict[tuple[str, ...], _Change] = {}
        self._layers = {scope: _layers_of(scope) for scope in self.scopes}  # before nodes are added
        self.taken = value_names(graph)

    def layers(self, scope: Scope) -> Layers:
        """Return the layers of a graph.

        Raises
        ------
        BundleError
            It has none.
        """
        found = self._layers[scope]
        if isinstance(found, BundleError):
            raise found
        return found

    def parameter(self, new: Added) -> ir.Value:
        """Add a tensor, or return it if the same part added it in another branch.

        Raises
        ------
        BundleError
            Another part added it.
        """
        old = self.added.get(new.name)
        if old is None:
            if new.name in self.taken:
                raise BundleError(f"train={new.part!r} adds {new.name!r}, and the graph has a value of that name")
            self.taken.add(new.name)
            self.added[new.name] = new
            value = ir.val(new.name, ir.DataType.FLOAT, new.shape)
            self.graph.initializers.add(value)
            return value
        if old.part != new.part or old.shape != new.shape:
            raise BundleError(f"train={new.part!r} adds {new.name!r}, as {old.part!r} does: leave one of them out")
        return self.graph.initializers[new.name]

    def describe(self, spec: AddedSpec, projection: Projection | None = None) -> None:
        """Note what was added; a second time, if both branches have its place."""
        change = self._changes.setdefault(spec.tensors, _Change(spec))
        if projection is None or spec.place is None:
            return
        changed = [(projection.stored, projection.node)]
        if spec.kind == "ia3" and not spec.place.input:
            changed += projection.biases
        for value, node in changed:
            change.stored.append(value)
            change.nodes.add(node)

    def place(self, columns: Columns, role: str | None = None, fault: str | None = None) -> Place:
        """Return the description of some columns of a product, which all have a role if others have another one."""
        projection = columns.projection
        if projection.factor != 1 and fault is None:
            fault = f"node {title_of(projection.node)} multiplies the product by {projection.factor:g}"
        return Place(
            weight=projection.weight,
            rows=projection.rows,
            columns=projection.columns,
            transposed=projection.transposed,
            start=columns.start,
            count=columns.count,
            role=role if columns.count < projection.columns else None,
            fault=fault,
        )

    @property
    def described(self) -> tuple[AddedSpec, ...]:
        """All that was added, once nothing else will be."""
        specs = []
        for change in self._changes.values():
            spec, place = change.spec, change.spec.place
            others = [(value, node) for value in change.stored for node in readers(value) if node not in change.nodes]
            if place is not None and place.fault is None and others:
                value, node = others[0]
                place = replace(place, fault=f"{value.name!r} is also read by node {title_of(node)}")
            specs.append(replace(spec, place=place))
        return tuple(specs)

    def builder(self, scope: Scope, stem: str) -> Builder:
        """Return what adds nodes to a graph."""
        return Builder(scope.graph, f"{stem}/", taken=self.taken)

    def rewire(self, value: ir.Value, compute: Callable[[], ir.Value]) -> ir.Value:
        """Let all that reads a value read another one, which is computed from it."""
        uses, is_output = tuple(value.uses()), value.is_graph_output()
        new = compute()
        for node, index in uses:
            node.replace_input_with(index, new)
        if is_output:
            assert isinstance(new.graph, ir.Graph), "a value of a graph"
            outputs = new.graph.outputs
            new.type, new.shape = value.type, value.shape
            outputs[outputs.index(value)] = new
            name, value.name = value.name, unique(f"{value.name}.base", self.taken)
            new.name = name
        return new

    def change_columns(
        self,
        scope: Scope,
        projection: Projection,
        changes: Sequence[tuple[Columns, Callable[[Builder, ir.Value], ir.Value]]],
    ) -> None:
        """Change columns of a product.

        Parameters
        ----------
        scope : Scope
        projection : Projection
            Its `y` becomes the changed product.
        changes : sequence of (Columns, callable)
            In the order of the columns, which do not overlap: what computes new columns from a value of them.
        """
        build = self.builder(scope, projection.stem)
        y = projection.y

        def compute() -> ir.Value:
            if len(changes) == 1 and changes[0][0].count == projection.columns:
                return changes[0][1](build, y)
            spans: list[tuple[int, Callable[[Builder, ir.Value], ir.Value] | None]] = []
            at = 0
            for columns, change in changes:
                spans += [(columns.start - at, None), (columns.count, change)]
                at = columns.start + columns.count
            spans = [span for span in (*spans, (projection.columns - at, None)) if span[0]]
            pieces = build.split(y, [size for size, _ in spans])
            for index, (_, how) in enumerate(spans):
                if how is not None:
                    pieces[index] = how(build, pieces[index])
            return build.op("Concat", *pieces, axis=-1)

        projection.y = self.rewire(y, compute)


def _layers_of(scope: Scope) -> Layers | BundleError:
    try:
        return Layers(scope)
    except BundleError as error:
        return error


def cast(build: Builder, value: ir.Value, old: ir.DataType, new: ir.DataType) -> ir.Value:
    """Return a value of another type."""
    return value if old == new else build.op("Cast", value, to=new)
