"""What fusing passes ask of a graph: who reads a value, what a cast hides, whether a factor fits."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hif4c.passes.producers import some_paths

__all__ = [
    "LINEARS",
    "QUANTIZERS",
    "arguments",
    "before_widening",
    "fits_tokens",
    "input_quantizer",
    "only_reader",
    "other_operand",
    "padded",
    "reasons",
]

aten, hif4 = torch.ops.aten, torch.ops.hif4
LINEARS = (hif4.linear.default, hif4.linear_w4.default)
"""The fused 4-bit linears."""
QUANTIZERS: dict[Any, tuple[int, int]] = {hif4.quantize.default: (1, 2), hif4.norm_quantize.default: (7, 8)}
"""What quantizes, with the positions of mask and rotation among its arguments."""


def only_reader(node: fx.Node, target: Any = None) -> fx.Node | None:
    """The one node that reads `node`, if it is the only one and of this target (any if None)."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if reader.op == "call_function" and target in (None, reader.target) else None


def before_widening(value: fx.Node) -> fx.Node:
    """What a cast from 16 bits to float32 was made from; any other value as it is."""
    if value.target is aten.to.dtype and value.meta["val"].dtype == torch.float32:
        source = value.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype in (torch.bfloat16, torch.float16):
            return source
    return value


def other_operand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The other operand of a sum or product of two tensors, None where it is none (or scaled by alpha)."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(item, fx.Node) for item in node.args):
        return None
    first, second = node.args
    other = second if first is one else first
    return other if other is not one and isinstance(other, fx.Node) else None


def fits_tokens(factor: fx.Node, result: fx.Node) -> bool:
    """Whether `factor` is float32 [B, 1 or T, C] for a result [B, T, C]."""
    given, wanted = factor.meta["val"], result.meta["val"]
    return (
        given.dtype == torch.float32
        and given.dim() == wanted.dim() == 3
        and bool(given.shape[0] == wanted.shape[0])
        and bool(given.shape[1] == 1 or given.shape[1] == wanted.shape[1])
        and bool(given.shape[2] == wanted.shape[2])
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, those that were left out with their defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((item.name for item in schema), node.args, strict=False)) | node.kwargs
    return {item.name: given.get(item.name, item.default_value) for item in schema}


def input_quantizer(linear: fx.Node) -> fx.Node:
    """The node that quantizes the input of a `hif4::linear`; ValueError where its planes are not those of one."""
    sources = []
    for number, plane in enumerate(linear.args[:2]):
        if isinstance(plane, fx.Node) and plane.target is operator.getitem and plane.args[1] == number:
            sources.append(plane.args[0])
    if len(sources) == 2 and sources[0] is sources[1]:
        quantizer = sources[0]
        if isinstance(quantizer, fx.Node) and quantizer.target in QUANTIZERS:
            return quantizer
    raise ValueError(f"{linear.name} does not read the two planes of one quantizer")


def padded(args: tuple[Any, ...], length: int) -> list[Any]:
    """Arguments with None for the optional ones that were left out."""
    return [*args, *[None] * (length - len(args))]


def reasons(kept: Mapping[str, Sequence[str]]) -> list[str]:
    """One note for each reason, with the places that have it."""
    return [f"{len(places)} not fused, {reason}: {some_paths(places)}" for reason, places in kept.items()]
