"""Cutting a graph into stages, each with a share of the memory: the devices of a pipeline hold one stage each.

A stage takes the values that the stage before gives, and the graph's own inputs. What is cheap to compute from these,
such as masks and tables of positions, every stage computes by itself: :func:`pocketzo.runtime.cut.cheapest` decides it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from pocketzo.errors import BundleError, NotCuttableError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.cut import Kept, ancestors, cheapest, cost_of
from pocketzo.runtime.frozen import stays_in_file
from pocketzo.runtime.measure import Sizes, measure, multiply_adds
from pocketzo.runtime.min_cut import INFINITE
from pocketzo.runtime.onnx_proto import read_by, read_graph
from pocketzo.runtime.subgraph import remove_unused_inputs

Shape: TypeAlias = tuple[float, float, float]
"""Rows, tokens and positions of a batch."""

_MOST_PLACES: Final = 100  # at which a cut is considered
_WIDER: Final = 1.25  # a place is considered where no more than this times the fewest bytes cross
_SIDE: Final = 1 / 10  # of the weights in memory: no fewer bytes are looked for where less is on one side
_LOOKUPS: Final = frozenset({"Gather", "GatherBlockQuantized"})
_LARGE: Final = 1 / 1000  # of the bytes of all weights: a value that needs such a weight is not computed twice


@dataclass(frozen=True)
class StagePlan:
    """One stage of a graph.

    Attributes
    ----------
    takes : tuple of Kept
        The values that the stage before gives.
    gives : tuple of Kept
        The values that the next stage takes, also those that are passed on.
    outputs : tuple of str
        The graph's outputs; none but of the last stage.
    tensors : tuple of str
        The weights that the stage reads.
    nbytes : int
        Their bytes.
    resident : int
        Bytes of weights in the memory of the stage's process: :class:`Held`.
    is_frozen : bool
        Whether those that are not trained stay in their file until onnxruntime prepacks them.
    """

    takes: tuple[Kept, ...]
    gives: tuple[Kept, ...]
    outputs: tuple[str, ...]
    tensors: tuple[str, ...]
    nbytes: int
    resident: int
    is_frozen: bool
    _nodes: tuple[Any, ...]
    _sizes: Mapping[str, Sizes]
    _weights: Mapping[str, tuple[int, ...]]

    def work(self, rows: float, tokens: float, positions: float = 1) -> float:
        """Return the multiply-adds of a forward pass of a batch."""
        return sum(multiply_adds(node, self._sizes, self._weights, rows, tokens, positions) for node in self._nodes)

    def sent(self, rows: float, tokens: float) -> int:
        """Return the bytes that go to the next stage for a batch."""
        return int(sum(kept.sizes.count(rows, tokens, 1) * kept.sizes.dtype.itemsize for kept in self.gives))

    def activations(self, rows: float, tokens: float, positions: float = 1) -> int:
        """Return the bytes of the largest values of a forward pass that are in memory at once: a node's, in and out."""
        return int(_largest_values(self._nodes, self._sizes, (rows, tokens, positions)))

    def readers(self) -> dict[str, set[str]]:
        """Return the kinds of the nodes that read each weight."""
        found: dict[str, set[str]] = {name: set() for name in self.tensors}
        for node in self._nodes:
            for name in read_by(node) & found.keys():
                found[name].add(node.op_type)
        return found

    def reduce(self, model: Any) -> None:
        """Reduce a graph of :func:`read_graph` to the stage, in place."""
        graph = model.graph
        taken = {kept.name for kept in self.takes}
        nodes = [node for node in graph.node if taken.isdisjoint(node.output)]
        outputs = [value for value in graph.output if value.name in self.outputs]
        del graph.node[:], graph.output[:]
        graph.node.extend(nodes)
        graph.output.extend(outputs)
        for kept in self.gives:
            if kept.name not in taken:
                kept.declare(graph.output)
        remove_unused_inputs(graph)
        read = {name for node in graph.node for name in read_by(node)}
        for kept in self.takes:
            if kept.name in read:
                kept.declare(graph.input)


class Held:
    """The weights that nodes read, and what of them is in the memory of the process that runs these nodes.

    Weights that are trained or prepacked are. Over a frozen base, a table that only lookups read is not: a few rows are
    read from the file, which is mapped. Trained weights are there twice then, as they return from each point by a copy.

    Parameters
    ----------
    bundle : Bundle
        The whole one.
    stored : mapping of str to int
        Of :func:`stored_bytes`.

    Attributes
    ----------
    names : set of str
    """

    def __init__(self, bundle: Bundle, stored: Mapping[str, int]) -> None:
        self.names: set[str] = set()
        self._bundle = bundle
        self._stored = stored
        self._trained = frozenset(tensor.name for tensor in bundle.tensors if tensor.trainable)
        self._counted: set[str] = set()
        self._read = self._resident = self._written = 0  # bytes: of all, of those that are no tables, of trained ones

    def add(self, reads: Iterable[tuple[str, str]]) -> None:
        """Add what nodes read, of :meth:`reads`."""
        for name, kind in reads:
            size, is_trained = self._stored[name], name in self._trained
            if name not in self.names:
                self.names.add(name)
                self._read += size
                self._written += size if is_trained else 0
            if name not in self._counted and (is_trained or kind not in _LOOKUPS):
                self._counted.add(name)
                self._resident += size

    def reads(self, nodes: Iterable[Any]) -> set[tuple[str, str]]:
        """Return the weights that nodes read, each with the kind of the node."""
        return {(name, node.op_type) for node in nodes for name in read_by(node) if name in self._stored}

    @property
    def is_frozen(self) -> bool:
        """Whether those that are not trained stay in their file."""
        return stays_in_file(self._bundle, self._written, self._read - self._written)

    @property
    def resident(self) -> int:
        """Bytes in memory."""
        return self._resident + self._written if self.is_frozen else self._read


def _largest_values(nodes: Iterable[Any], sizes: Mapping[str, Sizes], batch: Shape) -> float:
    """Return the bytes of the largest values that are in memory at once."""

    def size(name: str) -> float:
        own = sizes.get(name)
        return own.count(*batch) * own.dtype.itemsize if own else 0.0

    return max((sum(map(size, {*node.input, *node.output})) for node in nodes), default=0.0)


class MeasuredGraph(NamedTuple):
    """A bundle's graph, and the sizes of its values."""

    nodes: list[Any]
    outputs: tuple[str, ...]
    sizes: Mapping[str, Sizes]
    weights: Mapping[str, tuple[int, ...]]


def measured(bundle: Bundle) -> MeasuredGraph:
    """Read and measure a bundle's graph.

    Raises
    ------
    NotCuttableError
        It cannot be read or run.
    """
    try:
        model = read_graph(bundle.model_path)
        sizes = measure(bundle, model)
    except (BundleError, NotPrepackableError) as error:
        raise NotCuttableError(str(error)) from None
    graph = model.graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return MeasuredGraph(list(graph.node), tuple(value.name for value in graph.output), sizes, weights)


def plan_stages(
    bundle: Bundle,
    count: int,
    shares: Sequence[float] | None = None,
    *,
    graph: MeasuredGraph | None = None,
    batch: Shape | None = None,
) -> list[StagePlan]:
    """Cut a bundle's graph into stages.

    The cuts are made where few values cross, and such that the largest stage, measured by the bytes that its weights
    take in memory (:class:`Held`) over its share, is as small as possible.

    Parameters
    ----------
    bundle : Bundle
        With a probing batch.
    count : int
        How many stages, at least 1.
    shares : sequence of float, optional
        The share of this memory that each stage should have, in any unit; equal ones by default.
    graph : MeasuredGraph, optional
        Of :func:`measured`, which is called by default.
    batch : tuple of float, optional
        Rows, tokens and positions of a batch whose largest values count as the weights do.

    Raises
    ------
    NotCuttableError
        The graph has no such stages; says why.
    """
    shares = [1.0] * count if shares is None else list(shares)
    if len(shares) != count or not all(share > 0 and math.isfinite(share) for share in shares):
        raise ValueError(f"shares must be {count} positive numbers, one for each stage, got {shares}")
    nodes, outputs, sizes, weights = measured(bundle) if graph is None else graph
    stored = stored_bytes(bundle)
    places = _places(bundle, nodes, sizes, stored, batch, shares)
    if places is None:
        raise NotCuttableError(
            f"{bundle.path}: its graph has fewer than {count - 1} places where it could be cut into {count} stages; "
            "take fewer stages"
        )
    made = {name: node for node in nodes for name in node.output if name}
    stages: list[StagePlan] = []
    gives: set[str] = set()
    for at in reversed([0, *places]):
        targets = gives or {*outputs}
        before = nodes[:at]
        earlier = {name for node in before for name in node.output if name}
        own = [node for node in ancestors(made, targets, ()) if earlier.isdisjoint(node.output)]
        wanted = ({name for node in own for name in read_by(node)} | targets) & earlier
        takes = cheapest(before, wanted, sizes, weights, stored) if before else set()
        if before and not takes:
            raise NotCuttableError(f"{bundle.path}: what crosses the cut of stage {len(places) - len(stages)} varies")
        chosen = ancestors(made, targets, takes)
        held = Held(bundle, stored)
        held.add(held.reads(chosen))
        tensors = tuple(name for name in stored if name in held.names)
        stages.append(
            StagePlan(
                takes=_kept(nodes, takes, sizes),
                gives=_kept(nodes, gives, sizes),
                outputs=() if gives else outputs,
                tensors=tensors,
                nbytes=sum(stored[name] for name in tensors),
                resident=held.resident,
                is_frozen=held.is_frozen,
                _nodes=tuple(chosen),
                _sizes=sizes,
                _weights=weights,
            )
        )
        gives = takes
    return stages[::-1]


def stored_bytes(bundle: Bundle) -> dict[str, int]:
    """Return the bytes of each tensor in a bundle's files, in their order."""
    return {name: entry.stop - entry.start for name, (_, entry) in bundle.places.items()}


def _kept(nodes: Iterable[Any], names: Collection[str], sizes: Mapping[str, Sizes]) -> tuple[Kept, ...]:
    return tuple(Kept(name, sizes[name]) for node in nodes for name in node.output if name in names)


def _places(
    bundle: Bundle,
    nodes: Sequence[Any],
    sizes: Mapping[str, Sizes],
    stored: Mapping[str, int],
    batch: Shape | None,
    shares: Sequence[float],
) -> list[int] | None:
    """Return before which nodes to cut, so that the largest stage over its share is smallest; None if it cannot be."""
    crossing = _crossing(nodes, sizes, stored)
    inner = [at for at in range(1, len(nodes)) if 0 < crossing[at] < INFINITE]
    side = max(_SIDE, min(shares) / sum(shares) / 2)
    few = _WIDER * min((crossing[at] for at in _middle(Held(bundle, stored), nodes, inner, side) or inner), default=0)
    inner = sorted(sorted((at for at in inner if crossing[at] <= few), key=lambda at: crossing[at])[:_MOST_PLACES])
    edges = [0, *inner, len(nodes)]
    parts = [nodes[begin:end] for begin, end in itertools.pairwise(edges)]
    values = [_largest_values(part, sizes, batch) if batch else 0.0 for part in parts]
    size = _sizes_between(lambda: Held(bundle, stored), parts, values)
    # best[k][e]: of k stages up to edge e, the largest over its share, and the edge where the last of them begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for share in shares:
        found: dict[int, tuple[float, int]] = {}
        for (begin, (worst, _)), end in itertools.product(best[-1].items(), range(1, len(edges))):
            if begin < end:
                found[end] = min(found.get(end, (INFINITE, 0)), (max(worst, size[begin, end] / share), begin))
        best.append(found)
    end = len(edges) - 1
    if end not in best[-1]:
        return None
    places = []
    for stage in range(len(shares), 1, -1):
        end = best[stage][end][1]
        places.append(edges[end])
    return places[::-1]


def _crossing(nodes: Sequence[Any], sizes: Mapping[str, Sizes], stored: Mapping[str, int]) -> list[float]:
    """Return for each place between nodes the bytes of the values that cross it, but for those cheap to compute."""
    large = _LARGE * sum(stored.values())
    heavy: set[str] = set()
    last: dict[str, int] = {}
    for number, node in enumerate(nodes):
        read = read_by(node)
        if not heavy.isdisjoint(read) or any(stored.get(name, 0) >= large for name in read):
            heavy.update(name for name in node.output if name in sizes)
        last.update(dict.fromkeys(read, number))
    changes = [0] * (len(nodes) + 1)
    barred = [0] * (len(nodes) + 1)  # by values that cannot be sent
    for number, node in enumerate(nodes):
        for name in node.output:
            if name in heavy and last.get(name, -1) > number:
                cost = cost_of(sizes[name])
                counts, step = (barred, 1) if math.isinf(cost) else (changes, int(cost))
                counts[number + 1] += step
                counts[last[name] + 1] -= step
    return [
        INFINITE if bars else size
        for size, bars in zip(itertools.accumulate(changes), itertools.accumulate(barred), strict=True)
    ]


def _middle(held: Held, nodes: Sequence[Any], places: Sequence[int], side: float) -> list[int]:
    """Return those of some places that have a share of the weights in memory or more on either side."""
    sums = [0]
    for node in nodes:
        held.add(held.reads([node]))
        sums.append(held.resident)
    return [at for at in places if side * sums[-1] <= sums[at] <= (1 - side) * sums[-1]]


def _sizes_between(
    hold: Callable[[], Held], parts: Sequence[Sequence[Any]], values: Sequence[float]
) -> dict[tuple[int, int], float]:
    """Return the bytes in memory of the weights that consecutive parts read, and of their largest values.

    The keys are the numbers of the first part, and of the one behind the last.
    """
    reads = [hold().reads(part) for part in parts]
    found = {}
    for begin in range(len(parts)):
        held = hold()
        for end in range(begin, len(parts)):
            held.add(reads[end])
            found[begin, end + 1] = held.resident + max(values[begin : end + 1])
    return found
