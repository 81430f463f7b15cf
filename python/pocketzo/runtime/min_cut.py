"""A minimum cut of a directed graph with capacities (Dinic's algorithm)."""

from __future__ import annotations

from collections.abc import Hashable

INFINITE = float("inf")


class Network:
    """Arcs between nodes, each with a capacity."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._arcs: list[list[int]] = []  # by node, the numbers of its arcs
        self._heads: list[int] = []
        self._room: list[float] = []

    def connect(self, tail: Hashable, head: Hashable, capacity: float) -> None:
        """Add an arc."""
        one, other = self._number(tail), self._number(head)
        for begin, end, room in ((one, other, capacity), (other, one, 0.0)):
            self._arcs[begin].append(len(self._heads))
            self._heads.append(end)
            self._room.append(room)

    def near_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """Return the smallest set of nodes with the source such that the arcs out of it have the least capacity."""
        begin, end = self._number(source), self._number(sink)
        while (levels := self._levels(begin))[end] >= 0:
            self._fill(begin, end, levels)
        return {node for node, number in self._numbers.items() if levels[number] >= 0}

    def _number(self, node: Hashable) -> int:
        number = self._numbers.setdefault(node, len(self._numbers))
        if number == len(self._arcs):
            self._arcs.append([])
        return number

    def _levels(self, begin: int) -> list[int]:
        levels = [-1] * len(self._arcs)
        levels[begin] = 0
        queue = [begin]
        for node in queue:  # which grows
            for arc in self._arcs[node]:
                head = self._heads[arc]
                if self._room[arc] > 0 and levels[head] < 0:
                    levels[head] = levels[node] + 1
                    queue.append(head)
        return levels

    def _fill(self, begin: int, end: int, levels: list[int]) -> None:
        """Send flow along shortest paths until each has a full arc."""
        after = [0] * len(self._arcs)  # by node, the first of its arcs that may lead on
        path: list[int] = []
        node = begin
        while True:
            if node == end:
                least = min(self._room[arc] for arc in path)
                for arc in path:
                    self._room[arc] -= least
                    self._room[arc ^ 1] += least
                path, node = [], begin
                continue
            arcs = self._arcs[node]
            while after[node] < len(arcs):
                arc = arcs[after[node]]
                if self._room[arc] > 0 and levels[self._heads[arc]] == levels[node] + 1:
                    break
                after[node] += 1
            if after[node] < len(arcs):
                path.append(arcs[after[node]])
                node = self._heads[path[-1]]
            elif path:
                arc = path.pop()
                node = self._heads[arc ^ 1]
                after[node] += 1
            else:
                return
