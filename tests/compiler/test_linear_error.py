import math

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.compiler.linear_error import linear_sqnr
from hif4c.compiler.planes import make_planes
from hif4c.compiler.synthetic import synthetic_layer
from hif4c.passes.program import Decision, Precision, Program, TensorSource
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.rotation import block_hadamard

N, K = 40, 128
OUTLIERS = [3, 70]


def layer(precision: str, masked: str = "none", rotation: int = 0, rank: int = 0):
    """(decision, rows, weight, planes, mask)."""
    x, weight = synthetic_layer("attn2.q", 96, K, N, seed=6)
    mask = 2.0 ** (0.4 * torch.randn(K, generator=torch.Generator().manual_seed(7)))
    if masked == "zeros":
        mask[OUTLIERS] = 0
    mask = None if masked == "none" else mask
    folded = masked == "folded"
    decision = Decision(
        "l", precision, "test", mask=None if mask is None else "m", hadamard=rotation, rank=rank, mask_folded=folded
    )
    program = Program(fx.Graph(), {}, [], FakeTensorMode(), masks={} if mask is None else {"m": mask})
    source = TensorSource(
        "l.weight.codes", torch.uint8, (N, K // 2), source="l.weight", plane="codes", mask=decision.mask,
        hadamard=rotation, packed_from=torch.bfloat16, rank=rank, mask_folded=folded,
    )  # fmt: skip
    return decision, x.float(), weight.float(), make_planes(source, weight, program), mask


def by_hand(decision, rows, weight, planes, mask, shift=None) -> float:
    """In float64: what is multiplied is exact there, and the branch reads bf16."""
    x = rows if shift is None else rows - shift
    factor = torch.ones(K) if mask is None else mask
    x = (x * factor if decision.mask_folded else x).bfloat16()
    seen = x.float() if decision.mask_folded else x.float() * factor
    seen = block_hadamard(seen, decision.hadamard) if decision.hadamard else seen
    if decision.precision == Precision.W4A4:
        seen = dequantize(*quantize(seen), K, torch.float64)
    output = seen.double() @ dequantize(planes["codes"], planes["scales"], K, torch.float64).T
    if "down" in planes:
        side = torch.nn.functional.linear(x, planes["down"]).double()
        output = output + side @ planes["up"][: decision.rank].double()
    if mask is not None and (mask == 0).any():
        output = output + x[:, mask == 0].double() @ planes["up"][decision.rank :].double()
    if shift is not None:
        output = output + shift.double() @ weight.double().T
    exact = rows.double() @ weight.double().T
    return float(10 * torch.log10(exact.square().sum() / (output - exact).square().sum()))


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.W4A16])
@pytest.mark.parametrize("masked", ["none", "plain", "zeros", "folded"])
@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("shifted", [False, True])
def test_against_float64(precision, masked, rotation, rank, shifted):
    """Sums in fp32 are off by some 1e-6 of an error of some 1e-1; W4A16 rounds what it rotated to bf16, too."""
    decision, rows, weight, planes, mask = layer(precision, masked, rotation, rank)
    shift = rows.mean(0) if shifted else None
    found = linear_sqnr(decision, rows, weight, planes, mask, shift)
    assert found == pytest.approx(by_hand(decision, rows, weight, planes, mask, shift), abs=0.02)
    assert 10 < found < 60


def test_what_helps_shows():
    """The massive channel of this input in bf16, or off the mean, or activations in bf16: each is a gain."""

    def sqnr(*arguments, shift=None):
        decision, rows, weight, planes, mask = layer(*arguments)
        return linear_sqnr(decision, rows, weight, planes, mask, rows.mean(0) if shift else None)

    plain = sqnr(Precision.W4A4)
    assert sqnr(Precision.W4A16) > plain + 1
    assert sqnr(Precision.W4A4, shift=True) > plain + 3
    assert sqnr(Precision.W4A4, "none", 64, 8) > sqnr(Precision.W4A4, "none", 64) + 0.1


def test_a_folded_mask_that_is_forgotten_shows():
    decision, rows, weight, planes, mask = layer(Precision.W4A4, "folded")
    assert linear_sqnr(decision, rows, weight, planes, None) < 10 < linear_sqnr(decision, rows, weight, planes, mask)


def test_without_an_error_it_is_infinite():
    """A unit whose elements are all 7 = 1 * 2^2 * 7/4 loses nothing."""
    rows, weight = torch.full((3, K), 7.0), torch.full((N, K), -7.0)
    codes, scales = quantize(weight)
    decision = Decision("l", Precision.W4A4, "test")
    assert linear_sqnr(decision, rows, weight, {"codes": codes, "scales": scales}, None) == math.inf
