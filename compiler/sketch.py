"""Mergeable log-histograms of |x| per input channel, from which any percentile is read after calibration.

A channel keeps the `MAX_BUCKETS` buckets that end at its largest value, a range of more than 1000 to 1, and counts what
lies lower in the lowest of them. That range depends on the largest value only, so merged sketches equal the sketch of
all their values, in any order. The collapse is that of DDSketch (Masson, Rim, Lee, VLDB 2019, arXiv 1908.10693).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hif4c.compiler.log_grid import EDGES, VALUES, bucket_of
from hif4c.compiler.ranks import Ranks
from hif4c.runtime.errors import Hif4Error

__all__ = ["MAX_BUCKETS", "ChannelHistogram", "ChannelSketch"]

MAX_BUCKETS = 192
_MAX_TOKENS = 2**31 - 1  # of all bins together, so that every count of a sketch and of its pooled bins is an int32
_TOO_MANY = f"a sketch counts at most {_MAX_TOKENS} tokens in all its bins; use fewer samples"
_BLOCK_CHANNELS = 128  # their counts, 128 x 192 int64, stay in a core's cache
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ChannelHistogram:
    """Counts of one sketch for looking at. K channels, S buckets from the lowest to the highest one in use.

    Attributes:
        edges: [S+1] fp64, the bucket s holds edges[s] <= |x| < edges[s+1]. S is 0 when everything is zero.
        counts: [K, S] int32. The lowest bucket that a channel keeps also counts what was collapsed into it.
        zeros: [K] int32, values below `SMALLEST`.
    """

    edges: Tensor
    counts: Tensor
    zeros: Tensor


class _Histogram:
    """One timestep bin: counts[k, s] belongs to the bucket floor[k] + s."""

    def __init__(self, channels: int) -> None:
        self.tokens = 0
        self.maximum = torch.zeros(channels)
        self.zeros = torch.zeros(channels, dtype=torch.int32)
        self.counts = torch.zeros(channels, MAX_BUCKETS, dtype=torch.int32)

    @property
    def top(self) -> Tensor:
        """Highest bucket in use, [K] int32; -1 for a channel of zeros."""
        return bucket_of(self.maximum)

    @property
    def floor(self) -> Tensor:
        """Lowest bucket that can be kept, [K] int32."""
        return (self.top - (MAX_BUCKETS - 1)).clamp_(min=0)

    @property
    def buckets(self) -> Tensor:
        """Bucket of every slot, [K, MAX_BUCKETS] int32."""
        return self.floor[:, None] + torch.arange(MAX_BUCKETS, dtype=torch.int32)

    def clone(self) -> _Histogram:
        copy = _Histogram(0)
        copy.tokens = self.tokens
        copy.maximum, copy.zeros, copy.counts = self.maximum.clone(), self.zeros.clone(), self.counts.clone()
        return copy

    def make_room(self, maximum: Tensor) -> None:
        """Raise the maxima to at least maximum [K] fp32 and collapse what then lies too low."""
        old_floor = self.floor
        self.maximum = self.maximum.maximum(maximum)
        shift = self.floor - old_floor
        raised = shift.nonzero().squeeze(1)
        if self.tokens and len(raised):
            slots = (torch.arange(MAX_BUCKETS) - shift[raised, None]).clamp_(min=0)
            old = self.counts[raised]
            self.counts[raised] = torch.zeros_like(old).scatter_add_(1, slots, old)

    def add(self, rows: Tensor) -> None:
        """Count rows [T, K]; there is room for their maxima."""
        floor = self.floor
        for span, block in _blocks(rows):
            channels = block.shape[1]
            slots = bucket_of(block)
            zeros = (slots < 0).sum(0, dtype=torch.int32)
            slots.sub_(floor[span]).clamp_(min=0).add_(torch.arange(channels, dtype=torch.int32) * MAX_BUCKETS)
            counts = torch.bincount(slots.flatten(), minlength=channels * MAX_BUCKETS)
            self.zeros[span] += zeros
            self.counts[span] += counts.view(channels, MAX_BUCKETS)
            self.counts[span, 0] -= zeros  # their bucket -1 was clamped to the first slot
        self.tokens += len(rows)

    def merge(self, other: _Histogram) -> None:
        self.make_room(other.maximum)
        if not torch.equal(self.floor, other.floor):
            other = other.clone()
            other.make_room(self.maximum)
        self.counts += other.counts
        self.zeros += other.zeros
        self.tokens += other.tokens

    def merge_ranks(self, ranks: Ranks, tokens: int) -> None:
        """Add what the other ranks counted, which is `tokens` with our own."""
        self.make_room(ranks.all_max(self.maximum))
        self.counts = ranks.all_sum(self.counts)
        self.zeros = ranks.all_sum(self.zeros)
        self.tokens = tokens

    def percentile(self, rank: int) -> Tensor:
        """Value of the token number `rank` (from 1, ascending), [K] fp32."""
        if rank == self.tokens:
            return self.maximum.clone()
        at_or_below = self.counts.cumsum(1, dtype=torch.int32).add_(self.zeros[:, None])
        slot = (at_or_below < rank).sum(1)
        value = VALUES[self.floor + slot].minimum(self.maximum)
        return torch.where(self.zeros >= rank, 0.0, value)


class ChannelSketch:
    """Distribution of |x| of one quantized input x [..., K], per channel and timestep bin.

    Percentiles have a relative error of at most `RELATIVE_ERROR` (< 2 %) down to 1/1000 of the channel's maximum over
    the chosen bins. A lower one is answered with the lowest kept bucket: an upper bound but for that same error, and
    below 1/1000 of the maximum. One below `SMALLEST` is answered with 0. Maxima are exact.

    Memory: 776 bytes a channel for each bin that has tokens (K = 13824, 4 bins: 43 MB), and less than 64 MB more during
    `update`. `to_tensors` stores only buckets in use.

    Args:
        channels: K.
        bins: number of timestep bins.
    """

    def __init__(self, channels: int, bins: int) -> None:
        if channels < 1 or bins < 1:
            raise ValueError(f"a sketch needs channels and bins, not {channels} and {bins}")
        self.channels = channels
        self.bins = bins
        self._histograms: list[_Histogram | None] = [None] * bins

    def update(self, x: Tensor, bin: int) -> None:
        """Count all tokens of x [..., K], bf16, fp16 or fp32, in one timestep bin.

        The work is done on the CPU in blocks; only an x that cannot be seen as [T, K] or lies elsewhere is copied.

        Raises:
            ValueError: wrong shape, dtype or bin, more than 2^31-1 tokens, or a value that is NaN or infinite. The
                sketch is then unchanged.
        """
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"a sketch counts bf16, fp16 or fp32, not {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.channels:
            raise ValueError(f"a sketch of {self.channels} channels was given a tensor of shape {list(x.shape)}")
        if not 0 <= bin < self.bins:
            raise ValueError(f"timestep bin {bin} is not one of 0..{self.bins - 1}")
        rows = x.detach().reshape(-1, self.channels).cpu()
        if len(rows) == 0:
            return
        self._check_room(len(rows))
        maximum = _maximum(rows)
        bad = (~maximum.isfinite()).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"NaN or infinite values in {len(bad)} of {self.channels} channels, first in {int(bad[0])}"
            )
        histogram = self._histograms[bin]
        if histogram is None:
            histogram = self._histograms[bin] = _Histogram(self.channels)
        histogram.make_room(maximum)
        histogram.add(rows)

    def merge(self, other: ChannelSketch) -> None:
        """Add the other sketch's tokens to this one, bin by bin.

        Raises:
            ValueError: other channels or bins, or more than 2^31-1 tokens together.
        """
        if (self.channels, self.bins) != (other.channels, other.bins):
            raise ValueError(
                f"a sketch of {other.channels} channels and {other.bins} bins cannot be merged into one of "
                f"{self.channels} channels and {self.bins} bins"
            )
        self._check_room(int(other.count().sum()))
        for index, theirs in enumerate(other._histograms):
            ours = self._histograms[index]
            if theirs is not None and ours is not None:
                ours.merge(theirs)
            elif theirs is not None:
                self._histograms[index] = theirs.clone()

    def merge_ranks(self, ranks: Ranks) -> None:
        """Add the tokens of the other ranks' sketches of the same input, on every rank; counts add exactly.

        Raises:
            ValueError: more than 2^31-1 tokens together.
        """
        counted = ranks.all_sum(self.count())
        if int(counted.sum()) > _MAX_TOKENS:
            raise ValueError(_TOO_MANY)
        for index in counted.nonzero().flatten().tolist():
            histogram = self._histograms[index]
            if histogram is None:
                histogram = self._histograms[index] = _Histogram(self.channels)
            histogram.merge_ranks(ranks, int(counted[index]))

    def count(self, bins: Sequence[int] | None = None) -> Tensor:
        """Tokens of each chosen bin (all when None), int64."""
        chosen = [self._histograms[index] for index in self._chosen(bins)]
        return torch.tensor([0 if item is None else item.tokens for item in chosen], dtype=torch.int64)

    def maximum(self, bins: Sequence[int] | None = None) -> Tensor:
        """Exact maximum of |x| over the chosen bins (all when None), [K] fp32.

        Raises:
            ValueError: no such bins, or no tokens in them.
        """
        chosen = [item.maximum for item in self._filled(bins)]
        return torch.stack(chosen).amax(0)

    def percentile(self, p: float, bins: Sequence[int] | None = None) -> Tensor:
        """Nearest-rank percentile of |x| over all tokens of the chosen bins (all when None), zeros included, [K] fp32.

        The answer estimates the smallest value with at least p % of the tokens at or below it. It is never above the
        exact maximum, which is the answer where that value is the largest one, as for p = 100.

        Raises:
            ValueError: p outside (0, 100], no such bins, or no tokens in them.
        """
        if not 0 < p <= 100:
            raise ValueError(f"a percentile must be above 0 and at most 100, not {p}")
        pooled = self._pooled(bins)
        # 99.9 % of 1000 are 999, but 99.9 / 100 * 1000 is above 999 in floating point.
        return pooled.percentile(math.ceil(Fraction(str(float(p))) * pooled.tokens / 100))

    def histogram(self, bins: Sequence[int] | None = None) -> ChannelHistogram:
        """Counts over the chosen bins (all when None) on the edges that all channels share.

        Raises:
            ValueError: no such bins, or no tokens in them.
        """
        pooled = self._pooled(bins)
        channel, slot = pooled.counts.nonzero().T
        bucket = pooled.buckets[channel, slot]
        first, last = (int(bucket.min()), int(bucket.max()) + 1) if len(bucket) else (0, 0)
        counts = torch.zeros(self.channels, last - first, dtype=torch.int32)
        counts[channel, bucket - first] = pooled.counts[channel, slot]
        return ChannelHistogram(EDGES[first : last + 1].clone(), counts, pooled.zeros.clone())

    def to_tensors(self) -> dict[str, Tensor]:
        """The sketch as data; equal contents give equal bytes, however they were gathered.

        Returns:
            tokens [bins] int64; zeros [bins, K] int32; maximum [bins, K] fp32; lowest [bins, K] int16, the lowest
            bucket in use; widths [bins, K] int16, the number of buckets from there to the highest in use (0 for a
            channel of zeros, whose lowest is 0); counts int32, of all these buckets, bin by bin and channel by channel.
        """
        empty = _Histogram(self.channels)
        parts = [empty if item is None else item for item in self._histograms]
        used = [part.counts.ne(0).cummax(1).values & (part.buckets <= part.top[:, None]) for part in parts]
        widths = torch.stack([mask.sum(1) for mask in used])
        return {
            "tokens": self.count(),
            "zeros": torch.stack([part.zeros for part in parts]),
            "maximum": torch.stack([part.maximum for part in parts]),
            "lowest": (torch.stack([part.top for part in parts]) - widths + 1).to(torch.int16),
            "widths": widths.to(torch.int16),
            "counts": torch.cat([part.counts[mask] for part, mask in zip(parts, used, strict=True)]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str) -> ChannelSketch:
        """Read what `to_tensors` wrote; nothing is believed before it is checked.

        Args:
            tensors: exactly the tensors of `to_tensors`.
            where: what they were read from, for the message.

        Raises:
            Hif4Error: a tensor is missing or has another shape or dtype, or the numbers do not belong together.
        """
        _check_tensors(tensors, where)
        bins, channels = tensors["zeros"].shape
        sketch = cls(channels, bins)
        parts = tensors["counts"].split(tensors["widths"].sum(1).tolist())
        for index, tokens in enumerate(tensors["tokens"].tolist()):
            if tokens:
                histogram = sketch._histograms[index] = _Histogram(channels)
                histogram.tokens = tokens
                histogram.maximum.copy_(tensors["maximum"][index])
                histogram.zeros.copy_(tensors["zeros"][index])
                buckets, lowest = histogram.buckets, tensors["lowest"][index, :, None]
                used = (buckets >= lowest) & (buckets < lowest + tensors["widths"][index, :, None])
                histogram.counts[used] = parts[index]
        return sketch

    def _check_room(self, tokens: int) -> None:
        if int(self.count().sum()) + tokens > _MAX_TOKENS:
            raise ValueError(_TOO_MANY)

    def _chosen(self, bins: Sequence[int] | None) -> list[int]:
        chosen = list(range(self.bins)) if bins is None else list(bins)
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= index < self.bins for index in chosen):
            raise ValueError(f"timestep bins {chosen} must be one or more of 0..{self.bins - 1}, each once")
        return chosen

    def _filled(self, bins: Sequence[int] | None) -> list[_Histogram]:
        chosen = self._chosen(bins)
        filled = [item for item in (self._histograms[index] for index in chosen) if item is not None]
        if not filled:
            raise ValueError(f"no tokens were counted in timestep bins {chosen}")
        return filled

    def _pooled(self, bins: Sequence[int] | None) -> _Histogram:
        filled = self._filled(bins)
        if len(filled) == 1:
            return filled[0]
        pooled = filled[0].clone()
        for item in filled[1:]:
            pooled.merge(item)
        return pooled


def _blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows [T, K] with the channels that each one holds."""
    for first in range(0, rows.shape[1], _BLOCK_CHANNELS):
        span = slice(first, min(first + _BLOCK_CHANNELS, rows.shape[1]))
        for block in rows[:, span].split(_BLOCK_ELEMENTS // (span.stop - span.start)):
            yield span, block


def _maximum(rows: Tensor) -> Tensor:
    """Largest magnitude of each channel of rows [T, K], [K] fp32, or NaN, whose pattern is above infinity's."""
    result = torch.zeros(rows.shape[1], dtype=torch.int32)
    for span, block in _blocks(rows):
        if block.dtype == torch.bfloat16:
            bits = (block.view(torch.int16) & 0x7FFF).amax(0).int() << 16
        else:
            bits = (block.float().view(torch.int32) & 0x7FFFFFFF).amax(0)
        result[span] = torch.maximum(result[span], bits)
    return result.view(torch.float32)


def _check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    def check(good: bool | Tensor, problem: str) -> None:
        if not bool(good):
            raise Hif4Error(f"{where}: {problem}; the file is damaged, make it again with `hif4c calibrate`.")

    dtypes = {
        "tokens": torch.int64,
        "zeros": torch.int32,
        "maximum": torch.float32,
        "lowest": torch.int16,
        "widths": torch.int16,
        "counts": torch.int32,
    }
    check(tensors.keys() == dtypes.keys(), f"a sketch has the tensors {', '.join(dtypes)}, not {', '.join(tensors)}")
    for name, dtype in dtypes.items():
        check(tensors[name].dtype == dtype, f"{name} is {tensors[name].dtype}, not {dtype}")
    tokens, zeros, maximum, lowest, widths, counts = (tensors[name] for name in dtypes)
    shape = zeros.shape
    check(len(shape) == 2 and min(shape) > 0, f"zeros has shape {list(shape)}, not [bins, channels]")
    for name in ("maximum", "lowest", "widths"):
        check(tensors[name].shape == shape, f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}")
    check(tokens.shape == shape[:1], f"tokens has shape {list(tokens.shape)}, not {list(shape[:1])}")

    check(((tokens >= 0) & (tokens <= _MAX_TOKENS)).all() and tokens.sum() <= _MAX_TOKENS, "tokens are out of range")
    check(((zeros >= 0) & (zeros <= tokens[:, None])).all(), "zeros are out of range")
    # One comparison rules out NaN, infinity, negative numbers and the negative zero.
    bits = maximum.contiguous().view(torch.int32)
    check(((bits >= 0) & (bits < 0x7F800000)).all(), "a maximum is not a finite number >= 0")
    check(((widths >= 0) & (widths <= MAX_BUCKETS)).all(), f"widths are not within 0..{MAX_BUCKETS}")
    check(counts.shape == (int(widths.sum()),), f"counts has shape {list(counts.shape)}, not [{int(widths.sum())}]")
    check((maximum[tokens == 0] == 0).all(), "a maximum without tokens")

    used = widths.flatten() > 0
    low, high = lowest.flatten().long(), lowest.flatten().long() + widths.flatten() - 1
    check(((low >= 0) & (used | (low == 0))).all(), "lowest buckets are out of range")
    check((torch.where(used, high, -1) == bucket_of(maximum).flatten()).all(), "buckets and maxima disagree")

    check((counts >= 0).all(), "counts are negative")
    ends = widths.flatten().cumsum(0)
    starts = ends - widths.flatten()
    check((counts[starts[used]] > 0).all() and (counts[ends[used] - 1] > 0).all(), "an outermost bucket is empty")
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0, dtype=torch.int64)])
    total = (sums[ends] - sums[starts]).view(shape) + zeros
    check((total == tokens[:, None]).all(), "counts and zeros do not add up to the tokens")
