"""Of a pipeline's experts only the one that serves the current step holds memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.transformer import CompiledTransformer

__all__ = ["KEEPS", "ActiveExpert", "check_keep"]

KEEPS = ("both", "active")


def check_keep(keep: str) -> None:
    """Raise Hif4Error for a policy that there is not."""
    if keep not in KEEPS:
        raise Hif4Error(f"keep={keep!r} is not known; choose {' or '.join(KEEPS)}.")


class ActiveExpert:
    """Unloads the other experts whenever one is called that was not the last.

    A sampling run switches once, from the expert of the noisy steps to the other, and then waits until that one has
    been read.

    Args:
        experts: they are called one at a time.

    Attributes:
        active: the one that was called last.
    """

    def __init__(self, experts: Iterable[CompiledTransformer]) -> None:
        self.active: CompiledTransformer | None = None
        self._experts = list(experts)
        self._lock = threading.Lock()
        for expert in self._experts:
            expert.register_forward_pre_hook(self._make_active)

    def _make_active(self, expert: CompiledTransformer, _: Any) -> None:
        with self._lock:
            if expert is not self.active:
                for other in self._experts:
                    if other is not expert:
                        other.unload()
                self.active = expert
