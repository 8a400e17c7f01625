import numpy as np
import pytest
import torch

from hif4c.compiler.encode import element_steps, encode, encode_codes, encode_scales, round_on_grid
from hif4c.runtime.format import dequantize, in_unit_integers, quantize, unit_scales


def fields(seed: int) -> tuple[torch.Tensor, ...]:
    """E6M2 [5, 3], E1_8 [5, 3, 8], E1_16 [5, 3, 16] and q [5, 3, 64]: every legal value can occur."""
    g = torch.Generator().manual_seed(seed)
    e6m2 = torch.randint(0, 0xFF, (5, 3), generator=g)
    e8, e16 = (torch.rand(5, 3, runs, generator=g) < 0.5 for runs in (8, 16))
    return e6m2, e8, e16, torch.randint(-7, 8, (5, 3, 64), generator=g)


@pytest.mark.parametrize("seed", range(3))
def test_decoding_gives_back_the_fields(seed: int):
    e6m2, e8, e16, q = fields(seed)
    codes, scales = encode(e6m2, e8, e16, q)
    exponent = e8.repeat_interleave(8, -1).int() + e16.repeat_interleave(4, -1).int()
    value = 2.0 ** (e6m2.double() // 4 - 48) * (1 + e6m2 % 4 / 4) / 4
    assert torch.equal(in_unit_integers(codes, scales).int(), q.int() * 2**exponent)
    assert torch.equal(unit_scales(scales).double(), value)
    assert torch.equal(element_steps(scales).double().view(5, 3, 64), value[..., None] * 2**exponent)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_the_bytes_are_those_of_quantize(dtype: torch.dtype):
    codes, scales = quantize(torch.randn(6, 192, generator=torch.Generator().manual_seed(1)))
    bits = torch.from_numpy(np.unpackbits(scales[..., 1:].numpy(), axis=-1)).bool()
    nibbles = torch.stack((codes & 15, codes >> 4), -1).view(6, 3, 64)
    q = torch.where(nibbles > 7, -(nibbles & 7).to(dtype), (nibbles & 7).to(dtype))
    found, found_scales = encode(scales[..., 0], bits[..., :8], bits[..., 8:], q)
    assert torch.equal(found_scales, scales)
    positive_zero = torch.where(nibbles == 8, 0, nibbles)
    assert torch.equal(found, (positive_zero[..., 0::2] | positive_zero[..., 1::2] << 4).flatten(-2))


def test_what_is_rounded_is_what_is_decoded():
    e6m2, e8, e16, _ = fields(4)
    steps = element_steps(encode_scales(e6m2, e8, e16))
    values = torch.randn(steps.shape, generator=torch.Generator().manual_seed(5)) * 6 * steps
    q = round_on_grid(values, steps)
    decoded = dequantize(*encode(e6m2, e8, e16, q.view(5, 3, 64)), 192, torch.float32)
    # No magnitude of the grid is nearer; a quotient within rounding of a half may go either way.
    nearest = torch.stack([(values - n * steps).abs() for n in range(-7, 8)]).amin(0)
    assert torch.equal(decoded, q * steps)
    assert ((values - decoded).abs() <= nearest + 2**-20 * steps).all()


def test_values_out_of_range_are_refused():
    e6m2, e8, e16, q = fields(6)
    with pytest.raises(ValueError, match="at most 7, got 8"):
        encode(e6m2, e8, e16, torch.where(q == 3, -8, q))
    with pytest.raises(ValueError, match="at most 7"):
        encode_codes(torch.full((1, 64), torch.nan))
    with pytest.raises(ValueError, match="0 to 254"):
        encode_scales(e6m2.clone().fill_(255), e8, e16)
    with pytest.raises(ValueError, match="whole units"):
        encode_scales(e6m2, e16, e8)
