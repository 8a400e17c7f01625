"""Instruction sets by the number that the library knows them by, and what its status codes mean."""

from __future__ import annotations

from hif4c.runtime.errors import Hif4Error

__all__ = ["BEST", "INSTRUCTION_SETS", "raise_status"]

# Each includes those before it.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vbmi")
BEST = -1


def raise_status(status: int, instruction_set: int) -> None:
    """Raise what a status code stands for; 0 is success."""
    if status == 1:
        raise MemoryError("hif4: no memory for the kernels' scratch")
    if status:
        known = 0 <= instruction_set < len(INSTRUCTION_SETS)
        name = INSTRUCTION_SETS[instruction_set] if known else instruction_set
        raise Hif4Error(f"this processor has no kernels for {name!r}.")
