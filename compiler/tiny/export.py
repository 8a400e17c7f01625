"""Assembles the trained parts into a diffusers pipeline directory in bf16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from hif4c.compiler.tiny.dit_training import BOUNDARY, FLOW_SHIFT
from hif4c.compiler.tiny.text_training import build_tokenizer

__all__ = ["export_pipeline"]


def export_pipeline(vae: Path, text: Path, high: Path, low: Path, out: Path) -> WanPipeline:
    """Save the complete pipeline to `out` in bf16 and return it.

    `text` holds `text_encoder/`; `high` and `low` are the experts' directories.
    """
    # Cast after loading: loaded as bf16, diffusers would keep, and save, some of the experts' modules in float32.
    # Loading the export gives those modules float32 copies of the stored bf16 values.
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),  # a fresh one: a used tokenizer also saves its last padding
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
