"""The HiFloat4 format: quantize, dequantize, and the packed planes (arXiv 2602.11287).

Symbols: K channels, Kp = K rounded up to a multiple of 64, U = Kp/64 units. A unit is 64 consecutive channels:
`value = E6M2/4 * n`, with the in-unit integer `n = (-1)^sign * q * 2^(E1_8 + E1_16)` in [-28, 28].

    codes   uint8 [..., Kp/2]   byte i = element 2i in the low nibble, 2i+1 in the high; nibble = sign << 3 | q
    scales  uint8 [..., U, 4]   byte 0 = E6M2, stored (e + 48)*4 + m, 0xFF = NaN; byte 1 = E1_8, run 0 in the most
                                significant bit; bytes 2 and 3 = E1_16, runs 0..7 and 8..15, most significant bit first

The sign bit is set exactly when x < 0, also where q rounds to 0 (the official simulator gives -0.0 there); an input of
-0.0 is not below 0 and packs to nibble 0. A unit that holds NaN or Inf packs to E6M2 = 0xFF with every other bit 0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.rotation import block_hadamard, check_width

__all__ = [
    "LEVEL2_RUN",
    "LEVEL3_RUN",
    "MAX_E6M2",
    "MAX_IN_UNIT",
    "MIN_E6M2",
    "NAN_E6M2",
    "SCALE_BYTES",
    "UNIT",
    "check_decode",
    "check_input",
    "check_planes",
    "dequantize",
    "in_unit_integers",
    "packed_shapes",
    "quantize",
    "unit_scales",
]

UNIT = 64  # elements that share one E6M2
LEVEL2_RUN = 8  # elements that share one E1_8 bit
LEVEL3_RUN = 4  # elements that share one E1_16 bit
SCALE_BYTES = 4  # E6M2, E1_8, E1_16 (two bytes)
MAX_IN_UNIT = 28  # 7 * 2^(1 + 1)
MIN_E6M2 = 2.0**-48
MAX_E6M2 = 1.5 * 2.0**15
NAN_E6M2 = 0xFF

_MAX_Q = 7
_INVERSE_SEVEN = 0.142578125  # bf16_rne(1/7)
# fp32 shifted right by 21 keeps the exponent and two fraction bits; E6M2 is that less the difference of the biases.
_BIAS_SHIFT = (127 - 48) << 2
_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OUTPUT_DTYPES = (*_INPUT_DTYPES, torch.float64)
# Elements worked on at once. Some 25 bytes of temporaries an element were measured: about 7 MB on a CPU, where small
# blocks stay in cache, and 52 MB on a GPU, where launches are dear.
_BLOCK_CPU = 1 << 18
_BLOCK_GPU = 1 << 21


def packed_shapes(shape: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of (codes, scales) for a tensor of `shape` [..., K]; sizes may be int or SymInt."""
    if len(shape) == 0:
        raise Hif4Error("HiF4 needs a tensor with a channel dimension, got a scalar.")
    *lead, k = shape
    units = (k + UNIT - 1) // UNIT
    return (*lead, units * (UNIT // 2)), (*lead, units, SCALE_BYTES)


def check_input(x: torch.Tensor, mask: torch.Tensor | None, hadamard: int) -> None:
    """Raise Hif4Error unless x [..., K] can be quantized with this mask [K] and Hadamard width (0 or 1: none)."""
    if x.dtype not in _INPUT_DTYPES:
        raise Hif4Error(f"HiF4 quantizes bfloat16, float16 or float32, not {_name(x.dtype)}; convert the tensor first.")
    if x.dim() == 0:
        raise Hif4Error("HiF4 needs a tensor with a channel dimension, got a scalar.")
    k = x.shape[-1]
    if k == 0:
        raise Hif4Error(f"HiF4 needs at least one channel, got shape {list(x.shape)}.")
    if mask is not None:
        if not mask.is_floating_point():
            raise Hif4Error(f"A channel mask must be floating point, not {_name(mask.dtype)}.")
        if mask.dim() != 1 or mask.shape[0] != k:
            raise Hif4Error(f"A channel mask must have shape [{k}], one factor a channel, not {list(mask.shape)}.")
    if hadamard not in (0, 1):
        check_width(hadamard, k)


def check_planes(codes: torch.Tensor, scales: torch.Tensor, k: Any = None, what: str = "HiF4 planes") -> None:
    """Raise Hif4Error unless codes [..., Kp/2] and scales [..., U, 4] are planes of one tensor, of K = `k` if given.

    `what` names the tensor in the message. Only shapes and dtypes are looked at, so meta and fake tensors pass too.
    """
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise Hif4Error(f"{what}: codes and scales must be uint8, not {_name(codes.dtype)} and {_name(scales.dtype)}.")
    if codes.dim() == 0 or codes.shape[-1] % (UNIT // 2):
        raise Hif4Error(f"{what}: codes of shape {list(codes.shape)} do not hold whole units of {UNIT // 2} bytes.")
    expected = (*codes.shape[:-1], codes.shape[-1] // (UNIT // 2), SCALE_BYTES)
    if scales.dim() != len(expected) or any(a != b for a, b in zip(scales.shape, expected, strict=True)):
        raise Hif4Error(
            f"{what}: codes of shape {list(codes.shape)} need scales of shape {list(expected)}, "
            f"not {list(scales.shape)}."
        )
    if k is not None:
        units = codes.shape[-1] // (UNIT // 2)
        if (k + UNIT - 1) // UNIT != units:
            raise Hif4Error(f"{what}: {units} units of {UNIT} cannot hold K = {k} channels.")


def check_decode(codes: torch.Tensor, scales: torch.Tensor, k: Any, dtype: torch.dtype) -> None:
    """Raise Hif4Error unless the planes decode to `k` channels of `dtype` (bf16, fp16, fp32 or fp64)."""
    check_planes(codes, scales, k)
    if dtype not in _OUTPUT_DTYPES:
        raise Hif4Error(f"HiF4 decodes to bfloat16, float16, float32 or float64, not {_name(dtype)}.")


@torch.no_grad()
def quantize(x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert x to HiF4 planes, bit for bit as the official simulator does in fp32 arithmetic.

    x [..., K] bf16, fp16 or fp32, any leading shape and strides; `mask` [K] floating point, multiplied in fp32;
    `hadamard` the width of the block rotation applied after the mask (0 or 1: none, see `block_hadamard`).
    Returns codes uint8 [..., Kp/2] and scales uint8 [..., U, 4]; a tail of K is padded with zeros.

    Source of the conversion: `hif4_gpu/quant_cy/base/QFuncs/hifx.py` in global-computing-consortium/HiFloat4.
    Raises Hif4Error for another dtype, a scalar, no channels, or a mask or width that does not fit K.
    """
    check_input(x, mask, hadamard)
    k = x.shape[-1]
    codes_shape, scales_shape = packed_shapes(x.shape)
    kp = codes_shape[-1] * 2
    rows = x.reshape(-1, k)
    codes = torch.empty((rows.shape[0], kp // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows.shape[0], *scales_shape[-2:]), dtype=torch.uint8, device=x.device)
    factor = None if mask is None else mask.float()
    step = _rows_per_block(kp, x.device)
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].float()
        if factor is not None:
            block = block * factor
        if hadamard > 1:
            block = block_hadamard(block, hadamard)
        if kp != k:
            block = torch.nn.functional.pad(block, (0, kp - k))
        _quantize_units(
            block.reshape(-1, UNIT),
            codes[start : start + step].view(-1, UNIT // 2),
            scales[start : start + step].view(-1, SCALE_BYTES),
        )
    return codes.view(codes_shape), scales.view(scales_shape)


def _quantize_units(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Write the planes of units x [n, 64] fp32 into codes [n, 32] and scales [n, 4]."""
    a = x.abs()
    v16 = _pair_max(_pair_max(a))
    v8 = _pair_max(v16)
    vmax = v8.amax(-1)
    valid = vmax < torch.inf  # NaN wins every maximum and is not below infinity either

    # E6M2 is bf16 rounded to two fraction bits, half to even; done on the bits, so that a carry reaches the exponent.
    sf = (vmax * _INVERSE_SEVEN).to(torch.bfloat16).clamp(MIN_E6M2, MAX_E6M2)
    bits = sf.view(torch.int16).to(torch.int32)
    bits = (bits + 15 + ((bits >> 5) & 1)) >> 5
    e6m2 = (bits << 21).view(torch.float32)
    r = e6m2.reciprocal().to(torch.bfloat16).float()[:, None]

    e8 = v8 * r >= 4
    half8 = _power_of_half(e8)
    e16 = (v16 * r).view(-1, 8, 2) * half8[..., None] >= 2
    # Powers of two commute with rounding, so |x| * r / 2^(E1_8 + E1_16) * 4 may be scaled in one product after |x| * r.
    factor = 4 * half8[..., None] * _power_of_half(e16)
    t = (a * r).view(-1, 16, 4).mul_(factor.view(-1, 16, 1)).add_(0.5).clamp_(max=_MAX_Q)
    q = t.view(-1, UNIT).to(torch.uint8)  # truncation is the floor: t is not negative
    nibbles = q.bitwise_or_((x < 0).to(torch.uint8) << 3)

    torch.bitwise_or(nibbles[:, 0::2], nibbles[:, 1::2] << 4, out=codes)
    codes.mul_(valid[:, None])
    scales[:, 0] = torch.where(valid, bits - _BIAS_SHIFT, NAN_E6M2)
    scales[:, 1] = _pack_bits(e8 & valid[:, None])
    scales[:, 2:] = _pack_bits(e16.view(-1, 2, 8) & valid[:, None, None])


@torch.no_grad()
def dequantize(codes: torch.Tensor, scales: torch.Tensor, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Decode planes to values [..., k].

    codes uint8 [..., Kp/2], scales uint8 [..., U, 4]; `k` the channels before padding; dtype bf16, fp16, fp32 or fp64.
    A value has at most 6 significant bits and magnitude 0 or 2^-50 to 344064: exact in all of them but fp16, where what
    is above 65504 becomes Inf and what is small loses bits or becomes 0. A NaN unit decodes to NaN.
    Raises Hif4Error for planes that do not fit each other or `k`, or another dtype.
    """
    check_decode(codes, scales, k, dtype)
    units = scales.shape[-2]
    flat_codes = codes.reshape(-1, units * (UNIT // 2))
    flat_scales = scales.reshape(-1, units, SCALE_BYTES)
    rows = flat_codes.shape[0]
    out = torch.empty((rows, k), dtype=dtype, device=codes.device)
    in_place = dtype == torch.float32 and k == units * UNIT
    tables = _decoding_tables(codes.device)
    step = _rows_per_block(units * UNIT, codes.device)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        if in_place:
            _decode_rows(flat_codes[block], flat_scales[block], tables, out[block])
        else:
            values = torch.empty((len(flat_codes[block]), units * UNIT), dtype=torch.float32, device=codes.device)
            _decode_rows(flat_codes[block], flat_scales[block], tables, values)
            out[block] = values[:, :k]
    return out.view(*codes.shape[:-1], k)


def in_unit_integers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The integers n in [-28, 28] of every unit, int8 [..., U, 64]: the value is `unit_scales * n`.

    codes uint8 [..., Kp/2], scales uint8 [..., U, 4]. The sign of a zero and NaN are not in n (NaN is in the scale).
    Raises Hif4Error for planes that do not fit each other.
    """
    check_planes(codes, scales)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).view(*scales.shape[:-1], UNIT // LEVEL3_RUN, LEVEL3_RUN)
    magnitude = (nibbles & 7).to(torch.int8) << _exponents(scales).to(torch.int8)[..., None]
    n = torch.where(nibbles > 7, -magnitude, magnitude)
    return n.view(*scales.shape[:-1], UNIT)


def unit_scales(scales: torch.Tensor) -> torch.Tensor:
    """E6M2/4 of every unit, fp32 [..., U], from scales uint8 [..., U, 4]; NaN where E6M2 is 0xFF."""
    stored = scales[..., 0]
    bits = stored.to(torch.int32) + (_BIAS_SHIFT - (2 << 2))  # two exponent steps down: the division by 4
    return (bits << 21).view(torch.float32).masked_fill_(stored == NAN_E6M2, torch.nan)


def _decode_rows(
    codes: torch.Tensor, scales: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
) -> None:
    """Write values fp32 [n, Kp] of codes [n, Kp/2] and scales [n, U, 4] to `out`; `tables` from `_decoding_tables`."""
    pairs, powers = tables
    flat = scales.reshape(-1, SCALE_BYTES)
    half, whole = flat[:, 1], flat[:, 2:]
    index = torch.stack((half >> 4, half & 0xF), dim=1).to(torch.int32).mul_(256).add_(whole)
    halves = out.view(-1, UNIT // 2)
    torch.index_select(powers, 0, index.view(-1), out=halves)
    units = halves.view(-1, UNIT)
    units.mul_(unit_scales(flat)[:, None])
    units.mul_(pairs.index_select(0, codes.reshape(-1).to(torch.int32)).view(torch.float32).view(-1, UNIT))


def _decoding_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`_decoding_arrays` on a device; without a copy on the CPU."""
    pairs, powers = _decoding_arrays()
    return torch.from_numpy(pairs).to(device), torch.from_numpy(powers).to(device)


@functools.cache
def _decoding_arrays() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """What the bytes of a unit stand for.

    First, for each code byte, its two signed magnitudes as fp32 (-0.0 for nibble 8), one int64 entry [256] for the
    pair. Second, for four bits of E1_8 and the byte of E1_16 below them, 2^(E1_8 + E1_16) of their 32 elements, fp32
    [16 * 256, 32].
    """
    nibble = np.arange(16)
    value = np.where(nibble > _MAX_Q, -1, 1).astype(np.float32) * (nibble & _MAX_Q).astype(np.float32)
    byte = np.arange(256)
    pairs = np.stack((value[byte & 0xF], value[byte >> 4]), axis=-1).view(np.int64).reshape(-1)
    index = np.arange(16 * 256)[:, None]
    level2 = ((index >> 8) >> np.arange(3, -1, -1) & 1).repeat(LEVEL2_RUN // LEVEL3_RUN, axis=-1)
    level3 = index >> np.arange(7, -1, -1) & 1
    powers = (1 << (level2 + level3)).astype(np.float32).repeat(LEVEL3_RUN, axis=-1)
    return pairs, powers


def _exponents(scales: torch.Tensor) -> torch.Tensor:
    """E1_8 + E1_16 for every run of 4, int32 [..., U, 16]."""
    shifts = torch.arange(7, -1, -1, dtype=torch.int32, device=scales.device)
    bits = (scales[..., 1:].to(torch.int32)[..., None] >> shifts) & 1
    e16 = bits[..., 1:, :].reshape(*scales.shape[:-1], 8, 2)
    return (e16 + bits[..., 0, :, None]).flatten(-2)


def _pair_max(a: torch.Tensor) -> torch.Tensor:
    """Maxima of neighbours, [n, 2m] -> [n, m]; faster than a reduction over a short last dimension."""
    return torch.maximum(a[:, 0::2], a[:, 1::2])


def _power_of_half(exponent: torch.Tensor) -> torch.Tensor:
    """2^-e as fp32 for e in {False, True}."""
    return 1 - 0.5 * exponent.float()


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Booleans [..., 8] to uint8 [...], the first in the most significant bit."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def _rows_per_block(kp: int, device: torch.device) -> int:
    return max(1, (_BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU) // max(1, kp))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
