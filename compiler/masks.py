"""Channel masks from calibration statistics: m = w^(1 - alpha) / a^alpha, with alpha given or searched per input.

Source of the formula: SmoothQuant (arXiv 2211.10438) as ViDiT-Q uses it, with alpha the exponent of the activation
statistic a; Tail-Aware HiFloat4 (arXiv 2605.26628) takes a from a high percentile instead of the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.passes.program import inverse_mask
from hif4c.runtime.format import dequantize
from hif4c.runtime.rotation import block_hadamard

__all__ = [
    "ALPHAS",
    "MaskChoice",
    "channel_mask",
    "choose_mask",
    "column_maxima",
    "relative_error",
    "rotated",
    "round_trip",
]

ALPHAS = tuple(index / 10 for index in range(11))
FLOOR = 1e-5
"""Statistics below this share of the largest one are raised to it: a dead channel must not get an infinite mask."""

BLOCK_ELEMENTS = 1 << 22
"""Elements of a weight that are in memory at once where all of it is looked at."""


@dataclass(frozen=True)
class MaskChoice:
    """A mask and how it came about.

    Attributes:
        mask: m [K] float32, None where the search found that none is best.
        floored: channels whose activation or weight statistic was raised to the floor.
        alpha: its exponent.
    """

    mask: torch.Tensor | None
    floored: int
    alpha: float | None


def channel_mask(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, int]:
    """The mask m [K] float32 and the number of channels whose statistics were floored.

    Args:
        activation: a [K], a statistic of |x| per input channel, not negative.
        weight: w [K], the largest |W[:, j]| over the outputs of all linears that read the input.
        alpha: exponent of a; that of w is 1 - alpha.

    The mask is scaled to a geometric mean of 1, which changes nothing but keeps numbers near those of the model.
    """
    a, dead_inputs = _floored(activation.double())
    w, dead_weights = _floored(weight.double())
    mask = w ** (1 - alpha) / a**alpha
    return (mask / mask.log().mean().exp()).float(), int((dead_inputs | dead_weights).sum())


def column_maxima(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The largest |W[:, j]| of every column of a weight [N, K], float32 [K]; its memory is given back as it goes."""
    checkpoint.prefetch(name)
    weight = checkpoint.read(name)
    largest = torch.zeros(weight.shape[1])
    for block in weight.split(max(1, BLOCK_ELEMENTS // weight.shape[1])):
        largest = torch.maximum(largest, block.abs().amax(0).float())
        checkpoint.release(name)
    return largest


def choose_mask(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    activation: torch.Tensor,
    weight: torch.Tensor,
    width: int,
    alphas: Sequence[float] = ALPHAS,
) -> MaskChoice:
    """The alpha, or no mask at all, with the least output error on calibration rows.

    Args:
        rows: tokens [R, K] float32 of the input.
        weights: [n, K] float32 of the linears that read it (some of their outputs are enough).
        activation, weight: statistics as in `channel_mask`.
        width: block rotation that follows the mask, 0 for none.
        alphas: what is tried.

    The objective is the sum over the linears of the relative output error, both operands rounded to HiF4.
    """
    best: tuple[float, MaskChoice] | None = None
    expected = [rows @ item.T for item in weights]
    for alpha in (None, *alphas):
        mask, floored = (None, 0) if alpha is None else channel_mask(activation, weight, alpha)
        rounded = round_trip(rows, mask, width)
        inverse = None if mask is None else inverse_mask(mask)
        error = sum(
            relative_error(rounded @ round_trip(item, inverse, width).T, output)
            for item, output in zip(weights, expected, strict=True)
        )
        if best is None or error < best[0]:
            best = (error, MaskChoice(mask, floored, alpha))
    assert best is not None
    return best[1]


def round_trip(x: torch.Tensor, mask: torch.Tensor | None, width: int) -> torch.Tensor:
    """DQ(Q(x * mask, R)) in float32; rotated, not rotated back."""
    codes, scales = torch.ops.hif4.quantize(x.contiguous(), mask, width)
    return dequantize(codes, scales, x.shape[-1], torch.float32)


def rotated(x: torch.Tensor, mask: torch.Tensor | None, width: int) -> torch.Tensor:
    """(x * mask) R in float32, what `round_trip` approximates."""
    masked = x.float() if mask is None else x.float() * mask
    return block_hadamard(masked, width) if width > 1 else masked


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Energy of the difference over the energy of `expected`; 0 when both are zero."""
    signal = float(expected.double().square().sum())
    noise = float((found.double() - expected.double()).square().sum())
    return noise / signal if signal else (0.0 if noise == 0 else float("inf"))


def _floored(statistic: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The statistic [K] with its floor, and where that raised it."""
    largest = float(statistic.max())
    floor = FLOOR * largest if largest > 0 else 1.0
    low = statistic < floor
    return statistic.clamp_min(floor), low
