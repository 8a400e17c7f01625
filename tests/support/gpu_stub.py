"""A library that stands in for the GPU driver's and writes down every call (see `gpu_stub.c`)."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("gpu_stub.c")
ELF = b"\x7fELF"  # a binary that the stub accepts begins so; the names of its functions follow


def compiler() -> str:
    """The system's C compiler; skips the test when there is none."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return path
    pytest.skip("the stub of the GPU driver needs a C compiler (cc, gcc or clang), and none was found")


def build(directory: Path) -> Path:
    library = directory / "libgpu_stub.so"
    subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-pthread", str(SOURCE), "-o", str(library)], check=True)
    return library


def header_directories() -> dict[str, Path]:
    """The vendors' headers that come with Triton: define -> directory, where they are there."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return {}
    backends = Path(spec.submodule_search_locations[0]) / "backends"
    places = {"WITH_CUDA_H": backends / "nvidia" / "include", "WITH_HIP_H": backends / "amd" / "include"}
    return {define: path for define, path in places.items() if path.is_dir()}


@dataclass
class Launch:
    """A recorded launch; `arguments` are the eight bytes found at the address of each, as little-endian integers."""

    function: str
    context: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    arguments: list[int]


class Stub:
    """The loaded library; `reset` before use, as its state is the process's."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_journal.restype = ctypes.c_char_p
        self.reset()

    def reset(self) -> None:
        self._library.stub_reset()

    def fail(self, call: str, code: int, after: int = 0, times: int = 1) -> None:
        """Let a call fail with a code, some times in a row, once it has succeeded `after` times."""
        self._library.stub_fail(call.encode(), code, after, times)

    def capability(self, major: int, minor: int) -> None:
        self._library.stub_capability(major, minor)

    def architecture(self, name: str) -> None:
        self._library.stub_architecture(name.encode())

    def expect_arguments(self, count: int, function: str | None = None) -> None:
        """How many argument addresses a launch reads: of a function that is yet to be loaded, or of all others."""
        if function is None:
            self._library.stub_arguments(count)
        else:
            self._library.stub_arguments_of(function.encode(), count)

    def resident_blocks(self, count: int) -> None:
        self._library.stub_blocks(count)

    @property
    def calls(self) -> list[str]:
        """The calls in order, each as "name arguments"."""
        return self._library.stub_journal().decode().splitlines()

    @property
    def names(self) -> list[str]:
        return [line.split()[0] for line in self.calls]

    @property
    def launches(self) -> list[Launch]:
        found = []
        for line in self.calls:
            if "LaunchKernel" not in line:
                continue
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            grid, block = ([int(item) for item in fields[key].split(",")] for key in ("grid", "block"))
            numbers = (
                int(fields["context"]),
                tuple(grid),
                tuple(block),
                int(fields["shared"]),
                int(fields["stream"], 16),
            )
            values = [int(item, 16) for item in fields["arguments"].split(",") if item]
            found.append(Launch(fields["function"], *numbers, values))
        return found
