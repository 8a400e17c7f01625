"""Second moments are the sum of the fp32 products of chunks to within a bound, and the same whoever has which call."""

from functools import partial

import pytest
import torch

from hif4c.compiler import second_moments as module
from hif4c.compiler.second_moments import second_moments
from hif4c.runtime.errors import Hif4Error
from tests.support.forked_ranks import in_ranks

K = 192


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a call and blocks of channels, the last ones smaller."""
    monkeypatch.setattr(module, "TOKENS", 50)
    monkeypatch.setattr(module, "CHANNELS", 80)


def make_calls(count=5, seed=0):
    """Tokens of channels whose sizes span nine powers of ten, in calls of different lengths and sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-4, 5, K)[torch.randperm(K, generator=generator)]
    return [torch.randn(30 + 40 * index, K, generator=generator) * sizes * 10.0**index for index in range(count)]


def test_it_is_the_sum_of_the_products_of_chunks():
    calls = make_calls()
    found = second_moments(lambda: iter(calls), K)
    # The very products, from blocks as the function forms them.
    expected, bound, chunks = torch.zeros(K, K, dtype=torch.float64), 0.0, 0
    for call in calls:
        for chunk in call.split(50):
            for start in range(0, K, 80):
                end = min(start + 80, K)
                product = chunk[:, start:end].T @ chunk[:, :end]
                expected[start:end, :end] += product.double()
                bound = max(bound, float(product.max()))
            chunks += 1
    expected = expected.tril() + expected.tril(-1).T
    assert found.tokens == sum(map(len, calls))
    # Half a step of the grid for each chunk, a step being at most 2 B / 2^(61 - bits of n); one rounding to fp32
    # (2^-24), and those of the sum in float64 here (2^-53 of the largest entry for each chunk).
    step = 2 * bound / 2 ** (61 - chunks.bit_length())
    allowed = chunks * (step / 2 + bound * chunks * 2.0**-53) + expected.abs() * 2.0**-24
    assert ((found.hessian.double() - expected).abs() <= allowed).all()
    assert torch.equal(found.hessian, found.hessian.T)
    assert torch.equal(found.energy, found.hessian.diagonal())
    # The products themselves are fp32: 50 roundings of 2^-24 of the magnitudes that are added.
    whole = sum(call.double().T @ call.double() for call in calls)
    magnitudes = sum(call.double().abs().T @ call.double().abs() for call in calls)
    assert ((found.hessian.double() - whole).abs() <= magnitudes * 51 * 2.0**-24 + chunks * step).all()


def test_the_order_of_calls_does_not_change_a_bit():
    calls = make_calls()
    first = second_moments(lambda: iter(calls), K).hessian
    assert torch.equal(second_moments(lambda: reversed(calls), K).hessian, first)
    # Sums in fp32 do depend on it, or the test would not show much.
    products = [call.T @ call for call in calls]
    assert not torch.equal(sum(products), sum(reversed(products)))


def test_ranks_get_what_one_process_gets():
    """Of four ranks one has no call."""
    calls = make_calls(3)

    def run(ranks):
        found = second_moments(partial(iter, ranks.share(calls)), K, ranks=ranks)
        return found.hessian.numpy(), found.tokens

    ((expected, tokens),) = in_ranks(1, run)
    for hessian, count in in_ranks(4, run):
        assert (hessian == expected).all()
        assert count == tokens


@pytest.mark.parametrize("largest", [1e-18, 1e17])
def test_values_of_all_sizes_fit(largest):
    """The largest sum that there can be, of equal channels, near both ends of what fp32 squares and sums."""
    call = torch.full((200, 128), largest)
    found = second_moments(lambda: iter([call] * 3), 128).hessian
    torch.testing.assert_close(found, torch.full((128, 128), 600 * largest**2), rtol=50 * 2.0**-24, atol=0)


def test_an_input_of_zeros():
    found = second_moments(lambda: iter([torch.zeros(3, K)]), K)
    assert not found.hessian.any()
    assert found.tokens == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_has_no_second_moment_is_an_error(value):
    calls = make_calls(3)
    calls[1][7, 3] = value
    with pytest.raises(Hif4Error, match=r"ffn\.net\.2: its input holds NaN, infinity or values above 1e18"):
        second_moments(lambda: iter(calls), K, name="ffn.net.2")


def test_it_is_an_error_on_every_rank():
    calls = make_calls(2)
    calls[1][7, 3] = torch.nan
    for found in in_ranks(2, lambda ranks: second_moments(partial(iter, ranks.share(calls)), K, ranks=ranks)):
        assert isinstance(found, Hif4Error)
        assert "its input holds NaN" in str(found)
