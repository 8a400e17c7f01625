"""GPTQ (arXiv 2210.17323) in units of 64 columns: later columns take up the output error of earlier ones."""

import logging

import torch

from hif4c.compiler.encode import MAX_Q, element_steps, encode_codes
from hif4c.compiler.output_error import error_energy
from hif4c.compiler.scale_search import search_scales, unit_search
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import SCALE_BYTES, UNIT, quantize

__all__ = ["gptq"]

log = logging.getLogger(__name__)

_BLOCK = 512  # columns between two products over all earlier columns
_ATTEMPTS = 4  # factorizations, each with ten times the damping of the one before


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    damping: float = 0.01,
    search: bool = True,
    name: str = "a linear",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to HiF4 so that e H e^T, e = w - what, is small for every row.

    A unit's scales are fixed for all rows from the weights that compensate the error of the earlier units; then its
    columns are rounded one by one to the nearest value on that grid. Row by row the result is compared with plain
    rounding and, with `search`, with `search_scales` under the Hessian's diagonal, and the best is kept: no row is
    ever worse than plain rounding under this Hessian. Equal inputs and thread counts give equal bits.

    The feedback is written as in LDLQ, which QuIP (arXiv 2307.13304) proves equal to GPTQ's: with H = R R^T,
    R upper triangular, e H e^T = sum_k R_kk^2 (e_k + sum_{i<k} e_i R_ik / R_kk)^2, so that the target of
    column k is w_k plus that inner sum. It needs one factorization and no inverse. Channels that were always zero
    have no coupling and are rounded to nearest on the grid of their unit.

    Memory besides the arguments, an fp32 Hessian's, at its peak: 12 K^2 bytes, or 4 K^2 + 15 N K where that is more.

    Args:
        weight: fp32 [N, K], masked and rotated, K a multiple of 64.
        hessian: fp32 or fp64 [K, K], E[x x^T] of the quantized input or any multiple of it; not changed.
        damping: positive; this share of the mean diagonal is added to the diagonal. It grows tenfold, at most three
            times, while the factorization fails.
        search: choose each unit's scales by `search_scales` weighted by R_kk^2, instead of by `quantize`.
        name: of the linear, for messages.

    Returns:
        codes uint8 [N, K/2] and scales uint8 [N, K/64, 4].

    Raises:
        Hif4Error: the Hessian is not finite or not positive even with the largest damping.
        ValueError: shapes, dtypes or damping other than these, or a weight that is not finite.
    """
    _check(weight, hessian, damping)
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean(dtype=torch.float64))
    best = quantize(weight)
    noise = error_energy(weight, best, hessian)
    if not bool(noise.isfinite().all()):
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: the weight is not finite.")
        raise Hif4Error(f"{name}: the calibration statistics hold NaN or infinity; calibrate again.")
    if mean == 0:
        log.warning("%s: its input was zero in all of calibration, so GPTQ has nothing to go by.", name)
        return search_scales(weight) if search else best
    if search:
        noise = _keep_best_rows(best, noise, search_scales(weight, diagonal), weight, hessian)
    _keep_best_rows(best, noise, _feedback(weight, *_factorize(hessian, damping * mean, name), search), weight, hessian)
    return best


def _keep_best_rows(
    best: tuple[torch.Tensor, torch.Tensor],
    noise: torch.Tensor,
    other: tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    hessian: torch.Tensor,
) -> torch.Tensor:
    """Write into the planes `best` the rows that `other` rounds with less noise; the noise [N] of the result."""
    found = error_energy(weight, other, hessian)
    rows = found < noise
    for kept, new in zip(best, other, strict=True):
        kept[rows] = new[rows]
    return torch.where(rows, found, noise)


def _check(weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> None:
    k = weight.shape[-1]
    if weight.dim() != 2 or weight.dtype != torch.float32 or k == 0 or k % UNIT:
        raise ValueError(f"A weight must be fp32 [N, K], K a multiple of {UNIT}, not {weight.dtype} {weight.shape}.")
    if hessian.shape != (k, k) or hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A Hessian must be fp32 or fp64 [{k}, {k}], not {hessian.dtype} {list(hessian.shape)}.")
    if not damping > 0:
        raise ValueError(f"Damping must be positive, not {damping}.")


def _factorize(hessian: torch.Tensor, damping: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(U, d): H + damping = U diag(d) U^T with U unit upper triangular fp32 [K, K], and d [K] fp64."""
    k = hessian.shape[0]
    for attempt in range(_ATTEMPTS):
        added = damping * 10**attempt
        # Lower triangular of the reversed matrix is upper triangular of the matrix. Columns first in memory is what
        # the factorization wants: it then works in place.
        reverse = torch.empty((k, k), dtype=torch.float64, device=hessian.device).mT
        reverse.copy_(hessian.flip(0, 1))
        reverse.diagonal().add_(added)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(reverse, out=(reverse, info))
        pivots = reverse.diagonal().clone()
        if int(info) == 0 and bool(pivots.isfinite().all()):
            upper = reverse.div_(pivots).float()
            del reverse
            return upper.flip(0, 1), pivots.flip(0).square_()
        log.warning("%s: its Hessian is not positive with a damping of %.3g; trying ten times that.", name, added)
    raise Hif4Error(
        f"{name}: the Hessian of calibration is not positive definite even with a damping of {added:.3g}; "
        "calibrate again with more samples."
    )


def _feedback(
    weight: torch.Tensor, upper: torch.Tensor, pivots: torch.Tensor, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The planes that the columns' successive rounding gives; `upper` and `pivots` from `_factorize`."""
    n, k = weight.shape
    columns = weight.T.contiguous()  # a channel's weights side by side
    error = torch.empty_like(columns)
    codes = torch.empty((n, k // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((n, k // UNIT, SCALE_BYTES), dtype=torch.uint8, device=weight.device)
    for block in range(0, k, _BLOCK):
        end = min(block + _BLOCK, k)
        # Targets: weights plus what the errors so far ask of them.
        target = torch.addmm(columns[block:end], upper[:block, block:end].T, error[:block])
        for start in range(block, end, UNIT):
            unit = slice(start, start + UNIT)
            base = target[start - block : start - block + UNIT]
            base = base.addmm_(upper[block:start, unit].T, error[block:start])
            coupling = upper[unit, unit]
            # Where the unit's columns would go if they stayed unrounded: e' U = -(base - w) within the unit.
            free = columns[unit] + torch.linalg.solve_triangular(
                coupling.T, base - columns[unit], upper=False, unitriangular=True
            )
            chosen = unit_search(free, pivots[unit]) if search else quantize(free.T)[1][:, 0]
            q = _round_unit(columns[unit], base, coupling, element_steps(chosen[:, None]).T, error[unit])
            codes[:, start // 2 : (start + UNIT) // 2] = encode_codes(q.T[:, None])
            scales[:, start // UNIT] = chosen
    return codes, scales


def _round_unit(
    columns: torch.Tensor, base: torch.Tensor, coupling: torch.Tensor, steps: torch.Tensor, error: torch.Tensor
) -> torch.Tensor:
    """q [64, n] of one unit's columns, rounded in order; writes error = columns - q * steps, all [64, n]."""
    steps = steps.contiguous()
    q = torch.empty_like(base)
    for column in range(UNIT):
        target = torch.addmv(base[column], error[:column].T, coupling[:column, column])
        torch.div(target, steps[column], out=q[column]).round_().clamp_(-MAX_Q, MAX_Q)
        torch.addcmul(columns[column], q[column], steps[column], value=-1, out=error[column])
    return q
