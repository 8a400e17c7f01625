"""The portable linears against fp64, with bounds derived from the number of fp32 additions, and against their contract.

u = 2^-24 is fp32's unit roundoff and gamma(n) = n*u/(1 - n*u): a sum of n + 1 terms by n fp32 additions, in any order,
is off by at most gamma(n) times the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
"""

import numpy as np
import pytest
import torch

from hif4c.runtime import reference
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, in_unit_integers, quantize, unit_scales
from hif4c.runtime.reference import linear, linear_w4
from hif4c.runtime.rotation import block_hadamard

U = 2.0**-24


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def make(m: int, k: int, n: int, seed: int = 0, spread: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k], w [n, k], bias [n]; `spread` > 0 scales the units by 2^(spread * normal), so that rounding matters."""
    g = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n,)))
    scale = 2.0 ** (spread * torch.randn(-(-k // 64), generator=g)).repeat_interleave(64)[:k]
    return x * scale, w * scale.flip(0), bias


def planes(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(plane for t in tensors for plane in quantize(t))


def branch(m: int, n: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A side branch: side [m, width] and side_weight [width, n], with terms as large as a unit's dot product."""
    g = torch.Generator().manual_seed(m + n + width)
    return (8 * torch.randn(m, width, generator=g)).to(dtype), torch.randn(width, n, generator=g).to(dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("spread", [0.0, 6.0])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 1), (5, 200, 7), (33, 1100, 65), (160, 128, 96), (3, 5120, 40)])
def test_linear_is_within_its_summation_error(m: int, k: int, n: int, spread: float):
    x, w, bias = make(m, k, n, spread=spread)
    p = planes(x, w)
    a, b = dequantize(p[0], p[1], k, torch.float64), dequantize(p[2], p[3], k, torch.float64)
    exact = a @ b.t()
    units = p[1].shape[-2]
    # The terms of the fp32 sum are the units' dot products, each exact.
    pad = (0, -k % 64)
    terms = torch.einsum(
        "muk,nuk->umn",
        torch.nn.functional.pad(a, pad).unflatten(-1, (-1, 64)),
        torch.nn.functional.pad(b, pad).unflatten(-1, (-1, 64)),
    )
    magnitude = terms.abs().sum(0)
    slack = 2 * k * 2.0**-53 * (a.abs() @ b.abs().t() + bias.abs())  # of the fp64 reference itself
    y = linear(*p)
    assert y.dtype == torch.float32
    assert ((y - exact).abs() <= gamma(units - 1) * magnitude + slack).all()
    bound = gamma(units) * (magnitude + bias.double().abs()) + slack
    y = linear(*p, bias)
    assert ((y - (exact + bias)).abs() <= bound).all()
    # |gelu'| < 1.13; evaluating it in fp32 costs some roundings of numbers no larger than |x|.
    y = linear(*p, bias, "gelu_tanh")
    assert ((y - gelu(exact + bias)).abs() <= 1.13 * bound + 16 * U * (exact + bias).abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 5, 40])
def test_side_branch_is_within_its_summation_error(width: int, dtype: torch.dtype):
    """And to 1e-6 of the row's norm, what golden outputs are compared to: sqrt((U + S) / 3) * 2^-24 is 2e-7 here."""
    m, k, n = 33, 1100, 65
    x, w, bias = make(m, k, n)
    p, (side, side_weight) = planes(x, w), branch(m, n, width, dtype)
    a, b = dequantize(p[0], p[1], k, torch.float64), dequantize(p[2], p[3], k, torch.float64)
    added = side.double() @ side_weight.double()
    magnitude = side.double().abs() @ side_weight.double().abs() + bias.abs()
    # All additions after the product's own, each counted once for every term before it.
    exact, bound = a @ b.t() + added + bias, gamma(18 + width + 1) * (a.abs() @ b.abs().t() + magnitude)
    y = linear(*p, bias, side=side, side_weight=side_weight)
    assert ((y - exact).abs() <= bound).all()
    assert (y - exact).norm() <= 1e-6 * exact.norm()
    exact, bound = (
        x.double() @ b.t() + added + bias,
        gamma(k + width + 1) * (x.double().abs() @ b.abs().t() + magnitude),
    )
    y = linear_w4(x, *p[2:], bias, side=side, side_weight=side_weight)
    assert ((y - exact).abs() <= bound).all()
    assert (y - exact).norm() <= 1e-6 * exact.norm()


def test_linear_follows_the_contract_bit_for_bit():
    x, w, bias = make(9, 1216, 11, spread=6.0)
    p = planes(x, w)
    dots = torch.einsum(
        "muk,nuk->umn", in_unit_integers(p[0], p[1]).long(), in_unit_integers(p[2], p[3]).long()
    ).numpy()
    assert abs(dots).max() <= 64 * 28 * 28
    scale = (unit_scales(p[1]).t()[:, :, None] * unit_scales(p[3]).t()[:, None]).numpy()

    def total(order: range) -> np.ndarray:
        acc = np.zeros((9, 11), np.float32)
        for u in order:
            acc = acc + dots[u].astype(np.float32) * scale[u]
        return acc

    in_order = torch.from_numpy(total(range(19)))
    assert not np.array_equal(total(range(18, -1, -1)), total(range(19)))  # the data tells orders apart
    assert torch.equal(linear(*p), in_order)
    assert torch.equal(linear(*p, bias), in_order + bias)
    assert torch.equal(linear(*p, bias.bfloat16()), in_order + bias.bfloat16().float())
    for dtype in (torch.bfloat16, torch.float16):
        y = linear(*p, bias, "gelu_tanh", dtype)
        assert y.dtype == dtype
        assert torch.equal(y, gelu(in_order + bias).to(dtype))


def test_side_branch_follows_the_contract_bit_for_bit():
    """After the units, in the order of its columns, before bias and activation."""
    x, w, bias = make(9, 256, 11, spread=3.0)
    p, (side, side_weight) = planes(x, w), branch(9, 11, 20)
    products = side.float().t()[:, :, None] * side_weight.float()[:, None]
    assert torch.equal(products.double(), side.double().t()[:, :, None] * side_weight.double()[:, None])

    def total(start: torch.Tensor, order: range) -> torch.Tensor:
        acc = start.numpy()
        for j in order:
            acc = acc + products[j].numpy()
        return torch.from_numpy(acc)

    def with_branch(*args: object) -> torch.Tensor:
        return linear(*p, *args, side=side, side_weight=side_weight)

    in_order = total(linear(*p), range(20))
    for other in (
        total(linear(*p), range(19, -1, -1)), total(linear(*p, bias), range(20)) - bias,
        total(torch.zeros(9, 11), range(20)) + linear(*p),
    ):  # fmt: skip
        assert not torch.equal(other, in_order)  # the data tells orders apart
    assert torch.equal(with_branch(), in_order)
    assert torch.equal(with_branch(bias), in_order + bias)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(with_branch(bias, "gelu_tanh", dtype), gelu(in_order + bias).to(dtype))


def test_side_branch_does_what_it_is_for():
    """A low-rank part and whole channels of x, computed beside a product that leaves them out."""
    x, w, _ = make(20, 256, 12)
    x = x.bfloat16()
    columns, mask = torch.tensor([7, 200]), torch.ones(256)
    mask[columns] = 0
    down, up = torch.randn(4, 256).bfloat16(), torch.randn(12, 4).bfloat16()
    side = torch.cat([torch.nn.functional.linear(x, down), x.index_select(-1, columns)], -1)
    side_weight = torch.cat([up, w[:, columns].bfloat16()], 1).t()
    b = planes(w * mask)
    added, decoded = side.double() @ side_weight.double(), dequantize(*b, 256, torch.float64).t()
    exact = added + (x.double() * mask) @ decoded
    y = linear_w4(x, *b, mask=mask, side=side, side_weight=side_weight, dtype=torch.float32)
    assert (y - exact).norm() <= 1e-6 * exact.norm()
    a = quantize(x, mask)
    exact = added + dequantize(*a, 256, torch.float64) @ decoded
    y = linear(*a, *b, side=side, side_weight=side_weight)
    assert (y - exact).norm() <= 1e-6 * exact.norm()


def test_threads_batches_and_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    x, w, bias = make(70, 1216, 30, spread=6.0)
    p = planes(x, w)
    y = linear(*p, bias)
    side, side_weight = branch(70, 30, 7)
    sided = linear(*p, bias, side=side, side_weight=side_weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(linear(*p, bias), y)
    finally:
        torch.set_num_threads(threads)
    parts = [linear(p[0][i : i + 9], p[1][i : i + 9], *p[2:], bias) for i in range(0, 70, 9)]
    assert torch.equal(torch.cat(parts), y)
    assert torch.equal(linear(p[0].view(2, 5, 7, -1), p[1].view(2, 5, 7, -1, 4), *p[2:], bias), y.view(2, 5, 7, 30))
    assert torch.equal(linear(p[0][3], p[1][3], *p[2:], bias), y[3])
    monkeypatch.setattr(reference, "_BLOCK_OUT", 70 * 30 * 5)  # five units a call to the BLAS
    assert torch.equal(linear(*p, bias), y)
    for block in (1216 * 2, 1216 * 16):
        for name in ("_BLOCK_A", "_BLOCK_W", "_BLOCK_OUT"):
            monkeypatch.setattr(reference, name, block)
        assert torch.equal(linear(*p, bias), y)
        assert torch.equal(linear(*p, bias, side=side, side_weight=side_weight), sided)
    tensors = (p[0].view(2, 5, 7, -1), p[1].view(2, 5, 7, -1, 4), *p[2:], bias)
    found = linear(*tensors, side=side.view(2, 5, 7, 7), side_weight=side_weight.t().contiguous().t())
    assert torch.equal(found, sided.view(2, 5, 7, 30))
    assert torch.equal(linear(p[0][3], p[1][3], *p[2:], bias, side=side[3], side_weight=side_weight), sided[3])


def test_autocast_does_not_reach_inside():
    x, w, bias = make(4, 256, 8)
    p = planes(x, w)
    y, y4 = linear(*p, bias), linear_w4(x, *p[2:], bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(*p, bias), y)
        assert torch.equal(linear_w4(x, *p[2:], bias), y4)


def test_nan_stays_in_its_row_and_column():
    x, w, bias = make(4, 256, 6)
    x[1, 100] = torch.nan
    w[2, 7] = torch.inf
    p = planes(x, w)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1] = True
    expected[:, 2] = True
    for activation in (None, "gelu_tanh"):
        assert torch.equal(linear(*p, bias, activation).isnan(), expected)
    assert torch.equal(linear_w4(x, *p[2:], bias).isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 1), (6, 200, 9), (40, 1088, 33)])
def test_linear_w4_is_within_its_summation_error(m: int, k: int, n: int, dtype: torch.dtype):
    x, w, bias = make(m, k, n)
    x = x.to(dtype)
    wp = quantize(w)
    b = dequantize(*wp, k, torch.float64)
    exact = x.double() @ b.t() + bias
    # k products and k additions (the last one the bias), each rounded once, in an unknown order.
    bound = gamma(k + 1) * (x.double().abs() @ b.abs().t() + bias.abs())
    assert ((linear_w4(x, *wp, bias) - exact).abs() <= bound).all()
    y = linear_w4(x, *wp, bias, activation="gelu_tanh")
    assert ((y - gelu(exact)).abs() <= 1.13 * bound + 16 * U * exact.abs()).all()


def test_linear_w4_masks_and_rotates_as_by_hand():
    x, w, bias = make(6, 256, 9)
    mask = torch.rand(256) + 0.5
    wp = quantize(block_hadamard(w / mask, 64))
    y = linear_w4(x.bfloat16(), *wp, bias, mask, 64)
    by_hand = block_hadamard(x.bfloat16().float() * mask, 64).bfloat16()
    assert torch.equal(y, linear_w4(by_hand, *wp, bias))
    # The weight's error alone remains: nearer to x @ w than the unrotated product with this weight could be.
    assert (y - (x @ w.t() + bias)).norm() < 0.2 * (x @ w.t()).norm()
    assert linear_w4(x.view(2, 3, 256), *wp).shape == (2, 3, 9)


@pytest.mark.parametrize("tokens", [1, 5])
def test_gate_and_residual_are_the_steps_of_the_model_in_fp32(tokens: int):
    generator = torch.Generator().manual_seed(11)
    x, w = torch.randn(2, 5, 128, generator=generator), torch.randn(9, 128, generator=generator)
    gate = torch.randn(2, tokens, 9, generator=generator)
    residual = torch.randn(2, 5, 9, generator=generator).bfloat16()
    p = planes(x, w)
    for function, arguments in ((linear, p), (linear_w4, (x, *p[2:]))):
        y = function(*arguments, activation="gelu_tanh")
        both = function(*arguments, activation="gelu_tanh", gate=gate, residual=residual, dtype=torch.bfloat16)
        assert torch.equal(both, (residual.float() + y * gate).bfloat16())
        assert torch.equal(function(*arguments, activation="gelu_tanh", gate=gate), y * gate)
        assert torch.equal(function(*arguments, activation="gelu_tanh", residual=residual), residual + y)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate": torch.zeros(2, 5, 9).bfloat16()},
        {"gate": torch.zeros(2, 3, 9)},
        {"gate": torch.zeros(2, 5, 1)},
        {"gate": torch.zeros(9)},
        {"residual": torch.zeros(2, 1, 9)},
        {"residual": torch.zeros(10, 9)},
    ],
)
def test_gates_and_residuals_that_do_not_fit(wrong: dict[str, torch.Tensor]):
    p = planes(torch.ones(2, 5, 128), torch.ones(9, 128))
    with pytest.raises(Hif4Error, match=r"the gate must be float32|the residual must have shape"):
        linear(*p, **wrong)


def test_empty_batches():
    x, w, bias = make(4, 256, 6)
    p = planes(x[:0], w)
    assert linear(*p, bias).shape == linear_w4(x[:0], *p[2:], bias).shape == (0, 6)
    none = {"side": torch.zeros(0, 3).half(), "side_weight": torch.zeros(3, 6).half()}
    assert linear(*p, bias, **none).shape == linear_w4(x[:0], *p[2:], bias, **none).shape == (0, 6)


def test_unfit_arguments_are_refused():
    x, w, bias = make(4, 256, 6)
    p = planes(x, w)
    short = planes(x[:, :128], w)
    with pytest.raises(Hif4Error, match="2 units of 64 channels, the weight 4"):
        linear(*short)
    with pytest.raises(Hif4Error, match=r"bias must have shape \[6\]"):
        linear(*p, bias[:5])
    with pytest.raises(Hif4Error, match="unknown activation 'relu'"):
        linear(*p, bias, "relu")
    with pytest.raises(Hif4Error, match="float64"):
        linear(*p, bias, None, torch.float64)
    with pytest.raises(Hif4Error, match="weight codes must have shape"):
        linear(p[0], p[1], p[2][None], p[3][None])
    with pytest.raises(Hif4Error, match="linear input"):
        linear(p[0], p[1][:1], p[2], p[3])
    with pytest.raises(Hif4Error, match="K = 128"):
        linear_w4(x[:, :128], *p[2:])
    with pytest.raises(Hif4Error, match="float64"):
        linear_w4(x.double(), *p[2:])
    with pytest.raises(Hif4Error, match="unknown activation"):
        linear_w4(x, *p[2:], activation="silu")
    side, side_weight = branch(4, 6, 3)
    for bad, words in (
        ((side, None), "side and side_weight belong together; give both or neither"),
        ((None, side_weight), "belong together"),
        ((side.half(), side_weight), "both bfloat16, both float16 or both float32, not torch.float16 and torch.bf"),
        ((side.double(), side_weight.double()), "not torch.float64 and torch.float64"),
        ((side, side_weight[:2]), r"side must have shape \[4, 2\], not \[4, 3\]"),
        ((side[:3], side_weight), r"side must have shape \[4, 3\], not \[3, 3\]"),
        ((side[0], side_weight), r"side must have shape \[4, 3\], not \[3\]"),
        ((side, side_weight[:, 1:]), r"side_weight must have shape \[S, 6\] with S of at least 1, not \[3, 5\]"),
        ((side[:, :0], side_weight[:0]), r"with S of at least 1, not \[0, 6\]"),
        ((side, side_weight[0]), r"not \[6\]"),
    ):
        for call in (
            lambda branch: linear(*p, side=branch[0], side_weight=branch[1]),
            lambda branch: linear_w4(x, *p[2:], side=branch[0], side_weight=branch[1]),
        ):
            with pytest.raises(Hif4Error, match=words):
                call(bad)
