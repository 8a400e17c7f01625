"""Kernels for an artifact: built ahead of time for each requested target, so that its users need no compiler."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import GPU_TARGETS, cpu_target, trust_entries, write_kernel_set
from hif4c.runtime.native.bindings import INSTRUCTION_SETS
from hif4c.runtime.native.build import ABI, compiler_version, find_library
from hif4c.runtime.trust import record_trust

__all__ = ["TARGETS", "build_kernels", "check_targets", "resolve_targets", "trust_built_kernels"]

TARGETS = ("cpu", *GPU_TARGETS)
"""What kernels can be built for: "cpu" is this machine's architecture and system."""

CPU_LIBRARY = "hif4_cpu.so"

Events = Callable[[str, object], None]


def resolve_targets(chosen: Sequence[str]) -> tuple[str, ...]:
    """Turn `--target` values into targets, in the order of `TARGETS`.

    Args:
        chosen: names, also several in one with commas; "all", or "portable" for no kernels.

    Raises:
        Hif4Error: another name.
    """
    names = {name.strip() for item in chosen for name in item.split(",")}
    if unknown := sorted(names - {*TARGETS, "all", "portable"}):
        raise Hif4Error(f"target {unknown[0]!r} is not known; choose from {', '.join(TARGETS)}, all, portable.")
    return tuple(name for name in TARGETS if name in names or "all" in names)


def check_targets(targets: Sequence[str]) -> None:
    """Raise Hif4Error before any work is done: for an unknown target, or one for a GPU where Triton is missing."""
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise Hif4Error(f"target {unknown[0]!r} is not known; choose from {', '.join(TARGETS)}.")
    gpu = [target for target in targets if target != "cpu"]
    if gpu and importlib.util.find_spec("triton") is None:
        raise Hif4Error(
            f"kernels for {', '.join(gpu)} are built with Triton; install it with `pip install triton` (no GPU is "
            "needed), or leave these targets out."
        )


def build_kernels(targets: Sequence[str], directory: Path, events: Events) -> None:
    """Build kernels into `directory`/TARGET.

    Without a C++ compiler there is no folder for "cpu": what to install is said in an event, and the artifact serves
    every machine with its portable kernels.

    Args:
        targets: of `TARGETS`.
        directory: kernels/ of an artifact in the making.
        events: progress, see `hif4c.compiler.experts.Events`.

    Raises:
        Hif4Error: kernels for a GPU cannot be built.
    """
    for target in targets:
        if target == "cpu":
            _build_cpu(directory, events)
        else:
            # Triton is needed only by those who ask for these.
            from hif4c.compiler.gpu_kernels import build_gpu_kernels, list_jobs

            events("step", f"building kernels for {target}")
            events("total", len(list_jobs(target)))
            build_gpu_kernels(target, directory / target, lambda name: events("bytes", 1))


def _build_cpu(directory: Path, events: Events) -> None:
    target = cpu_target()
    events("step", f"building kernels for {target}")
    try:
        data = find_library().read_bytes()
    except Hif4Error as error:
        events("step", f"the artifact gets no CPU kernels: {error}")
        return
    sets = INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else INSTRUCTION_SETS[:1]
    properties = {"abi": ABI, "instruction_sets": list(sets)}
    built_with = {"c++": compiler_version()}
    write_kernel_set(directory / target, target, built_with, [("library", "all", CPU_LIBRARY, data, properties)])


def trust_built_kernels(artifact: Artifact, events: Events) -> None:
    """Record in the user's trust file what was built here; an event says so when that is impossible."""
    try:
        entries = trust_entries(artifact)
        if entries:
            record_trust(entries)
    except Hif4Error as error:
        events("step", f"the kernels were built, but are not trusted yet: {error}")
