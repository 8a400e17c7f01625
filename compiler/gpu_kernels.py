"""The Triton kernels, compiled ahead of time for one GPU family, on a machine that need not have a GPU.

`build_gpu_kernels` lists what to compile and starts workers (gpu_worker.py), processes of their own: Triton reads its
settings from the environment, and neither the user's settings nor the user's cache may find their way into an artifact.

Variants of a linear are tiles that static figures do not reject (no spills in the main loop, registers for at least one
block a multiprocessor, the fewest instructions a unit); they cannot order the rest, which the GPU times at first use.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hif4c.compiler.binary_report import loop_of_amdgcn, resources
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import write_kernel_set

__all__ = ["TARGETS", "Job", "build_gpu_kernels", "compile_jobs", "list_jobs"]

# Target -> Triton's backend, architecture and threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "cuda-sm80": ("cuda", 80, 32),
    "cuda-sm89": ("cuda", 89, 32),
    "cuda-sm90": ("cuda", 90, 32),
    "cuda-sm100": ("cuda", 100, 32),
    "cuda-sm120": ("cuda", 120, 32),
    "hip-gfx942": ("hip", "gfx942", 64),
}

SUPPORTED_TRITON = ((3, 6), (3, 10))  # from, and before
MAX_WORKERS = 8

# Rows, columns, warps, stages.
_Tile = tuple[int, int, int, int]
_INT8_TILES: tuple[_Tile, ...] = ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (128, 64, 4, 3))
_INT8_TILES_AMD: tuple[_Tile, ...] = ((128, 128, 8, 2), (64, 128, 4, 2), (128, 64, 4, 2))
_PACKED_TILES: tuple[_Tile, ...] = ((128, 128, 8, 3), (128, 256, 8, 3))
_PLAIN_TILES: tuple[_Tile, ...] = ((128, 128, 8, 4), (128, 256, 8, 3))
_WEIGHT_ONLY_TILES: tuple[_Tile, ...] = ((128, 128, 8, 3),)  # where W4A4 runs on int8
_WEIGHT_ONLY_TILES_AMD: tuple[_Tile, ...] = ((128, 128, 8, 2),)
_KERNELS = Path(__file__).parents[1] / "runtime" / "gpu" / "kernels.py"
_WORKER = Path(__file__).with_name("gpu_worker.py")
_GROUP_M = 8  # tiles of rows that share their columns in the L2

# The integers that the runtime may only pass as multiples of 16, which lets loads and stores be wide. M is any number.
_MULTIPLES_OF_16 = {"K", "N", "x_stride", "stride", "value_stride", "weight_stride", "gate_stride", "gain_stride"}
_TYPES = {
    "bias_ptr": "*fp32",
    "gate_ptr": "*fp32",
    "residual_ptr": "*bf16",
    "side_ptr": "*bf16",
    "side_weight_ptr": "*bf16",
    "out_ptr": "*bf16",
    "mask_ptr": "*fp32",
    "codes_ptr": "*i32",
    "scales_ptr": "*i32",
    "value_scales_ptr": "*fp32",
}


@dataclass(frozen=True)
class Job:
    """One binary to make.

    Attributes:
        name: of the kernel in `hif4c.runtime.gpu.kernels`.
        variant: which tile, "128x128_w8_s3".
        file: name of the binary, without suffix.
        types: argument -> type, "*i8"; all other arguments that are not constants are int32.
        constants: argument -> value.
        warps, stages: Triton's options.
    """

    name: str
    variant: str
    file: str
    types: dict[str, str]
    constants: dict[str, int]
    warps: int
    stages: int


def list_jobs(target: str) -> list[Job]:
    """Everything that is compiled for a target."""
    amd = target.startswith("hip")
    if target in ("cuda-sm90", "cuda-sm100"):
        # A promotion every 64 channels costs these more than int8 gains: exact bf16 instead.
        linears = [*_bf16_jobs(1, _PACKED_TILES), *_bf16_jobs(0, _PLAIN_TILES)]
        expansions = [_expand("expand_bf16")]
    else:
        linears = [
            *_int8_jobs(_INT8_TILES_AMD if amd else _INT8_TILES, magic=1),
            *_bf16_jobs(0, _WEIGHT_ONLY_TILES_AMD if amd else _WEIGHT_ONLY_TILES),
        ]
        expansions = [_expand("expand_int8"), _expand("expand_bf16")]
    return [*linears, *expansions, *_quantize_jobs(), *_norm_jobs()]


def _epilogues() -> Iterator[tuple[str, dict[str, int]]]:
    yield "bias", {"GELU": 0, "GATE": 0}
    yield "gelu", {"GELU": 1, "GATE": 0}
    yield "gate", {"GELU": 0, "GATE": 1}


def _int8_jobs(tiles: Iterable[_Tile], magic: int) -> Iterator[Job]:
    types = {**_TYPES, "values_ptr": "*i8", "weight_ptr": "*i8", "weight_scales_ptr": "*fp32"}
    for rows, columns, warps, stages in tiles:
        variant = f"{rows}x{columns}_w{warps}_s{stages}"
        for suffix, constants in _epilogues():
            constants |= {"MAGIC": magic, "BLOCK_M": rows, "BLOCK_N": columns, "GROUP_M": _GROUP_M}
            yield Job("linear_int8", variant, f"linear_int8.{variant}.{suffix}", types, constants, warps, stages)


def _bf16_jobs(packed: int, tiles: Iterable[_Tile]) -> Iterator[Job]:
    weight = "*i32" if packed else "*bf16"
    types = {**_TYPES, "values_ptr": "*bf16", "weight_ptr": weight, "weight_scales_ptr": "*i32"}
    for rows, columns, warps, stages in tiles:
        variant = f"{'packed_' if packed else ''}{rows}x{columns}_w{warps}_s{stages}"
        for suffix, constants in _epilogues():
            constants |= {"PACKED": packed, "BLOCK_M": rows, "BLOCK_N": columns, "GROUP_M": _GROUP_M}
            yield Job("linear_bf16", variant, f"linear_bf16.{variant}.{suffix}", types, constants, warps, stages)


def _expand(name: str) -> Job:
    constants = {"BLOCK_R": 16, "BLOCK_U": 4}
    return Job(name, "16x4_w4", f"{name}.16x4_w4", {**_TYPES, "values_ptr": "*i32"}, constants, 4, 1)


def _quantize_jobs() -> Iterator[Job]:
    """Rotations of one unit, which the recipes ask for, and wider ones where they come with a mask."""
    for kind, mask, log2 in (
        *itertools.product(("bf16", "fp32"), (0, 1), (0, 6)),
        *itertools.product(("bf16",), (1,), (7, 8, 9, 10)),
    ):
        rows, units, warps = (16, 4, 4) if log2 <= 8 else (8, 16, 8)
        variant = f"{rows}x{units}_w{warps}"
        suffix = kind + ("_mask" if mask else "") + (f"_hadamard{1 << log2}" if log2 else "")
        types = {**_TYPES, "x_ptr": f"*{kind}"}
        constants = {"HAS_MASK": mask, "HADAMARD": 1 << log2, "LOG2_HADAMARD": log2}
        constants |= {"BLOCK_M": rows, "BLOCK_U": units}
        yield Job("quantize", variant, f"quantize.{variant}.{suffix}", types, constants, warps, 1)


def _norm_jobs() -> Iterator[Job]:
    types = {"x_ptr": "*bf16", "gain_ptr": "*fp32", "shift_ptr": "*fp32", "offset": "fp32", "eps": "fp32"}
    for mask, log2 in itertools.product((0, 1), (0, 6)):
        suffix = "bf16" + ("_mask" if mask else "") + (f"_hadamard{1 << log2}" if log2 else "")
        constants = {"HAS_MASK": mask, "HADAMARD": 1 << log2, "LOG2_HADAMARD": log2, "BLOCK_M": 8, "BLOCK_U": 4}
        yield Job("norm_quantize", "8x4_w4", f"norm_quantize.8x4_w4.{suffix}", {**_TYPES, **types}, constants, 4, 1)


def build_gpu_kernels(target: str, directory: Path, progress: Callable[[str], None]) -> None:
    """Compile every kernel of a target into `directory`, with its kernels.json.

    Args:
        target: one of `TARGETS`.
        directory: kernels/TARGET of an artifact in the making.
        progress: called with the name of each binary when it is made, from several threads but never at once.

    Raises:
        Hif4Error: Triton is missing or of a version that was never tried, or it cannot compile a kernel.
    """
    version = _triton_version()
    jobs = list_jobs(target)
    made = compile_jobs(target, jobs, progress)
    suffix = ".cubin" if target.startswith("cuda") else ".hsaco"
    write_kernel_set(
        directory,
        target,
        {"triton": version},
        [
            (job.name, job.variant, job.file + suffix, data, properties)
            for job, (data, properties) in zip(jobs, made, strict=True)
        ],
    )


def compile_jobs(
    target: str, jobs: list[Job], progress: Callable[[str], None], workers: int | None = None
) -> list[tuple[bytes, dict[str, Any]]]:
    """(binary, properties) of every job, in order; the processors are shared among `workers` processes.

    Raises:
        Hif4Error: as `build_gpu_kernels`.
    """
    if target not in TARGETS:
        raise Hif4Error(f"target {target!r}: kernels are built for {', '.join(TARGETS)} only.")
    _triton_version()
    lock = threading.Lock()

    def report(text: str) -> None:
        with lock:
            progress(text)

    count = workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    count = max(1, min(count, len(jobs)))
    with tempfile.TemporaryDirectory(prefix="hif4c-kernels-") as scratch:
        shares = [jobs[index::count] for index in range(count)]
        folders = [Path(scratch) / str(index) for index in range(count)]
        with ThreadPoolExecutor(count) as pool:
            results = list(pool.map(lambda share, folder: _work_apart(target, share, folder, report), shares, folders))
    made: dict[str, tuple[bytes, dict[str, Any]]] = {}
    for share, result in zip(shares, results, strict=True):
        made.update(zip((job.file for job in share), result, strict=True))
    return [made[job.file] for job in jobs]


def _work_apart(
    target: str, jobs: list[Job], folder: Path, progress: Callable[[str], None]
) -> list[tuple[bytes, dict[str, Any]]]:
    """Compile jobs in a process of their own, below `folder`."""
    backend, architecture, warp_size = TARGETS[target]
    folder.mkdir()
    work = {
        "kernels": str(_KERNELS),
        "target": [backend, architecture, warp_size],
        "multiples_of_16": sorted(_MULTIPLES_OF_16),
        "jobs": [asdict(job) for job in jobs],
    }
    (folder / "work.json").write_text(json.dumps(work))
    # -P: nothing in the user's current directory may stand in for a module.
    command = [sys.executable, "-P", str(_WORKER), str(folder)]
    results = []
    with (
        open(folder / "log", "w+b") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=_environment(target, folder), text=True
        ) as process,
    ):
        assert process.stdout is not None
        for job, line in zip(jobs, process.stdout, strict=False):
            path = folder / job.file
            properties = json.loads(line)
            used = resources(path, target)
            properties |= {"warp_size": warp_size, "registers": used.registers, "spills": used.spills}
            if backend == "hip":
                loop = loop_of_amdgcn((folder / f"{job.file}.s").read_text())
                properties["loop"] = None if loop is None else asdict(loop)
            results.append((path.read_bytes(), properties))
            progress(f"{target} {job.file}")
        status = process.wait()
        if status or len(results) != len(jobs):
            log.seek(0)
            raise Hif4Error(
                f"{target}: Triton cannot compile {jobs[min(len(results), len(jobs) - 1)].file} "
                f"({_last_line(log.read(), status)}); leave this target out, or install triton 3.7."
            )
    return results


def _last_line(log: bytes, status: int) -> str:
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit status {status}"


def _environment(target: str, folder: Path) -> dict[str, str]:
    """Of this process, without what changes Triton's output; its cache and home are in `folder`."""
    foreign = re.compile(r"(TRITON|MLIR|LLVM|AMDGCN|NVPTX)_|(DISABLE_PTXAS_OPT|PTXAS_OPTIONS|USE_IR_LOC)$")
    environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    # Triton 3.9 takes its newest ptxas for sm_90; binaries of the older one load on older drivers. Both come with it.
    ptxas = _triton_directory() / "backends" / "nvidia" / "bin" / "ptxas"
    older = {"TRITON_PTXAS_BLACKWELL_PATH": str(ptxas)} if target == "cuda-sm90" else {}
    return (
        environment
        | older
        | {
            "PYTHONHASHSEED": "0",
            "TRITON_HOME": str(folder),
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "TRITON_DISABLE_LINE_INFO": "1",
        }
    )


def _triton_directory() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise Hif4Error(
            "GPU kernels are compiled by Triton, which is not installed; run `pip install 'hif4c[compile]'` on Linux, "
            "or leave GPU targets out."
        )
    return Path(spec.origin).parent


def _triton_version() -> str:
    _triton_directory()
    version = importlib.metadata.version("triton")
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    first, last = SUPPORTED_TRITON
    if not first <= number < last:
        raise Hif4Error(
            f"triton {version} is installed, and kernels are compiled by 3.6 to 3.9 only; install one of those."
        )
    return version
