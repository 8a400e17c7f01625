"""Training of wan-tiny's two experts by flow matching, each in one single-threaded process.

The pipeline's scheduler shifts its noise levels by 3, so levels are drawn as sigma = 3 u / (1 + 2 u); the high-noise
expert is trained on sigma >= 0.875 only and the low-noise expert below. Matrices of the blocks are trained by Muon
(Jordan et al. 2024), everything else by AdamW.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from hif4c.compiler.tiny.dit_data import LatentData, load_latents
from hif4c.compiler.tiny.dit_forward import text_bias, training_forward
from hif4c.compiler.tiny.text_training import MAX_TOKENS

__all__ = ["BOUNDARY", "FLOW_SHIFT", "DitRecipe", "build_expert", "train_expert"]

_log = logging.getLogger(__name__)

BOUNDARY = 0.875  # sigma at which the experts hand over
FLOW_SHIFT = 3.0
_BOUNDARY_U = BOUNDARY / (FLOW_SHIFT - (FLOW_SHIFT - 1) * BOUNDARY)
_TEXT_LENGTH = 512  # the pipeline's default padded length, in tokens


@dataclass(frozen=True)
class DitRecipe:
    """Steps and optimizer settings of one expert. The rate warms up, stays, and decays linearly over the last steps."""

    steps: int = 5750
    decay_steps: int = 1000
    warmup: int = 100
    batch: int = 16
    muon_rate: float = 5e-3
    adam_rate: float = 2e-3
    weight_decay: float = 0.02
    caption_dropout: float = 0.1
    subject_weight: float = 3.0
    ema: float = 0.998
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        return min(1.0, (step + 1) / self.warmup, max(0.02, (self.steps - step) / self.decay_steps))


def build_expert(seed: int) -> WanTransformer3DModel:
    """An untrained expert: 6 layers, 4 heads of 32, feed-forward 1280, initialized to return about its input."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=64,
        freq_dim=64,
        ffn_dim=1280,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        patch = nn.init.orthogonal_(torch.empty(128, 32))
        model.patch_embedding.weight.copy_(patch.view_as(model.patch_embedding.weight))
        assert model.patch_embedding.bias is not None
        model.patch_embedding.bias.zero_()
        # proj_out's rows are ordered (patch row, patch column, channel); the embedding's columns (channel, row,
        # column). A unit-variance token has RMS 1/2 after the embedding, which the output norm scales to 1.
        model.proj_out.weight.copy_(0.5 * patch.T.view(8, 4, 128).transpose(0, 1).reshape(32, 128))
        model.condition_embedder.time_proj.weight.mul_(0.3)
        for block in model.blocks:
            block.attn2.to_out[0].weight.mul_(0.3)
            # Hundreds of padding tokens would drown a caption. The padding's key is its bias alone, which the RMS norm
            # amplifies: opposite to a common part of all queries, it starts out nearly ignored.
            against = torch.randn(128).sign()
            block.attn2.to_q.bias.copy_(1.5 * against)
            block.attn2.to_k.bias.copy_(-0.2 * against)
            block.attn2.norm_k.weight.fill_(1.5)
    return model


def _draw(data: LatentData, recipe: DitRecipe, high: bool, step: int) -> tuple[torch.Tensor, ...]:
    # The step's own generator: an interrupted run continues exactly.
    rng = np.random.default_rng([recipe.seed, int(high), step])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    count = recipe.batch
    rows = torch.from_numpy(rng.integers(0, len(data.latents), count))
    clean = data.latents[rows]
    low_u, high_u = (_BOUNDARY_U, 1.0) if high else (0.0, _BOUNDARY_U)
    u = low_u + (high_u - low_u) * torch.from_numpy((rng.permutation(count) + rng.random(count)) / count).float()
    sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    noise = torch.randn(clean.shape, generator=generator)
    s = sigma.view(-1, 1, 1, 1, 1)
    combination, template = data.combination[rows], torch.from_numpy(rng.integers(0, data.text.shape[1], count))
    text, lengths = data.text[combination, template].clone(), data.lengths[combination, template].clone()
    dropped = torch.from_numpy(rng.random(count) < recipe.caption_dropout)
    text[dropped], lengths[dropped] = data.empty_text, data.empty_length
    # Mostly the default padding, sometimes less, so that any maximum sequence length works.
    padded = _TEXT_LENGTH if rng.random() < 0.5 else int(np.exp(rng.uniform(np.log(MAX_TOKENS + 2), np.log(512))))
    weight = 1 + (recipe.subject_weight - 1) * data.subject[rows].unsqueeze(1)
    bias = text_bias(lengths, MAX_TOKENS, padded)
    return (1 - s) * clean + s * noise, noise - clean, 1000 * sigma, text, bias, weight / weight.mean()


def train_expert(folder: Path, out: Path, high: bool, recipe: DitRecipe) -> None:
    """Train one expert, or continue from `out/state.pt`; averaged weights are saved to `out` as they are made.

    `folder` holds `vae/`, `text/` and `latents.pt`.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name = "high" if high else "low"
    data = load_latents(folder / "latents.pt", folder / "vae", folder / "text")
    model = build_expert(recipe.seed + int(high))
    average = copy.deepcopy(model)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, recipe.muon_rate, recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    first = 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        for part, key in ((model, "model"), (average, "average"), (muon, "muon"), (adam, "adam")):
            part.load_state_dict(state[key])
        first = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    start, running = time.time(), 0.0
    for step in range(first, recipe.steps):
        noisy, velocity, timestep, text, bias, weight = _draw(data, recipe, high, step)
        with torch.autocast("cpu", torch.bfloat16):
            output = training_forward(model, noisy, timestep, text, bias)
        loss = (weight * (output - velocity).square()).mean()
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer, base in ((muon, recipe.muon_rate), (adam, recipe.adam_rate)):
            optimizer.param_groups[0]["lr"] = base * recipe.rate(step)
            optimizer.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += loss.item()
        if step % 100 == 99 or step + 1 == recipe.steps:
            done = min(step % 100, step - first) + 1
            _log.info("%s step %d loss %.4f seconds %.0f", name, step + 1, running / done, time.time() - start)
            running = 0.0
        if step % 250 == 249 or step + 1 == recipe.steps:
            average.save_pretrained(out)
            parts = {"model": model, "average": average, "muon": muon, "adam": adam}
            state = {key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
