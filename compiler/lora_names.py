"""The names of a LoRA's tensors, whoever wrote the file, and the model's tensors that they change.

The styles that exist for Wan, by what wrote them:

- diffusers and PEFT: `transformer.blocks.0.attn1.to_q.lora_A.weight`, `base_model.model.….lora_A.default.weight`
- kohya's musubi-tuner: `lora_unet_blocks_0_self_attn_q.lora_down.weight` and `….alpha`; VideoX-Fun: `lora_unet__…`
- Wan's own names, as ComfyUI and most trainers write them: `diffusion_model.blocks.0.self_attn.q.lora_A.weight`
- lightx2v: the same with `lora_down`, and differences of whole tensors: `….diff` of a weight, `….diff_b` of a bias,
  `blocks.0.diff_m` of a modulation table

Sources: `loaders/lora_conversion_utils.py` of huggingface/diffusers, `tools/extract/lora_extractor.py` of
ModelTC/LightX2V, `convert_lora.py` of kohya-ss/musubi-tuner.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hif4c.compiler.wan_names import to_original_name
from hif4c.runtime.components import EXPERT_NAMES

__all__ = ["LoraKey", "Role", "find_targets", "is_image_module", "parse_key"]

Role = Literal["down", "up", "up_bias", "alpha", "weight", "bias", "modulation"]
"""What a tensor of the file is: a factor, the up factor's bias, alpha, or the difference of a whole tensor."""

_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "lora_unet__", "lora_unet_", "lora_transformer_",
)  # fmt: skip
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora(?P<which>_A|_B|_down|_up|\.down|\.up)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<what>alpha|diff|diff_b|diff_m)")
_WHOLE_ROLES: dict[str, Role] = {"alpha": "alpha", "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_IMAGE = re.compile(
    r"blocks_\d+_(cross_attn_(k_img|v_img|norm_k_img)|attn2_(add_k_proj|add_v_proj|norm_added_k))"
    r"|img_emb_.+|condition_embedder_image_embedder_.+"
)


@dataclass(frozen=True)
class LoraKey:
    """The name of one tensor of a LoRA file, taken apart.

    Attributes:
        expert: the expert that the name says it is for, or None.
        module: the module's path, in whatever naming, without prefixes.
        role: what the tensor is.
    """

    expert: str | None
    module: str
    role: Role

    @property
    def flat(self) -> str:
        """The module with underscores for dots: in kohya's names, all that is left of it."""
        return self.module.replace(".", "_")


def parse_key(key: str) -> LoraKey | None:
    """Take a name apart; None when it is of a kind that is not fused (DoRA, LoHa, LoKr, lora_mid, ...)."""
    role: Role
    if match := _FACTOR.fullmatch(key):
        down = match["which"] in ("_A", "_down", ".down")
        if match["leaf"] == "bias" and down:
            return None
        role = "down" if down else "up_bias" if match["leaf"] == "bias" else "up"
    elif match := _WHOLE.fullmatch(key):
        role = _WHOLE_ROLES[match["what"]]
    else:
        return None
    module, expert = match["module"], None
    while prefix := next((item for item in (*_PREFIXES, *_EXPERT_PREFIXES) if module.startswith(item)), None):
        module = module.removeprefix(prefix)
        expert = _EXPERT_PREFIXES.get(prefix, expert)
    return LoraKey(expert, module, role)


_EXPERT_PREFIXES = {f"{name}.": name for name in EXPERT_NAMES}


def find_targets(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """(flat module, "weight" | "bias" | "modulation") -> the model's tensor, under diffusers' and under Wan's names.

    Args:
        names: of the model's tensors, as diffusers has them.
    """
    targets = {}
    for name in names:
        for known in (name, to_original_name(name)):
            if known is not None:
                module, _, leaf = known.rpartition(".")
                role = "modulation" if leaf == "scale_shift_table" else leaf
                targets[module.replace(".", "_"), role] = name
    return targets


def is_image_module(flat: str) -> bool:
    """Whether a module is of Wan2.1's attention to an image embedding, which Wan2.2 does without."""
    return _IMAGE.fullmatch(flat) is not None
