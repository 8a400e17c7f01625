"""Names and shapes of the parameters of diffusers' WanTransformer3DModel, from its config alone.

Importing diffusers takes seconds; a plan needs none of it. The tests compare these with the model itself.
"""

from __future__ import annotations

import math

from hif4c.compiler.models import WanConfig

__all__ = ["is_linear_weight", "parameter_shapes"]

_MODULATIONS = 6
"""Shift, scale and gate, before self-attention and before the feed-forward layer."""


def parameter_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """diffusers' name -> shape, in the order of the modules; weights of linears are [out, in]."""
    width, patch = config.inner_dim, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 2, width)}
    shapes |= {"patch_embedding.weight": (width, config.in_channels, *patch), "patch_embedding.bias": (width,)}
    embedder = "condition_embedder"
    shapes |= _linear(f"{embedder}.time_embedder.linear_1", config.freq_dim, width)
    shapes |= _linear(f"{embedder}.time_embedder.linear_2", width, width)
    shapes |= _linear(f"{embedder}.time_proj", width, _MODULATIONS * width)
    shapes |= _linear(f"{embedder}.text_embedder.linear_1", config.text_dim, width)
    shapes |= _linear(f"{embedder}.text_embedder.linear_2", width, width)
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        shapes[f"{block}.scale_shift_table"] = (1, _MODULATIONS, width)
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= _linear(f"{block}.{attention}.{name}", width, width)
            for name in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{name}.weight"] = (width,)
        if config.cross_attn_norm:
            shapes |= {f"{block}.norm2.weight": (width,), f"{block}.norm2.bias": (width,)}
        shapes |= _linear(f"{block}.ffn.net.0.proj", width, config.ffn_dim)
        shapes |= _linear(f"{block}.ffn.net.2", config.ffn_dim, width)
    return shapes | _linear("proj_out", width, config.out_channels * math.prod(patch))


def is_linear_weight(name: str) -> bool:
    """Whether a parameter is the weight of an nn.Linear."""
    path, _, last = name.rpartition(".")
    return last == "weight" and path != "patch_embedding" and not path.rpartition(".")[2].startswith("norm")


def _linear(path: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}.weight": (outputs, inputs), f"{path}.bias": (outputs,)}
