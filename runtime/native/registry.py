"""Put the native kernels in front of the portable ones for the dispatcher's CPU key, and take them away again.

The dispatcher is the process's, so is the choice. As both give the same bits, it changes how long a result takes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch

from hif4c.runtime import ops
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native.bindings import Library
from hif4c.runtime.native.build import find_library

__all__ = ["KERNELS", "disable", "enable", "is_available", "is_enabled", "native_kernels", "select"]

log = logging.getLogger(__name__)

KERNELS = ("auto", "native", "portable")


class _Registry:
    """The loaded library and the registration, if there are any; a warning is given once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.library: Library | None = None
        self.registration: torch.library.Library | None = None
        self.warned = False


_registry = _Registry()


def enable() -> Library:
    """Use the native kernels for `hif4::quantize` and `hif4::linear` on the CPU; building them takes some seconds.

    Calling it again changes nothing. Raises Hif4Error when they cannot be built, loaded, or do not agree.
    """
    with _registry.lock:
        if _registry.library is None:
            _registry.library = Library(find_library())
        if _registry.registration is None:
            _registry.registration = _register(_registry.library)
        return _registry.library


def disable() -> None:
    """Go back to the portable kernels."""
    with _registry.lock:
        if _registry.registration is not None:
            _registry.registration._destroy()
            _registry.registration = None


def is_enabled() -> bool:
    """Whether the native kernels are in use."""
    return _registry.registration is not None


def is_available() -> bool:
    """Whether native kernels can be had on this machine; builds them when they are not there yet."""
    with _registry.lock:
        if _registry.library is None:
            try:
                _registry.library = Library(find_library())
            except Hif4Error:
                return False
        return True


@contextlib.contextmanager
def native_kernels() -> Iterator[None]:
    """Within it the native kernels run, where they can be had; afterwards those that ran before."""
    before = is_enabled()
    if is_available():
        enable()
    try:
        yield
    finally:
        if not before:
            disable()


def select(kernels: str) -> None:
    """Choose the kernels of this process: "auto", "native" or "portable".

    "auto" is native where a compiler or an earlier build is there, else portable with one warning that says how to get
    the speed. Raises Hif4Error for another word, or for "native" where that is impossible.
    """
    if kernels not in KERNELS:
        raise Hif4Error(f"kernels={kernels!r} is not known; choose {', '.join(KERNELS)}.")
    if kernels == "portable":
        disable()
        return
    try:
        enable()
    except Hif4Error as error:
        if kernels == "native":
            raise
        if not _registry.warned:
            _registry.warned = True
            log.warning("4-bit layers run on the slow portable kernels: %s", error)


def _register(library: Library) -> torch.library.Library:
    registration = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name, function in library.operators().items():
        registration.impl(name, function, "CPU")
    return registration
