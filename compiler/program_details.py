"""What a program in the making knows of its nodes and tensors beyond the graph: numbers, precisions, marks, sources."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from hif4c.compiler.program_views import NodeDetails, region_of
from hif4c.passes.matching import QUANTIZERS
from hif4c.passes.program import LINEAR, Decision, Precision, Program, TensorSource, module_path
from hif4c.runtime.graph import Graph

__all__ = ["ProgramDetails", "stored_details"]

hif4 = torch.ops.hif4
NONE = "none"
PRODUCTS = (
    "aten.linear.default",
    "aten.matmul.default",
    "aten.bmm.default",
    "aten.mm.default",
    "aten.addmm.default",
    "aten.conv3d.default",
    "aten.scaled_dot_product_attention.default",
    "hif4.attention",
)
"""What is computed in 16 bits or more wherever it stands."""
STORED_PRECISIONS = {
    "hif4.linear": Precision.W4A4,
    "hif4.linear_w4": Precision.W4A16,
    "hif4.quantize": Precision.W4A4,
    "hif4.norm_quantize": Precision.W4A4,
} | dict.fromkeys(PRODUCTS, Precision.HIGH)
# Position of the weight, or of its codes, among the arguments.
WEIGHTS = {LINEAR: 1, hif4.linear.default: 2, hif4.linear_w4.default: 1}
# What may stand between a weight and the linear that reads it.
CARRIERS = (operator.getitem, hif4.quantize.default, hif4.dequantize.default, torch.ops.aten.to.dtype)


class ProgramDetails:
    """Follows one program through the passes; a node keeps the number that it got when it was first seen."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._counts: dict[str, int] = {}

    def nodes(self, program: Program) -> list[NodeDetails]:
        """Of every call, in the order of `to_graph`."""
        return [
            NodeDetails(self._number(node), *_planned(program, node))
            for node in program.graph.nodes
            if node.op == "call_function"
        ]

    def tensors(self, program: Program) -> dict[str, tuple[str, ...]]:
        """Stored tensor -> how it is made from the checkpoint's tensor; those that are copied are left out."""
        return {spec.name: steps for spec in program.tensors.values() if (steps := tuple(_steps(spec)))}

    def _number(self, node: fx.Node) -> int:
        region = region_of(module_path(node))
        # A graph gives a name once, so a new node is never taken for one that is gone.
        key = (region, node.name)
        if key not in self._numbers:
            self._numbers[key] = self._counts.get(region, 0)
            self._counts[region] = self._numbers[key] + 1
        return self._numbers[key]


def stored_details(graph: Graph) -> list[NodeDetails]:
    """Of a program without a history: values are numbered in order."""
    counts: dict[str, int] = {}
    details = []
    for node in graph.nodes:
        region = region_of(node.module)
        number = counts.get(region, 0)
        counts[region] = number + 1
        details.append(NodeDetails(number, STORED_PRECISIONS.get(node.target, NONE)))
    return details


def _planned(program: Program, node: fx.Node) -> tuple[str, str]:
    """Precision and marks of a node."""
    if node.target in WEIGHTS:
        decision = _decision(program, node.args[WEIGHTS[node.target]])
        if decision is not None:
            return decision.precision, _marks(decision)
    elif node.target in QUANTIZERS or node.target is hif4.dequantize.default:
        decision = _decision(program, node.args[0])
        # What is not a weight is an input that is computed with in 4 bits.
        return Precision.W4A4 if decision is None else decision.precision, ""
    target = str(node.target)
    return STORED_PRECISIONS.get(target.removesuffix(".default") if target.startswith("hif4.") else target, NONE), ""


def _decision(program: Program, value: object) -> Decision | None:
    """The decision on the linear whose weight a value is; None where it is no weight, or there is no plan."""
    while isinstance(value, fx.Node) and value.target in CARRIERS:
        value = value.args[0]
    spec = program.tensors.get(value.name) if isinstance(value, fx.Node) else None
    if spec is None or spec.source is None or spec.plane in ("down", "up"):
        return None
    return program.decisions.get(spec.source.removesuffix(".weight"))


def _marks(decision: Decision) -> str:
    marks = [decision.precision]
    if decision.shift is not None:
        marks.append(f"input without {decision.shift}")
    if decision.mask is not None:
        marks.append(f"{'folded ' if decision.mask_folded else ''}mask {decision.mask}")
    if decision.hadamard:
        marks.append(f"rotation {decision.hadamard}")
    if decision.rank:
        marks.append(f"rank {decision.rank}")
    return ", ".join(marks)


def _steps(spec: TensorSource) -> Iterator[str]:
    for row, shift in spec.row_shifts:
        yield f"row {row} less {shift}" if len(spec.shape) > 1 else f"less {shift}"
    if spec.input_shift is not None:
        yield f"plus the weight times {spec.input_shift}"
    if spec.row_mask is not None:
        yield f"rows times {spec.row_mask}"
    if spec.plane == "down":
        yield f"low-rank factor of {spec.source}"
    elif spec.plane == "up":
        yield f"low-rank factor and outlier columns of {spec.source}"
    elif spec.plane != "whole":
        if spec.rank:
            yield f"without its part of rank {spec.rank}"
        if spec.mask is not None:
            yield f"columns over {spec.mask}"
        if spec.hadamard:
            yield f"rotated by {spec.hadamard}"
        if spec.rounding != "nearest":
            yield f"rounded by {spec.rounding}"
