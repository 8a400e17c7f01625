"""How far a rounded weight moves a linear's output, from the second moment of the linear's input."""

import torch

from hif4c.runtime.format import dequantize

__all__ = ["error_energy"]

_COLUMNS = 512  # of the Hessian at once
_ROWS = 1024  # of the weight at once


@torch.no_grad()
def error_energy(
    weight: torch.Tensor, planes: tuple[torch.Tensor, torch.Tensor], hessian: torch.Tensor
) -> torch.Tensor:
    """Energy of every output channel's error, fp64 [N]: e H e^T, row by row, with e = w - what.

    weight fp32 [N, K], its planes (codes [N, K/2], scales [N, K/64, 4]) and hessian [K, K] = E[x x^T] of the input
    (symmetric; scaled by any factor, for instance a sum over tokens: then the energy is).
    """
    blocks = zip(weight.split(_ROWS), *(plane.split(_ROWS) for plane in planes), strict=True)
    return torch.cat(
        [
            _quadratic_form(rows - dequantize(codes, scales, weight.shape[1], torch.float32), hessian)
            for rows, codes, scales in blocks
        ]
    )


def _quadratic_form(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """r H r^T of every row r, fp64 [n]; rows fp32 [n, K], hessian [K, K] symmetric, multiplied in fp32."""
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _COLUMNS):
        # Symmetry: only the blocks on and below the diagonal are read, those below it count twice.
        here, below = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        product = rows[:, below] @ hessian[below, here].to(rows.dtype)
        product = torch.addmm(product, rows[:, here], hessian[here, here].to(rows.dtype), beta=2)
        total += (product * rows[:, here]).sum(-1, dtype=torch.float64)
    return total
