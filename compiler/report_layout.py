"""Where the nodes and lines of a program's drawing go: a layered layout, computed once for each structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Layout", "lay_out"]

_LANE = 0.12
"""Columns between a node and a line that passes it, or between two such lines."""
_SWEEPS = 12
"""Rounds down and up in which nodes move towards their neighbours; after these a drawing of a block hardly changes."""


@dataclass(frozen=True)
class Layout:
    """A drawing in units of one column and one layer, which the page gives a size in pixels.

    Attributes:
        x: middle of each node in columns, from 0; nodes of one layer are at least one column apart.
        y: layer of each node, from 0 at the top; every line goes down.
        routes: for each line the columns at which it passes the layers between its ends.
        columns: greatest x.
        layers: how many there are.
    """

    x: tuple[float, ...]
    y: tuple[int, ...]
    routes: tuple[tuple[float, ...], ...]
    columns: float
    layers: int


def lay_out(nodes: int, edges: Sequence[tuple[int, int]]) -> Layout:
    """Draw a program from top to bottom (Sugiyama, Tagawa and Toda, 1981).

    igraph orders each layer so that few lines cross. Columns are chosen here: a line that passes a layer needs far
    less room than a node, and igraph gives both the same.

    Args:
        nodes: how many there are, numbered in execution order.
        edges: (from, to) with from < to.
    """
    import igraph

    x, y = [0.0] * nodes, [0] * nodes
    routes: list[tuple[float, ...]] = [()] * len(edges)
    left = 0.0
    for part in sorted(igraph.Graph(nodes, edges).connected_components(), key=len, reverse=True):
        number = {node: index for index, node in enumerate(part)}
        inside = [index for index, (start, _) in enumerate(edges) if start in number]
        found = _lay_out_part(len(part), [(number[edges[index][0]], number[edges[index][1]]) for index in inside])
        for node in part:
            x[node], y[node] = round(left + found.x[number[node]], 2), found.y[number[node]]
        for index, route in zip(inside, found.routes, strict=True):
            routes[index] = tuple(round(left + column, 2) for column in route)
        left += found.columns + 1
    return Layout(tuple(x), tuple(y), tuple(routes), max(left - 1, 0.0), max(y, default=-1) + 1)


def _lay_out_part(nodes: int, edges: Sequence[tuple[int, int]]) -> Layout:
    """A layout of what hangs together; parts stand side by side."""
    import igraph

    layers = _layers(nodes, edges)
    chains: list[list[int]] = []
    for start, end in edges:
        passed = range(layers[start] + 1, layers[end])
        chains.append([start, *range(len(layers), len(layers) + len(passed)), end])
        layers.extend(passed)
    links = [link for chain in chains for link in pairwise(chain)]
    drawn = igraph.Graph(len(layers), links, directed=True).layout_sugiyama(layers=layers, maxiter=100)
    rows: list[list[int]] = [[] for _ in range(max(layers) + 1)]
    for vertex in sorted(range(len(layers)), key=lambda vertex: (drawn.coords[vertex][0], vertex)):
        rows[layers[vertex]].append(vertex)
    x = _columns(rows, links, nodes)
    routes = tuple(tuple(x[vertex] for vertex in chain[1:-1]) for chain in chains)
    return Layout(tuple(x[:nodes]), tuple(layers[:nodes]), routes, max(x), len(rows))


def _layers(nodes: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Longest path from the top; a node with one source or none sits right above its first reader instead."""
    sources: list[list[int]] = [[] for _ in range(nodes)]
    readers: list[list[int]] = [[] for _ in range(nodes)]
    for start, end in edges:
        sources[end].append(start)
        readers[start].append(end)
    layers = [0] * nodes
    for node in range(nodes):
        layers[node] = max((layers[source] + 1 for source in sources[node]), default=0)
    for node in reversed(range(nodes)):
        if readers[node] and len(sources[node]) <= 1:
            layers[node] = min(layers[reader] for reader in readers[node]) - 1
    return layers


def _columns(rows: list[list[int]], links: Sequence[tuple[int, int]], nodes: int) -> list[float]:
    """A column for every node and every passing line (numbers from `nodes` on), in the order of the rows."""
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for start, end in links:
        below.setdefault(start, []).append(end)
        above.setdefault(end, []).append(start)
    width = [0.5 if vertex < nodes else _LANE / 2 for vertex in range(sum(map(len, rows)))]
    x = [0.0] * len(width)
    for row in rows:
        _place(row, x, width, nodes)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            for vertex in row:
                near = (above if down else below).get(vertex) or (below if down else above).get(vertex)
                if near:
                    x[vertex] = sum(x[other] for other in near) / len(near)
            _place(row, x, width, nodes)
    first = min(x)
    return [value - first for value in x]


def _place(row: Sequence[int], x: list[float], width: Sequence[float], nodes: int) -> None:
    """Move a row's vertices as little as possible from x until none overlap.

    With the room between them taken off, the columns must not decrease: isotonic regression by pooling adjacent
    violators. Lines weigh more than nodes, so that they stay straight.
    """
    room = 0.0
    offsets: list[float] = []
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for index, vertex in enumerate(row):
        if index:
            room += width[row[index - 1]] + width[vertex]
        offsets.append(room)
        pool = (x[vertex] - room, 1.0 if vertex < nodes else 4.0, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, weight, members = pools.pop()
            total = weight + pool[1]
            pool = ((mean * weight + pool[0] * pool[1]) / total, total, members + pool[2])
        pools.append(pool)
    index = 0
    for mean, _, members in pools:
        for _ in range(members):
            x[row[index]] = mean + offsets[index]
            index += 1
