"""What a synthetic checkpoint needs besides its experts to be sampled: small, and with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hif4c.compiler.models import PipelineConfig, WanConfig, tiny_directory

__all__ = ["write_components"]

_TI2V_CHANNELS = 48
_FLOW_SHIFT = 5.0  # of Wan's 720p models


def write_components(directory: Path, config: WanConfig, pipeline: PipelineConfig, seed: int = 0) -> dict[str, Any]:
    """Write scheduler, tokenizer, text encoder and VAE into a pipeline's directory.

    The VAE compresses as the model's own does (4 x 8 x 8, or 4 x 16 x 16 for 48 latent channels), the text encoder is
    as wide as the model's text, and the tokenizer is wan-tiny's: of other words than its own it knows nothing.

    Returns:
        Their entries in model_index.json.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_FLOW_SHIFT, num_train_timesteps=1000
    )
    scheduler.save_pretrained(directory / "scheduler")
    shutil.copytree(tiny_directory() / "tokenizer", directory / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = UMT5Config(
            vocab_size=64, d_model=config.text_dim, d_kv=16, d_ff=128, num_layers=1, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )  # fmt: skip
        encoder = UMT5EncoderModel(text).to(torch.bfloat16)
        vae = AutoencoderKLWan(**_vae_config(config.out_channels))
    vae.save_pretrained(directory / "vae")
    # Not save_pretrained, which draws a progress bar of its own.
    encoder.config.save_pretrained(directory / "text_encoder")
    state = {name: value for name, value in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(state, directory / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    return {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _vae_config(channels: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": channels,
        "num_res_blocks": 1,
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
    }
    if channels == _TI2V_CHANNELS:
        values |= {
            "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
        }  # fmt: skip
    return values
