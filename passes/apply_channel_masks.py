"""Give every quantized linear the channel mask of its input (SmoothQuant-style, arXiv 2211.10438; ViDiT-Q)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from hif4c.passes.program import PassResult, Precision, Program, inverse_mask

__all__ = ["apply_channel_masks"]


def apply_channel_masks(program: Program, assignment: Mapping[str, str] | None = None) -> PassResult:
    """Let `x` be multiplied by m inside `hif4::quantize` and the weight's columns by 1/m when it is packed.

    A factor of 0 makes its channel an outlier column: left out of the 4-bit product on both sides, and computed in the
    side branch (`add_side_branches`). A negative factor flips signs, as a rotation may want.

    Args:
        program: with `masks` (name -> m [K] float32) filled from a calibration.
        assignment: linear's module path -> mask name. Linears that read one input must have one mask.

    Raises:
        ValueError: unknown linear or mask, a mask of the wrong length, with values that are not finite or have no
            finite inverse, or of zeros only, or two masks for one input.
    """
    if not assignment:
        return PassResult(False, ["the recipe has no channel masks"])
    by_input: dict[fx.Node, str] = {}
    applied = 0
    for node in program.linears():
        path = program.linear_path(node)
        name = assignment.get(path)
        if name is None:
            continue
        if name not in program.masks:
            raise ValueError(f"{path}: no mask is called {name!r}")
        mask = program.masks[name]
        features = node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
        if mask.shape != (features,):
            raise ValueError(f"mask {name} has shape {list(mask.shape)}, but {path} has {features} input channels")
        if not bool(torch.isfinite(mask).all() and torch.isfinite(inverse_mask(mask)).all()):
            raise ValueError(f"mask {name} has values that are not finite, or whose inverses are not")
        if not bool((mask != 0).any()):
            raise ValueError(f"mask {name} is zero everywhere, which leaves nothing for the 4-bit product")
        if program.decisions[path].precision != Precision.W4A4:
            continue  # nothing is quantized that the mask could help
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if by_input.setdefault(source, name) != name:
            raise ValueError(f"{path} reads the same input as other linears but has another mask: {name}")
        program.decisions[path] = replace(program.decisions[path], mask=name)
        applied += 1
    unknown = sorted(assignment.keys() - program.decisions.keys())
    if unknown:
        raise ValueError(f"masks are assigned to linears that do not exist: {unknown}")
    return PassResult(applied > 0, [f"{len(set(by_input.values()))} masks for {applied} linears"])
