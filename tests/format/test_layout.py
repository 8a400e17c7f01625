"""The packed planes against a slow scalar reference that follows the format's definition word by word."""

import math
import struct

import pytest
import torch

from hif4c.runtime.format import dequantize, in_unit_integers, quantize, unit_scales


def f32(v: float) -> float:
    return struct.unpack("<f", struct.pack("<f", v))[0]


def rne(v: float, significant_bits: int) -> float:
    """Round to `significant_bits`, half to even (Python's round)."""
    fraction, exponent = math.frexp(v)
    return math.ldexp(round(math.ldexp(fraction, significant_bits)), exponent - significant_bits)


def scalar_unit(x: list[float]) -> tuple[list[int], list[int], list[float]]:
    """Codes (32 bytes), scales (4 bytes) and decoded values of one unit of 64 finite fp32 numbers."""
    v16 = [max(abs(v) for v in x[4 * j : 4 * j + 4]) for j in range(16)]
    v8 = [max(v16[2 * i], v16[2 * i + 1]) for i in range(8)]
    sf = rne(f32(max(v8) * rne(1 / 7, 8)), 8)
    e6m2 = rne(min(max(sf, 2.0**-48), 49152.0), 3)
    r = rne(1 / e6m2, 8)
    e8 = [int(f32(v * r) >= 4) for v in v8]
    e16 = [int(f32(v16[j] * r) / 2 ** e8[j // 2] >= 2) for j in range(16)]
    nibbles, values = [], []
    for i, v in enumerate(x):
        level = e8[i // 8] + e16[i // 4]
        q = min(7, math.floor(f32(f32(abs(v) * r) / 2**level * 4 + 0.5)))
        nibbles.append((8 if v < 0 else 0) + q)
        values.append(math.copysign(e6m2 * 2**level * q / 4, -1.0 if v < 0 else 1.0))
    fraction, exponent = math.frexp(e6m2)
    stored = (exponent - 1 + 48) * 4 + int((2 * fraction - 1) * 4)
    bits = "".join(map(str, e8)), "".join(map(str, e16[:8])), "".join(map(str, e16[8:]))
    codes = [nibbles[2 * i] + 16 * nibbles[2 * i + 1] for i in range(32)]
    return codes, [stored, *(int(b, 2) for b in bits)], values


def samples() -> torch.Tensor:
    """Units [n, 64] of many kinds: scales from 2^-60 to 2^20, outliers, ties, zeros, single elements."""
    g = torch.Generator().manual_seed(7)
    gauss = torch.randn(60, 64, generator=g) * 2.0 ** torch.randint(-60, 20, (60, 1), generator=g)
    heavy = torch.randn(40, 64, generator=g) * torch.randn(40, 64, generator=g).mul(3).exp()
    ties = torch.randint(-56, 57, (40, 64), generator=g) / 8 * 2.0 ** torch.randint(-3, 4, (40, 1), generator=g)
    single = torch.zeros(16, 64)
    single[torch.arange(16), torch.arange(16) * 4 + 1] = -3.7
    return torch.cat((gauss, heavy, ties, single, torch.zeros(1, 64), torch.full((1, 64), -0.0)))


def test_planes_equal_the_scalar_reference():
    x = samples()
    codes, scales = quantize(x)
    values = dequantize(codes, scales, 64, torch.float64)
    for row in range(x.shape[0]):
        expected_codes, expected_scales, expected_values = scalar_unit(x[row].tolist())
        assert codes[row].tolist() == expected_codes, row
        assert scales[row, 0].tolist() == expected_scales, row
        got = values[row].tolist()
        assert got == expected_values, row
        assert [math.copysign(1, v) for v in got] == [math.copysign(1, v) for v in expected_values], row


def test_a_unit_packed_by_hand():
    # vmax 7 gives E6M2 = 1.0, stored (0 + 48)*4; only runs 0 (E1_8, E1_16) and the last hold anything.
    x = torch.zeros(64)
    x[0], x[1], x[63] = 7.0, -4.0, 1.25
    codes, scales = quantize(x)
    assert codes[0] == 7 | (8 | 4) << 4  # element 0 in the low nibble, element 1 in the high one, with its sign
    assert codes[31] == 5 << 4
    assert codes[1:31].sum() == 0
    assert scales.tolist() == [[192, 0b1000_0000, 0b1000_0000, 0]]


@pytest.mark.parametrize(
    ("vmax", "stored"),
    [
        (7.0, 192),  # 1.0
        (8.75, 193),  # 1.25
        (10.5, 194),  # 1.5
        (13.9, 196),  # 1.98 carries into the next exponent
        (7.875, 192),  # 1.125 lies between 1.0 and 1.25: to the even 1.0
        (9.625, 194),  # 1.375 lies between 1.25 and 1.5: to the even 1.5
        (1e9, 254),  # clamped to the maximum 49152
        (1e-30, 0),  # clamped to the minimum 2^-48
        (0.0, 0),
    ],
)
def test_stored_form_of_e6m2(vmax: float, stored: int):
    _, scales = quantize(torch.tensor([vmax] + [0.0] * 63))
    assert scales[0, 0] == stored


def test_integers_and_unit_scales_rebuild_the_values():
    codes, scales = quantize(samples()[:156].view(-1, 3, 128))
    n, step = in_unit_integers(codes, scales), unit_scales(scales)
    assert n.dtype == torch.int8
    assert n.shape == (*codes.shape[:-1], 2, 64)
    assert step.dtype == torch.float32
    rebuilt = (n.double() * step.double()[..., None]).flatten(-2)
    assert torch.equal(rebuilt, dequantize(codes, scales, 128, torch.float64))


def test_every_decoded_value_is_exact_in_bf16_and_every_product_of_units_in_fp32():
    stored = torch.arange(255, dtype=torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2) * 17  # both nibbles of a byte, all 16 nibbles, twice
    for level in (0x00, 0xFF):
        scales = torch.stack((stored, *[torch.full_like(stored, level)] * 3), dim=-1)[:, None]
        wide = dequantize(codes, scales, 64, torch.float64)
        assert torch.equal(dequantize(codes, scales, 64).double(), wide)
        assert wide.abs().max() == 49152 * 1.75 * (4 if level else 1)
    step = unit_scales(torch.stack((stored,) * 4, dim=-1))
    product = step[:, None] * step[None]
    assert torch.equal(product.double(), step.double()[:, None] * step.double()[None])
    dot = torch.tensor(64 * 28 * 28 - 1)  # odd, the most significant bits a unit's dot product could need
    assert torch.equal((product * dot).double(), product.double() * dot)
