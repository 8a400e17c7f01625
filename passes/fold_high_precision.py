"""Fold what the high-precision regions compute again and again: constants, and values that several blocks share."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hif4c.passes.program import PassResult, Program, TensorSource, module_path
from hif4c.passes.share_quantized_inputs import share_equal_nodes

__all__ = ["fold_high_precision"]


def fold_high_precision(program: Program) -> PassResult:
    """Compute subgraphs that depend on no input (the timestep frequencies) and merge equal nodes.

    Results stay bit for bit the same.
    """
    constants = _constant_nodes(program)
    frontier = [node for node in constants if any(user not in constants for user in node.users)]
    for node in frontier:
        with unset_fake_temporarily():
            value = _evaluate(node, {})
        spec = TensorSource(f"{module_path(node)}.{node.name}", value.dtype, tuple(value.shape), value=value)
        node.replace_all_uses_with(program.add_tensor(spec, program.placeholder(program.inputs[0])))
    merged = share_equal_nodes(program)
    program.clean()
    return PassResult(
        bool(frontier or merged), [f"folded {len(constants)} nodes into {len(frontier)} constants, merged {merged}"]
    )


def _constant_nodes(program: Program) -> dict[fx.Node, None]:
    constants: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if (
            node.op == "call_function"
            and isinstance(node.meta["val"], torch.Tensor)
            and all(source in constants for source in node.all_input_nodes)
        ):
            constants[node] = None
    return constants


def _evaluate(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    if node not in known:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _evaluate(source, known))
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
