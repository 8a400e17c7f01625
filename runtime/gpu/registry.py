"""Put GPU kernels in front of the portable ones for the dispatcher's CUDA key, which HIP builds of torch use as well.

The dispatcher is the process's, so is the choice: the last one wins. The CPU's kernels are another choice, in
`hif4c.runtime.native`; both work side by side.
"""

from __future__ import annotations

import logging
import threading

import torch

from hif4c.runtime import ops
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.driver import open_driver
from hif4c.runtime.gpu.jit import Jit
from hif4c.runtime.gpu.launcher import Backend, Bundled, UnfitKernels
from hif4c.runtime.gpu.operators import Operators
from hif4c.runtime.kernel_files import UntrustedKernels
from hif4c.runtime.native import check_word

__all__ = ["active_backend", "select"]

log = logging.getLogger(__name__)


class _Registry:
    """The operators in use, what they were chosen by, and the warnings that were given."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.operators: Operators | None = None
        self.key: tuple[str, str] | None = None
        self.registration: torch.library.Library | None = None
        self.warned: set[str] = set()

    def use(self, backend: Backend | None, key: tuple[str, str] | None) -> None:
        if self.registration is not None:
            self.registration._destroy()
        self.registration, self.operators, self.key = None, None, None
        if backend is not None:
            self.operators = Operators(backend)
            self.registration = _register(self.operators)
            self.key = key

    def warn_once(self, sentence: str) -> None:
        if sentence not in self.warned:
            self.warned.add(sentence)
            log.warning("%s", sentence)


_registry = _Registry()


def select(kernels: str, artifact: Artifact | None = None) -> None:
    """Choose the GPU kernels of this process.

    Args:
        kernels: "bundled", the artifact's own, when the user trusts them; "jit", compiled here by Triton; "portable",
            plain torch; "auto", bundled, else portable with one warning that says how to get the speed. It never
            compiles on a machine that only samples.
        artifact: where bundled kernels are; None for none.

    Raises:
        Hif4Error: another word; an artifact whose kernels were damaged; or "bundled" and "jit" where it is impossible.
    """
    check_word(kernels)
    with _registry.lock:
        if kernels == "portable":
            _registry.use(None, None)
            return
        key = ("jit", "") if kernels == "jit" else ("bundled", "" if artifact is None else artifact.manifest["digest"])
        if key == _registry.key:  # the other expert of the same artifact
            return
        try:
            backend: Backend = Jit() if kernels == "jit" else _bundled(artifact)
        except (UnfitKernels, UntrustedKernels) as error:
            if kernels != "auto":
                raise
            _registry.use(None, None)
            _registry.warn_once(f"4-bit layers run on the slow portable kernels on the GPU: {error}")
            return
        if isinstance(backend, Bundled):
            for refusal in backend.refused.values():
                _registry.warn_once(f"a GPU has no kernels and would run the slow portable ones: {refusal}")
        _registry.use(backend, key)


def active_backend() -> str:
    """Which kernels run on a GPU now: "bundled", "jit" or "portable"."""
    operators = _registry.operators
    return "portable" if operators is None else operators.backend.name


def _bundled(artifact: Artifact | None) -> Bundled:
    if artifact is None:
        raise UnfitKernels("there is no artifact to take bundled kernels from; use kernels='jit' or 'portable'.")
    try:
        driver = open_driver()
    except Hif4Error as error:
        raise UnfitKernels(str(error)) from None
    return Bundled(artifact, driver, range(torch.cuda.device_count()))


def _register(operators: Operators) -> torch.library.Library:
    registration = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name in ("quantize", "norm_quantize", "linear", "linear_w4"):
        registration.impl(name, getattr(operators, name), "CUDA")
    return registration
