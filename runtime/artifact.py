"""An artifact on disk: manifest, hashes, memory-mapped tensors. Everything in it is untrusted input."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from hif4c.runtime.components import EXPERT_NAMES, PIPELINE_CLASSES, is_artifact_file
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import DTYPES, Graph, InputType, decode
from hif4c.runtime.manifest_entries import check_expert, check_linears, check_manifest, shown
from hif4c.runtime.stored_weights import StoredWeights

__all__ = [
    "FORMAT_VERSION",
    "VARIANTS",
    "Artifact",
    "ExpertInfo",
    "canonical_json",
    "manifest_digest",
    "open_artifact",
    "sha256_file",
    "timestep_ranges",
]

FORMAT = "hif4c-artifact"
FORMAT_VERSION = 3
"""2: a second program an expert. 3: kernels, and the operators that fusing norms, rotary and attention makes."""
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_GRAPH_BYTES = 256 << 20
MAX_TIMESTEP = 1000.0
VARIANTS = ("bf16",)
"""Programs that an expert may have beside its main one, over the same weights: "bf16" has activations in bf16."""

_CHUNK = 1 << 20

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class ExpertInfo:
    """What the manifest says of one expert.

    Attributes:
        name: "transformer" or "transformer_2".
        config: of diffusers' model class.
        dtype: of latents, text and sample.
        recipe: what was asked for, as `hif4c.compiler.recipe.Recipe.to_dict` gives it.
        fingerprint: sha256 that stands for the checkpoint's weights.
        linears: what was decided for every linear, with a reason; keys as in docs/artifact.md.
        bf16_timesteps: ranges (low, high) of timesteps, both ends included, in which the program `graph.bf16.json` runs
            instead of `graph.json`: sorted, disjoint, in 0 to 1000; empty for an expert of one program.
    """

    name: str
    config: dict[str, Any]
    dtype: torch.dtype
    recipe: dict[str, Any]
    fingerprint: str
    linears: list[dict[str, Any]]
    bf16_timesteps: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Artifact:
    """An opened artifact whose manifest has been checked.

    Attributes:
        root: its directory.
        manifest: the whole manifest.
        experts: name -> info, in sampling order.
        files: relative path -> (bytes, sha256).
    """

    root: Path
    manifest: dict[str, Any]
    experts: dict[str, ExpertInfo]
    files: dict[str, tuple[int, str]]

    @property
    def expand_timesteps(self) -> bool:
        """Whether the experts take one timestep a token."""
        return bool(self.manifest["model"]["expand_timesteps"])

    def expert(self, name: str) -> ExpertInfo:
        """The info of one expert; Hif4Error lists those that the artifact holds."""
        if name not in self.experts:
            raise Hif4Error(f"{self.root}: holds no expert {name!r}; it holds {', '.join(self.experts)}.")
        return self.experts[name]

    def path(self, relative: str) -> Path:
        """The path of a file that the manifest lists."""
        if relative not in self.files:
            raise Hif4Error(f"{self.root}: the manifest lists no {relative}; the artifact is incomplete.")
        return self.root / relative

    def verify(self, prefix: str = "", progress: Progress | None = None) -> None:
        """Compare the sha256 of every listed file below `prefix`, and refuse files that are not listed.

        Args:
            prefix: "" for all, or a folder such as "transformer/".
            progress: called with (file, bytes read) as it goes, from other threads, one call after the other.
        """
        chosen = [relative for relative in self.files if relative.startswith(prefix)]
        lock = threading.Lock()

        def one_at_a_time(name: str, count: int) -> None:
            with lock:
                if progress is not None:
                    progress(name, count)

        # hashlib lets other threads run. What was read stays in the page cache: it is about to be used.
        with ThreadPoolExecutor(min(len(chosen), os.cpu_count() or 1) or 1) as pool:
            digests = pool.map(lambda relative: sha256_file(self.root / relative, one_at_a_time), chosen)
            for relative, digest in zip(chosen, digests, strict=True):
                if digest != self.files[relative][1]:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise Hif4Error(
                        f"{self.root / relative}: its content does not match the manifest; the file was damaged or "
                        "changed, copy the artifact again."
                    )
        for path in sorted(self.root.rglob("*")):
            relative = path.relative_to(self.root).as_posix()
            if (
                (path.is_symlink() or not path.is_dir())
                and relative != MANIFEST
                and relative.startswith(prefix)
                and relative not in self.files
            ):
                raise Hif4Error(f"{path}: is not listed in the manifest; remove it or copy the artifact again.")

    def variants(self, expert: str) -> list[str]:
        """Names of the programs that an expert has beside its main one."""
        self.expert(expert)
        return [name for name in VARIANTS if _graph_name(expert, name) in self.files]

    def graph(self, expert: str, variant: str | None = None) -> Graph:
        """Read an expert's program: the main one, or one of `variants`.

        Raises:
            Hif4Error: there is no such program, or it is damaged.
        """
        self.expert(expert)
        if variant is not None and variant not in self.variants(expert):
            there = ", ".join(self.variants(expert)) or "none"
            raise Hif4Error(f"{self.root / expert}: has no variant {variant!r} of its program; it has {there}.")
        path = self.path(_graph_name(expert, variant))
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise Hif4Error(f"{path}: is larger than {MAX_GRAPH_BYTES} bytes, which no program is.")
        return decode(path.read_bytes(), str(path))

    def tensors(self, expert: str, wanted: list[InputType]) -> StoredWeights:
        """Map an expert's tensors: zero-copy views of the files, except where the program computes in a wider dtype.

        Args:
            expert: its name.
            wanted: `tensors` of its main program.

        Raises:
            Hif4Error: a tensor is missing, left over, or of another shape or dtype than the program states.
        """
        shards = [name for name in self.files if name.startswith(f"{expert}/") and name.endswith(".safetensors")]
        return StoredWeights([self.path(name) for name in shards], wanted, self.root / expert)


def _graph_name(expert: str, variant: str | None) -> str:
    return f"{expert}/graph.json" if variant is None else f"{expert}/graph.{variant}.json"


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open a directory as an artifact: manifest, format version, and that every listed file is there in its size.

    Raises:
        Hif4Error: no artifact, one of a newer format, or one that is damaged or incomplete.
    """
    root = Path(path)
    if not root.is_dir():
        raise Hif4Error(f"{root}: there is no such directory; give the output of `hif4c compile`.")
    manifest_path = root / MANIFEST
    if not manifest_path.is_file():
        raise Hif4Error(f"{root}: holds no {MANIFEST}; it is not an artifact, or its copy is incomplete.")
    if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
        raise Hif4Error(f"{manifest_path}: is larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is.")
    manifest = _read_manifest(manifest_path)
    try:
        check_manifest(manifest)
        experts = {
            name: _expert(name, manifest["experts"][name]) for name in EXPERT_NAMES if name in manifest["experts"]
        }
        files = {
            _confined(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
        model = manifest["model"]
        if not isinstance(model["expand_timesteps"], bool) or not set(experts) <= set(model["experts"]):
            raise ValueError("its model does not fit its experts")
        if model["pipeline_class"] not in PIPELINE_CLASSES:
            raise ValueError("its pipeline class is not known")
        _ = model["sampling"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Hif4Error(f"{manifest_path}: does not have the structure of a manifest ({reason}).") from None
    if not experts:
        raise Hif4Error(f"{manifest_path}: lists no expert.")
    for name, info in experts.items():
        if info.bf16_timesteps and (graph := _graph_name(name, "bf16")) not in files:
            raise Hif4Error(
                f"{manifest_path}: {name} has timesteps with bf16 activations, but no {graph} is listed; "
                "the artifact is incomplete, compile it again."
            )
    for relative, (size, _) in files.items():
        _check_file(root, relative, size)
    return Artifact(root, manifest, experts, files)


def canonical_json(value: Any) -> bytes:
    """The one way in which a manifest is written: sorted keys, two spaces, ASCII, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its own `digest`."""
    return hashlib.sha256(
        canonical_json({key: value for key, value in manifest.items() if key != "digest"})
    ).hexdigest()


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """sha256 of a file, read in pieces."""
    result, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(chunk):
                result.update(chunk[:count])
                if progress is not None:
                    progress(path.name, count)
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from None
    return result.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        # Rewritten at once: NaN and nesting that is too deep to write again are refused here.
        canonical = canonical_json(manifest)
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise Hif4Error(f"{path}: is not valid JSON; the artifact is damaged, copy it again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Hif4Error(f"{path}: is not the manifest of a hif4c artifact.")
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise Hif4Error(
            f"{path}: the artifact has format version {version!r} and this hif4c reads up to {FORMAT_VERSION}; "
            "upgrade hif4c on this machine."
        )
    if manifest.get("digest") != manifest_digest(manifest) or canonical != data:
        raise Hif4Error(f"{path}: does not match its own digest; it was damaged or changed, copy the artifact again.")
    return manifest


def _expert(name: str, entry: Mapping[str, Any]) -> ExpertInfo:
    check_expert(entry)
    check_linears(entry["linears"])
    return ExpertInfo(
        name,
        dict(entry["config"]),
        DTYPES[entry["dtype"]],
        dict(entry["recipe"]),
        str(entry["fingerprint"]),
        [dict(item) for item in entry["linears"]],
        timestep_ranges(entry.get("bf16_timesteps", [])),
    )


def timestep_ranges(value: Any) -> tuple[tuple[float, float], ...]:
    """Ranges [low, high], sorted and disjoint, inside [0, 1000]; a TypeError or ValueError says what is wrong."""
    if not isinstance(value, list):
        raise TypeError("bf16_timesteps is not a list of ranges")
    ranges: list[tuple[float, float]] = []
    last = -math.inf
    for item in value:
        if not isinstance(item, list) or len(item) != 2 or any(type(end) not in (int, float) for end in item):
            raise TypeError(f"in bf16_timesteps, {shown(item)} is not a pair of numbers")
        low, high = item
        if not 0 <= low <= high <= MAX_TIMESTEP:
            raise ValueError(f"in bf16_timesteps, {shown(item)} is not a range in 0 to {MAX_TIMESTEP:g}")
        if not low > last:
            raise ValueError(f"in bf16_timesteps, {shown(item)} does not lie above the range before it")
        ranges.append((float(low), float(high)))
        last = high
    return tuple(ranges)


def _confined(name: str) -> str:
    """A relative path that cannot leave the artifact."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(part in ("..", ".") for part in parts):
        raise ValueError(f"{name!r} is not a path inside the artifact")
    if not name.isprintable():  # control characters, and what no file name can be encoded from
        raise ValueError(f"{name!r} is not a path inside the artifact")
    if not is_artifact_file(name):
        raise ValueError(f"{name!r} is not a data file, nor a kernel in its place")
    return name


def _check_file(root: Path, relative: str, size: int) -> None:
    path = root / relative
    try:
        info = path.lstat()
    except OSError:
        raise Hif4Error(f"{path}: is missing, though the manifest lists it; copy the artifact again.") from None
    if not stat.S_ISREG(info.st_mode) or not path.resolve().is_relative_to(root.resolve()):
        raise Hif4Error(f"{path}: is not a plain file inside the artifact.")
    if info.st_size != size:
        raise Hif4Error(f"{path}: has {info.st_size} bytes, the manifest says {size}; copy the artifact again.")
