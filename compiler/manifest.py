"""manifest.json: what an artifact is and every file in it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.sampling_defaults import sampling_defaults
from hif4c.runtime.artifact import FORMAT, FORMAT_VERSION, MANIFEST, canonical_json, manifest_digest, sha256_file
from hif4c.runtime.kernel_files import SIDECAR

__all__ = ["write_manifest"]


def write_manifest(
    staging: Path, location: ModelLocation, experts: dict[str, Any], known: dict[str, tuple[int, str]]
) -> None:
    """List every file that is in the directory now. Written again when files are added.

    `known` maps relative paths to (bytes, sha256): files in it are not read again, new ones are added to it.
    """
    for path in sorted(staging.rglob("*")):
        relative = path.relative_to(staging).as_posix()
        if path.is_file() and relative != MANIFEST and relative not in known:
            known[relative] = (path.stat().st_size, sha256_file(path))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "source": location.source,
            "pipeline_class": location.pipeline.class_name,
            "boundary_ratio": location.pipeline.boundary_ratio,
            "expand_timesteps": location.pipeline.expand_timesteps,
            "experts": list(location.configs),
            "sampling": sampling_defaults(location.configs),
        },
        "experts": experts,
        "targets": ["portable", *sorted(path.parent.name for path in staging.glob(f"kernels/*/{SIDECAR}"))],
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(known.items())},
        "versions": {name: importlib.metadata.version(name) for name in ("hif4c", "torch", "diffusers")},
    }
    (staging / MANIFEST).write_bytes(canonical_json({**manifest, "digest": manifest_digest(manifest)}))
