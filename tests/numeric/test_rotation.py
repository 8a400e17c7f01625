"""The block Hadamard rotation: its matrix, its fixed order of fp32 operations, and what it leaves unchanged."""

import numpy as np
import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import quantize
from hif4c.runtime.rotation import block_hadamard

WIDTHS = [2**i for i in range(1, 11)]


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sylvester(width: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < width:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / width**0.5


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_the_orthonormal_sylvester_matrix(width: int):
    x = gauss(3, 2, 2 * width).double()
    expected = (x.unflatten(-1, (2, width)) @ sylvester(width)).flatten(-2)
    torch.testing.assert_close(block_hadamard(x, width), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", [2, 8, 128])
def test_fp32_operations_come_in_the_documented_order(width: int):
    x = gauss(2, 2 * width, seed=1)
    expected = x.numpy().copy()
    for row in expected:
        stride = 1
        while stride < width:
            for i in range(row.size):
                if not i & stride:
                    a, b = row[i], row[i + stride]
                    row[i], row[i + stride] = a + b, a - b
            stride *= 2
        row *= np.float32(width**-0.5)
    assert torch.equal(block_hadamard(x, width), torch.from_numpy(expected))
    assert torch.equal(block_hadamard(x.bfloat16(), width), block_hadamard(x.bfloat16().float(), width))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_its_own_inverse_to_rounding(width: int):
    x = gauss(4, 1024)
    # log2(width) additions and a product each way, each off by 2^-24 of numbers no larger than the row's norm.
    bound = 2 * (width.bit_length() + 1) * 2**-24 * x.norm(dim=-1).max().item()
    assert (block_hadamard(block_hadamard(x, width), width) - x).abs().max() < bound


def test_quantize_masks_then_rotates_in_fp32():
    x, mask = gauss(5, 256).bfloat16(), gauss(256, seed=3).abs() + 0.1
    by_hand = quantize(block_hadamard(x.float() * mask, 64))
    fused = quantize(x, mask, 64)
    assert all(torch.equal(a, b) for a, b in zip(fused, by_hand, strict=True))
    rotated_first = quantize(block_hadamard(x.float(), 64) * mask)
    assert not torch.equal(fused[0], rotated_first[0])
    for none in (0, 1):
        assert torch.equal(quantize(x, None, none)[0], quantize(x)[0])


def test_mask_and_rotation_leave_the_product_unchanged():
    x, w, mask = gauss(7, 256).double(), gauss(9, 256, seed=1).double(), gauss(256, seed=2).double().exp()
    y = block_hadamard(x * mask, 128) @ block_hadamard(w / mask, 128).t()
    torch.testing.assert_close(y, x @ w.t(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("width", [-2, 0, 1, 3, 48, 2048])
def test_other_widths_are_refused(width: int):
    with pytest.raises(Hif4Error, match="power of two"):
        block_hadamard(torch.zeros(2, 6144), width)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(Hif4Error, match="does not divide the 96"):
        block_hadamard(torch.zeros(96), 64)
    with pytest.raises(Hif4Error, match="scalar"):
        block_hadamard(torch.tensor(1.0), 2)
