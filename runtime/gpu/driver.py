"""The CUDA driver and the HIP runtime through ctypes: load a binary, find its function, launch it.

One class for each behind one interface. Torch's primary context is used, so pointers and streams of torch's tensors are
valid here. Every error code becomes a sentence with the driver's own name and text for it.
"""

from __future__ import annotations

import ctypes
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hif4c.runtime.errors import Hif4Error

__all__ = ["CudaDriver", "Device", "Driver", "HipDriver", "fitting_targets", "open_driver"]

_I, _U, _P = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
_OUT = ctypes.POINTER(ctypes.c_void_p)
_INT_OUT = ctypes.POINTER(ctypes.c_int)
_TEXT_OUT = ctypes.POINTER(ctypes.c_char_p)

# enumerators of cuda.h
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_LIMIT = 48 << 10  # bytes of shared memory that a block may have without asking
# Of hipDeviceProp_tR0600, whose layout is fixed by its name.
_HIP_NAME_AT, _HIP_ARCHITECTURE_AT, _HIP_TEXT_BYTES, _HIP_PROPERTIES_BYTES = 0, 1160, 256, 8192


@dataclass(frozen=True)
class Device:
    """A GPU as the driver describes it; `architecture` is "sm_86" or "gfx942", `index` is torch's."""

    index: int
    name: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.name} (device {self.index}, {self.architecture})"


class Driver(ABC):
    """What a launcher needs of a GPU's driver. Handles are the driver's pointers as integers; all of it is thread-safe.

    Every method raises Hif4Error with the driver's name and text of the error.
    """

    @abstractmethod
    def device(self, index: int) -> Device:
        """Describe a device."""

    @abstractmethod
    def version(self) -> int:
        """The driver's version as one number; another version may favour other kernels."""

    @abstractmethod
    def load(self, index: int, image: bytes) -> int:
        """Load a binary (cubin or code object) into a device; returns the module."""

    @abstractmethod
    def function(self, module: int, entry: str) -> int:
        """The kernel of that name in a module."""

    @abstractmethod
    def allow_shared(self, index: int, function: int, shared: int) -> None:
        """Let a kernel have `shared` bytes of dynamic shared memory; does nothing where no permission is needed."""

    @abstractmethod
    def resident_blocks(self, index: int, function: int, threads: int, shared: int) -> int:
        """How many blocks of that size fit a multiprocessor at once; 0 means that a launch is impossible."""

    @abstractmethod
    def launch(
        self, index: int, function: int, grid: tuple[int, int, int], threads: int, shared: int, stream: int,
        arguments: Sequence[int],
    ) -> None:  # fmt: skip
        """Enqueue a kernel on a stream of that device; `arguments` are the addresses of the values."""


class CudaDriver(Driver):
    """libcuda, which NVIDIA's driver brings.

    Args:
        library: name or path of the library; another one stands in for it in tests.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._library = _open(
            library,
            "NVIDIA's driver is not installed or not visible here; install it, or start the container with --gpus all",
            {
                "cuInit": (_U,),
                "cuDriverGetVersion": (_INT_OUT,),
                "cuDeviceGet": (_INT_OUT, _I),
                "cuDeviceGetName": (ctypes.c_char_p, _I, _I),
                "cuDeviceGetAttribute": (_INT_OUT, _I, _I),
                "cuDevicePrimaryCtxRetain": (_OUT, _I),
                "cuCtxGetCurrent": (_OUT,),
                "cuCtxPushCurrent_v2": (_P,),
                "cuCtxPopCurrent_v2": (_OUT,),
                "cuModuleLoadData": (_OUT, ctypes.c_char_p),
                "cuModuleGetFunction": (_OUT, _P, ctypes.c_char_p),
                "cuFuncSetAttribute": (_P, _I, _I),
                "cuOccupancyMaxActiveBlocksPerMultiprocessor": (_INT_OUT, _P, _I, ctypes.c_size_t),
                "cuLaunchKernel": (_P, _U, _U, _U, _U, _U, _U, _U, _P, _P, _P),
                "cuGetErrorName": (_I, _TEXT_OUT),
                "cuGetErrorString": (_I, _TEXT_OUT),
            },
        )
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        self._check(self._library.cuInit(0), "cuInit", "the CUDA driver")

    def device(self, index: int) -> Device:
        handle = self._device(index)
        what = f"CUDA device {index}"
        name = ctypes.create_string_buffer(256)
        self._check(self._library.cuDeviceGetName(name, len(name), handle), "cuDeviceGetName", what)
        capability = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(capability, _COMPUTE_CAPABILITY, strict=True):
            status = self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
            self._check(status, "cuDeviceGetAttribute", what)
        major, minor = (value.value for value in capability)
        return Device(index, name.value.decode(errors="replace"), f"sm_{major}{minor}")

    def version(self) -> int:
        version = ctypes.c_int()
        self._check(self._library.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion", "the CUDA driver")
        return version.value

    def load(self, index: int, image: bytes) -> int:
        module = ctypes.c_void_p()
        with self._current(index):
            status = self._library.cuModuleLoadData(ctypes.byref(module), image)
        self._check(status, "cuModuleLoadData", f"a binary of {len(image)} bytes on CUDA device {index}")
        return module.value or 0

    def function(self, module: int, entry: str) -> int:
        function = ctypes.c_void_p()
        status = self._library.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
        self._check(status, "cuModuleGetFunction", f"kernel {entry!r}")
        return function.value or 0

    def allow_shared(self, index: int, function: int, shared: int) -> None:
        if shared > _STATIC_LIMIT:
            with self._current(index):
                status = self._library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared)
            self._check(
                status, "cuFuncSetAttribute", f"{shared} bytes of shared memory for a block on CUDA device {index}"
            )

    def resident_blocks(self, index: int, function: int, threads: int, shared: int) -> int:
        blocks = ctypes.c_int()
        with self._current(index):
            status = self._library.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), function, threads, shared
            )
        self._check(status, "cuOccupancyMaxActiveBlocksPerMultiprocessor", f"a kernel on CUDA device {index}")
        return blocks.value

    def launch(
        self, index: int, function: int, grid: tuple[int, int, int], threads: int, shared: int, stream: int,
        arguments: Sequence[int],
    ) -> None:  # fmt: skip
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        with self._current(index):
            status = self._library.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, pointers, None)
        self._check(status, "cuLaunchKernel", f"a grid of {grid} x {threads} threads on CUDA device {index}")

    def _device(self, index: int) -> int:
        device = ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet", f"CUDA device {index}")
        return device.value

    def _primary_context(self, index: int) -> int:
        with self._lock:
            if index not in self._contexts:
                context = ctypes.c_void_p()
                status = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device(index))
                self._check(status, "cuDevicePrimaryCtxRetain", f"CUDA device {index}")
                self._contexts[index] = context.value or 0
            return self._contexts[index]

    @contextmanager
    def _current(self, index: int) -> Iterator[None]:
        """Within it, the device's primary context is this thread's; the default stream means that context's."""
        wanted, current = self._primary_context(index), ctypes.c_void_p()
        self._check(self._library.cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent", f"CUDA device {index}")
        if current.value == wanted:
            yield
            return
        self._check(self._library.cuCtxPushCurrent_v2(wanted), "cuCtxPushCurrent", f"CUDA device {index}")
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(current))

    def _check(self, status: int, call: str, what: str) -> None:
        if status:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise _failure(what, call, status, name.value, text.value)


class HipDriver(Driver):
    """libamdhip64, the HIP runtime of ROCm: the copy that torch has loaded, else one of the system.

    Args:
        library: name or path of the library; None looks for it.
    """

    def __init__(self, library: str | None = None) -> None:
        self._library = _open(
            library or _find_hip(),
            "the HIP runtime is not installed or not visible here; install ROCm's hip-runtime-amd, "
            "or start the container with --device=/dev/kfd --device=/dev/dri",
            {
                "hipInit": (_U,),
                "hipDriverGetVersion": (_INT_OUT,),
                "hipGetDevicePropertiesR0600": (ctypes.c_char_p, _I),
                "hipGetDevice": (_INT_OUT,),
                "hipSetDevice": (_I,),
                "hipModuleLoadData": (_OUT, ctypes.c_char_p),
                "hipModuleGetFunction": (_OUT, _P, ctypes.c_char_p),
                "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor": (_INT_OUT, _P, _I, ctypes.c_size_t),
                "hipModuleLaunchKernel": (_P, _U, _U, _U, _U, _U, _U, _U, _P, _P, _P),
                "hipGetLastError": (),
            },
        )
        for name in ("hipGetErrorName", "hipGetErrorString"):
            function = getattr(self._library, name)
            function.argtypes, function.restype = (_I,), ctypes.c_char_p
        self._check(self._library.hipInit(0), "hipInit", "the HIP runtime")

    def device(self, index: int) -> Device:
        properties = ctypes.create_string_buffer(_HIP_PROPERTIES_BYTES)
        status = self._library.hipGetDevicePropertiesR0600(properties, index)
        self._check(status, "hipGetDeviceProperties", f"HIP device {index}")

        def text(start: int) -> str:
            return properties.raw[start : start + _HIP_TEXT_BYTES].split(b"\0")[0].decode(errors="replace")

        # gcnArchName goes on with features, as in "gfx942:sramecc+:xnack-".
        return Device(index, text(_HIP_NAME_AT), text(_HIP_ARCHITECTURE_AT).split(":")[0])

    def version(self) -> int:
        version = ctypes.c_int()
        self._check(self._library.hipDriverGetVersion(ctypes.byref(version)), "hipDriverGetVersion", "the HIP runtime")
        return version.value

    def load(self, index: int, image: bytes) -> int:
        module = ctypes.c_void_p()
        with self._current(index):
            status = self._library.hipModuleLoadData(ctypes.byref(module), image)
        self._check(status, "hipModuleLoadData", f"a binary of {len(image)} bytes on HIP device {index}")
        return module.value or 0

    def function(self, module: int, entry: str) -> int:
        function = ctypes.c_void_p()
        status = self._library.hipModuleGetFunction(ctypes.byref(function), module, entry.encode())
        self._check(status, "hipModuleGetFunction", f"kernel {entry!r}")
        return function.value or 0

    def allow_shared(self, index: int, function: int, shared: int) -> None:
        """Nothing to do: the 64 KB of an AMD compute unit are a kernel's without asking."""

    def resident_blocks(self, index: int, function: int, threads: int, shared: int) -> int:
        blocks = ctypes.c_int()
        with self._current(index):
            status = self._library.hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), function, threads, shared
            )
        self._check(status, "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor", f"a kernel on HIP device {index}")
        return blocks.value

    def launch(
        self, index: int, function: int, grid: tuple[int, int, int], threads: int, shared: int, stream: int,
        arguments: Sequence[int],
    ) -> None:  # fmt: skip
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        with self._current(index):
            status = self._library.hipModuleLaunchKernel(function, *grid, threads, 1, 1, shared, stream, pointers, None)
        self._check(status, "hipModuleLaunchKernel", f"a grid of {grid} x {threads} threads on HIP device {index}")

    @contextmanager
    def _current(self, index: int) -> Iterator[None]:
        before = ctypes.c_int()
        self._check(self._library.hipGetDevice(ctypes.byref(before)), "hipGetDevice", f"HIP device {index}")
        if before.value == index:
            yield
            return
        self._check(self._library.hipSetDevice(index), "hipSetDevice", f"HIP device {index}")
        try:
            yield
        finally:
            self._library.hipSetDevice(before.value)

    def _check(self, status: int, call: str, what: str) -> None:
        if status:
            name, text = self._library.hipGetErrorName(status), self._library.hipGetErrorString(status)
            self._library.hipGetLastError()  # it would otherwise be found, and blamed on its own launch, by torch
            raise _failure(what, call, status, name, text)


def open_driver() -> Driver:
    """The driver of the GPUs that this torch was built for.

    Raises:
        Hif4Error: its library is missing, too old, or finds no device.
    """
    return HipDriver() if torch.version.hip else CudaDriver()


def fitting_targets(architecture: str) -> tuple[str, ...]:
    """The kernel targets whose binaries a device runs, best first; empty where hif4c builds none for it.

    A CUDA binary runs on devices of the same major version and no lower minor version. From 9.0 on they are built with
    the features of exactly one architecture (`sm_90a`) and run on no other.
    """
    if not (match := re.fullmatch(r"sm_(\d+)(\d)", architecture)):
        return ("hip-gfx942",) if architecture == "gfx942" else ()
    major, minor = int(match[1]), int(match[2])
    if major == 8:
        return ("cuda-sm89", "cuda-sm80") if minor >= 9 else ("cuda-sm80",)
    return (f"cuda-sm{major}0",) if major in (9, 10, 12) and minor == 0 else ()


def _open(library: str, advice: str, prototypes: dict[str, tuple[object, ...]]) -> ctypes.CDLL:
    try:
        opened = ctypes.CDLL(library)
        for name, types in prototypes.items():
            function = getattr(opened, name)
            function.argtypes, function.restype = types, ctypes.c_int
    except AttributeError as error:
        raise Hif4Error(f"{library}: is too old ({error}); install a newer driver.") from None
    except OSError as error:
        raise Hif4Error(f"{library}: cannot be loaded ({error}): {advice}, or use kernels='portable'.") from None
    return opened


def _find_hip() -> str:
    """A second copy in the process would not know the first one's memory, so the copy that is mapped comes first."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        maps = ""
    if match := re.search(r"/\S*/libamdhip64\.so\S*$", maps, re.MULTILINE):
        return match[0]
    beside_torch = Path(torch.__file__).parent / "lib" / "libamdhip64.so"
    return str(beside_torch) if beside_torch.is_file() else "libamdhip64.so"


def _failure(what: str, call: str, status: int, name: bytes | None, text: bytes | None) -> Hif4Error:
    """`name` and `text` are None for a code that this driver does not know."""
    known = (name or b"unknown error").decode(errors="replace")
    return Hif4Error(f"{what}: {call} failed with {known} ({status}): {(text or b'no text').decode(errors='replace')}.")
