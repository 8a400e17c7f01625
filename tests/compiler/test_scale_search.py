import pytest
import torch

from hif4c.compiler.scale_search import search_scales, unit_search
from hif4c.compiler.synthetic import KINDS, synthetic_layer
from hif4c.runtime.format import dequantize, quantize

MIN_STORED, MAX_STORED = 0, 0xFE


def unit_errors(weight: torch.Tensor, planes: tuple[torch.Tensor, ...], importance: torch.Tensor | None):
    """The objective of every unit, fp64 [N, U]."""
    error = (weight.double() - dequantize(*planes, weight.shape[1], torch.float64)) ** 2
    if importance is not None:
        error = error * importance.double()
    return error.unflatten(-1, (-1, 64)).sum(-1)


def gaussian(seed: int, n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def best_error(unit: torch.Tensor, importance: torch.Tensor, plain: int) -> float:
    """The smallest objective of one unit [64] over every candidate E6M2 and every setting of the level bits, fp64."""

    def cost(part: slice, step: float) -> float:
        q = (unit[part] / step).round().clamp(-7, 7)
        return float((importance[part] * (unit[part] - q * step) ** 2).sum())

    totals = []
    for stored in range(max(plain - 4, MIN_STORED), min(plain + 3, MAX_STORED) + 1):
        step = 2.0 ** (stored // 4 - 50) * (1 + stored % 4 / 4)
        total = 0.0
        for run in range(8):
            first, second = slice(8 * run, 8 * run + 4), slice(8 * run + 4, 8 * run + 8)
            total += min(
                cost(first, step * 2 ** (e8 + a)) + cost(second, step * 2 ** (e8 + b))
                for e8 in (0, 1)
                for a in (0, 1)
                for b in (0, 1)
            )
        totals.append(total)
    return min(totals)


@pytest.mark.parametrize("scale", [0.02, 2.0**-47, 50000.0])
def test_the_search_finds_the_best_of_its_candidates(scale: float):
    weight = gaussian(0, 3, 128) * scale
    importance = gaussian(1, 1, 128)[0].exp() ** 2
    found = unit_errors(weight, search_scales(weight, importance), importance)
    plain = quantize(weight)[1][..., 0]
    for row in range(3):
        for unit in range(2):
            columns = slice(64 * unit, 64 * unit + 64)
            best = best_error(weight[row, columns].double(), importance[columns].double(), int(plain[row, unit]))
            # The candidates are compared by sums of 64 fp32 terms.
            assert found[row, unit].item() == pytest.approx(best, rel=64 * 2**-23)


@pytest.mark.parametrize(
    ("kind", "width", "weighted"),
    [(kind, 5120, True) for kind in KINDS] + [("ffn.2", 5120, False), ("ffn.2", 13824, True)],
)
def test_no_unit_is_worse_than_plain_rounding(kind: str, width: int, weighted: bool):
    x, weight = (t.float() for t in synthetic_layer(kind, 16, width, 32, seed=3))
    importance = x.square().mean(0) if weighted else None
    plain, found = (unit_errors(weight, p, importance) for p in (quantize(weight), search_scales(weight, importance)))
    assert (found <= plain).all()
    assert found.sum() < 0.9 * plain.sum()  # measured on Gaussian weights without importance: .88


@pytest.mark.parametrize("scale", [0.0, 2.0**-60, 1e6, 1e30])
def test_units_beyond_the_scales_keep_what_plain_rounding_gives(scale: float):
    weight = gaussian(5, 4, 64) * scale
    assert all(torch.equal(a, b) for a, b in zip(search_scales(weight), quantize(weight), strict=True))


def test_channels_without_importance_do_not_count():
    weight = gaussian(6, 64, 64)
    weight[:, :4] *= 30  # alone in their run
    importance = torch.ones(64)
    importance[:4] = 0
    found = unit_errors(weight, search_scales(weight, importance), importance)
    # The others get the E6M2 that they would choose without them, up to the candidates' reach of one octave below.
    assert found.sum() < 0.6 * unit_errors(weight, quantize(weight), importance).sum()
    everything = search_scales(weight, torch.zeros(64))
    assert all(torch.equal(a, b) for a, b in zip(everything, quantize(weight), strict=True))


def test_a_large_weight_is_searched_as_its_rows_are():
    weight = gaussian(7, 2100, 64)
    importance = gaussian(8, 1, 64)[0].square()
    codes, scales = search_scales(weight, importance)
    some = torch.tensor([0, 2047, 2048, 2099])
    few_codes, few_scales = search_scales(weight[some], importance)
    assert torch.equal(codes[some], few_codes)
    assert torch.equal(scales[some], few_scales)
    assert unit_search(weight.T.contiguous(), importance).shape == (2100, 4)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        search_scales(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="fp32"):
        search_scales(torch.zeros(2, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="one a channel"):
        search_scales(torch.zeros(2, 64), torch.ones(2))
