"""The drivers against a library that records every call: order, values, contexts, and what an error says."""

import subprocess
import threading
from pathlib import Path

import pytest

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.driver import CudaDriver, HipDriver, fitting_targets
from tests.support.gpu_stub import ELF, SOURCE, Stub, build, compiler, header_directories

IMAGE = ELF + b"add_kernel"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(library: Path) -> Stub:
    return Stub(library)


def test_cuda_loads_into_torchs_primary_context_and_launches(stub: Stub) -> None:
    driver = CudaDriver(stub.path)
    module = driver.load(0, IMAGE)
    function = driver.function(module, "add_kernel")
    stub.expect_arguments(0)
    driver.launch(0, function, (3, 2, 1), 256, 1024, 0xABC, [])
    assert stub.calls == [
        "cuInit 0",
        "cuDeviceGet 0",
        "cuDevicePrimaryCtxRetain 0",
        "cuCtxPushCurrent 100",
        "cuModuleLoadData context=100",
        "cuCtxPopCurrent ",
        "cuModuleGetFunction module=1000 name=add_kernel",
        "cuCtxPushCurrent 100",
        "cuLaunchKernel context=100 function=add_kernel grid=3,2,1 block=256,1,1 shared=1024 stream=abc arguments=",
        "cuCtxPopCurrent ",
    ]


def test_each_device_has_its_context_retained_once(stub: Stub) -> None:
    driver = CudaDriver(stub.path)
    functions = {index: driver.function(driver.load(index, IMAGE), "add_kernel") for index in (0, 1)}
    for index in (1, 0, 1):
        driver.launch(index, functions[index], (1, 1, 1), 32, 0, 0, [])
    assert stub.names.count("cuDevicePrimaryCtxRetain") == 2
    assert [launch.context for launch in stub.launches] == [101, 100, 101]


def test_a_context_that_is_current_is_not_pushed_again(stub: Stub) -> None:
    driver = CudaDriver(stub.path)
    function = driver.function(driver.load(0, IMAGE), "add_kernel")
    with driver._current(0):
        before = stub.names.count("cuCtxPushCurrent")
        driver.launch(0, function, (1, 1, 1), 32, 0, 0, [])
    assert stub.names.count("cuCtxPushCurrent") == before
    assert stub.launches[0].context == 100


def test_many_threads_share_a_driver(stub: Stub) -> None:
    driver = CudaDriver(stub.path)
    function = driver.function(driver.load(0, IMAGE), "add_kernel")
    threads = [
        threading.Thread(target=driver.launch, args=(0, function, (number + 1, 1, 1), 32, 0, 0, []))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launch.grid[0] for launch in stub.launches) == list(range(1, 9))
    assert {launch.context for launch in stub.launches} == {100}


def test_only_more_shared_memory_than_48_kb_is_asked_for(stub: Stub) -> None:
    driver = CudaDriver(stub.path)
    function = driver.function(driver.load(0, IMAGE), "add_kernel")
    driver.allow_shared(0, function, 48 * 1024)
    assert "cuFuncSetAttribute" not in stub.names
    driver.allow_shared(0, function, 48 * 1024 + 16)
    assert f"cuFuncSetAttribute {function:x} 8 49168" in stub.calls


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("cuModuleLoadData", 209, "CUDA_ERROR_NO_BINARY_FOR_GPU (209): no kernel image is available for execution"),
        ("cuFuncSetAttribute", 1, "cuFuncSetAttribute failed with CUDA_ERROR_INVALID_VALUE (1): invalid argument"),
        ("cuLaunchKernel", 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701): too many resources requested"),
        ("cuDevicePrimaryCtxRetain", 12345, "failed with unknown error (12345): no text"),
    ],
)
def test_an_error_has_the_drivers_name_and_text(stub: Stub, call: str, code: int, message: str) -> None:
    driver = CudaDriver(stub.path)
    stub.fail(call, code)

    def use() -> None:
        function = driver.function(driver.load(0, IMAGE), "add_kernel")
        driver.allow_shared(0, function, 100_000)
        driver.launch(0, function, (1, 1, 1), 32, 100_000, 0, [])

    with pytest.raises(Hif4Error) as caught:
        use()
    assert message in str(caught.value)
    if call in ("cuModuleLoadData", "cuFuncSetAttribute", "cuLaunchKernel"):
        assert stub.names[-1] == "cuCtxPopCurrent", "the thread keeps the context that it had"


def test_a_corrupt_binary_and_a_missing_entry(stub: Stub) -> None:
    driver = CudaDriver(stub.path)
    with pytest.raises(Hif4Error, match=r"CUDA_ERROR_INVALID_IMAGE \(200\): device kernel image is invalid"):
        driver.load(0, b"not a cubin")
    with pytest.raises(Hif4Error, match=r"kernel 'other': .*CUDA_ERROR_NOT_FOUND"):
        driver.function(driver.load(0, IMAGE), "other")


def test_no_device_is_an_error_when_the_driver_starts(stub: Stub) -> None:
    stub.fail("cuInit", 100)
    with pytest.raises(Hif4Error, match=r"CUDA_ERROR_NO_DEVICE \(100\): no CUDA-capable device is detected"):
        CudaDriver(stub.path)
    stub.reset()
    with pytest.raises(Hif4Error, match=r"CUDA device 7: .*CUDA_ERROR_INVALID_DEVICE"):
        CudaDriver(stub.path).device(7)


def test_a_missing_library_says_what_to_install() -> None:
    with pytest.raises(Hif4Error, match=r"libnone\.so\.1.*install it.*--gpus all.*portable"):
        CudaDriver("libnone.so.1")
    with pytest.raises(Hif4Error, match=r"libnone\.so\.1.*hip-runtime-amd.*portable"):
        HipDriver("libnone.so.1")


def test_a_library_without_the_functions_is_too_old() -> None:
    with pytest.raises(Hif4Error, match="too old"):
        CudaDriver("libc.so.6")


def test_a_device_is_described(stub: Stub) -> None:
    stub.capability(8, 6)
    device = CudaDriver(stub.path).device(1)
    assert (device.name, device.architecture, device.index) == ("Stub GPU", "sm_86", 1)
    assert str(device) == "Stub GPU (device 1, sm_86)"
    assert CudaDriver(stub.path).version() == 12080
    stub.capability(12, 1)
    assert CudaDriver(stub.path).device(0).architecture == "sm_121"


def test_hip_sets_the_device_and_sets_it_back(stub: Stub) -> None:
    driver = HipDriver(stub.path)
    device = driver.device(1)
    assert (device.name, device.architecture) == ("Stub Instinct", "gfx942")
    function = driver.function(driver.load(1, IMAGE), "add_kernel")
    driver.allow_shared(1, function, 60_000)
    driver.launch(1, function, (5, 1, 1), 512, 60_000, 0x10, [])
    assert stub.calls == [
        "hipInit 0",
        "hipGetDeviceProperties 1",
        "hipSetDevice 1",
        "hipModuleLoadData context=1",
        "hipSetDevice 0",
        "hipModuleGetFunction module=1000 name=add_kernel",
        "hipSetDevice 1",
        "hipModuleLaunchKernel context=1 function=add_kernel grid=5,1,1 block=512,1,1 shared=60000 stream=10 "
        "arguments=",
        "hipSetDevice 0",
    ]


def test_a_hip_error_is_not_left_for_torch_to_find(stub: Stub) -> None:
    driver = HipDriver(stub.path)
    with pytest.raises(Hif4Error, match=r"hipErrorNoBinaryForGpu \(209\): no kernel image"):
        driver.load(0, b"not a code object")
    assert stub.names[-1] == "hipGetLastError"


def test_occupancy(stub: Stub) -> None:
    stub.resident_blocks(0)
    for driver in (CudaDriver(stub.path), HipDriver(stub.path)):
        function = driver.function(driver.load(0, IMAGE), "add_kernel")
        assert driver.resident_blocks(0, function, 256, 4096) == 0
        assert stub.calls[-2 if isinstance(driver, CudaDriver) else -1].endswith(f"{function:x} 256 4096")


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("sm_75", ()),
        ("sm_80", ("cuda-sm80",)),
        ("sm_86", ("cuda-sm80",)),
        ("sm_89", ("cuda-sm89", "cuda-sm80")),
        ("sm_90", ("cuda-sm90",)),
        ("sm_100", ("cuda-sm100",)),
        ("sm_103", ()),
        ("sm_120", ("cuda-sm120",)),
        ("sm_121", ()),
        ("gfx942", ("hip-gfx942",)),
        ("gfx90a", ()),
        ("gfx1100", ()),
    ],
)
def test_targets_that_a_device_runs(architecture: str, targets: tuple[str, ...]) -> None:
    assert fitting_targets(architecture) == targets


@pytest.mark.parametrize("define", ["WITH_CUDA_H", "WITH_HIP_H"])
def test_prototypes_and_constants_are_those_of_the_vendors_headers(define: str) -> None:
    directory = header_directories().get(define)
    if directory is None:
        pytest.skip("Triton, which brings the headers of CUDA and HIP, is not installed")
    command = [compiler(), "-std=gnu11", "-fsyntax-only", f"-D{define}", f"-I{directory}", str(SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
