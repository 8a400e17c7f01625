"""Kernels really compiled for every GPU family, and what their binaries say. No GPU is needed, and none is used."""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton")

from hif4c.compiler import gpu_kernels
from hif4c.compiler.binary_report import BinaryReport, _amd_metadata, _run, analyse, resources
from hif4c.compiler.gpu_kernels import TARGETS, Job, build_gpu_kernels, compile_jobs, list_jobs
from hif4c.runtime.errors import Hif4Error

# Whose binaries have ELF ABI 7; version 8 came with CUDA 13, and only drivers of that time load it.
OLDER_DRIVERS = ("cuda-sm80", "cuda-sm89", "cuda-sm90")
INT8 = ("cuda-sm80", "cuda-sm89", "cuda-sm120", "hip-gfx942")
# (target, kernel) -> the matrix instruction that its architecture has for it.
MATRIX = {
    ("cuda-sm80", "linear_int8"): "IMMA.16832.S8.S8",
    ("cuda-sm89", "linear_int8"): "IMMA.16832.S8.S8",
    ("cuda-sm120", "linear_int8"): "IMMA.16832.S8.S8",
    ("hip-gfx942", "linear_int8"): "v_mfma_i32_32x32x16_i8",
    ("cuda-sm80", "linear_bf16"): "HMMA.16816.F32.BF16",
    ("cuda-sm89", "linear_bf16"): "HMMA.16816.F32.BF16",
    ("cuda-sm120", "linear_bf16"): "HMMA.16816.F32.BF16",
    ("hip-gfx942", "linear_bf16"): "v_mfma_f32_32x32x8_bf16",
    ("cuda-sm90", "linear_bf16"): "HGMMA.64x",
    ("cuda-sm100", "linear_bf16"): "UTCHMMA",
}
# Instructions of a warp for one unit of 64 channels, at most. Those of an earlier study of the same kernels, as far as
# it had them (int8 128x128: 239, 247 and 234 on sm80, 89 and 120; packed bf16 on sm90: 227, and 351 for 128x256; plain
# bf16 128x256: 129 and 142 on sm90 and 100), else what was found with Triton 3.7.1 and a few more.
INSTRUCTIONS = {
    ("cuda-sm80", "linear_int8", "128x128"): 239,
    ("cuda-sm89", "linear_int8", "128x128"): 247,
    ("cuda-sm120", "linear_int8", "128x128"): 234,
    ("cuda-sm80", "linear_int8", "64x128"): 248,
    ("cuda-sm89", "linear_int8", "64x128"): 248,
    ("cuda-sm120", "linear_int8", "64x128"): 250,
    ("cuda-sm80", "linear_int8", "128x64"): 248,
    ("cuda-sm89", "linear_int8", "128x64"): 248,
    ("cuda-sm120", "linear_int8", "128x64"): 250,
    ("hip-gfx942", "linear_int8", "128x128"): 115,
    ("hip-gfx942", "linear_int8", "64x128"): 118,
    ("hip-gfx942", "linear_int8", "128x64"): 118,
    ("cuda-sm90", "linear_bf16", "packed_128x128"): 227,
    ("cuda-sm90", "linear_bf16", "packed_128x256"): 351,
    ("cuda-sm90", "linear_bf16", "128x128"): 90,
    ("cuda-sm90", "linear_bf16", "128x256"): 129,
    ("cuda-sm100", "linear_bf16", "packed_128x128"): 231,
    ("cuda-sm100", "linear_bf16", "packed_128x256"): 355,
    ("cuda-sm100", "linear_bf16", "128x128"): 105,
    ("cuda-sm100", "linear_bf16", "128x256"): 142,
    ("cuda-sm80", "linear_bf16", "128x128"): 145,
    ("cuda-sm89", "linear_bf16", "128x128"): 145,
    ("cuda-sm120", "linear_bf16", "128x128"): 135,
    ("hip-gfx942", "linear_bf16", "128x128"): 60,
}
# Shared memory that one block may have, static and dynamic.
SHARED = {
    "cuda-sm80": 166912,
    "cuda-sm89": 101376,
    "cuda-sm90": 232448,
    "cuda-sm100": 232448,
    "cuda-sm120": 101376,
    "hip-gfx942": 65536,
}


def subset(target: str) -> list[Job]:
    """The first tile of the target's own linear with the largest epilogue, and one or two of the other kernels."""
    jobs = list_jobs(target)
    chosen = [next(job for job in jobs if job.name.startswith("linear") and job.constants["GATE"])]
    chosen += [next(job for job in jobs if job.name.startswith("expand"))]
    if target in ("cuda-sm80", "hip-gfx942"):
        chosen += [next(job for job in jobs if job.name == "quantize" and job.constants["HADAMARD"] == 64)]
    return chosen


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernels/TARGET with a few kernels."""
    directory = tmp_path_factory.mktemp("kernels") / request.param
    with mock.patch.object(gpu_kernels, "list_jobs", subset):
        build_gpu_kernels(request.param, directory, lambda text: None)
    return directory


def check_binaries(directory: Path) -> list[BinaryReport]:
    """Each sidecar entry against its binary."""
    target = directory.name
    reports = []
    kernels = json.loads((directory / "kernels.json").read_text())["kernels"]
    for kernel in kernels:
        path, properties = directory / kernel["file"], kernel["properties"]
        used = resources(path, target)
        assert (used.entry, used.registers, used.spills) == (
            properties["entry"], properties["registers"], properties["spills"],
        )  # fmt: skip
        if target in OLDER_DRIVERS:
            assert path.read_bytes()[7:9] == b"\x33\x07"
        sizes = [8 if kind.startswith("*") else 4 for _, kind, _ in properties["arguments"]]
        assert parameter_sizes(path, target) == [*sizes, 8, 8]  # two pointers to scratch that no kernel here has

        report = analyse(path, target)
        assert report.blocks >= 1, kernel["file"]
        assert report.static_shared + report.dynamic_shared <= SHARED[target]
        assert report.spills == 0, kernel["file"]
        if kernel["name"].startswith("linear"):
            tile = re.fullmatch(r"((?:packed_)?\d+x\d+)_w\d+_s\d+", kernel["variant"])
            assert tile is not None
            assert report.loop is not None
            assert report.loop.spills == 0
            assert report.loop.matrix_instruction.startswith(MATRIX[target, kernel["name"]])
            assert report.loop.instructions <= INSTRUCTIONS[target, kernel["name"], tile[1]], kernel["file"]
        else:
            assert report.loop is None
        reports.append(report)
    return reports


def parameter_sizes(path: Path, target: str) -> list[int]:
    """Bytes of each parameter of the kernel, in order."""
    if target.startswith("hip"):
        arguments = _amd_metadata(path.read_bytes())["amdhsa.kernels"][0][".args"]
        return [item[".size"] for item in arguments if not item[".value_kind"].startswith("hidden")]
    found = re.findall(
        r"EIATTR_KPARAM_INFO.*?Ordinal\s*:\s*(0x\w+).*?Size\s*:\s*(0x\w+)", _run("cuobjdump", "-elf", str(path)), re.S
    )
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    return [sizes[index] for index in range(len(sizes))]


def test_binaries_are_what_kernels_json_says(built: Path) -> None:
    assert len(check_binaries(built)) == len(subset(built.name))
    value = json.loads((built / "kernels.json").read_text())
    assert value["target"] == built.name
    assert re.fullmatch(r"\d+\.\d+.*", value["built_with"]["triton"])
    for kernel in value["kernels"]:
        properties = kernel["properties"]
        assert properties["warp_size"] == (64 if built.name.startswith("hip") else 32)
        wide = {name for name, _, divisibility in properties["arguments"] if divisibility == 16}
        # M and U are whatever they are: 32760 tokens are no multiple of 16.
        assert not wide & {"M", "U", "R", "S", "gate_rows", "gain_rows"}
        assert {name for name, kind, _ in properties["arguments"] if kind.startswith("*")} <= wide


@pytest.mark.parametrize("target", TARGETS)
def test_jobs_cover_what_the_graph_needs(target: str) -> None:
    jobs = list_jobs(target)
    assert len({job.file for job in jobs}) == len(jobs)
    own = "linear_int8" if target in INT8 else "linear_bf16"
    tiles = {job.variant for job in jobs if job.name == own}
    assert 3 <= len(tiles) <= 5
    for tile in tiles:
        epilogues = {(job.constants["GELU"], job.constants["GATE"]) for job in jobs if job.variant == tile}
        assert epilogues == {(0, 0), (1, 0), (0, 1)}
    assert {f"expand_{kind}" for kind in ("int8", "bf16") if kind == "bf16" or target in INT8} <= {
        job.name for job in jobs
    }
    quantized = {
        (job.types["x_ptr"], job.constants["HAS_MASK"], job.constants["HADAMARD"])
        for job in jobs
        if job.name == "quantize"
    }
    assert {("*bf16", mask, width) for mask in (0, 1) for width in (1, 64)} <= quantized
    # A rotation must lie in one block.
    assert all(job.constants["HADAMARD"] <= 64 * job.constants["BLOCK_U"] for job in jobs if job.name == "quantize")


def test_equal_inputs_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the user's environment tells Triton to do something else, whose cache stays as it is."""
    jobs = subset("cuda-sm80")[1:]
    first = compile_jobs("cuda-sm80", jobs, lambda text: None, workers=1)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    said: list[str] = []
    assert compile_jobs("cuda-sm80", jobs, said.append, workers=2) == first
    assert sorted(said) == sorted(f"cuda-sm80 {job.file}" for job in jobs)
    assert not list(cache.iterdir())


def test_a_kernel_that_does_not_compile_is_named() -> None:
    job = subset("cuda-sm80")[1]
    broken = replace(job, constants={**job.constants, "BLOCK_R": 48})
    with pytest.raises(Hif4Error, match=rf"^cuda-sm80: Triton cannot compile {re.escape(job.file)} \(.+\); ") as caught:
        compile_jobs("cuda-sm80", [broken], lambda text: None)
    assert "\n" not in str(caught.value)


def test_missing_triton_and_odd_versions_are_said() -> None:
    with pytest.raises(Hif4Error, match="kernels are built for cuda-sm80, "):
        compile_jobs("cuda-sm75", [], lambda text: None)
    with (
        mock.patch.object(gpu_kernels.importlib.util, "find_spec", return_value=None),
        pytest.raises(Hif4Error, match="pip install 'hif4c"),
    ):
        build_gpu_kernels("cuda-sm80", Path("nowhere"), lambda text: None)
    for version in ("3.5.1", "3.10.0", "2.1"):
        with (
            mock.patch.object(gpu_kernels.importlib.metadata, "version", return_value=version),
            pytest.raises(Hif4Error, match=re.escape(f"triton {version} is installed")),
        ):
            build_gpu_kernels("cuda-sm80", Path("nowhere"), lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_shipped(target: str, tmp_path: Path) -> None:
    directory = tmp_path / target
    start = time.perf_counter()
    build_gpu_kernels(target, directory, lambda text: None)
    seconds = time.perf_counter() - start
    assert len(check_binaries(directory)) == len(list_jobs(target))
    # Six targets in three minutes, on two processors that are free.
    assert seconds < 30 or os.getloadavg()[0] > 3, f"{seconds:.0f} s"
