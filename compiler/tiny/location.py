"""Where the shipped wan-tiny pipeline is installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Directory of the shipped pipeline, ready for `WanPipeline.from_pretrained`.

    Raises FileNotFoundError where the package was installed without its data.
    """
    path = Path(str(files("hif4c.compiler.tiny") / "wan_tiny"))
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"wan-tiny's weights are not at {path}; train them with tools/train_tiny.py")
    return path
