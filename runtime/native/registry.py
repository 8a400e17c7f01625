"""Put the native kernels in front of the portable ones for the dispatcher's CPU key, and take them away again.

The dispatcher is the process's, so is the choice: the last one wins. It changes how long a result takes, and its last
bits where an operator's sums may be taken in another order.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from hif4c.runtime import ops
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import (
    KernelFile,
    UntrustedKernels,
    cpu_target,
    kernel_targets,
    read_kernel_set,
    trusted_bytes,
)
from hif4c.runtime.native.bindings import Library
from hif4c.runtime.native.build import ABI, find_library

__all__ = [
    "KERNELS",
    "check_word",
    "disable",
    "enable",
    "is_available",
    "is_enabled",
    "native_kernels",
    "portable_kernels",
    "select",
]

log = logging.getLogger(__name__)

KERNELS = ("auto", "bundled", "jit", "portable")

_SLOW = "4-bit layers run on the slow portable kernels"
# What a processor must have, in the words of /proc/cpuinfo, for the kernels of an instruction set.
_AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "bmi1", "bmi2"}
_NEEDED = {"avx2": {"avx2", "fma"}, "avx512": _AVX512, "avx512vbmi": {*_AVX512, "avx512vbmi"}}


class _UnfitError(Hif4Error):
    """An artifact has no CPU kernels for machines like this one."""


class _UnusableError(_UnfitError):
    """A library that claims to be for machines like this one, and is not: worth a warning."""


class _Registry:
    """The libraries that were loaded, the one in use, and the warnings that were given."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.built: Library | None = None
        self.bundled: dict[str, Library] = {}  # by sha256; a mapped library stays for as long as the process
        self.active: Library | None = None
        self.registration: torch.library.Library | None = None
        self.warned: set[str] = set()

    def use(self, library: Library | None) -> None:
        """Run this library's kernels from now on; None: the portable ones."""
        with self.lock:
            if library is self.active:
                return
            if self.registration is not None:
                self.registration._destroy()
                self.registration = None
            self.active = None
            if library is not None:
                self.registration = _register(library)
                self.active = library

    def warn_once(self, sentence: str) -> None:
        if sentence not in self.warned:
            self.warned.add(sentence)
            log.warning("%s", sentence)


_registry = _Registry()


def enable() -> Library:
    """Use native kernels built from this package's sources on the CPU; building them takes some seconds.

    Calling it again changes nothing. Raises Hif4Error when they cannot be built, loaded, or do not agree.
    """
    with _registry.lock:
        library = _built()
        _registry.use(library)
        return library


def disable() -> None:
    """Go back to the portable kernels."""
    _registry.use(None)


def is_enabled() -> bool:
    """Whether native kernels are in use."""
    return _registry.active is not None


def is_available() -> bool:
    """Whether native kernels can be built on this machine, or were; builds them when they are not there yet."""
    try:
        with _registry.lock:
            _built()
    except Hif4Error:
        return False
    return True


@contextlib.contextmanager
def native_kernels() -> Iterator[None]:
    """Within it native kernels run, where they can be had; afterwards those that ran before."""
    before = _registry.active
    if before is None and is_available():
        enable()
    try:
        yield
    finally:
        _registry.use(before)


@contextlib.contextmanager
def portable_kernels() -> Iterator[None]:
    """Within it the portable kernels run, afterwards those that ran before."""
    before = _registry.active
    disable()
    try:
        yield
    finally:
        _registry.use(before)


def check_word(kernels: str) -> None:
    """Raise Hif4Error for a choice of kernels that there is not."""
    if kernels not in KERNELS:
        raise Hif4Error(f"kernels={kernels!r} is not known; choose {', '.join(KERNELS)}.")


def select(kernels: str, artifact: Artifact | None = None) -> None:
    """Choose the CPU kernels of this process.

    Args:
        kernels: "bundled", the artifact's own, when the user trusts them; "jit", built here from this package's
            sources, once a machine; "portable", plain torch; "auto", the first of these that can be had: bundled, jit,
            and portable with one warning that says how to get the speed.
        artifact: where bundled kernels are; None for none.

    Raises:
        Hif4Error: another word; an artifact whose kernels were damaged; or "bundled" and "jit" where it is impossible.
    """
    check_word(kernels)
    if kernels == "portable":
        disable()
    elif kernels == "jit":
        enable()
    elif kernels == "bundled":
        with _registry.lock:
            _registry.use(_bundled(artifact))
    else:
        with _registry.lock:
            _registry.use(_best(artifact))


def _best(artifact: Artifact | None) -> Library | None:
    unfit: Hif4Error | None = None
    if artifact is not None:
        try:
            return _bundled(artifact)
        except (_UnfitError, UntrustedKernels) as error:
            unfit = error
    try:
        library = _built()
    except Hif4Error as error:
        if not any(warning.startswith(_SLOW) for warning in _registry.warned):
            _registry.warn_once(f"{_SLOW}: {'' if unfit is None else f'{unfit} '}{error}")
        return None
    if isinstance(unfit, _UnusableError):
        _registry.warn_once(f"{unfit} (What runs now was built here.)")
    elif unfit is not None:
        log.info("%s", unfit)
    return library


def _built() -> Library:
    if _registry.built is None:
        _registry.built = Library(find_library())
    return _registry.built


def _bundled(artifact: Artifact | None) -> Library:
    """The artifact's library for this machine, mapped from the very bytes that were found to be trusted.

    Raises:
        UntrustedKernels: the user did not trust it.
        _UnfitError: there is none, or none that this machine can run.
        Hif4Error: it was damaged.
    """
    if artifact is None:
        raise _UnfitError("there is no artifact to take bundled kernels from; use kernels='auto'.")
    target = cpu_target()
    kernel_set = read_kernel_set(artifact, target)
    if kernel_set is None:
        there = ", ".join(kernel_targets(artifact)) or "no target"
        raise _UnfitError(
            f"{artifact.root}: has kernels for {there} and this machine needs {target}; compile it with --target cpu "
            "on such a machine, or use kernels='auto'."
        )
    kernel = kernel_set.kernels[0]
    shown = artifact.path(f"kernels/{target}/{kernel.file}")
    _check_fits(kernel, shown)
    data = trusted_bytes(artifact, kernel_set, kernel)
    if kernel.sha256 not in _registry.bundled:
        _registry.bundled[kernel.sha256] = _map(data, shown)
    return _registry.bundled[kernel.sha256]


def _check_fits(kernel: KernelFile, shown: Path) -> None:
    """Refuse what could not be called, or would run instructions that this processor does not have."""
    abi, sets = kernel.properties.get("abi"), kernel.properties.get("instruction_sets")
    if type(abi) is not int or not isinstance(sets, list) or not all(isinstance(name, str) for name in sets):
        raise Hif4Error(f"{shown}: its kernels.json does not say what it is; compile the artifact again.")
    if abi != ABI:
        raise _UnusableError(
            f"{shown}: has version {abi} of the kernels' interface and this hif4c calls version {ABI}; "
            "compile the artifact again, or use kernels='jit'."
        )
    flags = set() if "portable" in sets else _processor_flags()
    if "portable" not in sets and not any(name in _NEEDED and _NEEDED[name] <= flags for name in sets):
        raise _UnusableError(
            f"{shown}: was built for {', '.join(sets) or 'no instruction set'}, which this processor does not have; "
            "compile the artifact on a machine like this one, or use kernels='jit'."
        )


def _processor_flags() -> set[str]:
    """What Linux says that every processor here can do; nothing where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return set.intersection(*found) if found else set()


def _map(data: bytes, shown: Path) -> Library:
    """Load a library from bytes."""
    try:
        with _as_file(data) as path:
            ctypes.CDLL(str(path))  # first by itself: what is wrong here is the file's fit to this machine
            library = Library(path)
    except OSError as error:
        reason = str(error).partition(": ")[2].partition(" (required by")[0] or str(error)
        raise _UnusableError(
            f"{shown}: cannot be loaded on this machine ({reason}); use kernels='jit', or compile the artifact on a "
            "machine with an older C library."
        ) from None
    except (Hif4Error, AttributeError) as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        raise _UnusableError(f"{shown}: cannot be used ({reason}); compile the artifact again.") from None
    library.path = shown
    return library


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[Path]:
    """A path from which exactly these bytes can be mapped, and that nobody can change in between."""
    if sys.platform == "linux" and os.path.isdir("/proc/self/fd"):
        try:
            descriptor = _sealed(data)
        except (OSError, AttributeError):
            log.info("no file in memory can be had; using a private temporary one")
        else:
            try:
                yield Path(f"/proc/self/fd/{descriptor}")
            except OSError:
                os.close(descriptor)
                raise
            # Else it stays open: the dynamic linker knows a library by its path, and would take the next one that got
            # the same number for this one.
            return
    directory = Path(tempfile.mkdtemp(prefix="hif4c-"))  # 0700
    try:
        path = directory / "library.so"
        path.write_bytes(data)
        yield path
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sealed(data: bytes) -> int:
    """A file in memory that cannot be written to any more."""
    import fcntl  # not on Windows

    descriptor = os.memfd_create("hif4-kernels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _register(library: Library) -> torch.library.Library:
    registration = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name, function in library.operators().items():
        registration.impl(name, function, "CPU")
    return registration
