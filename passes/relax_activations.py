"""The same program with activations in bf16, for timesteps that need them: W4A4 linears become W4A16 ones.

The packed weights, masks and rotations stay what they are, so one weight file serves both programs.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from hif4c.passes.program import PassResult, Precision, Program

__all__ = ["relax_activations"]

hif4 = torch.ops.hif4


def relax_activations(program: Program) -> PassResult:
    """Replace hif4::linear(hif4::quantize(x, mask, hadamard), ...) by hif4::linear_w4(x, ..., mask, hadamard, ...).

    The input is still masked and rotated, as the weight was when it was packed, but no longer rounded to 4 bits. Bias,
    activation, side branch and output dtype are kept.

    Args:
        program: a lowered program; its decisions become W4A16, with their masks and rotations.

    Raises:
        ValueError: a linear's planes do not come from a quantizer, or the weights would no longer be those of the
            program that was given.
    """
    tensors = dict(program.tensors)
    quantizers = set()
    relaxed = 0
    for linear in list(program.graph.nodes):
        if linear.target is not hif4.linear.default:
            continue
        quantizer = _quantizer(linear)
        x, mask, hadamard = _padded(quantizer.args, (None, None, 0))
        _, _, codes, scales, bias, activation, _, *side = _padded(linear.args, (None,) * 7)
        # Given even where the linear leaves it out: the two operators have different defaults.
        dtype = linear.meta["val"].dtype
        with program.graph.inserting_before(linear):
            arguments = (x, codes, scales, bias, mask, hadamard, activation, dtype, *side)
            fused = program.call(hif4.linear_w4.default, arguments, like=linear)
        linear.replace_all_uses_with(fused)
        program.graph.erase_node(linear)
        path = str(program.tensors[codes.name].source).removesuffix(".weight")
        program.decisions[path] = replace(program.decisions[path], precision=Precision.W4A16)
        quantizers.add(quantizer)
        relaxed += 1
    program.clean()
    if program.tensors != tensors:
        lost = sorted(tensors.keys() - program.tensors.keys())
        raise ValueError(f"the relaxed program no longer reads {lost}, so it cannot share the weight file")
    return PassResult(relaxed > 0, [f"{relaxed} hif4::linear to hif4::linear_w4, {len(quantizers)} quantizers dropped"])


def _quantizer(linear: fx.Node) -> fx.Node:
    """The node that quantizes the input of a `hif4::linear`."""
    sources = []
    for number, plane in enumerate(linear.args[:2]):
        if isinstance(plane, fx.Node) and plane.target is operator.getitem and plane.args[1] == number:
            sources.append(plane.args[0])
    if len(sources) == 2 and sources[0] is sources[1]:
        quantizer = sources[0]
        if isinstance(quantizer, fx.Node) and quantizer.target is hif4.quantize.default:
            return quantizer
    raise ValueError(f"{linear.name} does not read the two planes of one quantizer")


def _padded(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args, *defaults[len(args) :])
