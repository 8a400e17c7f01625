"""Artifacts as an attacker would make them: changed, but with sizes, hashes and digest that fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hif4c.runtime.artifact import canonical_json, manifest_digest, sha256_file

__all__ = ["forge"]


def forge(path: Path, change_manifest: Callable[[dict[str, Any]], Any] | None = None, **files: bytes) -> None:
    """Write files, by relative name, and change the manifest; then make sizes, hashes and digest right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    for relative, data in files.items():
        (path / relative).parent.mkdir(parents=True, exist_ok=True)
        (path / relative).write_bytes(data)
        manifest["files"][relative] = {"bytes": len(data), "sha256": sha256_file(path / relative)}
    if change_manifest is not None:
        change_manifest(manifest)
    manifest["digest"] = manifest_digest(manifest)
    (path / "manifest.json").write_bytes(canonical_json(manifest))
