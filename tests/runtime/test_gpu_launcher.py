"""Launches of bundled binaries through a recording driver: what reaches the driver, and what never does."""

import dataclasses
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.driver import CudaDriver, HipDriver
from hif4c.runtime.gpu.launcher import Bundled, Kernel, UnfitKernels, grid_of, mismatch
from hif4c.runtime.kernel_files import KernelFile, UntrustedKernels
from tests.support.gpu_artifacts import kernel, make_artifact, properties
from tests.support.gpu_stub import Stub, build

CPU = torch.device("cpu")
EXPAND = [("codes_ptr", "*i32", 16), ("values_ptr", "*i8", 16), ("R", "i32", 1), ("U", "i32", 1)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config").mkdir(mode=0o700)
    return Stub(library)


def expand(variant: str = "64x1_w4", **others: Any) -> Any:
    constants = {"BLOCK_R": 64, "BLOCK_U": 1}
    return kernel("expand_int8", variant, **{"arguments": EXPAND, "constants": constants, **others})


def bundled(root: Path, stub: Stub, *entries: Any, target: str = "cuda-sm90", stream: int = 0xBEEF) -> Bundled:
    artifact = make_artifact(root / "artifact", {target: list(entries)})
    driver = HipDriver(stub.path) if target.startswith("hip") else CudaDriver(stub.path)
    return Bundled(artifact, driver, [0], lambda device: stream)


def values(rows: int = 100, units: int = 3) -> dict[str, Any]:
    return {
        "codes_ptr": torch.zeros(rows, units * 8, dtype=torch.int32),
        "values_ptr": torch.zeros(rows, units * 64, dtype=torch.int8),
        "R": rows,
        "U": units,
    }


def test_arguments_in_order_then_two_null_pointers(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand(num_warps=8, shared=2048))
    given = values()
    (variant,) = backend.variants("expand_int8", CPU, given, {})
    stub.expect_arguments(6)
    backend.launch(variant, CPU, given)
    (launch,) = stub.launches
    assert launch.function == "expand_int8"
    assert launch.arguments == [given["codes_ptr"].data_ptr(), given["values_ptr"].data_ptr(), 100, 3, 0, 0]
    assert (launch.grid, launch.block, launch.shared, launch.stream) == ((2, 3, 1), (256, 1, 1), 2048, 0xBEEF)


def test_every_type_is_packed_in_its_own_size(stub: Stub, tmp_path: Path) -> None:
    types = {
        "a": ("i32", -5, struct.pack("<i", -5)),
        "b": ("fp32", 0.1, struct.pack("<f", 0.1)),
        "c": ("i64", -(1 << 40), struct.pack("<q", -(1 << 40))),
        "d": ("i1", True, b"\1"),
        "e": ("u8", 200, b"\xc8"),
        "f": ("fp64", 0.1, struct.pack("<d", 0.1)),
        "g": ("*fp32", None, b"\0" * 8),
        "h": ("i16", -2, struct.pack("<h", -2)),
    }
    arguments = [*EXPAND, *((name, kind, 1) for name, (kind, _, _) in types.items())]
    backend = bundled(tmp_path, stub, expand(arguments=arguments))
    given = {**values(), **{name: value for name, (_, value, _) in types.items()}}
    (variant,) = backend.variants("expand_int8", CPU, given, {})
    stub.expect_arguments(4 + len(types) + 2)
    backend.launch(variant, CPU, given)
    found = stub.launches[0].arguments[4:]
    expected = [int.from_bytes(data.ljust(8, b"\0"), "little") for _, _, data in types.values()]
    assert found == [*expected, 0, 0]


def test_an_amd_block_has_waves_of_64(stub: Stub, tmp_path: Path) -> None:
    name, variant, file, data, described = expand(num_warps=8, warp_size=64)
    entry = (name, variant, file.replace(".cubin", ".hsaco"), data, described)
    backend = bundled(tmp_path, stub, entry, target="hip-gfx942")
    given = values()
    backend.launch(backend.variants("expand_int8", CPU, given, {})[0], CPU, given)
    assert stub.launches[0].block == (512, 1, 1)


def test_a_variant_whose_assumptions_break_is_not_offered_and_cannot_be_launched(stub: Stub, tmp_path: Path) -> None:
    wide = [*EXPAND[:2], ("R", "i32", 16), EXPAND[3]]
    backend = bundled(tmp_path, stub, expand("wide", arguments=wide), expand("any"))
    given = values(rows=100)
    assert [item.variant for item in backend.variants("expand_int8", CPU, given, {})] == ["any"]
    assert len(backend.variants("expand_int8", CPU, values(rows=96), {})) == 2
    whole = backend.variants("expand_int8", CPU, values(rows=96), {})[0]
    with pytest.raises(Hif4Error, match="R is 100, which is not a multiple of 16"):
        backend.launch(whole, CPU, given)
    assert not stub.launches

    storage = torch.zeros(101 * 3 * 64 + 1, dtype=torch.int8)
    given["values_ptr"] = storage[1 : 100 * 3 * 64 + 1]
    assert backend.variants("expand_int8", CPU, given, {}) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"values_ptr": torch.zeros(4, dtype=torch.float32)}, r"values_ptr is torch.float32, not \*i8"),
        ({"R": 2**31}, "R is 2147483648, which does not fit i32"),
        ({"R": None}, "R is not a number"),
        ({"R": 1.5}, "R is 1.5, which does not fit i32"),
    ],
)
def test_values_of_other_types_do_not_fit(stub: Stub, tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    backend = bundled(tmp_path, stub, expand())
    (variant,) = backend.variants("expand_int8", CPU, values(), {})
    with pytest.raises(Hif4Error, match=reason):
        backend.launch(variant, CPU, {**values(), **changed})
    missing = values()
    del missing["U"]
    assert mismatch(variant, missing, {}) == "it takes an argument U that this launch does not have"
    assert not stub.launches


def test_constants_choose_among_binaries(stub: Stub, tmp_path: Path) -> None:
    entries = [
        expand(suffix=f".{gelu}", constants={"GELU": gelu, "BLOCK_R": 64, "BLOCK_U": 1, "S": 0}) for gelu in (0, 1)
    ]
    backend = bundled(tmp_path, stub, *entries)
    (found,) = backend.variants("expand_int8", CPU, values(), {"GELU": 1})
    assert found.constants["GELU"] == 1
    assert backend.variants("expand_int8", CPU, values(), {"OTHER": 1}) == []
    # A value that a binary was built for is no argument of it, and must be that value.
    assert len(backend.variants("expand_int8", CPU, {**values(), "S": 0}, {})) == 2
    assert backend.variants("expand_int8", CPU, {**values(), "S": 4}, {}) == []


def test_a_tensor_elsewhere_is_refused(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand())
    (variant,) = backend.variants("expand_int8", CPU, values(), {})
    given = {**values(), "codes_ptr": torch.zeros(4, dtype=torch.int32, device="meta")}
    with pytest.raises(Hif4Error, match="codes_ptr is on meta, the launch on cpu"):
        backend.launch(variant, CPU, given)


def test_a_module_is_loaded_once_whatever_the_threads(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand(shared=100_000))
    given = values()
    (variant,) = backend.variants("expand_int8", CPU, given, {})
    assert "cuModuleLoadData" not in stub.names, "nothing is loaded before it is launched"
    threads = [threading.Thread(target=backend.launch, args=(variant, CPU, given)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stub.names.count("cuModuleLoadData") == 1
    assert [call for call in stub.calls if call.startswith("cuFuncSetAttribute")] == [
        "cuFuncSetAttribute 2000 8 100000"
    ]
    assert len(stub.launches) == 8
    order = [name for name in stub.names if name.startswith(("cuModule", "cuFunc", "cuOcc", "cuLaunch"))][:5]
    assert order == [
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        "cuLaunchKernel",
    ]


def test_two_devices_have_modules_of_their_own(stub: Stub, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", {"cuda-sm90": [expand()]})
    backend = Bundled(artifact, CudaDriver(stub.path), [0, 1], lambda device: (device.index or 0) + 7)
    kernels = backend._kernels["cuda-sm90"]["expand_int8"]
    for index in (0, 1, 1):
        backend._driver.launch(
            index, backend._function(kernels[0], torch.device("cuda", index)), (1, 1, 1), 32, 0, 0, []
        )
    assert stub.names.count("cuModuleLoadData") == 2
    assert [launch.context for launch in stub.launches] == [100, 101, 101]


def test_a_corrupt_binary_gives_the_drivers_error_and_leaves_others_usable(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand("bad", image=b"garbage, though trusted"), expand("good"))
    given = values()
    bad, good = backend.variants("expand_int8", CPU, given, {})
    for _ in range(2):
        with pytest.raises(
            Hif4Error,
            match=r"expand_int8\.bad\.cubin on Stub GPU .*CUDA_ERROR_INVALID_IMAGE.*; update the GPU's driver",
        ):
            backend.launch(bad, CPU, given)
    assert stub.names.count("cuModuleLoadData") == 1, "a binary that failed is not tried again"
    backend.launch(good, CPU, given)
    assert len(stub.launches) == 1


def test_a_block_that_fits_no_multiprocessor(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand(shared=2048))
    given = values()
    stub.resident_blocks(0)
    with pytest.raises(Hif4Error, match="a block of 128 threads with 2048 bytes of shared memory does not fit"):
        backend.launch(backend.variants("expand_int8", CPU, given, {})[0], CPU, given)
    assert not stub.launches


def test_more_shared_memory_than_the_device_has(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand(shared=300_000))
    given = values()
    with pytest.raises(Hif4Error, match=r"300000 bytes of shared memory for a block .*CUDA_ERROR_INVALID_VALUE"):
        backend.launch(backend.variants("expand_int8", CPU, given, {})[0], CPU, given)


def test_a_launch_that_the_driver_refuses(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand())
    given = values()
    stub.fail("cuLaunchKernel", 701)
    with pytest.raises(Hif4Error, match="CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        backend.launch(backend.variants("expand_int8", CPU, given, {})[0], CPU, given)


@pytest.mark.parametrize(
    ("capability", "held", "chosen"),
    [
        ((8, 6), ["cuda-sm80", "cuda-sm89"], "cuda-sm80"),
        ((8, 9), ["cuda-sm80", "cuda-sm89"], "cuda-sm89"),
        ((8, 9), ["cuda-sm80"], "cuda-sm80"),
        ((12, 0), ["cuda-sm90", "cuda-sm120"], "cuda-sm120"),
    ],
)
def test_the_binaries_that_suit_a_device_best(
    stub: Stub, tmp_path: Path, capability: tuple[int, int], held: list[str], chosen: str
) -> None:
    stub.capability(*capability)
    artifact = make_artifact(tmp_path / "artifact", {target: [expand(target[5:])] for target in held})
    backend = Bundled(artifact, CudaDriver(stub.path), [0], lambda device: 0)
    assert [item.variant for item in backend.variants("expand_int8", CPU, values(), {})] == [chosen[5:]]


def test_a_device_without_binaries_is_named_with_what_it_needs(stub: Stub, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", {"cuda-sm80": [expand()], "cuda-sm90": [expand()]})
    driver = CudaDriver(stub.path)
    stub.capability(10, 0)
    with pytest.raises(
        UnfitKernels,
        match=r"has GPU kernels for cuda-sm80, cuda-sm90 only, and Stub GPU \(device 0, sm_100\) needs cuda-sm100; "
        "compile with --target cuda-sm100",
    ):
        Bundled(artifact, driver, [0])
    stub.capability(7, 5)
    with pytest.raises(UnfitKernels, match=r"hif4c builds none for Stub GPU \(device 0, sm_75\)"):
        Bundled(artifact, driver, [0])
    with pytest.raises(UnfitKernels, match="has no GPU kernels"):
        Bundled(make_artifact(tmp_path / "empty", {}), driver, [0])
    assert "cuModuleLoadData" not in stub.names


def test_untrusted_and_altered_binaries_never_reach_the_driver(stub: Stub, tmp_path: Path) -> None:
    driver = CudaDriver(stub.path)
    artifact = make_artifact(tmp_path / "artifact", {"cuda-sm90": [expand()]}, trusted=False)
    with pytest.raises(UntrustedKernels, match="hif4c trust"):
        Bundled(artifact, driver, [0])
    artifact = make_artifact(tmp_path / "artifact", {"cuda-sm90": [expand()]})
    path = artifact.root / "kernels" / "cuda-sm90" / "expand_int8.64x1_w4.cubin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(Hif4Error, match="does not match the manifest"):
        Bundled(artifact, driver, [0])
    assert "cuModuleLoadData" not in stub.names


def test_what_was_checked_is_what_is_loaded(stub: Stub, tmp_path: Path) -> None:
    backend = bundled(tmp_path, stub, expand())
    (tmp_path / "artifact" / "kernels" / "cuda-sm90" / "expand_int8.64x1_w4.cubin").write_bytes(b"changed after select")
    given = values()
    backend.launch(backend.variants("expand_int8", CPU, given, {})[0], CPU, given)
    assert len(stub.launches) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"num_warps": "8"},
        {"num_warps": 64},
        {"num_warps": True},
        {"shared": -1},
        {"entry": "not a name"},
        {"entry": None},
        {"arguments": [["a", "tensordesc", 1]]},
        {"arguments": [["a", "i32", 0]]},
        {"arguments": [["a", "i32"]]},
        {"arguments": [["a", "i32", 1], ["a", "i32", 1]]},
        {"constants": {"BLOCK_M": "128"}},
        {"constants": None},
    ],
)
def test_malformed_properties_are_refused(changed: dict[str, Any]) -> None:
    file = KernelFile("expand_int8", "x", "x.cubin", 1, "0" * 64, {**properties(EXPAND), **changed})
    with pytest.raises(Hif4Error, match=r"x\.cubin: its properties are not a GPU kernel's"):
        Kernel.from_file(file)
    missing = dataclasses.replace(file, properties={})
    with pytest.raises(Hif4Error, match="KeyError"):
        Kernel.from_file(missing)


@pytest.mark.parametrize(
    ("name", "constants", "given", "grid"),
    [
        ("quantize", {"BLOCK_M": 64, "BLOCK_U": 1}, {"M": 65, "K": 200}, (2, 4, 1)),
        ("quantize", {"BLOCK_M": 64, "BLOCK_U": 4}, {"M": 64, "K": 320}, (1, 2, 1)),
        ("norm_quantize", {"BLOCK_M": 8, "BLOCK_U": 4}, {"M": 65, "K": 5120}, (9, 1, 1)),
        ("expand_bf16", {"BLOCK_R": 64, "BLOCK_U": 2}, {"R": 129, "U": 3}, (3, 2, 1)),
        ("linear_int8", {"BLOCK_M": 128, "BLOCK_N": 64}, {"M": 32760, "N": 5120}, (256 * 80, 1, 1)),
        ("linear_bf16", {"BLOCK_M": 128, "BLOCK_N": 256}, {"M": 1, "N": 16}, (1, 1, 1)),
    ],
)
def test_grids(name: str, constants: dict[str, int], given: dict[str, int], grid: tuple[int, ...]) -> None:
    assert grid_of(Kernel(name, "x", constants, 4), given) == grid


def test_impossible_and_unknown_grids() -> None:
    with pytest.raises(Hif4Error, match="is not possible"):
        grid_of(Kernel("expand_int8", "x", {"BLOCK_R": 64, "BLOCK_U": 1}, 4), {"R": 64, "U": 65536})
    with pytest.raises(Hif4Error, match="knows no such kernel"):
        grid_of(Kernel("other", "x", {}, 4), {})
