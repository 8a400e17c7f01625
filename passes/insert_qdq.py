"""Insert quantize/dequantize around the linears that the plan quantizes: the readable reference program."""

from __future__ import annotations

import operator

import torch
from torch import fx

from hif4c.passes.program import PassResult, Precision, Program, TensorSource, inverse_mask

__all__ = ["insert_qdq"]

hif4 = torch.ops.hif4


def insert_qdq(program: Program) -> PassResult:
    """Rewrite linear(x, W, b) as linear(DQ(Q(x * m, R)), DQ(Q(W / m, R)), b); W4A16 linears keep x.

    Q is `hif4::quantize`, DQ is `hif4::dequantize` to the dtype that the linear already computes in. Where the mask is
    folded, x arrives as x * m and is quantized without it. 1/m is 0 where m is 0.
    """
    counts = {Precision.W4A4: 0, Precision.W4A16: 0}
    for linear in list(program.linears()):
        decision = program.decisions[program.linear_path(linear)]
        if not decision.quantized:
            continue
        source, weight = linear.args[0], linear.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(weight, fx.Node)
        mask = inverse = None
        if decision.mask is not None:
            mask, inverse = _mask_tensors(program, decision.mask)
        if decision.mask_folded:
            mask = None
        with program.graph.inserting_before(linear):
            if decision.precision == Precision.W4A4:
                # The producer's module path: a shared quantize belongs to what made its input, not to one reader.
                like = source if source.op == "call_function" else linear
                linear.replace_input_with(source, _round_trip(program, source, mask, decision.hadamard, like))
            packed = _round_trip(program, weight, inverse, decision.hadamard, linear)
        linear.replace_input_with(weight, packed)
        counts[decision.precision] += 1
    program.clean()
    return PassResult(any(counts.values()), [f"{count} linears {precision}" for precision, count in counts.items()])


def _round_trip(program: Program, source: fx.Node, mask: fx.Node | None, hadamard: int, like: fx.Node) -> fx.Node:
    value = source.meta["val"]
    planes = program.call(hif4.quantize.default, (program.unrounded(source), mask, hadamard), like=like)
    codes = program.call(operator.getitem, (planes, 0), like=like)
    scales = program.call(operator.getitem, (planes, 1), like=like)
    return program.call(hif4.dequantize.default, (codes, scales, value.shape[-1], value.dtype), like=like)


def _mask_tensors(program: Program, name: str) -> tuple[fx.Node, fx.Node]:
    """Placeholders of the mask (for activations) and of its inverse (for weights; gone once they are packed)."""
    existing = {spec.name: placeholder for placeholder, spec in program.tensors.items()}
    nodes = []
    mask = program.masks[name].to(torch.float32)
    before = program.placeholder(program.inputs[0])
    for full_name, value in ((name, mask), (f"{name}.inverse", inverse_mask(mask))):
        if full_name in existing:
            nodes.append(program.placeholder(existing[full_name]))
        else:
            spec = TensorSource(full_name, torch.float32, tuple(value.shape), value=value)
            nodes.append(program.add_tensor(spec, before))
    return nodes[0], nodes[1]
