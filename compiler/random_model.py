"""A Wan transformer of any size with made-up weights: on disk as diffusers has it, and compiled, for measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.experts import DTYPE, ExpertBuilder
from hif4c.compiler.locate import ModelDescription, locate_model
from hif4c.compiler.manifest import write_manifest
from hif4c.compiler.models import PipelineConfig, WanConfig
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe, load_recipe
from hif4c.compiler.synthetic_checkpoint import CheckpointOptions, make_checkpoint
from hif4c.runtime.native import native_kernels

__all__ = ["RECIPE", "compile_random_model", "random_config"]

RECIPE = "rotate"
"""The recipe of a compiled random model: the work of `best` when it runs, and no calibration."""

Events = Callable[[str, Any], None]


def random_config(width: int, heads: int, ffn: int, layers: int, text_dim: int) -> WanConfig:
    """A text-to-video transformer like Wan2.2's in everything but its sizes; Hif4Error for sizes that do not fit.

    Args:
        width: of the residual stream, a multiple of heads.
        heads: of the attention.
        ffn: inner width of the feed-forward layers.
        layers: blocks.
        text_dim: width of the text embeddings.
    """
    values = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": text_dim,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }
    return WanConfig.from_dict(values, f"width {width}, heads {heads}, ffn {ffn}, layers {layers}")


def compile_random_model(directory: Path, config: WanConfig, seed: int = 0) -> tuple[Path, Path]:
    """Write a random model and its artifact below `directory`; returns their directories.

    The artifact has both programs, W4A4 and its variant with activations in bf16, and no bundled kernels.
    """
    model, artifact, scratch = (directory / name for name in ("model", "model.hif4", "scratch"))
    description = ModelDescription(model.name, {"transformer": config}, PipelineConfig())
    make_checkpoint(description, model, CheckpointOptions(seed=seed), _ignore)
    artifact.mkdir()
    scratch.mkdir()
    location = locate_model(str(model), expert_files_only=True)
    recipe = _BothPrograms(**{**vars(load_recipe(RECIPE)), "bf16_steps": 1.0})
    builder = ExpertBuilder(location, {"transformer": recipe}, None, artifact, scratch, _ignore)
    with Checkpoint(location.experts["transformer"], config) as checkpoint, native_kernels():
        builder.expert("transformer", make_plan(config, recipe, DTYPE), checkpoint)
    write_manifest(artifact, location, builder.experts, builder.files)
    return model, artifact


class _BothPrograms(Recipe):
    """A recipe whose artifact has the program for bf16 steps, but no calibration to choose these steps with."""

    @property
    def needs_calibration(self) -> bool:
        return False


def _ignore(event: str, value: Any) -> None:
    pass
