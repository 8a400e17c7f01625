"""Assembles the trained parts into a diffusers pipeline directory in bf16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5EncoderModel

from hif4c.compiler.tiny.dit_training import BOUNDARY, FLOW_SHIFT

__all__ = ["export_pipeline"]


def export_pipeline(vae: Path, text: Path, high: Path, low: Path, out: Path) -> WanPipeline:
    """Save the complete pipeline to `out` in bf16 and return it.

    `text` holds `tokenizer/` and `text_encoder/`; `high` and `low` are the experts' directories.
    """
    pipeline = WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(text / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(text / "text_encoder", dtype=torch.bfloat16),
        vae=AutoencoderKLWan.from_pretrained(vae, torch_dtype=torch.bfloat16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=FLOW_SHIFT,
            num_train_timesteps=1000,
        ),
        transformer=WanTransformer3DModel.from_pretrained(high).to(torch.bfloat16),
        transformer_2=WanTransformer3DModel.from_pretrained(low).to(torch.bfloat16),
        boundary_ratio=BOUNDARY,
    )
    pipeline.save_pretrained(out)
    return pipeline
