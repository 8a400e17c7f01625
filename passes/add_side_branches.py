"""Compute in 16 bits, beside the 4-bit product, what 4 bits cannot hold: a low-rank part and outlier columns."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from hif4c.passes.program import Decision, PassResult, Program, TensorSource, outlier_columns, plane_source
from hif4c.runtime.errors import Hif4Error

__all__ = ["add_side_branches"]

aten, hif4 = torch.ops.aten, torch.ops.hif4


def add_side_branches(program: Program) -> PassResult:
    """Rewrite y = linear(DQ, DQ, b) as y + side @ up, where side = [x @ down^T, x[..., columns]].

    For every quantized linear whose decision has a rank r (SVDQuant, arXiv 2411.05007) or whose channel mask has c
    zeros (outlier columns, as in LLM.int8(), arXiv 2208.07339); a part that is not needed is left out. x [..., K] is
    the linear's input before quantization, down [r, K] and up [r + c, N] have its dtype, bf16 or fp16. Linears that
    share x and mask share the selection of columns. With a low-rank branch, what is quantized becomes the residual of
    the weight. `TensorSource` says how all of it is made.

    Raises:
        Hif4Error: a rank is larger than its weight allows.
        ValueError: x is neither bf16 nor fp16.
    """
    selections: dict[tuple[fx.Node, str], fx.Node] = {}
    low_rank = outliers = 0
    for linear in list(program.linears()):
        decision = program.decisions[program.linear_path(linear)]
        columns = outlier_columns(program, decision)
        if not decision.quantized or (decision.rank == 0 and columns.numel() == 0):
            continue
        x, weight = _before_quantization(linear.args[0]), _before_quantization(linear.args[1])
        if x.meta["val"].dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"{decision.path}: a side branch reads bf16 or fp16, not {x.meta['val'].dtype}")
        parts = []
        with program.graph.inserting_before(linear):
            if decision.rank:
                parts.append(_project(program, linear, x, weight, decision))
                low_rank += 1
            if decision.mask is not None and columns.numel():
                if (x, decision.mask) not in selections:
                    selections[x, decision.mask] = _select(program, linear, x, decision.mask, columns)
                parts.append(selections[x, decision.mask])
                outliers += 1
            side = parts[0] if len(parts) == 1 else program.call(aten.cat.default, (parts, -1), like=linear)
            shape = (decision.rank + columns.numel(), weight.meta["val"].shape[0])
            spec = plane_source(program.tensors[weight.name], "up", x.meta["val"].dtype, shape, decision)
            product = program.call(aten.matmul.default, (side, program.add_tensor(spec, weight)), like=linear)
        with program.graph.inserting_after(linear):
            total = program.call(aten.add.Tensor, (linear, product), like=linear)
        for user in list(linear.users):
            if user is not total:
                user.replace_input_with(linear, total)
        if decision.rank:
            _make_residual(program, weight, decision)
    program.clean()
    if not low_rank and not outliers:
        return PassResult(False, ["the recipe has no side branches"])
    return PassResult(True, [f"low-rank branches for {low_rank} linears", f"outlier columns for {outliers} linears"])


def _before_quantization(value: Any) -> fx.Node:
    """The input of the quantize whose round trip a linear reads; a value without round trip is itself."""
    for target in (hif4.dequantize.default, operator.getitem, hif4.quantize.default):
        if value.target is target:
            value = value.args[0]
    return value


def _project(program: Program, linear: fx.Node, x: fx.Node, weight: fx.Node, decision: Decision) -> fx.Node:
    """x @ down^T: [..., r]."""
    rows, features = weight.meta["val"].shape
    if decision.rank > min(rows, features):
        raise Hif4Error(
            f"{decision.path} has a weight of {rows} x {features}, which has no low-rank part of rank {decision.rank}; "
            f"choose a rank of at most {min(rows, features)}."
        )
    spec = program.tensors[weight.name]
    down = plane_source(spec, "down", x.meta["val"].dtype, (decision.rank, features), decision)
    return program.call(aten.linear.default, (x, program.add_tensor(down, weight)), like=linear)


def _select(program: Program, linear: fx.Node, x: fx.Node, mask: str, columns: torch.Tensor) -> fx.Node:
    """x[..., columns]: [..., c]. The columns are stored once a mask."""
    name = f"{mask}.columns"
    stored = next((item for item, spec in program.tensors.items() if spec.name == name), None)
    if stored is None:
        spec = TensorSource(name, torch.int64, tuple(columns.shape), value=columns)
        indices = program.add_tensor(spec, program.placeholder(program.inputs[0]))
    else:
        indices = program.placeholder(stored)
    # As for a shared quantize: it belongs to what made x, not to one reader.
    like = x if x.op == "call_function" else linear
    return program.call(aten.index_select.default, (x, -1, indices), like=like)


def _make_residual(program: Program, weight: fx.Node, decision: Decision) -> None:
    """Let what is quantized be the weight without its low-rank part, in float32 so that it is rounded once."""
    spec = program.tensors[weight.name]
    program.tensors[weight.name] = replace(
        spec,
        dtype=torch.float32,
        mask=decision.mask,
        packed_from=spec.packed_from or spec.dtype,
        rank=decision.rank,
        mask_folded=decision.mask_folded,
    )
    with program.fake_mode:
        weight.meta["val"] = torch.empty(spec.shape, dtype=torch.float32)
