"""Write HiF4 planes from scales and magnitudes chosen elsewhere, and round on the grid that given scales span."""

import torch

from hif4c.runtime.format import LEVEL2_RUN, LEVEL3_RUN, NAN_E6M2, UNIT, dequantize

__all__ = ["MAX_Q", "element_steps", "encode", "encode_codes", "encode_scales", "round_on_grid"]

MAX_Q = 7  # the largest magnitude of a code
_ONES = 0x11  # a byte of two codes with q = 1


def encode(
    e6m2: torch.Tensor, e8: torch.Tensor, e16: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack units into planes; the inverse of `unit_scales` and `in_unit_integers`.

    e6m2 [..., U] integers 0 to 0xFE, the stored E6M2; e8 bool [..., U, 8]; e16 bool [..., U, 16]; q [..., U, 64]
    integers -7 to 7 of any dtype. Returns codes uint8 [..., 32 U] and scales uint8 [..., U, 4].
    Raises ValueError for another shape or a value out of range.
    """
    return encode_codes(q), encode_scales(e6m2, e8, e16)


def encode_codes(q: torch.Tensor) -> torch.Tensor:
    """Pack signed magnitudes q [..., U, 64], integers -7 to 7 of any dtype, into codes uint8 [..., 32 U].

    A zero packs to nibble 0, never to a negative zero. Raises ValueError for another shape or a value out of range.
    """
    if q.shape[-1] != UNIT:
        raise ValueError(f"Units have {UNIT} magnitudes, got shape {list(q.shape)}.")
    magnitude = q.abs()
    if not bool((magnitude <= MAX_Q).all()):  # NaN fails too
        raise ValueError(f"Magnitudes of codes are at most {MAX_Q}, got {float(magnitude.max())}.")
    nibbles = magnitude.to(torch.uint8) | ((q < 0).to(torch.uint8) << 3)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).flatten(-2)


def encode_scales(e6m2: torch.Tensor, e8: torch.Tensor, e16: torch.Tensor) -> torch.Tensor:
    """Pack e6m2 [..., U], e8 [..., U, 8] and e16 [..., U, 16], as in `encode`, into scales uint8 [..., U, 4]."""
    runs = (UNIT // LEVEL2_RUN, UNIT // LEVEL3_RUN)
    if e8.shape != (*e6m2.shape, runs[0]) or e16.shape != (*e6m2.shape, runs[1]):
        raise ValueError(f"Scales of shapes {[list(t.shape) for t in (e6m2, e8, e16)]} are not those of whole units.")
    if bool(((e6m2 < 0) | (e6m2 >= NAN_E6M2)).any()):
        raise ValueError(f"Stored E6M2 must be 0 to {NAN_E6M2 - 1}.")
    bits = torch.cat((e8, e16), dim=-1).to(torch.uint8).unflatten(-1, (3, 8))
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    exponents = (bits << shifts).sum(-1, dtype=torch.uint8)
    return torch.cat((e6m2.to(torch.uint8)[..., None], exponents), dim=-1)


def element_steps(scales: torch.Tensor) -> torch.Tensor:
    """E6M2/4 * 2^(E1_8 + E1_16) of every element, fp32 [..., 64 U], from scales uint8 [..., U, 4]."""
    units = scales.shape[-2]
    # The step of an element is what the code q = 1 decodes to.
    ones = torch.full((*scales.shape[:-2], units * (UNIT // 2)), _ONES, dtype=torch.uint8, device=scales.device)
    return dequantize(ones, scales, units * UNIT, torch.float32)


def round_on_grid(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The q in -7 to 7 whose q * steps is nearest to values, as floats; both fp32 of shapes that broadcast."""
    return (values / steps).round_().clamp_(-MAX_Q, MAX_Q)
