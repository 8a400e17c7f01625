"""Check the rest of a pipeline (text encoder, tokenizer, VAE, scheduler) before diffusers and transformers read it.

Only known classes, data files only, no key that would send a library after code elsewhere, and every weight file whole.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = [
    "COMPONENT_CLASSES",
    "DATA_SUFFIXES",
    "EXPERT_NAMES",
    "KERNEL_SUFFIXES",
    "PIPELINE_CLASSES",
    "check_components",
    "component_names",
    "is_artifact_file",
]

DATA_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".md", ".html")
"""Endings of the data files that an artifact may hold: no pickles, no code."""

# The one place where an artifact may hold code. It runs only when the user trusts it, see `hif4c.runtime.kernel_files`.
_KERNELS = "kernels/"
_KERNEL_FILE = re.compile(r"kernels/(cpu|cuda|hip)-[a-z0-9-]+/(kernels\.json|[A-Za-z0-9_][A-Za-z0-9_.+-]*)")
KERNEL_SUFFIXES = {"cpu": ".so", "cuda": ".cubin", "hip": ".hsaco"}

EXPERT_NAMES = ("transformer", "transformer_2")
"""In the order of sampling: `transformer` denoises above the boundary timestep, `transformer_2` below it."""

PIPELINE_CLASSES = ("WanPipeline", "WanImageToVideoPipeline")
"""The diffusers pipelines that compiled experts go into."""

COMPONENT_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "scheduler": {
        "diffusers": ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    },
    "tokenizer": {"transformers": ("T5Tokenizer", "T5TokenizerFast")},
    "text_encoder": {"transformers": ("UMT5EncoderModel",)},
    "vae": {"diffusers": ("AutoencoderKLWan",)},
    "image_encoder": {"transformers": ("CLIPVisionModel",)},
    "image_processor": {"transformers": ("CLIPImageProcessor", "CLIPImageProcessorFast")},
}
"""Component of a Wan pipeline -> library -> classes that it may be of."""

WITH_WEIGHTS = ("text_encoder", "vae", "image_encoder")
# Keys by which a config sends transformers or diffusers to code or kernels outside the file.
FORBIDDEN_KEYS = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "attn_implementation",
    "auto_map",
    "base_model_name_or_path",
    "custom_pipelines",
    "experts_implementation",
    "quantization_config",
)


def is_artifact_file(name: str) -> bool:
    """Whether an artifact may hold a file of that relative name: data, or a kernel of a target in its own folder."""
    if not name.startswith(_KERNELS):
        return name.endswith(DATA_SUFFIXES)
    match = _KERNEL_FILE.fullmatch(name)
    return match is not None and (match[2] == "kernels.json" or name.endswith(KERNEL_SUFFIXES[match[1]]))


def component_names(index: dict[str, Any], where: Path) -> list[str]:
    """The components that a model_index.json names, the experts and absent ones aside.

    Raises:
        Hif4Error: a component or class that a Wan pipeline does not have.
    """
    names = []
    for name, entry in index.items():
        if name in EXPERT_NAMES or name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        classes = COMPONENT_CLASSES.get(name)
        if classes is None:
            raise Hif4Error(f"{where}: a Wan pipeline has no component {name!r}.")
        if len(entry) != 2 or entry[1] not in classes.get(str(entry[0]), ()):
            allowed = ", ".join(f"{library}.{kind}" for library, kinds in classes.items() for kind in kinds)
            raise Hif4Error(f"{where}: {name} is {entry!r}, but only {allowed} can be used.")
        names.append(name)
    return names


def check_components(directory: Path) -> None:
    """Check a pipeline directory without its experts.

    Raises:
        Hif4Error: something is missing, truncated, of an unknown class, or asks for code from elsewhere.
    """
    index_path = directory / "model_index.json"
    index = _read_object(index_path)
    if index.get("_class_name") not in PIPELINE_CLASSES:  # a list would name a Python file to diffusers
        raise Hif4Error(f"{index_path}: pipeline class {index.get('_class_name')!r} is not supported.")
    for name in component_names(index, index_path):
        folder = directory / name
        if not folder.is_dir():
            raise Hif4Error(f"{folder}: is missing, though {index_path.name} names it; complete the directory.")
        for path in sorted(folder.rglob("*.json")):
            _check_keys(_read_json(path), path)
        files = {path.name for path in folder.glob("*.safetensors")}
        for path in sorted(folder.glob("*.safetensors")):
            TensorFile(path).close()
        for path in sorted(folder.glob("*.safetensors.index.json")):
            shards = _read_object(path).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise Hif4Error(f"{path}: its weight_map does not say which file holds which tensor.")
            if missing := sorted(set(shards.values()) - files):
                raise Hif4Error(f"{folder / missing[0]}: is missing, though {path.name} lists it.")
        if name in WITH_WEIGHTS and not files:
            raise Hif4Error(f"{folder}: holds no .safetensors weights; complete the directory.")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Hif4Error(f"{path}: is missing; complete the directory.") from None
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise Hif4Error(f"{path}: is not valid JSON ({error}).") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise Hif4Error(f"{path}: must hold a JSON object.")
    return value


def _check_keys(value: Any, path: Path) -> None:
    """Look for forbidden keys at any depth; JSON from a file is finite, so a stack of its own is enough."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key in FORBIDDEN_KEYS:
                if item.get(key) is not None:
                    raise Hif4Error(f"{path}: has {key}, which may load code from elsewhere; remove it.")
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
