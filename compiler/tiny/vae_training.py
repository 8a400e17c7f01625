"""Training of wan-tiny's VAE: a small `AutoencoderKLWan` (spatial factor 4, temporal factor 2, 8 latent channels).

PyTorch's default initialization of this architecture hardly trains in minutes; delta-orthogonal initialization (Xiao
et al. 2018, "Dynamical isometry and a mean field theory of CNNs") makes the untrained network nearly an isometry and
trains at once.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn import functional

from hif4c.compiler.tiny.parallel import average_gradients, broadcast_parameters, run_workers
from hif4c.compiler.tiny.world import attribute_indices, held_out_attributes, render_batch, training_attributes

__all__ = ["VaeRecipe", "build_vae", "load_clips", "measure_vae", "set_latent_statistics", "train_vae"]

_log = logging.getLogger(__name__)

# Clips of one frame teach the first causal chunk, short ones the second; (frames, clips a process and step).
_MIX = ((9, 6), (9, 6), (5, 12), (1, 32))


@dataclass(frozen=True)
class VaeRecipe:
    """Steps and optimizer settings of the VAE's training; each step takes one batch in each process."""

    steps: int = 1500
    learning_rate: float = 2e-3
    warmup: int = 30
    kl_weight: float = 1e-4
    edge_weight: float = 5.0
    seed: int = 0
    workers: int = 2


def build_vae() -> AutoencoderKLWan:
    """The untrained VAE: video [B, 3, 1 + 2 f, 4 h, 4 w] in -1..1 <-> latents [B, 8, 1 + f, h, w]."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=8,
        dim_mult=[1, 2],
        num_res_blocks=2,
        temperal_downsample=[True],
        in_channels=12,  # the VAE sees 2 x 2 patches of RGB
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    _initialize(vae)
    return vae


@torch.no_grad()
def _initialize(vae: AutoencoderKLWan) -> None:
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        module.weight.mul_(0.3)
        if module.bias is not None:
            # Not zero: mid-gray is 0 to the VAE, and the RMS norms have no gradient at a zero vector.
            module.bias.normal_(0, 0.02)
        matrix = nn.init.orthogonal_(torch.empty(module.out_channels, module.in_channels))
        # Spatial centre; of a causal convolution's time taps, the last is the present frame.
        height, width = module.weight.shape[-2:]
        tap = module.weight[..., height // 2, width // 2]
        if isinstance(module, nn.Conv3d):
            tap = tap[..., -1]
        tap.add_(matrix)
        if name.endswith(".conv2"):
            module.weight.mul_(0.1)  # residual branches start small
    bias = vae.quant_conv.bias
    assert bias is not None
    bias[vae.config.z_dim :] = -5.0  # log variance: start almost deterministic


def load_clips(indices: np.ndarray, rng: np.random.Generator, num_frames: int) -> torch.Tensor:
    """Rendered clips of attribute indices [N, 4] as the VAE wants them: float32 [N, 3, F, H, W] in -1..1."""
    frames = render_batch(indices, rng, num_frames)
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 4, 1, 2, 3))).mul_(2).sub_(1)


def _loss(vae: AutoencoderKLWan, video: torch.Tensor, recipe: VaeRecipe) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(video).latent_dist
        output = vae.decode(posterior.sample()).sample
    output = output.float()
    spread = functional.max_pool3d(video, (1, 3, 3), 1, (0, 1, 1)) + functional.max_pool3d(
        -video, (1, 3, 3), 1, (0, 1, 1)
    )
    edge = (spread.amax(1, keepdim=True) > 0.2).float()
    weight = 1 + (recipe.edge_weight - 1) * edge
    difference = output - video
    reconstruction = (weight * (difference.abs() + 2 * difference.square())).mean() / weight.mean()
    log_variance = posterior.logvar.float()
    kl = 0.5 * (posterior.mean.float().square() + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction + recipe.kl_weight * kl


def _train_worker(rank: int, world_size: int, folder: str, recipe: VaeRecipe) -> None:
    torch.manual_seed(recipe.seed)
    vae = build_vae().train()
    parameters = list(vae.parameters())
    broadcast_parameters(parameters)
    torch.manual_seed(recipe.seed * 1000 + rank)
    rng = np.random.default_rng([recipe.seed, rank])
    table = attribute_indices(training_attributes())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, running = time.time(), 0.0
    for step in range(recipe.steps):
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps))
        rate = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * decay
        for group in optimizer.param_groups:
            group["lr"] = rate
        num_frames, count = _MIX[step % len(_MIX)]
        video = load_clips(table[rng.integers(0, len(table), count)], rng, num_frames)
        loss = _loss(vae, video, recipe)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * loss.item() if step else loss.item()
        if rank == 0 and (step % 50 == 49 or step + 1 == recipe.steps):
            _log.info("vae step %d loss %.4f seconds %.0f", step + 1, running, time.time() - start)
        if rank == 0 and (step % 200 == 199 or step + 1 == recipe.steps):
            vae.eval()
            _log.info("vae step %d held out %.2f dB", step + 1, measure_vae(vae, 16))
            vae.save_pretrained(folder)
            vae.train()


def train_vae(folder: Path, recipe: VaeRecipe) -> None:
    """Train from scratch and save the float32 VAE (with the latents' statistics in its config) to `folder`."""
    run_workers(_train_worker, recipe.workers, str(folder), recipe)
    vae = AutoencoderKLWan.from_pretrained(folder)
    set_latent_statistics(vae)
    vae.save_pretrained(folder)


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, count: int) -> float:
    """PSNR in dB (peak 1) of the reconstructions of `count` held-out clips."""
    video = load_clips(attribute_indices(held_out_attributes())[:count], np.random.default_rng(1), 9)
    output = vae.decode(vae.encode(video).latent_dist.mode()).sample
    return float(-10 * torch.log10((output - video).div(2).square().mean()))


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan) -> None:
    """Measure the latents' mean and standard deviation per channel on training clips and put them into the config."""
    rng = np.random.default_rng(2)
    table = attribute_indices(training_attributes())
    latents = [
        vae.encode(load_clips(table[rng.integers(0, len(table), 32)], rng, 9)).latent_dist.mode() for _ in range(8)
    ]
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
