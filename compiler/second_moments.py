"""E[x x^T] of a layer's input, summed over calls and ranks so exactly that no order of summation changes a bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from hif4c.compiler.planes import InputStatistics
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.runtime.errors import Hif4Error

__all__ = ["second_moments"]

TOKENS = 4096
"""Tokens of a call that one fp32 product is over."""
CHANNELS = 512
"""Rows of the result that are summed at once: what that takes besides is small."""
BITS = 61


@torch.no_grad()
def second_moments(
    calls: Callable[[], Iterable[torch.Tensor]], channels: int, *, ranks: Ranks = ALONE, name: str = "a linear"
) -> InputStatistics:
    """Of the tokens of all calls of all ranks; every rank gets the same.

    The tokens of a call are multiplied in chunks, in float32. Each product is rounded to multiples of a power of two
    and summed as int64, which is exact. With n chunks in all and B the largest diagonal entry of any product, the power
    is 2^e / 2^(61 - bits of n), B <= 2^e: by Cauchy and Schwarz no entry is larger than B, to within the rounding
    errors of the product for which one bit is left, so the sum fits. Rounding moves the result by at most half that
    power a chunk: B / 2^49 in all for a thousand chunks, where float32 has 24 bits.

    Memory besides a chunk and its like on the device: 8 K (K + 512) / 2 bytes of sums, and the result's 4 K^2.

    Args:
        calls: gives this rank's calls, [T, K] float32 each, one after the other; called twice.
        channels: K.
        ranks: others that hold other calls. A rank may have none.
        name: of the linear, for the message.

    Returns:
        The sum over tokens, on the CPU, as `hessian`; its diagonal; and the number of tokens.

    Raises:
        Hif4Error: a value that is not finite, or too large to be squared in float32.
    """
    bound, tokens, chunks = 0.0, 0, 0
    for call in calls():
        for chunk in call.split(TOKENS):
            largest = float(chunk.square().sum(0).max())
            bound = max(bound, largest if math.isfinite(largest) else math.inf)
            chunks += 1
        tokens += len(call)
    ranks.all_agree(None)
    bound = float(ranks.all_max(torch.tensor([bound], dtype=torch.float64)))
    tokens, chunks = (int(count) for count in ranks.all_sum(torch.tensor([tokens, chunks])))
    if math.isinf(bound):
        raise Hif4Error(
            f"{name}: its input holds NaN, infinity or values above 1e18 on the calibration calls; calibrate again."
        )
    power = BITS - chunks.bit_length() - math.frexp(bound)[1]
    sums = _sums(calls(), channels, power)
    ranks.all_agree(None)
    result = torch.empty(channels, channels)
    for start in range(0, channels, CHANNELS):
        # Taken off the list, and so freed once it has been read.
        part = ranks.all_sum(sums.pop(0)).double().mul_(math.ldexp(1.0, -power)).float().cpu()
        end = start + len(part)
        result[start:end, :end] = part
        result[:start, start:end] = part[:, :start].T
        corner = result[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return InputStatistics(result.diagonal(), tokens, result)


def _sums(calls: Iterable[torch.Tensor], channels: int, power: int) -> list[torch.Tensor]:
    """int64 sums times 2^power, rows s:e and columns :e for each block s:e of the channels."""
    ends = [min(start + CHANNELS, channels) for start in range(0, channels, CHANNELS)]
    sums = [torch.zeros(end - start, end, dtype=torch.int64) for start, end in zip([0, *ends], ends, strict=False)]
    scale = math.ldexp(1.0, power)
    for call in calls:
        if sums[0].device != call.device:
            sums = [part.to(call.device) for part in sums]
        for chunk in call.split(TOKENS):
            for part, end in zip(sums, ends, strict=True):
                product = chunk[:, end - len(part) : end].T @ chunk[:, :end]
                part += product.double().mul_(scale).round_().long()
    return sums
