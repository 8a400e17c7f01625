"""Block Walsh-Hadamard rotation along the channel dimension, with one fixed order of fp32 operations."""

import torch

from hif4c.runtime.errors import Hif4Error

__all__ = ["MAX_WIDTH", "block_hadamard", "check_width"]

MAX_WIDTH = 1024


def check_width(width: int, k: int) -> None:
    """Raise Hif4Error unless `width` is a power of two in [2, 1024] that divides `k`."""
    if width < 2 or width > MAX_WIDTH or width & (width - 1):
        raise Hif4Error(f"Hadamard width {width} is not a power of two from 2 to {MAX_WIDTH}.")
    if k % width:
        raise Hif4Error(f"Hadamard width {width} does not divide the {k} channels; choose a width that does.")


@torch.no_grad()
def block_hadamard(x: torch.Tensor, width: int) -> torch.Tensor:
    """Rotate each run of `width` channels by the orthonormal Walsh-Hadamard matrix (Sylvester order).

    x [..., K], any floating dtype; returns a new [..., K] tensor, fp32 (fp64 for fp64 input).
    The matrix is symmetric and orthogonal, so the rotation is its own inverse up to rounding, and rotating the
    activations and the weight's input channels alike leaves their product unchanged.

    The order of operations is part of the contract, as every backend must give the same bits: for stride s = 1, 2, 4,
    ..., width/2, each pair (a, b) = (x[i], x[i + s]) with bit s of i clear becomes (a + b, a - b), each rounded to
    fp32; then one multiplication of every element by 2^(-log2(width)/2) rounded to fp32.

    Raises Hif4Error for a width that is not a power of two in [2, 1024] or does not divide K.
    """
    if x.dim() == 0:
        raise Hif4Error("The Hadamard rotation needs a tensor with a channel dimension, got a scalar.")
    k = x.shape[-1]
    check_width(width, k)
    y = x if x.dtype == torch.float64 else x.float()
    stride = 1
    while stride < width:
        pairs = y.reshape(*x.shape[:-1], k // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2)
        stride *= 2
    # A Python scalar times an fp32 tensor is rounded to fp32 first; for odd log2 this is fp32(sqrt(1/2)) * 2^-j.
    return y.reshape(x.shape) * (width**-0.5)
