"""Attach the plan's decision to every linear of the graph."""

from __future__ import annotations

from collections.abc import Sequence

from hif4c.passes.mark_boundaries import region
from hif4c.passes.program import Decision, PassResult, Program

__all__ = ["choose_precision"]


def choose_precision(program: Program, plan: Sequence[Decision]) -> PassResult:
    """Record one decision for each `aten.linear`.

    Raises:
        ValueError: the graph and the plan do not name the same linears, or the plan quantizes a boundary region.
    """
    decisions = {decision.path: decision for decision in plan}
    regions = {program.linear_path(node): region(node) for node in program.linears()}
    if regions.keys() != decisions.keys():
        raise ValueError(
            "the plan and the graph disagree about the linears: "
            f"only planned {sorted(decisions.keys() - regions.keys())}, "
            f"only in the graph {sorted(regions.keys() - decisions.keys())}"
        )
    for path, decision in decisions.items():
        if decision.quantized and regions[path] == "boundary":
            raise ValueError(f"the plan quantizes {path}, which lies in a boundary region")
    program.decisions = {path: decisions[path] for path in regions}
    counts: dict[str, int] = {}
    for decision in plan:
        counts[decision.precision] = counts.get(decision.precision, 0) + 1
    return PassResult(True, [f"{count} linears {precision}" for precision, count in sorted(counts.items())])
