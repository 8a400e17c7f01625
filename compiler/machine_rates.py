"""How fast this machine does what a compile and a calibration are made of, measured in a second or two."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hif4c.compiler.scale_search import search_scales
from hif4c.compiler.sketch import ChannelSketch
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import quantize
from hif4c.runtime.native import native_kernels, portable_kernels

__all__ = ["MachineRates", "measure_rates"]

LOOP = 300_000
ROWS, CHANNELS = 256, 5120
TOKENS = 24
PRODUCT = 2048
SECONDS = 0.08
"""Spent on each figure."""
READS, READ_BYTES = 12, 4 << 20
WRITE_BYTES = 64 << 20
SEED = 0


@dataclass(frozen=True)
class MachineRates:
    """Amounts a second.

    Attributes:
        cores: that torch uses.
        loops: turns of a plain Python loop, for work that is interpreted: tracing and passes.
        quantize: elements rounded to HiF4, of all cores.
        search: elements whose scales are searched, of all cores.
        decode: elements of packed weights that the portable kernels multiply a few tokens with, of all cores.
        count: activations counted in the histograms of a calibration, of all cores.
        scan: bytes of a 16-bit weight whose largest values are found, of all cores.
        hash: bytes, SHA-256, of one core.
        multiply: floating-point operations of float32 matrix products, of all cores or the device.
        multiply16: the same of bfloat16.
        read: bytes of the checkpoint, or of a file in the output's folder where there is none, not in memory before.
        write: bytes written in the output's folder and on the disk.
    """

    cores: int
    loops: float
    quantize: float
    search: float
    decode: float
    count: float
    scan: float
    hash: float
    multiply: float
    multiply16: float
    read: float
    write: float


@torch.no_grad()
def measure_rates(folder: Path, weights: Sequence[Path] = (), device: torch.device | str = "cpu") -> MachineRates:
    """Measure this machine. What else runs on it at the moment is in the figures.

    Args:
        folder: of the output, existing; a file of 64 MB is written there and removed.
        weights: files of the checkpoint, where it is on this machine: a few parts of them are read from the disk.
        device: where matrix products of a calibration run.

    Raises:
        Hif4Error: the folder cannot be written.
    """
    written, back = _disk_rates(folder)  # first: it says whether there is a place for the output
    cores = torch.get_num_threads()
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(ROWS, CHANNELS, generator=generator)
    narrow = weight.to(torch.bfloat16)
    data = bytes(4 << 20)
    # One core is measured and counted as often as there are cores: several that wait for each other at every short
    # operation show the machine's other work a hundred times enlarged.
    with _one_thread():
        with native_kernels():
            quantized = _rate(lambda: torch.ops.hif4.quantize(weight, None, 64), weight.numel())
            searched = _rate(lambda: search_scales(weight[:64]), weight[:64].numel())
            scanned = _rate(lambda: narrow.abs().amax(0), narrow.nbytes)
            counted = _rate(lambda: ChannelSketch(CHANNELS, 1).update(narrow, 0), narrow.numel())
        packed = quantize(weight)
        tokens = quantize(torch.randn(TOKENS, CHANNELS, generator=generator))
        with portable_kernels():
            decoded = _rate(lambda: torch.ops.hif4.linear(*tokens, *packed, None, None, torch.float32), weight.numel())
        products = [_multiply_rate(dtype, device, generator) for dtype in (torch.float32, torch.bfloat16)]
    shared = 1 if torch.device(device).type != "cpu" else cores
    return MachineRates(
        cores=cores,
        loops=_rate(_loop, LOOP),
        quantize=quantized * cores,
        search=searched * cores,
        decode=decoded * cores,
        count=counted * cores,
        scan=scanned * cores,
        hash=_rate(lambda: hashlib.sha256(data).digest(), len(data)),
        multiply=products[0] * shared,
        multiply16=products[1] * shared,
        read=_read_rate(weights) or back,
        write=written,
    )


def _rate(function: Callable[[], object], amount: float) -> float:
    """Amount a second, of the fastest of as many calls as fit in the time; the first is not counted."""
    function()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        started = time.perf_counter()
        function()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= end:
            return amount / best


def _loop() -> None:
    counts: dict[int, int] = {}
    for index in range(LOOP):
        counts[index & 1023] = counts.get(index & 511, 0) + 1


def _multiply_rate(dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> float:
    left = torch.randn(PRODUCT // 4, PRODUCT, generator=generator).to(device, dtype)
    right = torch.randn(PRODUCT, PRODUCT, generator=generator).to(device, dtype)

    def multiply() -> None:
        product = left @ right
        if product.is_cuda:
            torch.cuda.synchronize(product.device)

    return _rate(multiply, PRODUCT**3 / 2)


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second of writing to the disk, and of reading back what was written."""
    block = random.Random(SEED).randbytes(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = WRITE_BYTES / (time.perf_counter() - started)
            places = range(0, WRITE_BYTES, READ_BYTES)
            return written, _read_places([(file.fileno(), place) for place in places])
    except OSError as error:
        raise Hif4Error(f"{folder}: cannot be written ({error.strerror}).") from None


def _read_rate(paths: Sequence[Path]) -> float | None:
    """Bytes a second of parts of these files at random places."""
    sizes = {path: path.stat().st_size for path in paths}
    long = [path for path, size in sizes.items() if size > READ_BYTES]
    if not long:
        return None
    choice = random.Random(SEED)
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in long}
        drawn = choice.choices(long, [sizes[path] for path in long], k=READS)
        return _read_places([(files[path], choice.randrange(sizes[path] - READ_BYTES)) for path in drawn])


def _read_places(places: Sequence[tuple[int, int]]) -> float:
    """Of the median read: one of many may come from a cache or wait for something else."""
    seconds = []
    for file, place in places:
        start = place // READ_BYTES * READ_BYTES
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, start, READ_BYTES, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        count = len(os.pread(file, READ_BYTES, start))
        seconds.append((time.perf_counter() - started) / max(count, 1))
    return 1 / sorted(seconds)[len(seconds) // 2]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
