"""Native CPU kernels: C++ that ships with this package, compiled on the user's machine, loaded through ctypes."""

from hif4c.runtime.native.registry import KERNELS, disable, enable, is_available, is_enabled, native_kernels, select

__all__ = ["KERNELS", "disable", "enable", "is_available", "is_enabled", "native_kernels", "select"]
