"""The whole sampling pipeline around exported experts: diffusers' scheduler, text encoder and VAE, and onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hif4c.runtime.components import check_components
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_session import CPU
from hif4c.runtime.onnx_transformer import open_experts
from hif4c.runtime.pipeline import load_components

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["load_onnx_pipeline"]


def load_onnx_pipeline(
    components: str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]],
    *,
    providers: Sequence[str] = CPU,
    session_options: Any = None,
) -> DiffusionPipeline:
    """Load a diffusers pipeline whose experts are .onnx files.

    Args:
        components: an artifact that has them, or the directory of a diffusers pipeline: text encoder, tokenizer, VAE
            and scheduler.
        paths: all .onnx files of a model, in any order.
        providers, session_options: as `hif4c.runtime.onnx_transformer.OnnxTransformer`.

    Raises:
        Hif4Error: as there; an expert of two is missing; or the components are not there, or not data alone.
    """
    experts = open_experts(paths, providers=providers, session_options=session_options)
    if not experts:
        raise Hif4Error("there is no .onnx file; give those that `hif4c export-onnx` wrote.")
    model = next(iter(experts.values())).model
    if missing := [name for name in model["experts"] if name not in experts]:
        raise Hif4Error(
            f"the .onnx files lack {', '.join(missing)}; a pipeline needs every expert, give its files too."
        )
    root = Path(components)
    if (root / "pipeline").is_dir():
        root /= "pipeline"
    if not (root / "model_index.json").is_file():
        raise Hif4Error(
            f"{components}: holds no text encoder, VAE and scheduler; give an artifact that has them, or the directory "
            "of the original pipeline."
        )
    check_components(root)
    pipeline = load_components(str(root), model["pipeline_class"], without_experts=True)
    pipeline.register_modules(**experts)
    return pipeline
