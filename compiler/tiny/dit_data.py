"""The experts' training data: clips encoded once by the frozen VAE, and every caption encoded once by the frozen text
encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional
from transformers import T5Tokenizer, UMT5EncoderModel

from hif4c.compiler.tiny.parallel import run_workers
from hif4c.compiler.tiny.text_training import encode_text
from hif4c.compiler.tiny.vae_training import load_clips
from hif4c.compiler.tiny.world import NUM_TEMPLATES, attribute_indices, caption, training_attributes

__all__ = ["DataRecipe", "LatentData", "encode_clips", "load_latents"]


@dataclass(frozen=True)
class DataRecipe:
    """How many clips of each training combination are encoded, and by how many processes."""

    clips_each: int = 12
    seed: int = 0
    workers: int = 2


@dataclass(frozen=True)
class LatentData:
    """Everything an expert trains on.

    `latents` [N, 8, 5, 8, 8], normalized per channel; `subject` [N, 5, 8, 8], 1.0 where a latent position sees the
    shape, else 0.0; `combination` int64 [N]; `text` [combinations, templates, T, 64] and `lengths` of the captions;
    `empty_text` [T, 64] and `empty_length` of the empty caption.
    """

    latents: torch.Tensor
    subject: torch.Tensor
    combination: torch.Tensor
    text: torch.Tensor
    lengths: torch.Tensor
    empty_text: torch.Tensor
    empty_length: int


@torch.no_grad()
def _encode_worker(rank: int, world_size: int, vae_folder: str, out: str, recipe: DataRecipe) -> None:
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    table = attribute_indices(training_attributes())
    rows = np.arange(len(table) * recipe.clips_each) % len(table)
    rows = np.array_split(rows, world_size)[rank]
    rng = np.random.default_rng([recipe.seed, 11, rank])
    latents, subject = [], []
    for chunk in np.array_split(rows, len(rows) // 27):
        video = load_clips(table[chunk], rng, 9)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(video).latent_dist.mode().float())
        background = video[:, :, :, :1, :1]
        seen = ((video - background).abs().amax(1) > 0.1).float()
        # Frame 0 is the first latent frame; each later latent frame covers two frames.
        seen = torch.cat([seen[:, :1], seen[:, 1:].unflatten(1, (-1, 2)).amax(2)], dim=1)
        subject.append(functional.max_pool2d(seen, 4))
    torch.save({"latents": torch.cat(latents), "subject": torch.cat(subject), "rows": rows}, f"{out}.{rank}")


def encode_clips(vae_folder: Path, out: Path, recipe: DataRecipe) -> None:
    """Render and encode the training clips; `out` receives latents (not normalized), subject masks and combinations."""
    run_workers(_encode_worker, recipe.workers, str(vae_folder), str(out), recipe)
    parts = [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(recipe.workers)]
    torch.save(
        {
            "latents": torch.cat([part["latents"] for part in parts]),
            "subject": torch.cat([part["subject"] for part in parts]),
            "combination": torch.cat([torch.from_numpy(part["rows"]) for part in parts]),
        },
        out,
    )


@torch.no_grad()
def load_latents(file: Path, vae_folder: Path, text_folder: Path) -> LatentData:
    """Read what `encode_clips` wrote, normalize it with the VAE's statistics, and encode all training captions."""
    stored = torch.load(file)
    config = AutoencoderKLWan.load_config(vae_folder)
    mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1, 1)
    std = torch.tensor(config["latents_std"]).view(1, -1, 1, 1, 1)
    tokenizer = T5Tokenizer.from_pretrained(text_folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(text_folder / "text_encoder")
    items = training_attributes()
    texts = [caption(item, template) for item in items for template in range(NUM_TEMPLATES)]
    text, lengths = encode_text(tokenizer, encoder, texts)
    empty_text, empty_length = encode_text(tokenizer, encoder, [""])
    return LatentData(
        latents=(stored["latents"] - mean) / std,
        subject=stored["subject"],
        combination=stored["combination"],
        text=text.unflatten(0, (len(items), NUM_TEMPLATES)),
        lengths=lengths.unflatten(0, (len(items), NUM_TEMPLATES)),
        empty_text=empty_text[0],
        empty_length=int(empty_length[0]),
    )
