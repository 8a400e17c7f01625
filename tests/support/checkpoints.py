"""Small random Wan checkpoints on disk, in diffusers' layout and in Wan's own; every parameter is random."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from hif4c.compiler.locate import ModelDescription, describe_model
from hif4c.compiler.wan_names import to_original_name

__all__ = [
    "VARIANTS",
    "build_transformer",
    "narrow_model",
    "random_inputs",
    "small_config",
    "write_diffusers_model",
    "write_wan_model",
]

VARIANTS = {"t2v": (16, 16), "i2v": (36, 16), "ti2v": (48, 48)}
"""Input and output channels."""

_PIPELINES: dict[str, dict[str, Any]] = {
    "t2v": {"_class_name": "WanPipeline", "boundary_ratio": 0.875},
    "i2v": {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9},
    "ti2v": {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": True},
}


def small_config(variant: str = "t2v", **changes: Any) -> dict[str, Any]:
    """The config.json of a transformer of 2 layers, 4 heads of 32, with the channels of the variant."""
    in_channels, out_channels = VARIANTS[variant]
    config = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.35.0.dev0",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 256,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    return {**config, **changes}


def build_transformer(
    variant: str = "t2v", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> WanTransformer3DModel:
    """A real diffusers transformer with seeded weights (norm weights around 1, the rest around 0, none equal to it)."""
    arguments = {key: value for key, value in small_config(variant, **changes).items() if not key.startswith("_")}
    model = WanTransformer3DModel(**arguments).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
        parameter.normal_(0, fan_in**-0.5, generator=generator)
        if ".norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return model.to(dtype)


def narrow_model(name: str, **changes: Any) -> ModelDescription:
    """A built-in model with 2 layers of the smallest width that fits, everything else its own.

    Args:
        name: of the model.
        changes: to the configuration of its experts.
    """
    model = describe_model(name)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2, "text_dim": 64}
    configs = {key: dataclasses.replace(config, **{**sizes, **changes}) for key, config in model.configs.items()}
    return dataclasses.replace(model, configs=configs)


def random_inputs(variant: str = "t2v", *, seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    """Arguments of a forward call: latents [B, C, 3, 8, 6], text [B, 7, 64], timestep [B], or [B, tokens] for ti2v."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3 * 4 * 3) if variant == "ti2v" else (batch,)
    return {
        "hidden_states": torch.randn(batch, VARIANTS[variant][0], 3, 8, 6, generator=generator),
        "timestep": torch.rand(shape, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(batch, 7, 64, generator=generator),
    }


def write_diffusers_model(
    directory: Path,
    variant: str = "t2v",
    *,
    experts: int | None = None,
    shards: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> dict[str, WanTransformer3DModel]:
    """A pipeline directory of which only the transformers exist; returns the experts written, by name.

    Args:
        experts: 1 or 2; by default what the published model of that variant has.
        shards: several files and an index instead of one file.
        changes: to the transformers' configuration.
    """
    names = ("transformer", "transformer_2")[: experts or (1 if variant == "ti2v" else 2)]
    models = {name: build_transformer(variant, seed=i, dtype=dtype, **changes) for i, name in enumerate(names)}
    for name, model in models.items():
        model.save_pretrained(directory / name, max_shard_size="300KB" if shards else "10GB")
    entries: dict[str, Any] = {name: [None, None] for name in ("transformer", "transformer_2")}
    entries |= {name: ["diffusers", "WanTransformer3DModel"] for name in names}
    pipeline = dict(_PIPELINES[variant])
    if len(names) == 1:
        pipeline["boundary_ratio"] = None
    index = {"_diffusers_version": "0.35.0.dev0", **pipeline, **entries, "vae": ["diffusers", "AutoencoderKLWan"]}
    _write_json(directory / "model_index.json", index)
    return models


def write_wan_model(
    directory: Path, variant: str = "t2v", *, shards: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, WanTransformer3DModel]:
    """The same in the layout of Wan's own releases; returns the same experts as write_diffusers_model would."""
    folders = {"transformer": ""} if variant == "ti2v" else _WAN_FOLDERS
    models = {name: build_transformer(variant, seed=i, dtype=dtype) for i, name in enumerate(folders)}
    for name, model in models.items():
        _write_wan_expert(directory / folders[name], variant, model, shards)
    return models


_WAN_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}


def _write_wan_expert(folder: Path, variant: str, model: WanTransformer3DModel, shards: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": 128,
        "eps": 1e-6,
        "ffn_dim": 256,
        "freq_dim": 64,
        "in_dim": VARIANTS[variant][0],
        "model_type": variant,
        "num_heads": 4,
        "num_layers": 2,
        "out_dim": VARIANTS[variant][1],
        "text_dim": 64,  # published ones leave it out; theirs is Wan's default of 4096
        "text_len": 512,
    }
    _write_json(folder / "config.json", config)
    state = {str(to_original_name(name)): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if not shards:
        save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for part in range(2):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00002.safetensors"
        content = {name: tensor for i, (name, tensor) in enumerate(state.items()) if i % 2 == part}
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
