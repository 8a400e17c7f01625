"""The operators of a GPU without one: computed by Triton's interpreter, and launched into a recording driver."""

import dataclasses
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu import registry
from hif4c.runtime.gpu.driver import CudaDriver, HipDriver
from hif4c.runtime.gpu.epilogue import Epilogue, row_blocks
from hif4c.runtime.gpu.launcher import Bundled, UnfitKernels
from hif4c.runtime.gpu.operators import Operators
from hif4c.runtime.gpu.products import Planes, Product
from hif4c.runtime.gpu.tuning import Candidate, Tuner
from hif4c.runtime.kernel_files import UntrustedKernels
from tests.support.gpu_artifacts import Entry, make_artifact, shipped_kernels
from tests.support.gpu_stub import Stub, build
from tests.support.gpu_tuners import Picked

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = Path(__file__).parents[1] / "support" / "gpu_interpreted.py"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config").mkdir(mode=0o700)
    return Stub(library)


@needs_triton
def test_operators_in_the_interpreter_agree_with_the_portable_ones() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) > 60
    assert {name: wrong for name, wrong in results.items() if wrong is not None} == {}


class Recorded:
    """Operators on what is shipped for a target, launched into the stub; results are not computed."""

    def __init__(self, stub: Stub, root: Path, target: str, capability: tuple[int, int], prefix: str = "") -> None:
        stub.capability(*capability)
        self.stub = stub
        self.entries: dict[str, dict[str, Any]] = {}
        entries: list[Entry] = []
        for name, variant, file, data, properties in shipped_kernels(target):
            entry = file.replace(".", "_")  # so that a launch tells which binary it is of
            properties = {**properties, "entry": entry}
            entries.append((name, variant, file, data + entry.encode(), properties))
            self.entries[entry] = properties
            stub.expect_arguments(len(properties["arguments"]) + 2, entry)
        artifact = make_artifact(root / target, {target: [(*e[:3], e[3].replace(b"\0", b" "), e[4]) for e in entries]})
        driver = HipDriver(stub.path) if target.startswith("hip") else CudaDriver(stub.path)
        self.tuner = Picked(prefix, checks=False)
        self.operators = Operators(Bundled(artifact, driver, [0], lambda device: 0), lambda device: self.tuner)

    @property
    def launches(self) -> list[tuple[str, dict[str, int]]]:
        """(binary, its arguments by name) of each launch."""
        found = []
        for launch in self.stub.launches:
            names = [name for name, _, _ in self.entries[launch.function]["arguments"]]
            assert launch.arguments[len(names) :] == [0, 0]
            found.append((launch.function, dict(zip(names, launch.arguments, strict=False))))
        return found


def planes(rows: int, channels: int, lead: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    return hif4_format.quantize(torch.randn(*lead, rows, channels))


@needs_triton
def test_an_int8_linear_expands_both_operands_and_launches_its_epilogue(stub: Stub, tmp_path: Path) -> None:
    recorded = Recorded(stub, tmp_path, "cuda-sm80", (8, 6))
    codes, scales = planes(35, 320, (2,))
    w_codes, w_scales = planes(96, 320)
    modulation, residual = torch.randn(2, 6, 96), torch.randn(2, 35, 96).bfloat16()
    side, side_weight = torch.randn(2, 35, 20).bfloat16(), torch.randn(20, 96).bfloat16()
    y = recorded.operators.linear(
        codes, scales, w_codes, w_scales, torch.randn(96).bfloat16(), None, torch.bfloat16, side, side_weight,
        modulation[:, 2:3], residual,
    )  # fmt: skip
    assert (y.shape, y.dtype) == ((2, 35, 96), torch.bfloat16)
    (first, a), (second, w), (name, linear) = recorded.launches
    assert first == second
    assert first.startswith("expand_int8")
    assert (a["codes_ptr"], a["scales_ptr"], a["R"], a["U"], a["stride"]) == (
        codes.data_ptr(), scales.data_ptr(), 70, 5, 256,
    )  # fmt: skip
    assert (w["codes_ptr"], w["scales_ptr"], w["R"], w["U"]) == (w_codes.data_ptr(), w_scales.data_ptr(), 96, 5)
    assert name == "linear_int8_128x128_w8_s3_gate_cubin"
    for argument, source, made in (("values_ptr", a, "values_ptr"), ("weight_ptr", w, "values_ptr")):
        assert linear[argument] == source[made]
    assert linear["value_scales_ptr"] == a["value_scales_ptr"]
    assert linear["weight_scales_ptr"] == w["value_scales_ptr"]
    assert linear["side_ptr"] == side.data_ptr()
    assert linear["side_weight_ptr"] == side_weight.data_ptr()
    assert linear["residual_ptr"] == residual.data_ptr()
    assert linear["out_ptr"] == y.data_ptr()
    # The gate is a slice of the modulation: read in place, a row for the 35 tokens of a sample.
    assert linear["gate_ptr"] == modulation[:, 2:3].data_ptr()
    numbers = {key: linear[key] for key in ("M", "N", "U", "S", "gate_rows", "gate_stride")}
    assert numbers == {"M": 70, "N": 96, "U": 5, "S": 20, "gate_rows": 35, "gate_stride": 6 * 96}
    assert (linear["value_stride"], linear["weight_stride"]) == (256, 256)


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        ({}, "bias"),
        ({"activation": "gelu_tanh"}, "gelu"),
        ({"residual": torch.zeros(64, 96, dtype=torch.bfloat16)}, "gate"),
        ({"residual": torch.zeros(64, 96, dtype=torch.bfloat16), "gate": torch.ones(1, 96)}, "gate"),
    ],
)
@pytest.mark.parametrize(
    ("target", "capability", "linear", "expansions"),
    [
        ("cuda-sm80", (8, 0), "linear_int8_128x128_w8_s3", 2),
        ("cuda-sm120", (12, 0), "linear_int8_128x128_w8_s3", 2),
        ("cuda-sm90", (9, 0), "linear_bf16_packed_128x128_w8_s3", 1),
        ("cuda-sm100", (10, 0), "linear_bf16_packed_128x128_w8_s3", 1),
        ("hip-gfx942", (0, 0), "linear_int8_128x128_w8_s2", 2),
    ],
)
def test_every_target_has_a_kernel_for_every_epilogue(
    stub: Stub, tmp_path: Path, target: str, capability: tuple[int, int], linear: str, expansions: int,
    arguments: dict[str, Any], suffix: str,
) -> None:  # fmt: skip
    prefix = "linear_int8" if "int8" in linear else "linear_bf16 packed"
    recorded = Recorded(stub, tmp_path, target, capability, prefix)
    weight = planes(96, 128)
    recorded.operators.linear(*planes(64, 128), *weight, None, dtype=torch.bfloat16, **arguments)
    *expanded, (name, values) = recorded.launches
    assert name.startswith(f"{linear}_{suffix}_")
    assert len(expanded) == expansions
    if prefix.endswith("packed"):
        assert (values["weight_ptr"], values["weight_scales_ptr"]) == (weight[0].data_ptr(), weight[1].data_ptr())
    threads = recorded.entries[name]["num_warps"] * (64 if target.startswith("hip") else 32)
    assert stub.launches[-1].block == (threads, 1, 1)


@needs_triton
@pytest.mark.parametrize(
    ("target", "capability"),
    [
        ("cuda-sm80", (8, 0)),
        ("cuda-sm89", (8, 9)),
        ("cuda-sm90", (9, 0)),
        ("cuda-sm100", (10, 0)),
        ("cuda-sm120", (12, 0)),
        ("hip-gfx942", (0, 0)),
    ],
)
def test_every_shipped_binary_is_reached(stub: Stub, tmp_path: Path, target: str, capability: tuple[int, int]) -> None:
    recorded = Recorded(stub, tmp_path, target, capability)
    inputs, weight = Planes(*planes(64, 128)), Planes(*planes(96, 128))
    out = torch.empty(64, 96, dtype=torch.bfloat16)
    bias, residual = torch.zeros(96), torch.zeros(64, 96, dtype=torch.bfloat16)
    for epilogue in (Epilogue(bias), Epilogue(bias, "gelu_tanh"), Epilogue(bias, residual=residual)):
        for candidate in Product(recorded.operators.backend, inputs, None, weight, epilogue, out).candidates():
            candidate.run()
    for dtype in (torch.bfloat16, torch.float32):
        for width in (0, 64, 128, 256, 512, 1024):
            for mask in (None, torch.ones(1024)):
                x = torch.zeros(16, 1024, dtype=dtype)
                recorded.operators.quantize(x, mask, width)
                recorded.operators.norm_quantize(x, None, None, None, None, 1e-6, torch.bfloat16, mask, width)
    assert {launch.function for launch in stub.launches} == set(recorded.entries)


@needs_triton
def test_a_norm_reads_its_modulation_in_place(stub: Stub, tmp_path: Path) -> None:
    recorded = Recorded(stub, tmp_path, "cuda-sm80", (8, 0))
    x, modulation = torch.randn(2, 35, 128).bfloat16(), torch.randn(2, 6, 128)
    scale, shift = modulation[:, 1:2], modulation[:, :1]
    codes, scales = recorded.operators.norm_quantize(x, None, None, scale, shift, 1e-6, torch.bfloat16)
    ((name, values),) = recorded.launches
    assert re.fullmatch(r"norm_quantize_\d+x\d+_w\d+_bf16_cubin", name)
    pointers = [values[key] for key in ("x_ptr", "gain_ptr", "shift_ptr", "codes_ptr", "scales_ptr")]
    assert pointers == [tensor.data_ptr() for tensor in (x, scale, shift, codes, scales)]
    numbers = {key: values[key] for key in ("M", "K", "x_stride", "gain_rows", "gain_stride")}
    assert numbers == {"M": 70, "K": 128, "x_stride": 128, "gain_rows": 35, "gain_stride": 6 * 128}
    as_bits = [int.from_bytes(struct.pack("<f", value), "little") for value in (1.0, 1e-6)]
    assert [values["offset"], values["eps"]] == as_bits
    assert recorded.tuner.offered[-1] == "separate"
    # A weight and a modulation: the norm is torch's, and its result is quantized.
    recorded.operators.norm_quantize(x, torch.ones(128), None, scale, shift, 1e-6, torch.bfloat16)
    assert recorded.launches[-1][0].startswith("quantize_")


@needs_triton
def test_the_users_default_dtype_changes_no_launch(stub: Stub, tmp_path: Path) -> None:
    """What stands in for an absent bias, gate, weight or mask is fp32, as the binaries take it."""
    recorded = Recorded(stub, tmp_path, "cuda-sm80", (8, 0))
    activations, weight = planes(35, 128), planes(96, 128)
    x, residual = torch.randn(35, 128).bfloat16(), torch.zeros(35, 96, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        recorded.operators.linear(*activations, *weight, dtype=torch.bfloat16, residual=residual)
        recorded.operators.norm_quantize(x, None, None, None, None, 1e-6, torch.bfloat16)
        recorded.operators.quantize(x, None, 128)
    finally:
        torch.set_default_dtype(torch.float32)
    names = [name.split("_")[0] for name, _ in recorded.launches]
    assert names == ["expand", "expand", "linear", "norm", "quantize"]


@needs_triton
def test_dtypes_that_have_other_kernels_are_choices_of_their_own(stub: Stub, tmp_path: Path) -> None:
    """Else the choice for one would be thrown away, and all be timed again, whenever the other came by."""
    recorded, keys = Recorded(stub, tmp_path, "cuda-sm80", (8, 0)), []
    recorded.tuner.known = lambda key: keys.append(key)
    arguments = (*planes(8, 64), *planes(96, 64))
    side, side_weight, residual = torch.zeros(8, 4), torch.zeros(4, 96), torch.zeros(8, 96)
    for low in (torch.bfloat16, torch.float16):
        recorded.operators.linear(*arguments, dtype=torch.bfloat16, side=side.to(low), side_weight=side_weight.to(low))
        recorded.operators.linear(*arguments, dtype=torch.bfloat16, residual=residual.to(low))
    assert len(set(keys)) == len(keys) == 4


@needs_triton
def test_what_the_kernels_do_not_cover_goes_to_the_library(stub: Stub, tmp_path: Path) -> None:
    """fp32 outputs and odd N have no kernel; the library's GEMM takes them, and is right."""
    recorded = Recorded(stub, tmp_path, "cuda-sm80", (8, 0))
    for outputs, dtype in ((96, torch.float32), (24, torch.bfloat16)):
        recorded.operators.linear(*planes(8, 64), *planes(outputs, 64), dtype=dtype)
        assert recorded.tuner.offered == ["library"]
    recorded.operators.linear(*planes(8, 64), *planes(96, 64), dtype=torch.bfloat16)
    assert len(recorded.tuner.offered) == 6
    assert recorded.tuner.offered[-2:] == ["linear_bf16 128x128_w8_s3", "library"]


@needs_triton
def test_a_variant_that_does_not_load_is_dropped_and_the_choice_runs_alone(
    stub: Stub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded(stub, tmp_path, "cuda-sm80", (8, 0))

    class Unchecked(Tuner):
        """The stub computes nothing, so nothing can be compared."""

        def choose(self, key: str, candidates: Sequence[Candidate], *rest: Any, **named: Any) -> Candidate:
            same = [dataclasses.replace(item, family=None) for item in candidates if item.name != "library"]
            return super().choose(key, same, lambda result: None)

    tuner = Unchecked(["stub"], lambda run: 1.0 + len(timed.append(run) or timed), None)
    timed: list[Any] = []
    operators = Operators(recorded.operators.backend, lambda device: tuner)
    stub.fail("cuModuleLoadData", 200, after=1)  # expand_int8 loads, the first linear does not
    arguments = (*planes(64, 128), *planes(96, 128))
    operators.linear(*arguments, dtype=torch.bfloat16)
    assert "linear_int8 128x128_w8_s3 is not used" in caplog.text
    assert "CUDA_ERROR_INVALID_IMAGE" in caplog.text
    assert len(timed) == 4, "the others are timed"
    assert tuner.known("linear bfloat16 N=96 K=128 plain M<=64") == "linear_int8 128x128_w8_s4"
    before = len(stub.launches)
    operators.linear(*arguments, dtype=torch.bfloat16)
    assert len(stub.launches) == before + 3, "two expansions and one product"


@needs_triton
@pytest.mark.parametrize(
    ("x", "mask", "hadamard", "binary", "channels"),
    [
        (torch.zeros(3, 128, dtype=torch.bfloat16), False, 0, "bf16", 128),
        (torch.zeros(3, 128, dtype=torch.bfloat16), True, 64, "bf16_mask_hadamard64", 128),
        (torch.zeros(3, 128), True, 0, "fp32_mask", 128),
        (torch.zeros(3, 128, dtype=torch.float16), True, 0, "fp32_mask", 128),
        (torch.zeros(3, 128, dtype=torch.bfloat16), False, 128, "bf16_mask_hadamard128", 128),  # by ones
        (torch.zeros(3, 128, dtype=torch.bfloat16), True, 2, "fp32", 128),  # rotated, and masked, before
        (torch.zeros(3, 100, dtype=torch.bfloat16), True, 0, "bf16_mask", 128),  # padded before
        (torch.zeros(3, 112, dtype=torch.bfloat16), False, 0, "bf16", 112),
    ],
)
def test_a_quantization_finds_a_kernel(
    stub: Stub, tmp_path: Path, x: torch.Tensor, mask: bool, hadamard: int, binary: str, channels: int
) -> None:
    recorded = Recorded(stub, tmp_path, "cuda-sm90", (9, 0))
    codes, scales = recorded.operators.quantize(x, torch.ones(x.shape[1]) if mask else None, hadamard)
    ((name, values),) = recorded.launches
    assert re.fullmatch(rf"quantize_\d+x\d+_w\d+_{binary}_cubin", name)
    assert (values["M"], values["K"], values["codes_ptr"], values["scales_ptr"]) == (
        3, channels, codes.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    assert (codes.shape, scales.shape) == ((3, 64), (3, 2, 4))


@needs_triton
def test_a_device_that_is_not_served_computes_portably(stub: Stub, tmp_path: Path) -> None:
    recorded = Recorded(stub, tmp_path, "cuda-sm90", (9, 0))
    recorded.operators.backend.serves = lambda device: False  # type: ignore[method-assign]
    x = torch.randn(3, 128).bfloat16()
    assert all(map(torch.equal, recorded.operators.quantize(x), hif4_format.quantize(x)))
    assert recorded.operators.linear(*planes(8, 64), *planes(96, 64)).isfinite().all()
    assert recorded.operators.linear_w4(x, *planes(96, 128)).isfinite().all()
    assert not stub.launches


def test_tensors_on_two_devices_are_refused() -> None:
    class Nothing:
        name = "nothing"

        def serves(self, device: torch.device) -> bool:
            return True

    operators = Operators(Nothing())  # type: ignore[arg-type]
    with pytest.raises(Hif4Error, match="the tensors of one call are on cpu, meta"):
        operators.quantize(torch.zeros(2, 64), torch.ones(64, device="meta"))


def test_gates_of_every_shape() -> None:
    def of(gate: torch.Tensor, lead: tuple[int, ...]) -> Epilogue:
        return Epilogue.of((*lead, 16), None, None, None, None, gate, None)

    for shape, lead, rows, each in [
        ((2, 1, 16), (2, 5), 2, 5),
        ((2, 5, 16), (2, 5), 10, 1),
        ((1, 1, 16), (2, 5), 1, 10),
        ((1, 5, 16), (2, 5), 10, 1),  # no regular step: spread out
        ((2, 1, 1, 16), (2, 3, 5), 2, 15),
        ((2, 3, 1, 16), (2, 3, 5), 6, 5),
        ((1, 16), (7,), 1, 7),
    ]:
        gate = torch.randn(shape)
        epilogue = of(gate, lead)
        assert epilogue.gate is not None
        assert (epilogue.gate.shape[0], epilogue.gate_rows) == (rows, each), shape
        spread = epilogue.gate.repeat_interleave(each, 0)
        assert torch.equal(spread, gate.expand(*lead, 16).reshape(-1, 16))
        total = spread.shape[0]
        for limit in (1, 3, 4, 100):
            found = []
            for start, stop in row_blocks(total, limit, epilogue):
                block = epilogue.block(start, stop)
                assert block.gate is not None
                assert 0 < stop - start <= limit
                found.append(block.gate.repeat_interleave(block.gate_rows, 0))
                assert len(found[-1]) == stop - start
            assert torch.equal(torch.cat(found), spread), (shape, limit)
        index = torch.tensor([0, total - 1])
        assert torch.equal(epilogue.rows(index).gate, spread[index])  # type: ignore[arg-type]


def test_blocks_without_a_gate_are_whole_tiles() -> None:
    assert list(row_blocks(700, 300, Epilogue())) == [(0, 256), (256, 512), (512, 700)]
    assert list(row_blocks(300, 300, Epilogue())) == [(0, 256), (256, 300)]
    assert list(row_blocks(256, 300, Epilogue())) == [(0, 256)]


@pytest.fixture
def choice(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with one GPU, the stub's, and a process that has chosen nothing."""
    monkeypatch.setattr(registry, "open_driver", lambda: CudaDriver(stub.path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(registry._registry, "warned", set())
    yield
    registry.select("portable")


def has_gpu_kernel(name: str = "linear") -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"hif4::{name}", "CUDA")


def artifact(root: Path, trusted: bool = True) -> Any:
    from tests.support.gpu_artifacts import kernel

    return make_artifact(root, {"cuda-sm90": [kernel("quantize", "64x1_w4")]}, trusted)


@pytest.mark.usefixtures("choice")
def test_auto_uses_trusted_kernels_beside_those_of_the_cpu(tmp_path: Path) -> None:
    x = torch.randn(4, 128)
    before = torch.ops.hif4.quantize(x)
    assert not has_gpu_kernel()
    made = artifact(tmp_path / "a")
    registry.select("auto", made)
    assert registry.active_backend() == "bundled"
    assert all(has_gpu_kernel(name) for name in ("quantize", "norm_quantize", "linear", "linear_w4"))
    assert all(map(torch.equal, torch.ops.hif4.quantize(x), before))
    chosen = registry._registry.operators
    registry.select("bundled", made)
    assert registry._registry.operators is chosen, "the other expert of an artifact changes nothing"
    registry.select("auto", artifact(tmp_path / "b"))
    assert registry._registry.operators is chosen, "nor do the same kernels in another place"
    registry.select("portable", made)
    assert registry.active_backend() == "portable"
    assert not has_gpu_kernel()


@pytest.mark.usefixtures("choice")
def test_auto_says_once_how_to_trust_and_bundled_insists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = artifact(tmp_path / "a", trusted=False)
    for _ in range(2):
        registry.select("auto", made)
    assert registry.active_backend() == "portable"
    assert caplog.text.count("hif4c trust") == 1
    assert "slow portable kernels on the GPU" in caplog.text
    with pytest.raises(UntrustedKernels, match="hif4c trust"):
        registry.select("bundled", made)


@pytest.mark.usefixtures("choice")
def test_auto_without_fitting_kernels(stub: Stub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stub.capability(7, 5)
    registry.select("auto", artifact(tmp_path / "a"))
    assert registry.active_backend() == "portable"
    assert "builds none for Stub GPU (device 0, sm_75)" in caplog.text
    registry.select("auto")
    assert "there is no artifact" in caplog.text
    with pytest.raises(UnfitKernels, match="there is no artifact"):
        registry.select("bundled")


@pytest.mark.usefixtures("choice")
def test_a_missing_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(registry, "open_driver", lambda: CudaDriver("libnone.so.1"))
    registry.select("auto", artifact(tmp_path / "a"))
    assert "NVIDIA's driver is not installed" in caplog.text
    with pytest.raises(Hif4Error, match="NVIDIA's driver is not installed"):
        registry.select("bundled", artifact(tmp_path / "a"))


@pytest.mark.usefixtures("choice")
def test_a_damaged_artifact_is_an_error_whatever_was_asked(tmp_path: Path) -> None:
    made = artifact(tmp_path / "a")
    path = next((tmp_path / "a").rglob("*.cubin"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(Hif4Error, match="does not match the manifest"):
        registry.select("auto", made)


@pytest.mark.usefixtures("choice")
def test_one_gpu_of_two_that_has_kernels(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Mixed(CudaDriver):
        def device(self, index: int) -> Any:
            stub.capability(9 if index else 7, 0)
            return super().device(index)

    monkeypatch.setattr(registry, "open_driver", lambda: Mixed(stub.path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    registry.select("bundled", artifact(tmp_path / "a"))
    operators = registry._registry.operators
    assert operators is not None
    assert [operators.backend.serves(torch.device("cuda", index)) for index in (0, 1)] == [False, True]
    assert "a GPU has no kernels" in caplog.text
    assert "device 0, sm_70" in caplog.text


@pytest.mark.usefixtures("choice")
def test_jit_needs_triton_and_never_runs_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(Hif4Error, match="kernels='jit' needs Triton"):
        registry.select("jit")
    monkeypatch.undo()
    if importlib.util.find_spec("triton") is not None:
        registry.select("jit")
        assert registry.active_backend() == "jit"


@pytest.mark.usefixtures("choice")
def test_another_word() -> None:
    with pytest.raises(Hif4Error, match="kernels='fast' is not known"):
        registry.select("fast")
