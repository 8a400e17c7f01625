"""Weight names of Wan's own checkpoints and diffusers' names for the same tensors.

Source: `scripts/convert_wan_to_diffusers.py` of huggingface/diffusers. There it is a chain of text replacements; here
it is a rule per name, so that an unknown name is recognised as one. Wan2.2 only: Wan2.1's image embedding has no entry.
"""

import re
from collections.abc import Iterable

__all__ = ["is_original_layout", "to_diffusers_name", "to_original_name"]

# ComfyUI's repackaged files put every name under this.
_PREFIX = "model.diffusion_model."

_TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}

# Wan calls the norms before attention, before cross-attention and before the feed-forward norm1, norm3 and norm2;
# diffusers counts them in that order. Only the one before cross-attention has weights.
_BLOCK = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
for _theirs, _ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _part, _new in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}.items():
        _BLOCK[f"{_theirs}.{_part}"] = f"{_ours}.{_new}"
    for _part in ("norm_q", "norm_k"):
        _BLOCK[f"{_theirs}.{_part}"] = f"{_ours}.{_part}"

_TOP_BACK = {new: old for old, new in _TOP.items()}
_BLOCK_BACK = {new: old for old, new in _BLOCK.items()}
_NAME = re.compile(r"(?:blocks\.(?P<block>0|[1-9][0-9]*)\.)?(?P<module>.+)\.(?P<leaf>weight|bias)")
_TABLE = re.compile(r"(blocks\.(?:0|[1-9][0-9]*)\.)(modulation|scale_shift_table)")


def to_diffusers_name(name: str) -> str | None:
    """diffusers' name of a tensor of a Wan checkpoint, or None when Wan's Wan2.2 models have no such tensor."""
    name = name.removeprefix(_PREFIX)
    if name == "head.modulation":
        return "scale_shift_table"
    if (table := _TABLE.fullmatch(name)) and table[2] == "modulation":
        return f"{table[1]}scale_shift_table"
    return _rename(name, _TOP, _BLOCK)


def to_original_name(name: str) -> str | None:
    """The inverse of to_diffusers_name."""
    if name == "scale_shift_table":
        return "head.modulation"
    if (table := _TABLE.fullmatch(name)) and table[2] == "scale_shift_table":
        return f"{table[1]}modulation"
    return _rename(name, _TOP_BACK, _BLOCK_BACK)


def is_original_layout(names: Iterable[str]) -> bool:
    """Whether any of the names is one that only Wan's own checkpoints have."""
    return any(to_diffusers_name(name) not in (None, name) for name in names)


def _rename(name: str, top: dict[str, str], block: dict[str, str]) -> str | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match["block"] is None:
        module = top.get(match["module"])
        return None if module is None else f"{module}.{match['leaf']}"
    module = block.get(match["module"])
    # RMSNorm has no bias.
    if module is None or (match["leaf"] == "bias" and match["module"].endswith(("norm_q", "norm_k"))):
        return None
    return f"blocks.{match['block']}.{module}.{match['leaf']}"
