"""Artifacts with GPU kernels: real lists of arguments, and binaries that only the stub of a driver takes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hif4c.runtime.artifact import Artifact
from hif4c.runtime.kernel_files import write_kernel_set
from hif4c.runtime.trust import TrustEntry, record_trust
from tests.support.gpu_stub import ELF

Entry = tuple[str, str, str, bytes, dict[str, Any]]


def properties(arguments: Iterable[tuple[str, str, int]], entry: str = "kernel", **others: Any) -> dict[str, Any]:
    """Of a kernel of 4 warps without shared memory, or with what `others` say."""
    usual = {"num_warps": 4, "warp_size": 32, "shared": 0, "constants": {}, "registers": 64, "stack": 0}
    return {**usual, "entry": entry, "arguments": [list(item) for item in arguments], **others}


def kernel(name: str, variant: str, suffix: str = "", image: bytes | None = None, **others: Any) -> Entry:
    """An entry of `write_kernel_set`; the binary holds a function of the kernel's name."""
    file = f"{name}.{variant}{suffix}.cubin"
    data = image if image is not None else ELF + name.encode() + b"\0" + file.encode()
    return name, variant, file, data, properties(others.pop("arguments", ()), name, **others)


def make_artifact(root: Path, sets: dict[str, list[Entry]], trusted: bool = True) -> Artifact:
    """An opened artifact that has these kernels, by target, and nothing else."""
    for target, entries in sets.items():
        write_kernel_set(root / "kernels" / target, target, {"triton": "3.7.1"}, entries)
    return open_and_trust(root, trusted)


def open_and_trust(root: Path, trusted: bool = True) -> Artifact:
    """A directory that holds kernels/TARGET, as an opened artifact."""
    files = {}
    for path in sorted(item for item in root.rglob("*") if item.is_file()):
        data = path.read_bytes()
        files[path.relative_to(root).as_posix()] = (len(data), hashlib.sha256(data).hexdigest())
    if trusted:
        record_trust({digest: TrustEntry("cuda", name, str(root)) for name, (_, digest) in files.items()})
    return Artifact(root, {"digest": str(sorted(files.items()))}, {}, files)


def shipped_kernels(target: str) -> list[Entry]:
    """What the compiler ships for a target, with the arguments it would compile, uncompiled. Imports Triton."""
    from hif4c.compiler import gpu_kernels
    from hif4c.runtime.gpu import kernels as sources

    warp_size = gpu_kernels.TARGETS[target][2]
    suffix = ".cubin" if target.startswith("cuda") else ".hsaco"
    entries = []
    for job in gpu_kernels.list_jobs(target):
        arguments = []
        for name in getattr(sources, job.name).arg_names:
            if name not in job.constants:
                kind = job.types.get(name, "i32")
                wide = kind.startswith("*") or name in gpu_kernels._MULTIPLES_OF_16
                arguments.append((name, kind, 16 if wide else 1))
        described = properties(
            arguments, job.name, num_warps=job.warps, warp_size=warp_size, constants=job.constants, shared=1024
        )
        image = ELF + job.name.encode() + b"\0" + job.file.encode()
        entries.append((job.name, job.variant, job.file + suffix, image, described))
    return entries
