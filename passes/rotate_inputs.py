"""Give every W4A4 linear a block Hadamard rotation of its input channels (HiSQRot4-style, after the mask)."""

from __future__ import annotations

from dataclasses import replace

from hif4c.passes.program import PassResult, Precision, Program

__all__ = ["rotate_inputs"]


def rotate_inputs(program: Program, width: int) -> PassResult:
    """Rotate runs of `width` input channels before quantization, of the activation and of the weight alike.

    (x R)(W R)^T = x W^T for an orthogonal R: exact before quantization. 0 means no rotation. A width that does not
    divide a linear's input channels leaves that linear alone, with a note.

    Raises:
        ValueError: the width is not 0 or a power of two in [2, 1024].
    """
    if width == 0:
        return PassResult(False, ["the recipe has no rotation"])
    if width & (width - 1) or not 2 <= width <= 1024:
        raise ValueError(f"rotation width {width} is not a power of two in [2, 1024]")
    rotated, notes = 0, []
    for node in program.linears():
        path = program.linear_path(node)
        decision = program.decisions[path]
        if decision.precision != Precision.W4A4:
            continue
        features = node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
        if features % width:
            notes.append(f"{path}: not rotated, {width} does not divide its {features} input channels")
            continue
        program.decisions[path] = replace(decision, hadamard=width)
        rotated += 1
    return PassResult(rotated > 0, [f"rotated the inputs of {rotated} linears by {width}", *notes])
