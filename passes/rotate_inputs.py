"""Give every W4A4 linear a block Hadamard rotation of its input channels (HiSQRot4-style, after the mask)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from hif4c.passes.program import PassResult, Precision, Program
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.rotation import MAX_WIDTH

__all__ = ["rotate_inputs"]

LARGEST = "largest"


def rotate_inputs(program: Program, width: int | str) -> PassResult:
    """Rotate runs of `width` input channels before quantization, of the activation and of the weight alike.

    (x R)(W R)^T = x W^T for an orthogonal R: exact before quantization.

    Args:
        program: with decisions.
        width: 0 for no rotation, a power of two in [2, 1024], or "largest": for each linear the largest of these that
            divides its input channels.

    Raises:
        ValueError: the width is none of these.
        Hif4Error: the width does not divide the input channels of a W4A4 linear.
    """
    if width == 0:
        return PassResult(False, ["the recipe has no rotation"])
    if width != LARGEST and (not isinstance(width, int) or width & (width - 1) or not 2 <= width <= MAX_WIDTH):
        raise ValueError(f"rotation width {width} is not a power of two in [2, {MAX_WIDTH}]")
    features = {
        program.linear_path(node): node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
        for node in program.linears()
        if program.decisions[program.linear_path(node)].precision == Precision.W4A4
    }
    rotated: Counter[int] = Counter()
    for path, channels in features.items():
        chosen = _largest(channels) if isinstance(width, str) else width
        if channels % chosen:
            fits = _largest(math.gcd(*features.values()))
            other = f"a power of two from 2 to {fits} or " if fits > 1 else ""
            raise Hif4Error(
                f"{path} has {channels} input channels, which a rotation of width {width} does not divide; "
                f'set hadamard to {other}"{LARGEST}".'
            )
        if chosen > 1:
            program.decisions[path] = replace(program.decisions[path], hadamard=chosen)
            rotated[chosen] += 1
    if not rotated:
        return PassResult(False, ["no linear has an input to rotate"])
    notes = [f"rotated the inputs of {count} linears by {chosen}" for chosen, count in sorted(rotated.items())]
    return PassResult(True, notes)


def _largest(channels: int) -> int:
    """The largest power of two up to 1024 that divides `channels`; 1 for an odd number."""
    return min(channels & -channels, MAX_WIDTH)
