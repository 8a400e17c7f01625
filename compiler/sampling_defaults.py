"""Sizes and steps that each model is usually sampled with; `hif4c sample` and `evaluate` start from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hif4c.compiler.models import WanConfig

__all__ = ["sampling_defaults"]

# By (in_channels, out_channels). Wan's own repository: shared_config and wan_*_A14B / wan_ti2v_5B configs.
_DEFAULTS: dict[tuple[int, int], dict[str, Any]] = {
    (8, 8): {
        "height": 32, "width": 32, "frames": 9, "steps": 20, "guidance": 5.0, "fps": 8, "text_tokens": 32,
    },
    (16, 16): {
        "height": 480, "width": 832, "frames": 81, "steps": 40, "guidance": 4.0, "guidance_2": 3.0, "fps": 16,
    },
    (36, 16): {
        "height": 480, "width": 832, "frames": 81, "steps": 40, "guidance": 3.5, "guidance_2": 3.5, "fps": 16,
    },
    (48, 48): {"height": 704, "width": 1280, "frames": 121, "steps": 50, "guidance": 5.0, "fps": 24},
}  # fmt: skip


def sampling_defaults(configs: Mapping[str, WanConfig]) -> dict[str, Any] | None:
    """The usual settings for a model of these experts, as recorded in the manifest; None for an unknown kind."""
    config = next(iter(configs.values()))
    return _DEFAULTS.get((config.in_channels, config.out_channels))
