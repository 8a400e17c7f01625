"""Kernels inside an artifact: kernels/TARGET/kernels.json and the binaries it lists.

A binary is code, and the hashes beside it prove integrity, not origin. So bytes are handed out only after they were
compared with kernels.json, with the manifest, and with the user's trust file; and a binary is trusted together with
the kernels.json that says how it is called. What was compared is what gets loaded: files are read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hif4c.runtime.artifact import Artifact, canonical_json
from hif4c.runtime.components import KERNEL_SUFFIXES
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.trust import TrustEntry, trusted_hashes

__all__ = [
    "GPU_TARGETS",
    "SIDECAR",
    "KernelFile",
    "KernelSet",
    "UntrustedKernels",
    "cpu_target",
    "kernel_targets",
    "read_kernel_set",
    "trust_entries",
    "trusted_bytes",
    "write_kernel_set",
]

GPU_TARGETS = ("cuda-sm80", "cuda-sm89", "cuda-sm90", "cuda-sm100", "cuda-sm120", "hip-gfx942")
SIDECAR = "kernels.json"
SCHEMA = 1
MAX_SIDECAR_BYTES = 16 << 20
MAX_BINARY_BYTES = 256 << 20

# Neither follow a link nor wait for the other end of a pipe.
_CAUTIOUS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY_KEYS = {"name", "variant", "file", "bytes", "sha256", "properties"}
_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


class UntrustedKernels(Hif4Error):  # noqa: N818 - named for what it says, as Hif4Error is
    """Kernels of an artifact that the user has not trusted on this machine; they are not loaded."""


@dataclass(frozen=True)
class KernelFile:
    """One binary.

    Attributes:
        name: of the kernel, "linear_int8"; "library" for a CPU library.
        variant: which of several builds of it, "128x128_w8_s3".
        file: its name in the target's directory.
        bytes: its size.
        sha256: of its content, 64 hexadecimal digits.
        properties: what its loader needs: entry, launch geometry, arguments. Checked by the loader.
    """

    name: str
    variant: str
    file: str
    bytes: int
    sha256: str
    properties: dict[str, Any]


@dataclass(frozen=True)
class KernelSet:
    """The kernels that an artifact has for one target.

    Attributes:
        target: "cuda-sm80", "cpu-x86-64-linux", ...
        built_with: tool -> version.
        kernels: in the order of kernels.json.
        sha256: of kernels.json; "" for a set that was not read from an artifact.
    """

    target: str
    built_with: dict[str, str]
    kernels: tuple[KernelFile, ...]
    sha256: str = field(default="", compare=False)


def cpu_target() -> str:
    """The target of CPU libraries that are built, and run, on this machine: "cpu-x86-64-linux"."""
    machine = platform.machine().lower()
    system = {"darwin": "macos"}.get(sys.platform, sys.platform)
    return f"cpu-{_ARCHITECTURES.get(machine, machine)}-{system}"


def kernel_targets(artifact: Artifact) -> list[str]:
    """The targets for which an artifact has kernels, sorted."""
    return sorted(
        name.split("/")[1] for name in artifact.files if name.startswith("kernels/") and name.endswith(f"/{SIDECAR}")
    )


def write_kernel_set(
    directory: Path,
    target: str,
    built_with: dict[str, str],
    kernels: Iterable[tuple[str, str, str, bytes, dict[str, Any]]],
) -> KernelSet:
    """Write binaries and their kernels.json; equal arguments give equal bytes.

    Args:
        directory: kernels/TARGET of an artifact in the making; made here when it is not there.
        target: "cuda-sm80", ...
        built_with: tool -> version.
        kernels: (name, variant, file name, binary, properties); properties must be JSON.

    Raises:
        ValueError: an entry that `read_kernel_set` would refuse.
    """
    binaries = {}
    entries = []
    for name, variant, file, data, properties in kernels:
        if file in binaries:
            raise ValueError(f"two kernels are called {file}")
        binaries[file] = data
        digest = hashlib.sha256(data).hexdigest()
        entries.append(
            {"name": name, "variant": variant, "file": file, "bytes": len(data), "sha256": digest}
            | {"properties": properties}
        )
    text = canonical_json({"schema": SCHEMA, "target": target, "built_with": built_with, "kernels": entries})
    result = _parse(json.loads(text), target, hashlib.sha256(text).hexdigest())
    directory.mkdir(parents=True, exist_ok=True)
    for file, data in binaries.items():
        (directory / file).write_bytes(data)
    (directory / SIDECAR).write_bytes(text)
    return result


def read_kernel_set(artifact: Artifact, target: str) -> KernelSet | None:
    """What kernels.json says of one target, checked against the manifest; None when the artifact has none for it.

    Raises:
        Hif4Error: kernels.json is malformed, does not match the manifest, or lists other files than there are.
    """
    folder = f"kernels/{target}"
    relative = f"{folder}/{SIDECAR}"
    if relative not in artifact.files:
        return None
    path = artifact.path(relative)
    size, digest = artifact.files[relative]
    if size > MAX_SIDECAR_BYTES:
        raise Hif4Error(f"{path}: is larger than {MAX_SIDECAR_BYTES} bytes, which no list of kernels is.")
    data = _read_checked(path, size, digest)
    try:
        value = json.loads(data)
        if canonical_json(value) != data:
            raise ValueError("it is not canonical JSON")
        result = _parse(value, target, digest)
    except (ValueError, TypeError, RecursionError) as error:
        raise Hif4Error(f"{path}: is not a list of kernels ({error}); compile the artifact again.") from None
    listed = {f"{folder}/{kernel.file}": (kernel.bytes, kernel.sha256) for kernel in result.kernels}
    there = {
        name: entry for name, entry in artifact.files.items() if name.startswith(f"{folder}/") and name != relative
    }
    if odd := sorted(name for name in listed.keys() | there.keys() if listed.get(name) != there.get(name)):
        raise Hif4Error(f"{path}: disagrees with the manifest about {odd[0]}; compile or copy the artifact again.")
    return result


def trust_entries(artifact: Artifact) -> dict[str, TrustEntry]:
    """What trusting all kernels of an artifact records: sha256 -> entry of every binary and every kernels.json.

    Raises:
        Hif4Error: a kernels.json is malformed, or does not agree with the manifest about its files.
    """
    origin = str(artifact.root.resolve())
    entries = {}
    for target in kernel_targets(artifact):
        kernel_set = read_kernel_set(artifact, target)
        assert kernel_set is not None
        entries[kernel_set.sha256] = TrustEntry(target, SIDECAR, origin)
        for kernel in kernel_set.kernels:
            entries[kernel.sha256] = TrustEntry(target, kernel.file, origin)
    return entries


def trusted_bytes(artifact: Artifact, kernel_set: KernelSet, kernel_file: KernelFile) -> bytes:
    """Read a binary once, and return it when it is what was listed and what the user trusts.

    Raises:
        UntrustedKernels: the user's trust file cannot be used, or lacks it or the kernels.json that it comes with.
        Hif4Error: the file was changed.
    """
    relative = f"kernels/{kernel_set.target}/{kernel_file.file}"
    path = artifact.path(relative)
    if artifact.files[relative] != (kernel_file.bytes, kernel_file.sha256):
        raise Hif4Error(f"{path}: {SIDECAR} and the manifest disagree about it; copy the artifact again.")
    try:
        trusted = trusted_hashes()
    except Hif4Error as error:
        raise UntrustedKernels(str(error)) from None
    if not {kernel_file.sha256, kernel_set.sha256} <= trusted:
        raise UntrustedKernels(
            f"{path}: is code that is not trusted on this machine; see what it is and trust it with "
            f"`hif4c trust {artifact.root}`, or use kernels='portable'."
        )
    return _read_checked(path, kernel_file.bytes, kernel_file.sha256)


def _read_checked(path: Path, size: int, digest: str) -> bytes:
    """Read a plain file once and compare what was read."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _CAUTIOUS)) as file:
            plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(size + 1) if plain else b""
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from None
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise Hif4Error(
            f"{path}: its content does not match the manifest; the file was damaged or changed, "
            "copy the artifact again."
        )
    return data


def _parse(value: Any, target: str, digest: str) -> KernelSet:
    """A kernels.json as read; ValueError or TypeError says what is wrong with it."""
    if not isinstance(value, dict) or value.keys() != {"schema", "target", "built_with", "kernels"}:
        raise ValueError("it does not have the fields schema, target, built_with and kernels")
    if value["schema"] != SCHEMA:
        raise ValueError(f"its schema is {_shown(value['schema'])} and this hif4c reads {SCHEMA}; upgrade hif4c")
    if value["target"] != target:
        raise ValueError(f"its target is {_shown(value['target'])}, but it is kept as {target}")
    family = target.partition("-")[0]
    if family not in KERNEL_SUFFIXES or not _WORD.fullmatch(target):
        raise ValueError(f"there is no target {target}")
    built_with, entries = value["built_with"], value["kernels"]
    if not isinstance(built_with, dict) or not all(isinstance(item, str) for item in built_with.values()):
        raise ValueError("built_with does not map tools to versions")
    if not isinstance(entries, list) or not entries:
        raise ValueError("it lists no kernels")
    kernels = tuple(_parse_entry(entry, KERNEL_SUFFIXES[family]) for entry in entries)
    if len({kernel.file for kernel in kernels}) != len(kernels):
        raise ValueError("two kernels share a file")
    return KernelSet(target, dict(built_with), kernels, digest)


def _parse_entry(entry: Any, suffix: str) -> KernelFile:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"a kernel does not have the fields {', '.join(sorted(_ENTRY_KEYS))}")
    for key, pattern in (("name", _WORD), ("variant", _WORD), ("file", _FILE_NAME), ("sha256", _SHA256)):
        if not isinstance(entry[key], str) or not pattern.fullmatch(entry[key]):
            raise ValueError(f"{_shown(entry[key])} cannot be the {key} of a kernel")
    if not entry["file"].endswith(suffix):
        raise ValueError(f"{entry['file']} does not end in {suffix}")
    if type(entry["bytes"]) is not int or not 0 < entry["bytes"] <= MAX_BINARY_BYTES:
        raise ValueError(f"{entry['file']} cannot have {_shown(entry['bytes'])} bytes")
    if not isinstance(entry["properties"], dict):
        raise ValueError(f"the properties of {entry['file']} are not an object")
    return KernelFile(**entry)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
