"""wan-tiny with fewer blocks: a whole pipeline that is traced and sampled in little time. Its clips show nothing."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from hif4c.compiler.models import tiny_directory

__all__ = ["write_short_tiny"]


def write_short_tiny(directory: Path, layers: int = 1) -> Path:
    """Copy wan-tiny with the first `layers` blocks of both experts; returns the directory."""
    shutil.copytree(tiny_directory(), directory)
    for expert in ("transformer", "transformer_2"):
        config, weights = (directory / expert / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": layers}))
        kept = {
            name: tensor
            for name, tensor in load_file(weights).items()
            if not name.startswith("blocks.") or int(name.split(".")[1]) < layers
        }
        save_file(kept, weights, metadata={"format": "pt"})
    return directory
