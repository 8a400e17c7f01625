"""The logarithmic grid of buckets that every sketch shares.

Each octave [2^e, 2^(e+1)) is cut into 19 buckets at significands of 8 bits, chosen greedily so that a bucket [a, b) has
b/a <= 1.04. A bucket is answered by the harmonic mean r = 2ab/(a+b) of its edges, so for every x in it

    |r - x| / x  <=  max(r/a - 1, 1 - r/b)  =  (b - a) / (b + a)  <=  0.04 / 2.04  <  2 %.

Since all edges are bfloat16 numbers, the upper 16 bits of a value's fp32 pattern decide on its bucket: one table
look-up without logarithms, and the same on every machine.
"""

import torch
from torch import Tensor

__all__ = ["EDGES", "RELATIVE_ERROR", "SMALLEST", "VALUES", "bucket_of"]

_MIN_EXPONENT = -40
SMALLEST = 2.0**_MIN_EXPONENT  # lower edge of the bucket 0; magnitudes below it count as zeros


def _edge_bits() -> Tensor:
    """Lower edges of all buckets as bf16 bit patterns, ascending, and the upper edge of the last one: infinity's."""
    significands = [128]
    while significands[-1] < 256:
        significands.append(min(256, significands[-1] * 26 // 25))  # 26/25 = 1.04
    octaves = torch.arange(_MIN_EXPONENT + 127, 255, dtype=torch.int32) << 7
    edges = (octaves[:, None] + torch.tensor(significands[:-1], dtype=torch.int32) - 128).flatten()
    return torch.cat([edges, torch.tensor([0x7F80], dtype=torch.int32)])


_EDGE_BITS = _edge_bits()
_BUCKET_OF_BITS = torch.bucketize(torch.arange(1 << 15, dtype=torch.int32), _EDGE_BITS, right=True, out_int32=True) - 1

EDGES = (_EDGE_BITS << 16).view(torch.float32).double()  # bucket i is EDGES[i] <= |x| < EDGES[i + 1]
EDGES[-1] = 2.0**128  # beyond fp32
VALUES = (2 / (1 / EDGES[:-1] + 1 / EDGES[1:])).float()
RELATIVE_ERROR = float(((EDGES[1:] - EDGES[:-1]) / (EDGES[1:] + EDGES[:-1])).max())


def bucket_of(x: Tensor) -> Tensor:
    """Bucket of the magnitude of each finite value of x (bf16, fp16 or fp32), int32; -1 below `SMALLEST`."""
    if x.dtype == torch.bfloat16:
        bits = x.view(torch.int16).int().bitwise_and_(0x7FFF)
    else:
        bits = (x.float().view(torch.int32) >> 16).bitwise_and_(0x7FFF)
    return _BUCKET_OF_BITS.index_select(0, bits.flatten()).view(bits.shape)
