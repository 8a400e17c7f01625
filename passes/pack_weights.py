"""Replace every weight quantize by the stored planes of the packed weight."""

from __future__ import annotations

import operator

import torch
from torch import fx

from hif4c.passes.program import PassResult, Program, plane_source
from hif4c.runtime.format import packed_shapes

__all__ = ["pack_weights"]


def pack_weights(program: Program) -> PassResult:
    """Turn quantize(W, 1/m, R) into two tensors `W.codes` and `W.scales` that the artifact stores; W itself is dropped.

    The bytes are made when the artifact is written, one tensor of the checkpoint at a time.
    """
    branches = _branches(program)
    packed = 0
    for quantize in list(program.graph.nodes):
        if quantize.target is not torch.ops.hif4.quantize.default or quantize.args[0].op != "placeholder":
            continue
        source = quantize.args[0]
        spec = program.tensors.get(source.name)
        if spec is None:
            continue  # a user input: quantized when the program runs
        decision = program.decisions[str(spec.source).removesuffix(".weight")]
        codes_shape, scales_shape = packed_shapes(spec.shape)
        for index, (plane, shape) in enumerate((("codes", codes_shape), ("scales", scales_shape))):
            placeholder = program.add_tensor(plane_source(spec, plane, torch.uint8, shape, decision), source)
            for user in list(quantize.users):
                if user.target is operator.getitem and user.args[1] == index:
                    user.replace_all_uses_with(placeholder)
        for branch in branches.get(spec.source, ()):
            # What is made from one checkpoint tensor stands together, so that it is read once.
            source.prepend(branch)
            program.tensors[branch.name] = program.tensors.pop(branch.name)
        packed += 1
    program.clean()
    return PassResult(packed > 0, [f"packed {packed} weights"])


def _branches(program: Program) -> dict[str | None, list[fx.Node]]:
    """The placeholders of side branches by the checkpoint tensor that they are made from."""
    found: dict[str | None, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.tensors:
            spec = program.tensors[node.name]
            if spec.plane in ("down", "up"):
                found.setdefault(spec.source, []).append(node)
    return found
