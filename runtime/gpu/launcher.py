"""Launch kernels: what a binary's entry in kernels.json means, argument packing, and the two places kernels come from.

`Bundled` loads the binaries of an artifact through the GPU's driver; `hif4c.runtime.gpu.jit` has Triton compile the
same sources. What a binary was built for, the divisibility of its pointers and numbers included, is compared with each
launch: one that does not fit is never chosen.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.driver import Device, Driver, fitting_targets
from hif4c.runtime.kernel_files import KernelFile, KernelSet, kernel_targets, read_kernel_set, trusted_bytes

__all__ = [
    "Argument",
    "Backend",
    "Bundled",
    "Kernel",
    "UnfitKernels",
    "Value",
    "find_kernel_set",
    "grid_of",
    "mismatch",
    "pack",
]

Value = torch.Tensor | int | float | None

# Triton's names of types; a binary takes each by its own size.
_NUMBERS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u8": "<B", "u16": "<H", "u32": "<I"} | {
    "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip
_POINTERS = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip
_HIDDEN_POINTERS = 2  # Triton's scratch for the grid and for profiling; empty for these kernels
_SLOT = 8
_MAX_THREADS, _MAX_SHARED, _MAX_GRID = 1024, 1 << 20, (2**31 - 1, 65535, 65535)


class UnfitKernels(Hif4Error):  # noqa: N818 - named for what it says, as Hif4Error is
    """An artifact has no kernels for the GPUs of this machine."""


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel: its type in Triton's words ("*i8", "i32"), and what its value is a multiple of."""

    name: str
    type: str
    divisibility: int = 1


@dataclass(frozen=True)
class Kernel:
    """One variant of a kernel.

    Attributes:
        name: "linear_int8".
        variant: "128x128_w8_s3".
        entry: of the function in the binary.
        file: of the binary; "" for one that Triton compiles.
        constants: the constexpr parameters, tile shape included.
        arguments: the others, in order.
        num_warps, warp_size: threads of a block.
        num_stages: for Triton.
        shared: bytes of dynamic shared memory.
    """

    name: str
    variant: str
    constants: Mapping[str, int]
    num_warps: int
    arguments: tuple[Argument, ...] = ()
    entry: str = ""
    file: str = ""
    warp_size: int = 32
    num_stages: int = 1
    shared: int = 0

    @property
    def threads(self) -> int:
        return self.warp_size * self.num_warps

    @classmethod
    def from_file(cls, file: KernelFile) -> Kernel:
        """Read the properties of a binary.

        Raises:
            Hif4Error: they are not those of a GPU kernel.
        """
        properties = file.properties
        try:
            arguments = tuple(_argument(item) for item in properties["arguments"])
            kernel = cls(
                file.name, file.variant, {str(k): _integer(v) for k, v in properties["constants"].items()},
                _integer(properties["num_warps"]), arguments, properties["entry"], file.file,
                _integer(properties["warp_size"]), 1, _integer(properties["shared"]),
            )  # fmt: skip
            fits = 0 < kernel.threads <= _MAX_THREADS and 0 <= kernel.shared <= _MAX_SHARED
            if not fits or not isinstance(kernel.entry, str) or not kernel.entry.isidentifier():
                raise ValueError("its entry or launch geometry is impossible")
            if len({argument.name for argument in arguments}) != len(arguments):
                raise ValueError("two arguments have one name")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Hif4Error(f"{file.file}: its properties are not a GPU kernel's ({reason}); compile again.") from None
        return kernel


def _argument(item: Any) -> Argument:
    name, kind, divisibility = item
    known = kind in _NUMBERS or kind in _POINTERS.values()
    if not isinstance(name, str) or not known or not 1 <= _integer(divisibility) <= 256:
        raise ValueError(f"{item!r} is not an argument")
    return Argument(name, kind, divisibility)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def mismatch(kernel: Kernel, values: Mapping[str, Value], constants: Mapping[str, int]) -> str | None:
    """Why a kernel cannot be launched with these values and constants, or None when it can."""
    for name, number in constants.items():
        if kernel.constants.get(name) != number:
            return f"it is built for {name} = {kernel.constants.get(name)}, not {number}"
    known = {argument.name for argument in kernel.arguments}
    for argument in kernel.arguments:
        if argument.name not in values:
            return f"it takes an argument {argument.name} that this launch does not have"
        if reason := _unfit(argument, values[argument.name]):
            return f"{argument.name} {reason}"
    for name, value in values.items():
        if name not in known and kernel.constants.get(name, value) != value:
            return f"it is built for {name} = {kernel.constants[name]}, not {value}"
    return None


def _unfit(argument: Argument, value: Value) -> str | None:
    number: float
    if argument.type.startswith("*"):
        if value is None:
            return None
        if not isinstance(value, torch.Tensor) or _POINTERS.get(value.dtype) != argument.type:
            return f"is {getattr(value, 'dtype', value)}, not {argument.type}"
        number = value.data_ptr()
    else:
        if value is None or isinstance(value, torch.Tensor):
            return f"is not a number, but the binary takes {argument.type}"
        number = value
        if argument.type[0] in "iu":
            bits = int(argument.type[1:])
            signed = argument.type[0] == "i" and bits > 1  # i1 is a truth value
            low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
            if not isinstance(value, int) or not low <= value <= high:
                return f"is {value}, which does not fit {argument.type}"
    if argument.divisibility > 1 and number % argument.divisibility:
        return f"is {number}, which is not a multiple of {argument.divisibility}"
    return None


def pack(kernel: Kernel, values: Mapping[str, Value], device: torch.device) -> tuple[ctypes.Array[Any], list[int]]:
    """The arguments as the binary takes them: a buffer that holds each, and their addresses in it.

    Two null pointers follow the arguments. The buffer must live until the launch has returned.

    Raises:
        Hif4Error: a value is missing, of another type or device, or breaks what the binary was built for.
    """
    if reason := mismatch(kernel, values, {}):
        raise Hif4Error(f"{kernel.name} {kernel.variant}: {reason}; no variant of this artifact fits, compile again.")
    count = len(kernel.arguments) + _HIDDEN_POINTERS
    buffer = ctypes.create_string_buffer(count * _SLOT)
    for place, argument in enumerate(kernel.arguments):
        value, format_ = values[argument.name], _NUMBERS.get(argument.type, "<Q")
        if isinstance(value, torch.Tensor):
            if value.device != device:
                raise Hif4Error(f"{kernel.name}: {argument.name} is on {value.device}, the launch on {device}.")
            value = value.data_ptr()
        struct.pack_into(format_, buffer, place * _SLOT, 0 if value is None else value)
    start = ctypes.addressof(buffer)
    return buffer, [start + place * _SLOT for place in range(count)]


def grid_of(kernel: Kernel, values: Mapping[str, Value]) -> tuple[int, int, int]:
    """The blocks of a launch; see the docstrings of `hif4c.runtime.gpu.kernels`.

    Raises:
        Hif4Error: the shape needs more blocks than a grid may have, or the kernel is not known.
    """

    def blocks(size: int, block: str) -> int:
        return -(-size // kernel.constants[block])

    def number(name: str) -> int:
        value = values[name]
        assert isinstance(value, int)
        return value

    if kernel.name == "quantize":
        grid = (blocks(number("M"), "BLOCK_M"), blocks(-(-number("K") // 64), "BLOCK_U"), 1)
    elif kernel.name == "norm_quantize":
        grid = (blocks(number("M"), "BLOCK_M"), 1, 1)
    elif kernel.name in ("expand_int8", "expand_bf16"):
        grid = (blocks(number("R"), "BLOCK_R"), blocks(number("U"), "BLOCK_U"), 1)
    elif kernel.name in ("linear_int8", "linear_bf16"):
        grid = (blocks(number("M"), "BLOCK_M") * blocks(number("N"), "BLOCK_N"), 1, 1)
    else:
        raise Hif4Error(f"{kernel.name}: this hif4c knows no such kernel; upgrade it or use kernels='portable'.")
    if any(not 0 < size <= limit for size, limit in zip(grid, _MAX_GRID, strict=True)):
        raise Hif4Error(f"{kernel.name}: a grid of {grid} blocks is not possible; use a smaller batch.")
    return grid


class Backend(Protocol):
    """Where kernels come from. All methods are thread-safe."""

    name: str

    def serves(self, device: torch.device) -> bool:
        """Whether there are kernels for a device."""

    def identity(self, device: torch.device) -> list[str]:
        """What a timing on this device depends on: GPU, driver, hash of the kernels."""

    def variants(
        self, name: str, device: torch.device, values: Mapping[str, Value], constants: Mapping[str, int]
    ) -> list[Kernel]:
        """The variants of a kernel that can be launched with these values and have these constants."""

    def launch(self, kernel: Kernel, device: torch.device, values: Mapping[str, Value]) -> None:
        """Enqueue a kernel on the device's current stream.

        Raises:
            Hif4Error: it cannot be loaded, or the driver refuses the launch.
        """


class Bundled:
    """The kernels of an artifact, for the devices of this process that they fit; loaded when first launched.

    Args:
        artifact: opened.
        driver: of the GPUs.
        devices: torch's indices of those that are visible.
        stream: the handle of a device's current stream.

    Raises:
        UnfitKernels: no device fits what the artifact has; the sentence names device and targets.
        UntrustedKernels: the user has not trusted them on this machine.
        Hif4Error: they were damaged, or the driver cannot describe a device.
    """

    name = "bundled"

    def __init__(
        self,
        artifact: Artifact,
        driver: Driver,
        devices: Sequence[int],
        stream: Callable[[torch.device], int] | None = None,
    ) -> None:
        self._driver = driver
        self._stream = stream or (lambda device: torch.cuda.current_stream(device).cuda_stream)
        self._lock = threading.Lock()
        self._functions: dict[tuple[int, str], int | Hif4Error] = {}
        self._devices: dict[int, tuple[Device, KernelSet]] = {}
        self.refused: dict[int, Hif4Error] = {}
        self._kernels: dict[str, dict[str, list[Kernel]]] = {}  # target -> name -> variants
        self._images: dict[tuple[str, str], bytes] = {}
        for index in devices:
            try:
                device = driver.device(index)
                kernel_set = find_kernel_set(artifact, device)
                self._read(artifact, kernel_set)
                self._devices[index] = (device, kernel_set)
            except Hif4Error as error:
                self.refused[index] = error
        if not self._devices:
            raise next(iter(self.refused.values()), UnfitKernels("there is no GPU here; use kernels='portable'."))

    def _read(self, artifact: Artifact, kernel_set: KernelSet) -> None:
        """Read every binary of a target once: what is checked here is what is loaded later."""
        if kernel_set.target not in self._kernels:
            kernels = [Kernel.from_file(file) for file in kernel_set.kernels]
            for file in kernel_set.kernels:
                self._images[kernel_set.target, file.file] = trusted_bytes(artifact, kernel_set, file)
            by_name = self._kernels[kernel_set.target] = {}
            for kernel in kernels:
                by_name.setdefault(kernel.name, []).append(kernel)

    def serves(self, device: torch.device) -> bool:
        return _index(device) in self._devices

    def identity(self, device: torch.device) -> list[str]:
        described, kernel_set = self._device(device)
        return [described.name, str(self._driver.version()), kernel_set.sha256]

    def variants(
        self, name: str, device: torch.device, values: Mapping[str, Value], constants: Mapping[str, int]
    ) -> list[Kernel]:
        kernels = self._kernels[self._device(device)[1].target].get(name, [])
        return [item for item in kernels if mismatch(item, values, constants) is None]

    def launch(self, kernel: Kernel, device: torch.device, values: Mapping[str, Value]) -> None:
        index = _index(device)
        buffer, addresses = pack(kernel, values, device)
        function = self._function(kernel, device)
        stream = self._stream(device)
        self._driver.launch(index, function, grid_of(kernel, values), kernel.threads, kernel.shared, stream, addresses)
        del buffer  # the driver has copied the arguments

    def _device(self, device: torch.device) -> tuple[Device, KernelSet]:
        index = _index(device)
        if index not in self._devices:
            raise self.refused.get(index) or Hif4Error(f"{device}: was not there when the kernels were chosen.")
        return self._devices[index]

    def _function(self, kernel: Kernel, device: torch.device) -> int:
        described, kernel_set = self._device(device)
        key = (described.index, kernel.file)
        with self._lock:
            if key not in self._functions:
                try:
                    self._functions[key] = self._load(kernel, described, self._images[kernel_set.target, kernel.file])
                except Hif4Error as error:
                    self._functions[key] = error  # it would fail again, and slowly
            found = self._functions[key]
        if isinstance(found, Hif4Error):
            raise found
        return found

    def _load(self, kernel: Kernel, device: Device, image: bytes) -> int:
        try:
            function = self._driver.function(self._driver.load(device.index, image), kernel.entry)
            self._driver.allow_shared(device.index, function, kernel.shared)
            blocks = self._driver.resident_blocks(device.index, function, kernel.threads, kernel.shared)
        except Hif4Error as error:
            raise Hif4Error(
                f"{kernel.file} on {device}: {str(error).rstrip('.')}; update the GPU's driver, compile the artifact "
                "again, or use kernels='portable'."
            ) from None
        if blocks < 1:
            raise Hif4Error(
                f"{kernel.file} on {device}: a block of {kernel.threads} threads with {kernel.shared} bytes of shared "
                "memory does not fit a multiprocessor."
            )
        return function


def find_kernel_set(artifact: Artifact, device: Device) -> KernelSet:
    """The kernels of an artifact that suit a device best.

    Raises:
        UnfitKernels: there are none; the sentence names the device, what it needs and what the artifact holds.
    """
    targets = fitting_targets(device.architecture)
    for target in targets:
        if (found := read_kernel_set(artifact, target)) is not None:
            return found
    held = [target for target in kernel_targets(artifact) if not target.startswith("cpu")]
    holds = f"has GPU kernels for {', '.join(held)} only" if held else "has no GPU kernels"
    if not targets:
        raise UnfitKernels(
            f"{artifact.root}: {holds}, and hif4c builds none for {device}; use kernels='jit' where Triton is "
            "installed, or kernels='portable'."
        )
    raise UnfitKernels(
        f"{artifact.root}: {holds}, and {device} needs {' or '.join(targets)}; compile with --target {targets[0]}, "
        "or use kernels='portable'."
    )


def _index(device: torch.device) -> int:
    return device.index or 0
