"""A program's drawing: lines go down, nothing lies on anything else, the same program looks the same."""

import random
from itertools import pairwise

import pytest

from hif4c.compiler.report_layout import _LANE, lay_out

# A column is rounded to 0.01.
ROUNDING = 0.011


def program(seed, nodes=60):
    """Nodes in execution order; most read the one before, some others further up, some nothing."""
    random.seed(seed)
    edges = set()
    for node in range(1, nodes):
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            edges.add((random.randrange(max(0, node - random.choice((1, 3, 30))), node), node))
    return nodes, sorted(edges)


@pytest.mark.parametrize("seed", range(4))
def test_lines_go_down_past_nodes(seed):
    nodes, edges = program(seed)
    layout = lay_out(nodes, edges)
    assert len(layout.x) == len(layout.y) == nodes
    rows = {layer: [(x, 0.5) for x, y in zip(layout.x, layout.y, strict=True) if y == layer] for layer in layout.y}
    for (start, end), route in zip(edges, layout.routes, strict=True):
        assert layout.y[start] < layout.y[end]
        assert len(route) == layout.y[end] - layout.y[start] - 1
        for layer, x in enumerate(route, layout.y[start] + 1):
            rows.setdefault(layer, []).append((x, _LANE / 2))
    for row in rows.values():
        row.sort()
        for (left, half), (right, other) in pairwise(row):
            assert right - left >= half + other - ROUNDING
    every = [*layout.x, *(x for route in layout.routes for x in route)]
    assert min(every) == 0
    assert max(every) == pytest.approx(layout.columns, abs=ROUNDING)
    assert layout.layers == max(layout.y) + 1


def test_the_same_program_looks_the_same():
    nodes, edges = program(5)
    random.seed(1)
    first = lay_out(nodes, edges)
    random.seed(2)
    assert lay_out(nodes, edges) == first


def test_a_constant_sits_above_what_reads_it():
    """Node 3 reads nothing; with the longest chain from the top it would be in the first row."""
    layout = lay_out(5, [(0, 1), (1, 2), (2, 4), (3, 4)])
    assert layout.y == (0, 1, 2, 2, 3)
    assert layout.routes == ((), (), (), ())


def test_a_chain_is_straight_and_parts_stand_side_by_side():
    layout = lay_out(5, [(0, 1), (1, 2), (3, 4)])
    assert layout.x == (0, 0, 0, 1, 1)
    assert layout.y == (0, 1, 2, 0, 1)
    assert (layout.columns, layout.layers) == (1, 3)


def test_nothing_to_draw():
    assert lay_out(0, []).layers == 0
    assert lay_out(1, []).x == (0,)
