"""Move GELU(tanh) into the linear before it, where it works on the float32 accumulator."""

from __future__ import annotations

import torch

from hif4c.passes.program import PassResult, Program, module_path

__all__ = ["fuse_activation"]

hif4 = torch.ops.hif4
# Position of the `activation` argument.
LINEARS = {hif4.linear.default: 5, hif4.linear_w4.default: 6}


def fuse_activation(program: Program) -> PassResult:
    """Fuse gelu(linear(...), approximate="tanh") where the linear is quantized and nothing else reads its result.

    The contract of the fused node is GELU of the float32 accumulator, rounded once: closer to exact arithmetic than the
    unfused program, which rounds the linear's output to bf16 first.
    """
    fused, notes = 0, []
    for gelu in list(program.graph.nodes):
        if gelu.target is not torch.ops.aten.gelu.default:
            continue
        linear = gelu.args[0]
        where = module_path(gelu)
        if linear.target not in LINEARS:
            notes.append(f"{where}: not fused, its input is not a 4-bit linear")
        elif gelu.kwargs.get("approximate") != "tanh":
            notes.append(f"{where}: not fused, it is not the tanh approximation")
        elif len(linear.users) > 1:
            notes.append(f"{where}: not fused, {len(linear.users)} nodes read the linear's result")
        else:
            linear.update_arg(LINEARS[linear.target], "gelu_tanh")
            gelu.replace_all_uses_with(linear)
            program.graph.erase_node(gelu)
            fused += 1
    program.clean()
    return PassResult(fused > 0, [f"fused {fused} activations", *notes])
