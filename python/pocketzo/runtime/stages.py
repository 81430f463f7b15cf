"""Cutting a graph into stages, each with a share of the weights: the devices of a pipeline hold one stage each.

A stage takes the values that the stage before gives, and the graph's own inputs. What is cheap to compute from these,
such as masks and tables of positions, every stage computes by itself: :func:`pocketzo.runtime.cut.cheapest` decides it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pocketzo.errors import BundleError, NotCuttableError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.cut import Kept, ancestors, cheapest, cost_of
from pocketzo.runtime.measure import Sizes, measure, multiply_adds
from pocketzo.runtime.min_cut import INFINITE
from pocketzo.runtime.onnx_proto import read_by, read_graph
from pocketzo.runtime.subgraph import remove_unused_inputs

_MOST_PLACES: Final = 100  # at which a cut is considered
_WIDER: Final = 1.25  # a place is considered where no more than this times the fewest bytes cross
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
    """

    takes: tuple[Kept, ...]
    gives: tuple[Kept, ...]
    outputs: tuple[str, ...]
    tensors: tuple[str, ...]
    nbytes: int
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

        def size(name: str) -> float:
            own = self._sizes.get(name)
            return own.count(rows, tokens, positions) * own.dtype.itemsize if own else 0.0

        at_once = (sum(map(size, {*node.input, *node.output})) for node in self._nodes)
        return int(max(at_once, default=0.0))

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
    bundle: Bundle, count: int, shares: Sequence[float] | None = None, *, graph: MeasuredGraph | None = None
) -> list[StagePlan]:
    """Cut a bundle's graph into stages.

    The cuts are made where few values cross, and such that the largest stage, measured by the bytes of its weights over
    its share, is as small as possible.

    Parameters
    ----------
    bundle : Bundle
        With a probing batch.
    count : int
        How many stages, at least 1.
    shares : sequence of float, optional
        The share of the weights that each stage should have, in any unit; equal ones by default.
    graph : MeasuredGraph, optional
        Of :func:`measured`, which is called by default.

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
    places = _places(nodes, sizes, stored, count, shares)
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
        read = {name for node in chosen for name in read_by(node)}
        tensors = tuple(name for name in stored if name in read)
        stages.append(
            StagePlan(
                takes=_kept(nodes, takes, sizes),
                gives=_kept(nodes, gives, sizes),
                outputs=() if gives else outputs,
                tensors=tensors,
                nbytes=sum(stored[name] for name in tensors),
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
    nodes: Sequence[Any],
    sizes: Mapping[str, Sizes],
    stored: Mapping[str, int],
    count: int,
    shares: Sequence[float],
) -> list[int] | None:
    """Return before which nodes to cut, so that the largest stage over its share is smallest; None if it cannot be."""
    crossing = _crossing(nodes, sizes, stored)
    inner = [at for at in range(1, len(nodes)) if 0 < crossing[at] < INFINITE]
    few = _WIDER * min((crossing[at] for at in _middle(nodes, stored, inner) or inner), default=0)
    inner = sorted(sorted((at for at in inner if crossing[at] <= few), key=lambda at: crossing[at])[:_MOST_PLACES])
    edges = [0, *inner, len(nodes)]
    size = _sizes_between(nodes, stored, edges)
    # best[k][e]: of k stages up to edge e, the largest over its share, and the edge where the last of them begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for share in shares:
        found: dict[int, tuple[float, int]] = {}
        for (begin, (worst, _)), end in itertools.product(best[-1].items(), range(1, len(edges))):
            if begin < end:
                found[end] = min(found.get(end, (INFINITE, 0)), (max(worst, size[begin, end] / share), begin))
        best.append(found)
    end = len(edges) - 1
    if end not in best[count]:
        return None
    places = []
    for stage in range(count, 1, -1):
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


def _middle(nodes: Sequence[Any], stored: Mapping[str, int], places: Sequence[int]) -> list[int]:
    """Return those of some places that have a tenth of the weights or more on either side."""
    seen: set[str] = set()
    sums = [0]
    for node in nodes:
        fresh = (read_by(node) & stored.keys()) - seen
        seen |= fresh
        sums.append(sums[-1] + sum(stored[name] for name in fresh))
    return [at for at in places if sums[-1] / 10 <= sums[at] <= 9 * sums[-1] / 10]


def _sizes_between(nodes: Sequence[Any], stored: Mapping[str, int], edges: Sequence[int]) -> dict[tuple[int, int], int]:
    """Return the bytes of the weights that the nodes between two edges read, by the edges' numbers."""
    parts = [
        {name for node in nodes[begin:end] for name in read_by(node)} & stored.keys()
        for begin, end in itertools.pairwise(edges)
    ]
    sizes = {}
    for begin in range(len(parts)):
        seen: set[str] = set()
        total = 0
        for end in range(begin, len(parts)):
            total += sum(stored[name] for name in parts[end] - seen)
            seen |= parts[end]
            sizes[begin, end + 1] = total
    return sizes
