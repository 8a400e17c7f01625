"""The rest of the pipeline (text encoder, tokenizer, VAE, scheduler): copied beside the compiled experts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hif4c.compiler.models import EXPERT_NAMES, read_json_object
from hif4c.runtime.artifact import canonical_json
from hif4c.runtime.components import DATA_SUFFIXES, check_components, component_names
from hif4c.runtime.errors import Hif4Error

__all__ = ["copy_components"]


def copy_components(root: Path, destination: Path, *, link: bool = False) -> None:
    """Copy every component that model_index.json names but the experts, and model_index.json without them.

    Args:
        root: a diffusers pipeline directory. One without model_index.json (a lone transformer) has nothing to copy.
        destination: made by this call.
        link: make hard links instead of copies.

    Raises:
        Hif4Error: a component is missing, damaged, of an unknown class or pickled, or links cannot be made there.
    """
    index_path = root / "model_index.json"
    if not index_path.is_file():
        return
    index = read_json_object(index_path)
    destination.mkdir()
    for name in component_names(index, index_path):
        _copy_folder(root / name, destination / name, link)
    index |= {name: [None, None] for name in EXPERT_NAMES if name in index}
    (destination / "model_index.json").write_bytes(canonical_json(index))
    check_components(destination)


def _copy_folder(source: Path, destination: Path, link: bool) -> None:
    if not source.is_dir():
        raise Hif4Error(
            f"{source}: is missing, though model_index.json names it; complete the directory, or use --components none."
        )
    files = sorted(path for path in source.iterdir() if path.is_file())
    kept = [path for path in files if path.suffix in DATA_SUFFIXES]
    if any(path.suffix == ".bin" for path in files) and not any(path.suffix == ".safetensors" for path in kept):
        raise Hif4Error(f"{source}: has only pickled weights (.bin); save it as safetensors first.")
    destination.mkdir()
    for path in kept:
        if link:
            try:
                # Hub caches hold links to blobs: link the file itself.
                os.link(path.resolve(), destination / path.name)
            except OSError as error:
                raise Hif4Error(f"{path}: cannot be hard-linked ({error.strerror}); use --components copy.") from None
        else:
            shutil.copyfile(path, destination / path.name)
