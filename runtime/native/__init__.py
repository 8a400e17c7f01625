"""Native CPU kernels: C++ that ships with this package and in artifacts, loaded through ctypes."""

from hif4c.runtime.native.registry import (
    KERNELS,
    check_word,
    disable,
    enable,
    is_available,
    is_enabled,
    native_kernels,
    portable_kernels,
    select,
)

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
