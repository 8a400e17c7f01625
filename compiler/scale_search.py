"""Choose the three-level scales of every unit by the error that they leave, not by the largest element alone."""

import torch

from hif4c.compiler.encode import MAX_Q, element_steps, encode_codes, encode_scales, round_on_grid
from hif4c.runtime.format import LEVEL3_RUN, NAN_E6M2, UNIT, dequantize, quantize, unit_scales

__all__ = ["search_scales", "unit_search"]

# Units searched at once: their temporaries, 512 KB each, stay in cache.
_UNITS = 2048
_OCTAVE = 4  # steps of the E6M2 grid in a factor of two
# Channels without importance still choose between candidates that are otherwise equal.
_IMPORTANCE_FLOOR = 1e-6


@torch.no_grad()
def search_scales(weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to HiF4 with the scales that minimise sum_j importance_j (w_j - what_j)^2 in every unit.

    A unit's candidates are the E6M2 from 4 grid steps (one octave) below the choice of `quantize` to 3 above it; for
    each of them the best level bits are found exactly, with elements rounded to nearest. Where no candidate is
    strictly better, the unit keeps what `quantize` gives, so no unit is ever worse.

    Args:
        weight: fp32 [N, K], masked and rotated, K a multiple of 64.
        importance: [K], not negative, for instance the diagonal of the Hessian; None: all channels alike.

    Returns:
        codes uint8 [N, K/2] and scales uint8 [N, K/64, 4].

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or weight.shape[1] % UNIT:
        raise ValueError(f"A weight must be fp32 [N, K], K a multiple of {UNIT}, not {_describe(weight)}.")
    if importance is not None and importance.shape != weight.shape[1:]:
        raise ValueError(f"Importance must be [{weight.shape[1]}], one a channel, not {list(importance.shape)}.")
    codes, scales = quantize(weight)
    for unit in range(weight.shape[1] // UNIT):
        columns = slice(unit * UNIT, (unit + 1) * UNIT)
        half = slice(unit * (UNIT // 2), (unit + 1) * (UNIT // 2))
        factor = None if importance is None else importance[columns]
        for start in range(0, weight.shape[0], _UNITS):
            rows = slice(start, start + _UNITS)
            values = weight[rows, columns]
            plain_codes, plain_scales = codes[rows, half], scales[rows, unit]
            found_scales = _search_block(values.T.contiguous(), plain_scales[:, 0], factor)
            steps = element_steps(found_scales[:, None])
            q = round_on_grid(values, steps)
            plain = dequantize(plain_codes, plain_scales[:, None], UNIT, torch.float32)
            better = (_objective(values, q * steps, factor) < _objective(values, plain, factor))[:, None]
            codes[rows, half] = torch.where(better, encode_codes(q[:, None]), plain_codes)
            scales[rows, unit] = torch.where(better, found_scales, plain_scales)
    return codes, scales


def unit_search(columns: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The best scales uint8 [n, 4] among the candidates of `search_scales`, for the unit fp32 [64, n] of n rows.

    importance [64], or None: all channels alike. The choice of `quantize` is a candidate, rounded to nearest.
    """
    plain = quantize(columns.T)[1][:, 0, 0]
    blocks = zip(columns.split(_UNITS, dim=1), plain.split(_UNITS), strict=True)
    return torch.cat([_search_block(block.contiguous(), e6m2, importance) for block, e6m2 in blocks])


def _search_block(columns: torch.Tensor, plain: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Scales uint8 [n, 4] for columns fp32 [64, n], whose plain E6M2 are stored in `plain` uint8 [n]."""
    base = plain.to(torch.int32).clamp_(max=NAN_E6M2 - 1)
    base_step = _step(base)
    sums = _run_sums(importance, columns.device)
    best = torch.full_like(base_step, torch.inf)
    e6m2 = base
    for fraction in range(_OCTAVE):
        # Candidates an octave apart share their steps: E6M2/4 times 1, 2, 4 and, of the upper one, 8.
        low = base - _OCTAVE + fraction
        step = _step(low)
        scaled = columns / step
        costs = [_run_costs(scaled, float(1 << exponent), sums) for exponent in range(4)]
        to_base = (step / base_step).square_()
        for octave in range(2):
            stored = low + _OCTAVE * octave
            without, with8 = _pair_costs(*costs[octave : octave + 3])
            total = torch.minimum(without, with8).sum(0).mul_(to_base)
            better = (total < best) & (stored >= 0) & (stored < NAN_E6M2)
            best = torch.where(better, total, best)
            e6m2 = torch.where(better, stored, e6m2)
    scaled = columns / _step(e6m2)
    costs = [_run_costs(scaled, float(1 << exponent), sums) for exponent in range(3)]
    without, with8 = _pair_costs(*costs)
    e8 = with8 < without
    e16 = torch.where(e8.repeat_interleave(2, dim=0), costs[2] < costs[1], costs[1] < costs[0])
    return encode_scales(e6m2, e8.T, e16.T)


def _step(e6m2: torch.Tensor) -> torch.Tensor:
    """E6M2/4 of stored values int32 [n], fp32; down to an octave below the smallest that can be stored."""
    below = e6m2 < 0
    stored = (e6m2 + _OCTAVE * below).to(torch.uint8)
    return unit_scales(stored[:, None]) * torch.where(below, 0.5, 1.0)


def _run_sums(importance: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """[16, 64] fp32: this times squared errors [64, n] are the weighted sums over runs of 4."""
    sums = torch.eye(UNIT // LEVEL3_RUN, device=device).repeat_interleave(LEVEL3_RUN, dim=1)
    if importance is None:
        return sums
    factor = importance.to(device, torch.float64)
    factor = factor / factor.max() if bool(factor.max() > 0) else torch.ones_like(factor)
    return sums * factor.clamp(min=_IMPORTANCE_FLOOR).float()


def _run_costs(scaled: torch.Tensor, step: float, sums: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every run of 4, [16, n], of elements scaled [64, n] rounded to multiples of step."""
    error = (scaled * (1 / step)).round_().clamp_(-MAX_Q, MAX_Q).mul_(step).sub_(scaled).square_()
    return sums @ error


def _pair_costs(cost0: torch.Tensor, cost1: torch.Tensor, cost2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest cost [8, n] of every run of 8 without and with its E1_8.

    `cost` i [16, n] is that of runs of 4 whose exponent E1_8 + E1_16 is i.
    """
    without, with8 = torch.minimum(cost0, cost1), torch.minimum(cost1, cost2)
    return without[0::2] + without[1::2], with8[0::2] + with8[1::2]


def _objective(values: torch.Tensor, rounded: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    error = (values.double() - rounded.double()).square_()
    return error.sum(-1) if importance is None else error @ importance.to(error)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
