"""How the values of a stored weight are spread, read from its 4-bit planes or from its high-precision form.

Large weights are sampled: of a weight of more than `SAMPLED_WEIGHTS` elements evenly spaced whole rows are counted, the
first one included. A share p of n counted elements then has a standard error of about sqrt(p (1 - p) / n), at most
0.1 % of the whole, as long as rows are alike. The ranges of the units' scales are always of all units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import MAX_IN_UNIT, NAN_E6M2, SCALE_BYTES, check_planes, in_unit_integers, unit_scales

__all__ = [
    "SAMPLED_WEIGHTS",
    "Histogram",
    "WeightStatistics",
    "dense_statistics",
    "magnitude_histogram",
    "packed_statistics",
    "row_step",
]

SAMPLED_WEIGHTS = 1 << 18
_IN_UNIT = 32  # a power of two above the largest |n|


@dataclass(frozen=True)
class Histogram:
    """Magnitudes in half octaves: counts[i] of them are in [2^((lowest + i) / 2), 2^((lowest + i + 1) / 2)).

    Attributes:
        lowest: twice the base-2 logarithm of the lowest edge; 0 where all is zero.
        counts: from the lowest bucket in use to the highest.
        zeros: values that are 0.
    """

    lowest: int
    counts: tuple[int, ...]
    zeros: int


@dataclass(frozen=True)
class WeightStatistics:
    """The values of one weight [N, K], as stored: with its input's mask divided out and rotated, where that was done.

    Attributes:
        rows: how many of the N rows are counted.
        magnitudes: of the counted values.
        in_unit: for a weight in 4 bits, how many of the counted values have the in-unit integer |n| = 0, 1, ..., 28;
            8 magnitudes of 3 bits at three exponents make 16 of them possible. None for others.
        unit_scale: for a weight in 4 bits, the least and the largest E6M2 / 4 of all units. None for others.
    """

    rows: int
    magnitudes: Histogram
    in_unit: tuple[int, ...] | None = None
    unit_scale: tuple[float, float] | None = None


def row_step(rows: int, channels: int) -> int:
    """Every how many rows one is counted, so that at most about `SAMPLED_WEIGHTS` values are."""
    return max(1, min(rows, -(-rows * channels // SAMPLED_WEIGHTS)))


def packed_statistics(codes: torch.Tensor, scales: torch.Tensor, channels: int, what: str) -> WeightStatistics:
    """Statistics of planes.

    Args:
        codes: uint8 [N, Kp/2].
        scales: uint8 [N, U, 4].
        channels: K; the padding behind it is not counted.
        what: their name in an error.

    Raises:
        Hif4Error: planes that do not fit each other or `channels`, or a unit that is NaN.
    """
    check_planes(codes, scales, channels, what)
    level1 = scales[..., 0].numpy()  # strided: three times as fast there as in torch
    lowest, highest = int(level1.min()), int(level1.max())
    if highest == NAN_E6M2:
        raise _not_finite(what)
    step = row_step(len(codes), channels)
    codes, scales = codes[::step].contiguous(), scales[::step].contiguous()
    n = in_unit_integers(codes, scales).abs().to(torch.int32)
    index = n.add_(scales[..., :1].to(torch.int32) * _IN_UNIT).view(len(codes), -1)[:, :channels]
    joint = torch.bincount(index.flatten(), minlength=256 * _IN_UNIT).view(256, _IN_UNIT).numpy()
    sizes = _scale_of_byte()
    return WeightStatistics(
        len(codes),
        magnitude_histogram(sizes[:, None] * np.arange(_IN_UNIT), joint),
        tuple(joint.sum(0)[: MAX_IN_UNIT + 1].tolist()),
        (float(sizes[lowest]), float(sizes[highest])),
    )


def dense_statistics(weight: torch.Tensor, what: str) -> WeightStatistics:
    """Statistics of a weight in floating point, of which the first dimension are rows; one that is NaN is refused."""
    rows = weight.flatten(1)
    rows = rows[:: row_step(*rows.shape)].float()
    if not bool(torch.isfinite(rows).all()):
        raise _not_finite(what)
    return WeightStatistics(len(rows), magnitude_histogram(rows.abs().numpy()))


def magnitude_histogram(values: npt.NDArray[np.floating], counts: npt.NDArray[np.integer] | None = None) -> Histogram:
    """Count finite values >= 0; `counts`, of their shape and together below 2^53, says how often each occurs."""
    counts = np.ones_like(values, dtype=np.int64) if counts is None else counts
    used = (values > 0) & (counts > 0)
    # 2^e m with m in [1/2, 1); no value that is rounded to a few bits lies on an edge at the root of 2.
    significand, exponent = np.frexp(values[used])
    bucket = 2 * (exponent - 1) + (significand >= math.sqrt(0.5))
    zeros = int(counts[values == 0].sum())
    if not len(bucket):
        return Histogram(0, (), zeros)
    lowest = int(bucket.min())
    found = np.bincount(bucket - lowest, weights=counts[used])
    return Histogram(lowest, tuple(int(count) for count in found), zeros)


def _scale_of_byte() -> npt.NDArray[np.float64]:
    """E6M2 / 4 of every byte, [256]; the last one is NaN's and given as 0, for no valid weight has it."""
    scales = torch.zeros(256, SCALE_BYTES, dtype=torch.uint8)
    scales[:, 0] = torch.arange(256)
    return unit_scales(scales).nan_to_num_(0.0).double().numpy()


def _not_finite(what: str) -> Hif4Error:
    return Hif4Error(f"{what}: holds NaN or infinite values; the artifact is damaged, compile it again.")
