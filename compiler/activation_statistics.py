"""How a calibrated input is spread: maxima, percentiles and outlier channels, from its sketch.

All figures are of |x| in the unquantized program: before an input is shifted, masked or rotated. Percentiles and
histograms have the sketch's relative error of less than 2 %; what lies below 1/1000 of its channel's maximum counts as
that. Maxima are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch

from hif4c.compiler.calibration import ExpertCalibration
from hif4c.compiler.sketch import ChannelHistogram, ChannelSketch
from hif4c.compiler.weight_statistics import Histogram, magnitude_histogram

__all__ = ["COLUMNS", "PERCENTILES", "WORST", "Channel", "GroupNumbers", "group_numbers"]

PERCENTILES = (50.0, 99.0, 99.9)
COLUMNS = 128
WORST = 5


@dataclass(frozen=True)
class Channel:
    """One input channel: its index, its largest |x|, and that over the median of all channels (None over 0)."""

    index: int
    maximum: float
    ratio: float | None


@dataclass(frozen=True)
class GroupNumbers:
    """One quantized input: what the calibration's tokens have there.

    Attributes:
        name: path of the first linear that reads it.
        block: number of the transformer block, None where readers are outside of blocks or in several.
        readers: paths of the linears that read it.
        channels: K.
        tokens: how many were counted.
        maximum: the largest |x|.
        bin_maxima: the same in each timestep bin, None in one without tokens.
        percentiles: of |x| over all channels and tokens together, of the ranks `PERCENTILES`.
        ratios: maximum over percentile; None over 0.
        magnitudes: all |x|.
        median_maximum: median of the channels' maxima (of an even number the lower one).
        channel_maxima: the channels' maxima over that median, in order; of more than `COLUMNS` channels the largest in
            each of `COLUMNS` runs, the run i being the channels i K / 128 to (i + 1) K / 128, rounded down. Empty where
            the median is 0.
        worst: the `WORST` channels with the largest maxima, descending.
    """

    name: str
    block: int | None
    readers: tuple[str, ...]
    channels: int
    tokens: int
    maximum: float
    bin_maxima: tuple[float | None, ...]
    percentiles: tuple[float, ...]
    ratios: tuple[float | None, ...]
    magnitudes: Histogram
    median_maximum: float
    channel_maxima: tuple[float, ...]
    worst: tuple[Channel, ...]


def group_numbers(calibration: ExpertCalibration, name: str, block: int | None) -> GroupNumbers:
    """The numbers of one group; raises Hif4Error where its sketch is damaged."""
    group, sketch = calibration.groups[name], calibration.sketch(name)
    tokens = sketch.count()
    maxima = sketch.maximum()
    maximum, median = float(maxima.max()), float(maxima.median())
    histogram = sketch.histogram()
    percentiles = tuple(_percentile(histogram, p, maximum) for p in PERCENTILES)
    values = _centres(histogram)
    counts = histogram.counts.sum(0, dtype=torch.int64)
    shape = magnitude_histogram(values.numpy(), counts.numpy())
    worst = maxima.topk(min(WORST, group.channels))
    return GroupNumbers(
        name=name,
        block=block,
        readers=group.readers,
        channels=group.channels,
        tokens=int(tokens.sum()),
        maximum=maximum,
        bin_maxima=_bin_maxima(sketch),
        percentiles=percentiles,
        ratios=tuple(_ratio(maximum, value) for value in percentiles),
        magnitudes=Histogram(shape.lowest, shape.counts, int(histogram.zeros.sum(dtype=torch.int64))),
        median_maximum=median,
        channel_maxima=tuple((_columns(maxima) / median).tolist()) if median else (),
        worst=tuple(
            Channel(index, value, _ratio(value, median))
            for value, index in zip(worst.values.tolist(), worst.indices.tolist(), strict=True)
        ),
    )


def _bin_maxima(sketch: ChannelSketch) -> tuple[float | None, ...]:
    counts = enumerate(sketch.count().tolist())
    return tuple(float(sketch.maximum([index]).max()) if count else None for index, count in counts)


def _centres(histogram: ChannelHistogram) -> torch.Tensor:
    """What each bucket is answered with: the harmonic mean of its edges, [S] fp64."""
    return 2 / (1 / histogram.edges[:-1] + 1 / histogram.edges[1:])


def _percentile(histogram: ChannelHistogram, p: float, maximum: float) -> float:
    """Nearest-rank percentile over all channels."""
    at_or_below = histogram.counts.sum(0, dtype=torch.int64).cumsum(0) + histogram.zeros.sum(dtype=torch.int64)
    total = int(at_or_below[-1]) if len(at_or_below) else 0
    rank = math.ceil(Fraction(str(p)) * total / 100)
    if not total or int(histogram.zeros.sum(dtype=torch.int64)) >= rank:
        return 0.0
    return min(float(_centres(histogram)[int((at_or_below < rank).sum())]), maximum)


def _columns(maxima: torch.Tensor) -> torch.Tensor:
    """[K] as at most `COLUMNS` maxima of neighbours."""
    if len(maxima) <= COLUMNS:
        return maxima
    edges = [index * len(maxima) // COLUMNS for index in range(COLUMNS + 1)]
    return torch.stack([maxima[start:end].amax() for start, end in pairwise(edges)])


def _ratio(value: float, divisor: float) -> float | None:
    return value / divisor if divisor else None
