import pytest
import torch

from hif4c.compiler.masks import (
    ALPHAS,
    channel_mask,
    choose_mask,
    relative_error,
    rotated,
    round_trip,
)
from hif4c.compiler.synthetic import synthetic_layer
from hif4c.passes.program import inverse_mask
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.rotation import block_hadamard


@pytest.mark.parametrize(
    ("alpha", "unscaled"),
    [
        (0.0, [2, 1, 8, 4]),  # w
        (0.5, [1, 0.25, 4, 0.5]),  # sqrt(w / a)
        (1.0, [0.5, 0.0625, 2, 0.0625]),  # 1 / a
        (0.25, [2**0.5, 0.5, 2**2.5, 2**0.5]),
    ],
)
def test_the_formula_by_hand(alpha, unscaled):
    a, w = torch.tensor([2.0, 16.0, 0.5, 16.0]), torch.tensor([2.0, 1.0, 8.0, 4.0])
    mask, floored = channel_mask(a, w, alpha)
    assert (mask.dtype, floored) == (torch.float32, 0)
    expected = torch.tensor(unscaled, dtype=torch.float64)
    # Up to one common factor, which makes the geometric mean 1; fp32 rounds by 2^-24.
    torch.testing.assert_close(mask.double() / mask[0], expected / expected[0], rtol=2**-22, atol=0)
    assert float(mask.double().log().sum().exp()) == pytest.approx(1, rel=1e-6)


def test_dead_channels_are_floored_and_counted():
    a = torch.tensor([4.0, 0.0, 8e-5, 3.9e-5, 1.0])
    w = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    mask, floored = channel_mask(a, w, 1.0)
    assert floored == 3  # 1 and 3 are below 4e-5, and the weight of 4 is zero
    # a is raised to 1e-5 of its largest.
    torch.testing.assert_close(mask / mask[0], torch.tensor([1, 1e5, 5e4, 1e5, 4]), rtol=1e-5, atol=0)
    mask, _ = channel_mask(a, w, 0.0)
    torch.testing.assert_close(mask / mask[0], torch.tensor([1, 1, 1, 1, 1e-5]), rtol=1e-5, atol=0)
    # A channel that is dead on both sides counts once.
    assert channel_mask(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.5)[1] == 1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_all_zero_statistics_give_no_mask_but_a_count(alpha):
    mask, floored = channel_mask(torch.zeros(8), torch.zeros(8), alpha)
    assert torch.equal(mask, torch.ones(8))
    assert floored == 8
    mask, floored = channel_mask(torch.zeros(8), torch.ones(8), alpha)
    assert torch.equal(mask, torch.ones(8))
    assert floored == 8


@pytest.mark.parametrize("width", [0, 1, 64])
def test_round_trip_and_what_it_approximates(width):
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(5, 128, generator=generator).bfloat16(), torch.rand(128, generator=generator) + 0.5
    for factor in (None, mask):
        expected = x.float() if factor is None else x.float() * factor
        if width > 1:
            expected = block_hadamard(expected, width)
        assert torch.equal(rotated(x, factor, width), expected)
        found = round_trip(x, factor, width)
        assert torch.equal(found, dequantize(*quantize(expected), 128, torch.float32))
        assert not torch.equal(found, expected)


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 3.0]), expected) == 1 / 25
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(expected, torch.zeros(2)) == float("inf")


def objective(rows, weights, mask, width) -> float:
    """In float64, from planes that were made here."""
    inverse = None if mask is None else inverse_mask(mask)
    total = 0.0
    for weight in weights:
        x, w = (
            dequantize(*quantize(value, factor, width), value.shape[1], torch.float64)
            for value, factor in ((rows, mask), (weight, inverse))
        )
        exact = rows.double() @ weight.double().T
        total += float((x @ w.T - exact).square().sum() / exact.square().sum())
    return total


@pytest.mark.parametrize("width", [0, 64])
@pytest.mark.parametrize("kind", ["attn1.q", "attn2.q", "ffn.2"])
def test_the_search_finds_the_best_of_what_it_tries(kind, width):
    x, weight = synthetic_layer(kind, 96, 256, 64, seed=3)
    rows, weights = x.float(), [weight[:40].float(), 3 * weight[40:].float()]
    a, w = rows.abs().amax(0), torch.cat(weights).abs().amax(0)
    choice = choose_mask(rows, weights, a, w, width)
    tried = {alpha: objective(rows, weights, channel_mask(a, w, alpha)[0], width) for alpha in ALPHAS}
    tried[None] = objective(rows, weights, None, width)
    found = objective(rows, weights, choice.mask, width)
    # The search multiplies in fp32, whose errors are some 1e-6 of outputs that are off by 1e-1.
    assert found <= min(tried.values()) * (1 + 1e-4)
    assert found == tried[choice.alpha]
    assert found <= tried[None]
    if choice.mask is not None:
        assert torch.equal(choice.mask, channel_mask(a, w, choice.alpha)[0])


def test_a_massive_channel_gets_a_strong_mask():
    """One channel 60 times as large, whose unit loses the others: most of that has to move into the weight."""
    x, weight = synthetic_layer("attn1.q", 128, 256, 64, seed=1)
    rows = x.float()
    rows[:, 70] *= 60
    a, w = rows.abs().amax(0), weight.float().abs().amax(0)
    choice = choose_mask(rows, [weight.float()], a, w, 0)
    assert choice.alpha is not None
    assert choice.alpha >= 0.3
    assert choice.mask[70] < 0.3 * choice.mask.median()
    assert objective(rows, [weight.float()], choice.mask, 0) < 0.7 * objective(rows, [weight.float()], None, 0)


def test_no_mask_where_every_mask_harms():
    """Statistics that say nothing of the values: a mask made from them is noise."""
    generator = torch.Generator().manual_seed(2)
    rows, weight = torch.randn(64, 128, generator=generator), torch.randn(32, 128, generator=generator)
    wild = (3 * torch.randn(2, 128, generator=generator)).exp()
    choice = choose_mask(rows, [weight], wild[0], wild[1], 0)
    assert (choice.mask, choice.floored, choice.alpha) == (None, 0, None)


def test_only_the_alphas_that_are_asked_for():
    x, weight = synthetic_layer("attn2.q", 64, 128, 32, seed=0)
    rows, weight = x.float(), weight.float()
    a, w = rows.abs().amax(0), weight.abs().amax(0)
    a[3] = 0
    choice = choose_mask(rows, [weight], a, w, 0, alphas=(0.5,))
    assert choice.alpha in (None, 0.5)
    assert choice.floored == (choice.alpha is not None)
