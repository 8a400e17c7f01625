"""A model on paper of a Wan2.2 block on GPUs: what the pipes of a multiprocessor allow. Nothing here was measured.

Time of a linear on a GPU = tiles * turns of the main loop * clocks of a turn / (multiprocessors * clock rate). A turn
is one unit of 64 channels of one tile; its clocks follow from the instructions that `hif4c bench static` counts in the
binaries:

    matrix  multiply-accumulates of the turn / those that the matrix units do in a clock
    issue   instructions of all warps / 4, what the schedulers start in a clock
    vector  vector instructions of all warps * threads of a warp / lanes

If the pipes overlap perfectly the longest counts (the *bound*), if they do not overlap matrix + max(issue, vector)
(*serial*). Neither knows of latency, caches, or clocks that sink under load; serial is no upper limit. A kernel on the
bf16 matrix units is never taken to be faster than the vendor's library, which runs on the same.

Peak rates and memory are those of the makers' data sheets, dense, at the clock that these rates imply. The share of the
peak that a library's bf16 GEMM reaches is an assumption, and so is that attention reaches the same share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hif4c.compiler.models import WanConfig
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import SCALE_BYTES, UNIT

__all__ = ["GPUS", "LOOPS", "BlockModel", "Gpu", "LinearModel", "Loop", "model_block", "model_linear"]

TEXT = 512
_SCHEDULERS = 4
_PACKED = 0.5 + SCALE_BYTES / UNIT
"""Bytes of a value: 4-bit codes and the scales of its unit."""


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU.

    Attributes:
        name: as it is sold.
        target: of the kernels that run on it.
        multiprocessors: AMD: compute units.
        clock: in Hz, at which the rates of the data sheet hold.
        bf16: multiply-accumulates of a multiprocessor a clock, in fp32.
        int8: the same in int32.
        lanes: of fp32 arithmetic in a multiprocessor; AMD: of any vector instruction.
        warp: threads of a warp; AMD: of a wavefront.
        bandwidth: of the memory, bytes a second.
        efficiency: assumed share of the peak that a bf16 GEMM of the vendor's library reaches.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bf16: int
    int8: int
    lanes: int
    warp: int
    bandwidth: float
    efficiency: float

    @property
    def peak_bf16(self) -> float:
        """Operations a second, two a multiply-accumulate."""
        return 2.0 * self.multiprocessors * self.clock * self.bf16


GPUS: tuple[Gpu, ...] = (
    Gpu("A100 SXM 80 GB", "cuda-sm80", 108, 1.410e9, 1024, 2048, 64, 32, 2.039e12, 0.85),
    Gpu("RTX 4090", "cuda-sm89", 128, 2.520e9, 256, 1024, 128, 32, 1.008e12, 0.93),
    Gpu("RTX 5090", "cuda-sm120", 170, 2.407e9, 256, 1024, 128, 32, 1.792e12, 0.93),
    Gpu("H100 SXM", "cuda-sm90", 132, 1.830e9, 2048, 4096, 128, 32, 3.350e12, 0.72),
    Gpu("B200", "cuda-sm100", 148, 1.860e9, 4096, 8192, 128, 32, 8.000e12, 0.72),
    Gpu("MI300X", "hip-gfx942", 304, 2.100e9, 1024, 2048, 64, 64, 5.300e12, 0.54),
)


@dataclass(frozen=True)
class Loop:
    """The main loop of a linear's kernel, for one unit of 64 channels of one tile.

    Attributes:
        kernel: name and variant.
        rows: of the tile.
        columns: of the tile.
        warps: that share the tile.
        instructions: of a warp.
        vector: of these, fp32 arithmetic; AMD: all vector instructions but the matrix ones.
        integer: whether it runs on the int8 matrix units (else on bf16 ones).
        packed: whether the weight is read packed, 4.5 bits a value (else expanded in memory before).
    """

    kernel: str
    rows: int
    columns: int
    warps: int
    instructions: int
    vector: int
    integer: bool
    packed: bool = False

    def clocks(self, gpu: Gpu) -> tuple[float, float, float]:
        """(matrix, issue, vector) clocks of one turn."""
        rate = gpu.int8 if self.integer else gpu.bf16
        return (
            self.rows * self.columns * UNIT / rate,
            self.instructions * self.warps / _SCHEDULERS,
            self.vector * self.warps * gpu.warp / gpu.lanes,
        )


# As `hif4c bench static` counts them in what Triton 3.7.1 makes of the kernels with the epilogue "bias".
_INT8 = Loop("linear_int8 128x128_w8_s3", 128, 128, 8, 235, 136, True)
LOOPS: dict[str, tuple[Loop, ...]] = {
    "cuda-sm80": (_INT8,),
    "cuda-sm89": (_INT8,),
    "cuda-sm90": (
        Loop("linear_bf16 packed_128x256_w8_s3", 128, 256, 8, 343, 0, False, True),
        Loop("linear_bf16 128x256_w8_s3", 128, 256, 8, 94, 0, False),
    ),
    "cuda-sm100": (
        Loop("linear_bf16 packed_128x256_w8_s3", 128, 256, 8, 351, 0, False, True),
        Loop("linear_bf16 128x256_w8_s3", 128, 256, 8, 108, 0, False),
    ),
    "cuda-sm120": (replace(_INT8, instructions=234),),
    "hip-gfx942": (Loop("linear_int8 128x128_w8_s2", 128, 128, 8, 109, 67, True),),
}
"""The kernels that are worth modelling, by target."""


@dataclass(frozen=True)
class LinearModel:
    """One linear on one GPU, in seconds.

    Attributes:
        m: rows.
        k: inputs.
        n: outputs.
        kernel: the one that takes least.
        bf16: with the vendor's library.
        bound: the main loop, its pipes in perfect overlap.
        serial: the main loop, its pipes one after the other.
        quantize: reading the input once and writing its planes; nothing where another linear did it already.
        expand: what a call reads and writes to expand its operands.
    """

    m: int
    k: int
    n: int
    kernel: str
    bf16: float
    bound: float
    serial: float
    quantize: float
    expand: float


@dataclass(frozen=True)
class BlockModel:
    """A transformer block on one GPU, in seconds; norms, rotary embedding and residuals are left out of both sides.

    Attributes:
        gpu: its name.
        tokens: length of the sequence.
        linears: every linear of the block.
        attention: self and cross attention in bf16, the same on both sides.
    """

    gpu: str
    tokens: int
    linears: tuple[LinearModel, ...]
    attention: float

    @property
    def bf16(self) -> float:
        """All linears with the vendor's library."""
        return sum(item.bf16 for item in self.linears)

    @property
    def overhead(self) -> float:
        """Quantization of all inputs and expansion of all operands."""
        return sum(item.quantize + item.expand for item in self.linears)

    def hif4(self, *, serial: bool) -> float:
        """All linears, quantization and expansion included."""
        return self.overhead + sum(item.serial if serial else item.bound for item in self.linears)

    def speedup(self, *, serial: bool, block: bool) -> float:
        """bf16 / HiF4, of the linears or of the whole block."""
        rest = self.attention if block else 0.0
        return (self.bf16 + rest) / (self.hif4(serial=serial) + rest)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "bf16": self.bf16,
            "overhead": self.overhead,
            "hif4": [self.hif4(serial=False), self.hif4(serial=True)],
            "linears_speedup": [self.speedup(serial=serial, block=False) for serial in (True, False)],
            "block_speedup": [self.speedup(serial=serial, block=True) for serial in (True, False)],
        }


def model_linear(gpu: Gpu, m: int, k: int, n: int, *, quantized: bool = True) -> LinearModel:
    """One linear; `quantized` is off for an input that another linear of the same input quantized already."""
    found = [_with_loop(gpu, loop, m, k, n, quantized) for loop in LOOPS[gpu.target]]
    return min(found, key=lambda item: item.serial + item.expand)


def _with_loop(gpu: Gpu, loop: Loop, m: int, k: int, n: int, quantized: bool) -> LinearModel:
    matrix, issue, vector = loop.clocks(gpu)
    # A round of tiles, one a multiprocessor, takes as long when it is not full.
    rounds = math.ceil(math.ceil(m / loop.rows) * math.ceil(n / loop.columns) / gpu.multiprocessors)
    turn = rounds * math.ceil(k / UNIT) / gpu.clock
    bf16 = 2.0 * m * k * n / (gpu.peak_bf16 * gpu.efficiency)
    least = 0.0 if loop.integer else bf16
    wide = 1 + 4 / UNIT if loop.integer else 2.0  # int8 with an fp32 scale a unit, or bf16
    weight = 0.0 if loop.packed else n * k * (_PACKED + wide)
    return LinearModel(
        m, k, n, loop.kernel, bf16,
        bound=max(least, turn * max(matrix, issue, vector)),
        serial=max(least, turn * (matrix + max(issue, vector))),
        quantize=m * k * (2 + _PACKED) / gpu.bandwidth if quantized else 0.0,
        expand=(m * k * (_PACKED + wide) + weight) / gpu.bandwidth,
    )  # fmt: skip


def model_block(gpu: Gpu, config: WanConfig, tokens: int) -> BlockModel:
    """One block of a model with one video of `tokens` tokens and `TEXT` tokens of text.

    Raises:
        Hif4Error: no token.
    """
    if tokens < 1:
        raise Hif4Error(f"{tokens} tokens: a video has at least one.")
    width, inner = config.inner_dim, config.ffn_dim
    shapes: Sequence[tuple[int, int, int, bool]] = [
        (tokens, width, width, True),  # attn1.to_q; to_k and to_v read the same planes
        (tokens, width, width, False),
        (tokens, width, width, False),
        (tokens, width, width, True),  # attn1.to_out
        (tokens, width, width, True),  # attn2.to_q
        (TEXT, width, width, True),  # attn2.to_k, and to_v
        (TEXT, width, width, False),
        (tokens, width, width, True),  # attn2.to_out
        (tokens, width, inner, True),
        (tokens, inner, width, True),
    ]
    linears = tuple(model_linear(gpu, m, k, n, quantized=quantized) for m, k, n, quantized in shapes)
    operations = 4.0 * tokens * (tokens + TEXT) * width
    return BlockModel(gpu.name, tokens, linears, operations / (gpu.peak_bf16 * gpu.efficiency))
