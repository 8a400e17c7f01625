"""GPTQ (arXiv 2210.17323) in units of 64 columns: later columns take up the output error of earlier ones."""

import logging

import torch

from hif4c.compiler.encode import MAX_Q, element_steps, encode_codes
from hif4c.compiler.output_error import error_energy
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.scale_search import search_scales, unit_search
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import SCALE_BYTES, UNIT, quantize

__all__ = ["gptq"]

log = logging.getLogger(__name__)

_BLOCK = 512  # columns between two products over all earlier columns
_ROWS = 1024  # of a weight at once: they depend on each other in nothing
_ATTEMPTS = 4  # factorizations, each with ten times the damping of the one before


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    damping: float = 0.01,
    search: bool = True,
    name: str = "a linear",
    ranks: Ranks = ALONE,
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

    Memory besides the arguments, an fp32 Hessian's: about 4 K^2 bytes and 16 K for each of 1024 rows.

    Args:
        weight: fp32 [N, K], masked and rotated, K a multiple of 64.
        hessian: fp32 or fp64 [K, K], E[x x^T] of the quantized input or any multiple of it; not changed.
        damping: positive; this share of the mean diagonal is added to the diagonal. It grows tenfold, at most three
            times, while the factorization fails.
        search: choose each unit's scales by `search_scales` weighted by R_kk^2, instead of by `quantize`.
        name: of the linear, for messages.
        ranks: share the rows; each has the whole weight and Hessian, and gets the whole result.

    Returns:
        codes uint8 [N, K/2] and scales uint8 [N, K/64, 4].

    Raises:
        Hif4Error: the Hessian is not finite or not positive even with the largest damping.
        ValueError: shapes, dtypes or damping other than these, or a weight that is not finite.
    """
    _check(weight, hessian, damping, name)
    mean = float(hessian.diagonal().mean(dtype=torch.float64))
    if mean == 0:
        log.warning("%s: its input was zero in all of calibration, so GPTQ has nothing to go by.", name)
        return search_scales(weight) if search else quantize(weight)
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    factor = None
    with ranks.together():
        for start in ranks.share(range(0, len(weight), _ROWS)):
            rows = weight[start : start + _ROWS]
            best = quantize(rows)
            noise = error_energy(rows, best, hessian)
            if not bool(noise.isfinite().all()):
                raise Hif4Error(f"{name}: the calibration statistics hold NaN or infinity; calibrate again.")
            if search:
                noise = _keep_best_rows(best, noise, search_scales(rows, hessian.diagonal()), rows, hessian)
            factor = factor or _factorize(hessian, damping * mean, name)
            _keep_best_rows(best, noise, _feedback(rows, *factor, search), rows, hessian)
            parts[start] = best
    del factor
    if ranks.count > 1:
        for part in ranks.all_gather({start: [plane.cpu() for plane in planes] for start, planes in parts.items()}):
            parts |= part
    codes, scales = zip(*(planes for _, planes in sorted(parts.items())), strict=True)
    return torch.cat(codes).to(weight.device), torch.cat(scales).to(weight.device)


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


def _check(weight: torch.Tensor, hessian: torch.Tensor, damping: float, name: str) -> None:
    k = weight.shape[-1]
    if weight.dim() != 2 or weight.dtype != torch.float32 or k == 0 or k % UNIT:
        raise ValueError(f"A weight must be fp32 [N, K], K a multiple of {UNIT}, not {weight.dtype} {weight.shape}.")
    if hessian.shape != (k, k) or hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A Hessian must be fp32 or fp64 [{k}, {k}], not {hessian.dtype} {list(hessian.shape)}.")
    if not all(bool(edge.isfinite()) for edge in torch.aminmax(weight)):
        raise ValueError(f"{name}: the weight is not finite.")
    if not damping > 0:
        raise ValueError(f"Damping must be positive, not {damping}.")


def _factorize(hessian: torch.Tensor, damping: float, name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(U, d): H + damping = U diag(d) U^T with U unit upper triangular and d [K] fp64.

    U is a list of its columns, fp32 [end, _BLOCK] for each block of them that ends at `end`: what is below is zero.
    """
    for attempt in range(_ATTEMPTS):
        added = damping * 10**attempt
        found = _try_to_factorize(hessian, added)
        if found is not None:
            return found
        log.warning("%s: its Hessian is not positive with a damping of %.3g; trying ten times that.", name, added)
    raise Hif4Error(
        f"{name}: the Hessian of calibration is not positive definite even with a damping of {added:.3g}; "
        "calibrate again with more samples."
    )


def _try_to_factorize(hessian: torch.Tensor, damping: float) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """As `_factorize`, None where the damped matrix is not positive definite.

    In fp64, from the last columns to the first: the library's own factorization would need the whole square twice.
    """
    k = hessian.shape[0]
    starts = range(0, k, _BLOCK)
    exact = [hessian[: start + _BLOCK, start : start + _BLOCK].double() for start in starts]
    columns: list[torch.Tensor] = []
    pivots: list[torch.Tensor] = []
    for start in reversed(starts):
        block = exact.pop()
        corner = block[start:]
        corner.diagonal().add_(damping)
        # Lower triangular of the reversed matrix is upper triangular of the matrix.
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        upper = lower.flip(0, 1)
        diagonal = upper.diagonal().clone()
        if int(info) != 0 or not bool(diagonal.isfinite().all()):
            return None
        block[start:] = upper
        if start:
            above = torch.linalg.solve_triangular(upper.T, block[:start], upper=False, left=False)
            block[:start] = above
            for other, earlier in zip(starts, exact, strict=False):
                end = other + earlier.shape[1]
                earlier.addmm_(above[:end], above[other:end].T, alpha=-1)
        columns.insert(0, block.div_(diagonal).float())
        pivots.insert(0, diagonal.square_())
        del block, corner
    return columns, torch.cat(pivots)


def _feedback(
    weight: torch.Tensor, upper: list[torch.Tensor], pivots: torch.Tensor, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The planes that the columns' successive rounding gives; `upper` and `pivots` from `_factorize`."""
    n, k = weight.shape
    columns = weight.T.contiguous()  # a channel's weights side by side
    error = torch.empty_like(columns)
    codes = torch.empty((n, k // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((n, k // UNIT, SCALE_BYTES), dtype=torch.uint8, device=weight.device)
    for block, coupled in zip(range(0, k, _BLOCK), upper, strict=True):
        end = min(block + _BLOCK, k)
        # Targets: weights plus what the errors so far ask of them.
        target = torch.addmm(columns[block:end], coupled[:block].T, error[:block])
        for start in range(block, end, UNIT):
            unit, inside = slice(start, start + UNIT), slice(start - block, start - block + UNIT)
            base = target[inside]
            base = base.addmm_(coupled[block:start, inside].T, error[block:start])
            coupling = coupled[unit, inside]
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
