"""Sketches: percentiles against exact ones, merging in any order, storage, damaged data."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hif4c.compiler.log_grid import RELATIVE_ERROR, SMALLEST
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.sketch import MAX_BUCKETS, ChannelSketch
from hif4c.runtime.errors import Hif4Error
from tests.support.forked_ranks import in_ranks

PERCENTILES = (1, 25, 50, 90, 99, 99.9, 99.99, 100)
# A bucket's value is stored in fp32.
BOUND = RELATIVE_ERROR + 2**-24


def sketch_of(x: Tensor, bins: int = 1, bin: int = 0) -> ChannelSketch:
    sketch = ChannelSketch(x.shape[-1], bins)
    sketch.update(x, bin)
    return sketch


def exact_percentile(x: Tensor, p: float) -> Tensor:
    """Nearest rank by sorting: the smallest value of each column with at least p % of the column at or below it."""
    rank = math.ceil(Fraction(str(p)) * len(x) / 100)
    return x.double().abs().sort(0).values[rank - 1]


def assert_same(a: ChannelSketch, b: ChannelSketch) -> None:
    first, second = a.to_tensors(), b.to_tensors()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert tensor.numpy().tobytes() == second[name].numpy().tobytes(), name


def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(4001, 6, generator=generator) * torch.tensor([1e-6, 0.02, 1, 3, 100, 1e6])


def lognormal(generator: torch.Generator) -> Tensor:
    return torch.randn(4001, 6, generator=generator).mul(1.2).exp()


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Student's t with two degrees of freedom."""
    return torch.randn(4001, 6, generator=generator) / torch.rand(4001, 6, generator=generator).log().neg().sqrt()


def constant(generator: torch.Generator) -> Tensor:
    return torch.tensor([0.0, 1.0, -1.0, 0.7, 1e-9, 60000.0]).expand(999, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [gaussian, lognormal, heavy_tailed, constant])
def test_percentiles_are_within_two_percent(make: Callable[[torch.Generator], Tensor], dtype: torch.dtype) -> None:
    x = make(torch.Generator().manual_seed(0)).clamp(-60000, 60000).to(dtype)
    sketch = sketch_of(x)
    assert RELATIVE_ERROR < 0.02
    maximum = x.float().abs().amax(0)
    assert torch.equal(sketch.maximum(), maximum)
    assert torch.equal(sketch.percentile(100), maximum)
    for p in PERCENTILES:
        exact, found = exact_percentile(x, p), sketch.percentile(p)
        assert found.dtype == torch.float32
        assert (found <= maximum).all()
        kept = exact >= maximum / 1000
        error = (found - exact).abs() / exact.clamp(min=SMALLEST)
        assert (error[kept & (exact > 0)] <= BOUND).all(), p
        assert (found[exact < SMALLEST] == 0).all()
        assert (found >= exact * (1 - BOUND)).all()


def test_every_bfloat16_is_answered_within_the_bound() -> None:
    magnitudes = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    # The second token keeps the clamp by the maximum out of the way.
    x = torch.stack([magnitudes, (magnitudes.float() * 2).clamp(max=torch.finfo(torch.bfloat16).max).bfloat16()])
    found = sketch_of(x).percentile(50).double()
    counted = magnitudes.double() >= SMALLEST
    error = (found / magnitudes.double() - 1).abs()
    assert (error[counted] <= BOUND).all()
    assert error[counted].max() > RELATIVE_ERROR * 0.99
    assert (found[~counted] == 0).all()
    assert (found.diff() >= 0).all()


def test_float32_between_bfloat16_neighbours_stays_in_the_bound() -> None:
    bits = torch.randint(
        0x2C000000, 0x7F000000, (20000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32
    )
    magnitudes = bits.view(torch.float32)
    found = sketch_of(torch.stack([magnitudes, magnitudes * 1.5])).percentile(50)
    assert ((found.double() / magnitudes.double() - 1).abs() <= BOUND).all()


def test_rank_is_exact_in_decimals() -> None:
    # 99.9 / 100 * 1000 is 999.0000000000001 in floating point, which would round up to the outlier.
    x = torch.ones(1000, 1)
    x[17] = 500.0
    assert sketch_of(x).percentile(99.9) == pytest.approx(1.0, rel=BOUND)
    assert sketch_of(x).percentile(99.91) == 500.0


def test_zeros_are_tokens() -> None:
    x = torch.zeros(100, 3)
    x[:10, 1] = 2.0
    x[:, 2] = SMALLEST / 4
    sketch = sketch_of(x)
    assert sketch.percentile(90).tolist() == [0, 0, 0]
    assert sketch.percentile(91)[1] == pytest.approx(2.0, rel=BOUND)
    assert sketch.maximum().tolist() == [0, 2, SMALLEST / 4]
    assert sketch.histogram().zeros.tolist() == [100, 90, 100]


def test_low_values_collapse_into_an_upper_bound() -> None:
    x = torch.cat([torch.full((90, 1), 1e-3), torch.full((10, 1), 100.0)])
    sketch = sketch_of(x)
    low = sketch.percentile(50).item()
    assert 1e-3 <= low <= 100 / 1000
    assert sketch.percentile(95).item() == pytest.approx(100, rel=BOUND)
    counts = sketch.to_tensors()["counts"].tolist()
    assert len(counts) == MAX_BUCKETS
    assert (counts[0], counts[-1]) == (90, 10)
    # The values were kept as long as nothing large had been seen.
    late = sketch_of(x[:90])
    assert late.percentile(50).item() == pytest.approx(1e-3, rel=BOUND)
    late.update(x[90:], 0)
    assert_same(late, sketch)


def test_large_and_tiny_magnitudes() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, SMALLEST, -0.0], [-largest, SMALLEST, 1e-45]])
    sketch = sketch_of(x)
    assert sketch.maximum().tolist() == [largest, SMALLEST, torch.tensor(1e-45).item()]
    half = sketch.percentile(50)
    assert half[0] == pytest.approx(largest, rel=BOUND)
    assert half[1:].tolist() == [SMALLEST, 0]
    assert_same(ChannelSketch.from_tensors(sketch.to_tensors(), "here"), sketch)


# Powers over the whole range, so that parts have tops far apart and collapse differently.
values = st.one_of(st.just(0.0), st.floats(-44, 40).map(lambda e: 2.0**e), st.floats(-9, 9, width=32))
batches = st.lists(st.tuples(st.integers(0, 1), st.lists(st.tuples(values, values), max_size=6)), max_size=5)


def from_batches(items: list[tuple[int, list[tuple[float, float]]]]) -> ChannelSketch:
    sketch = ChannelSketch(2, 2)
    for bin, rows in items:
        sketch.update(torch.tensor(rows, dtype=torch.float32).reshape(-1, 2), bin)
    return sketch


def merged(*sketches: ChannelSketch) -> ChannelSketch:
    result = ChannelSketch(2, 2)
    for sketch in sketches:
        result.merge(sketch)
    return result


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batches, batches, batches)
def test_merging_is_associative_and_commutative_and_equals_one_sketch_of_all(a: list, b: list, c: list) -> None:
    first, second, third = from_batches(a), from_batches(b), from_batches(c)
    expected = from_batches(a + b + c)
    assert_same(merged(merged(first, second), third), expected)
    assert_same(merged(first, merged(second, third)), expected)
    assert_same(merged(third, first, second), expected)
    # None of this changed its arguments, nor does reading back.
    assert_same(first, from_batches(a))
    assert_same(ChannelSketch.from_tensors(expected.to_tensors(), "here"), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches, st.floats(0.01, 100))
def test_chosen_bins_answer_as_one(items: list, p: float) -> None:
    sketch, single = from_batches(items), from_batches([(0, rows) for _, rows in items])
    if single.count().sum() == 0:
        return
    assert torch.equal(sketch.percentile(p), single.percentile(p))
    assert torch.equal(sketch.percentile(p, [1, 0]), single.percentile(p, [0]))
    assert torch.equal(sketch.maximum(), single.maximum())
    assert torch.equal(sketch.histogram().counts, single.histogram().counts)


def test_sketches_of_ranks_add_up_to_one_of_all() -> None:
    """Ranks with tops far apart, one without tokens in a bin, one without any."""
    parts = [
        [(0, [(1.0, 0.0), (3.0, 1e-30)]), (1, [(7.0, 2.0)])],
        [(0, [(1e4, 5.0)])],
        [],
    ]  # fmt: skip

    def work(ranks: Ranks) -> dict[str, object]:
        sketch = from_batches(parts[ranks.rank])
        sketch.merge_ranks(ranks)
        return {name: (value.dtype, value.tolist()) for name, value in sketch.to_tensors().items()}

    whole = from_batches([batch for part in parts for batch in part]).to_tensors()
    expected = {name: (value.dtype, value.tolist()) for name, value in whole.items()}
    assert in_ranks(3, work) == [expected] * 3
    alone = from_batches(parts[0])
    alone.merge_ranks(ALONE)
    assert_same(alone, from_batches(parts[0]))


def test_a_sketch_merges_with_itself() -> None:
    x = gaussian(torch.Generator().manual_seed(4))
    sketch = sketch_of(x)
    sketch.merge(sketch)
    assert_same(sketch, sketch_of(torch.cat([x, x])))


def test_timestep_bins_are_apart() -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(500 + 10 * i, 5, generator=generator) * 10**i for i in range(4)]
    sketch = ChannelSketch(5, 4)
    for index in (3, 0, 1, 2):
        sketch.update(parts[index], index)
    assert sketch.count().tolist() == [500, 510, 520, 530]
    assert sketch.count([3, 1]).tolist() == [530, 510]
    for bins in ([0], [2], [0, 1], [1, 3], None):
        chosen = torch.cat([parts[index] for index in (bins or range(4))])
        assert torch.equal(sketch.maximum(bins), chosen.abs().amax(0))
        exact = exact_percentile(chosen, 95)
        assert ((sketch.percentile(95, bins) / exact - 1).abs() <= BOUND).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_and_shapes_do_not_matter(dtype: torch.dtype) -> None:
    """More channels and tokens than one block holds, leading dimensions, and a view with strides."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(3, 3001, 300, generator=generator) * torch.rand(300, generator=generator)).to(dtype)
    x[0, :100] = 0
    whole, pieces = sketch_of(x), ChannelSketch(300, 1)
    for piece in x.reshape(-1, 300).split(701):
        pieces.update(piece, 0)
    assert_same(whole, pieces)
    assert_same(whole, sketch_of(x.mT.contiguous().mT))
    narrow = sketch_of(x[..., 40:177])
    assert torch.equal(narrow.percentile(99), whole.percentile(99)[40:177])
    histogram = whole.histogram()
    assert (histogram.counts.sum(1) + histogram.zeros == 9003).all()


def test_histogram_counts_what_lies_between_the_edges() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2000, 3, generator=generator).clamp(min=0.01)
    histogram = sketch_of(x).histogram()
    edges = histogram.edges
    assert edges.dtype == torch.float64
    assert (edges[1:] / edges[:-1] <= 1.04).all()
    for channel in range(3):
        expected, _ = np.histogram(x[:, channel].double().numpy(), edges.numpy())
        assert histogram.counts[channel].tolist() == expected.tolist()
    assert (histogram.counts.sum(0)[[0, -1]] > 0).all()


def test_histogram_of_zeros_has_no_buckets() -> None:
    histogram = sketch_of(torch.zeros(7, 2)).histogram()
    assert histogram.counts.shape == (2, 0)
    assert histogram.zeros.tolist() == [7, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_and_change_nothing(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(3000, 400).to(dtype)
    sketch = sketch_of(x)
    x[2999, 301] = value
    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 400 channels, first in 301"):
        sketch.update(x, 0)
    x[2999, 301] = 0
    again = sketch_of(x)
    sketch.update(x, 0)
    assert sketch.count().tolist() == [6000]
    assert torch.equal(again.maximum(), x.float().abs().amax(0))


def test_wrong_calls() -> None:
    sketch = sketch_of(torch.ones(4, 8), bins=3, bin=1)
    for x, bin, text in (
        (torch.ones(4, 7), 0, r"8 channels .* \[4, 7\]"),
        (torch.tensor(1.0), 0, "8 channels"),
        (torch.ones(4, 8), 3, r"bin 3 is not one of 0\.\.2"),
        (torch.ones(4, 8, dtype=torch.float64), 0, "float64"),
    ):
        with pytest.raises(ValueError, match=text):
            sketch.update(x, bin)
    sketch.update(torch.ones(0, 8), 0)
    for p in (0, -1, 100.5, math.nan):
        with pytest.raises(ValueError, match="above 0 and at most 100"):
            sketch.percentile(p)
    for bins in ([], [3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="each once"):
            sketch.percentile(50, bins)
    for read in (sketch.maximum, sketch.histogram):
        with pytest.raises(ValueError, match=r"no tokens .* \[0, 2\]"):
            read([0, 2])
    for other in (ChannelSketch(8, 2), ChannelSketch(9, 3)):
        with pytest.raises(ValueError, match="cannot be merged"):
            sketch.merge(other)
    with pytest.raises(ValueError, match="0 and 1"):
        ChannelSketch(0, 1)


def test_counts_do_not_overflow() -> None:
    sketch = sketch_of(torch.ones(1, 1))
    for _ in range(30):
        sketch.merge(sketch)
    with pytest.raises(ValueError, match="at most 2147483647 tokens"):
        sketch.merge(sketch)
    with pytest.raises(ValueError, match="at most 2147483647 tokens"):
        sketch.update(torch.ones(1, 1).expand(2**30, 1), 0)
    assert sketch.count().tolist() == [2**30]
    assert sketch.percentile(10) == 1


def stored() -> dict[str, Tensor]:
    """Two bins with tokens and one without; channel 1 is zero in bin 0 and channel 2 has zeros among its values."""
    x = torch.tensor([[1.0, 0.0, 0.0], [1.5, 0.0, 4.0], [2.0, 0.0, 5.0]])
    sketch = ChannelSketch(3, 3)
    sketch.update(x, 0)
    sketch.update(x + 1, 2)
    return sketch.to_tensors()


def test_round_trip() -> None:
    tensors = stored()
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "tokens": (torch.int64, [3]),
        "zeros": (torch.int32, [3, 3]),
        "maximum": (torch.float32, [3, 3]),
        "lowest": (torch.int16, [3, 3]),
        "widths": (torch.int16, [3, 3]),
        "counts": (torch.int32, [int(tensors["widths"].sum())]),
    }
    read = ChannelSketch.from_tensors(tensors, "here")
    assert read.count().tolist() == [3, 0, 3]
    x = torch.ones(2, 3)
    read.update(x * 1e5, 1)
    read.update(x, 0)
    assert read.percentile(100, [1]).tolist() == [1e5, 1e5, 1e5]


def test_round_trip_after_collapse_goes_on_like_the_original() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(2000, 40, generator=generator).pow(30)
    original = sketch_of(x)
    read = ChannelSketch.from_tensors(original.to_tensors(), "here")
    for sketch in (original, read):
        sketch.update(x * 20, 0)
    assert_same(original, read)


def put(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][index] = value

    return damage


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop("zeros"), "has the tensors"),
    "extra": (lambda tensors: tensors.update(more=torch.zeros(1)), "has the tensors"),
    "dtype": (replace("counts", Tensor.long), "counts is torch.int64"),
    "no bins": (replace("zeros", lambda t: t[:0]), "zeros has shape"),
    "flat": (replace("zeros", Tensor.flatten), "zeros has shape"),
    "shape": (replace("maximum", lambda t: t[:, :2]), "maximum has shape"),
    "tokens shape": (replace("tokens", lambda t: t[:2]), "tokens has shape"),
    "counts cut": (replace("counts", lambda t: t[:-1]), "counts has shape"),
    "counts shape": (replace("counts", lambda t: t[None]), "counts has shape"),
    "negative tokens": (put("tokens", (0,), -3), "tokens are out of range"),
    "many tokens": (put("tokens", (0,), 2**31), "tokens are out of range"),
    "too many tokens": (put("tokens", (0,), 2**31 - 2), "add up|out of range"),
    "other tokens": (put("tokens", (0,), 4), "do not add up"),
    "tokens lost": (put("tokens", (0,), 0), "out of range|without tokens"),
    "tokens appear": (put("tokens", (1,), 1), "do not add up"),
    "negative zeros": (put("zeros", (0, 2), -1), "zeros are out of range"),
    "more zeros": (put("zeros", (0, 2), 2), "do not add up"),
    "NaN maximum": (put("maximum", (0, 0), math.nan), "not a finite number"),
    "infinite maximum": (put("maximum", (0, 0), math.inf), "not a finite number"),
    "negative maximum": (put("maximum", (0, 1), -0.0), "not a finite number"),
    "other maximum": (put("maximum", (0, 0), 4.0), "disagree"),
    "maximum without values": (put("maximum", (0, 1), 4.0), "disagree"),
    "maximum without tokens": (put("maximum", (1, 0), SMALLEST / 2), "without tokens"),
    "negative width": (put("widths", (0, 0), -1), "widths are not within"),
    "wide": (put("widths", (0, 0), MAX_BUCKETS + 1), "widths are not within"),
    "lowest": (put("lowest", (0, 0), 5), "disagree"),
    "negative lowest": (put("lowest", (0, 0), -5), "lowest buckets are out of range"),
    "lowest of zeros": (put("lowest", (0, 1), 7), "lowest buckets are out of range"),
    "negative count": (put("counts", (1,), -1), "counts are negative"),
    "empty first": (put("counts", (0,), 0), "outermost"),
    "empty last": (put("counts", (-1,), 0), "outermost"),
    "count": (put("counts", (0,), 2), "do not add up"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data_is_refused_by_name(kind: str) -> None:
    damage, text = DAMAGE[kind]
    tensors = stored()
    ChannelSketch.from_tensors(tensors, "calib.safetensors, blocks.0.attn1.to_q")
    damage(tensors)
    with pytest.raises(Hif4Error, match=rf"^calib\.safetensors, blocks\.0\.attn1\.to_q: .*({text}).*hif4c calibrate"):
        ChannelSketch.from_tensors(tensors, "calib.safetensors, blocks.0.attn1.to_q")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_never_give_an_inconsistent_sketch(data: st.DataObject) -> None:
    tensors = {name: tensor.clone() for name, tensor in stored().items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[name].view(torch.uint8).flatten()
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        sketch = ChannelSketch.from_tensors(tensors, "here")
    except Hif4Error:
        return
    # What is still consistent, such as another maximum in the same bucket, is read as it is written.
    for key, tensor in sketch.to_tensors().items():
        assert torch.equal(tensor, tensors[key])
    sketch.percentile(50)


def test_wide_inputs_in_little_memory() -> None:
    """The widest input of Wan2.2-A14B: every stored byte belongs to a bucket in use or to one of five fixed planes."""
    x = torch.randn(64, 13824, generator=torch.Generator().manual_seed(7)).bfloat16()
    sketch = sketch_of(x, bins=4, bin=2)
    tensors = sketch.to_tensors()
    assert int(tensors["counts"].sum()) + int(tensors["zeros"].sum()) == x.numel()
    exact = exact_percentile(x, 90)
    assert ((sketch.percentile(90) / exact - 1).abs() <= BOUND).all()
    assert_same(ChannelSketch.from_tensors(tensors, "here"), sketch)
