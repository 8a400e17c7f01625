"""Harden: the same function with outlier channels in the inputs of its 4-bit linears, a yardstick for recipes.

A channel is multiplied by a power of two where it is made and the columns that read it are divided by it. This is exact
at four kinds of site of a Wan block, named here by the linear that reads the channel first:

- `attn1.to_q` (with to_k, to_v) and `ffn.net.0.proj`: the modulation after norm1 and norm3. Shift and scale are
  `scale_shift_table + time_proj`, and time_proj serves all blocks, so these channels are the same in all blocks.
- `attn2.to_q`: weight and bias of norm2; every block has channels of its own.
- `attn1.to_out.0`, `attn2.to_out.0`: rows and bias of to_v (attention mixes tokens, never channels of v); the same.
- `attn2.to_k` (with to_v): rows and bias of `text_embedder.linear_2`, the same in all blocks.

There is no such site at `ffn.net.2`: a GELU lies between it and what makes its input. Nor between to_q, to_k and the
attention scores, where an RMS norm mixes the channels.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.capture import build_transformer
from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.compiler.components import copy_components
from hif4c.compiler.locate import ModelLocation, locate_model
from hif4c.compiler.models import WanConfig
from hif4c.compiler.staging import staged_directory
from hif4c.runtime.artifact import canonical_json
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import DTYPE_NAMES, StreamingWriter, TensorSpec

__all__ = ["PROFILES", "RECORD", "SITES", "Injection", "Outliers", "choose_injections", "harden_model"]

RECORD = "hardened.json"
"""File in the written directory that says what was injected."""

SITES: Mapping[str, tuple[str, ...]] = {
    "attn1.to_q": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.to_out.0": ("attn1.to_out.0",),
    "attn2.to_q": ("attn2.to_q",),
    "attn2.to_k": ("attn2.to_k", "attn2.to_v"),
    "attn2.to_out.0": ("attn2.to_out.0",),
    "ffn.net.0.proj": ("ffn.net.0.proj",),
}
"""Site -> the linears of a block that read its input."""

_SHARED = ("attn1.to_q", "attn2.to_k", "ffn.net.0.proj")
# Where a modulated input finds its shift among the six parts of scale_shift_table and time_proj; its scale is next.
_SHIFT_PART = {"attn1.to_q": 0, "ffn.net.0.proj": 3}
# What else makes an input, in its own block or for all.
_MAKERS = {
    "attn1.to_out.0": "blocks.{}.attn1.to_v",
    "attn2.to_q": "blocks.{}.norm2",
    "attn2.to_k": "condition_embedder.text_embedder.linear_2",
    "attn2.to_out.0": "blocks.{}.attn2.to_v",
}
_TIME_PROJ = "condition_embedder.time_proj"
_BASE_NAME = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Outliers:
    """What a profile injects at one site.

    Attributes:
        factor: what the channels are multiplied by; a power of two, so that every scaled weight is exact.
        share: of the input's channels, at least one. 1/64 is one channel a HiF4 unit on average.
    """

    factor: int
    share: float = 1 / 64

    def __post_init__(self) -> None:
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ValueError(f"factor {self.factor} is not a power of two above 1")

    def count(self, width: int) -> int:
        """How many of `width` channels."""
        return max(1, round(self.share * width))


PROFILES: Mapping[str, Mapping[str, Outliers]] = {
    "x32": dict.fromkeys(SITES, Outliers(32)),
    "x128": dict.fromkeys(SITES, Outliers(128)),
    # Published per-tensor maxima of Wan2.2-I2V-A14B, as powers of two. Inputs that come from a LayerNorm: maximum over
    # 4 standard deviations; attn1.to_q 9.9 (largest block 22.7), ffn.net.0.proj 5.2 (13.7), attn2.to_q 53.5 in a
    # single channel. Inputs that come from an attention have no natural unit: attn1.to_out.0 has the largest block over
    # the median block (21.2 over 8.9), attn2.to_out.0 the middle of its rare calls, 4-16 times the median. Weights can
    # make a channel large in every call, not in rare ones. The text tokens (attn2.to_k, 1.1) have no outliers.
    "wan2.2": {
        "attn1.to_q": Outliers(4),
        "attn1.to_out.0": Outliers(2),
        "attn2.to_q": Outliers(16, share=0),
        "attn2.to_out.0": Outliers(8),
        "ffn.net.0.proj": Outliers(2),
    },
}
"""Profile -> site -> what is injected there."""


@dataclass(frozen=True)
class Injection:
    """Channels of one input that grow by `factor`, in the given blocks."""

    site: str
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    factor: int


@dataclass(frozen=True)
class _Edit:
    """`x * factor + offset` at some indices along a dimension of a tensor, or of the flattened tensor (None)."""

    dim: int | None
    indices: tuple[int, ...]
    factor: float
    offset: float = 0.0


def harden_model(
    model: ModelLocation | str,
    output: str | os.PathLike[str],
    *,
    profile: str,
    seed: int = 0,
    events: Callable[[str, Any], None] = lambda event, value: None,
) -> dict[str, Any]:
    """Write a diffusers directory of the same function as MODEL whose 4-bit linears have outlier channels.

    One tensor is in memory at a time. Dtypes are kept, but for the `scale_shift_table` of blocks, which becomes float32
    (diffusers loads it in float32 whatever it is stored in). In float32 and in mixed bf16 the outputs differ from
    the original's only by the float32 rounding of the modulation. The directory appears when it is complete.

    Args:
        model: a diffusers pipeline, as `locate_model` takes or finds it, with all its components on this machine.
        output: must not exist.
        profile: one of `PROFILES`.
        seed: chooses the channels.
        events: called with ("total", bytes to read), ("bytes", bytes read) and ("step", sentence).

    Returns:
        What `RECORD` in the directory says: {"source", "profile", "seed", "experts": {name: {"fingerprint" of the
        original weights, "injections": [{"site", "blocks", "channels", "factor"}]}}}.

    Raises:
        Hif4Error: an unknown profile, an output that exists, a model in another layout or with damaged or missing
            files, weights that do not stay exact (float16 columns that become subnormal), or a full disk.
    """
    if profile not in PROFILES:
        raise Hif4Error(f"profile {profile!r}: choose one of {', '.join(PROFILES)}.")
    target = Path(output)
    with staged_directory(target, "hardening") as staging:
        location = locate_model(model, expert_files_only=False) if isinstance(model, str) else model
        if location.layout != "diffusers" or not (location.root / "model_index.json").is_file():
            raise Hif4Error(f"{location.root}: only a diffusers pipeline (with model_index.json) can be hardened.")
        events("total", _checked_bytes(location))
        events("unit", "bytes")
        events("step", "copying the rest of the pipeline")
        pipeline = staging / "pipeline"
        copy_components(location.root, pipeline)
        shutil.copyfile(location.root / "model_index.json", pipeline / "model_index.json")
        experts = {}
        for name, config in location.configs.items():
            events("step", f"hardening {name}")
            injections = choose_injections(config, profile, f"{seed}/{name}")
            fingerprint = _write_expert(location.experts[name], config, injections, pipeline / name, events)
            experts[name] = {"fingerprint": fingerprint, "injections": [asdict(item) for item in injections]}
        record = {"source": location.source, "profile": profile, "seed": seed, "experts": experts}
        (pipeline / RECORD).write_bytes(canonical_json(record))
        os.rename(pipeline, target)
    return record


def choose_injections(config: WanConfig, profile: str, seed: str) -> list[Injection]:
    """The channels that a profile makes large; every site, and every block of a site of its own, draws anew.

    A model whose norm2 has no weights (`cross_attn_norm` false) gets none at attn2.to_q.
    """
    blocks = range(config.num_layers)
    result = []
    for site, outliers in PROFILES[profile].items():
        if site == "attn2.to_q" and not config.cross_attn_norm:
            continue
        for group in [tuple(blocks)] if site in _SHARED else [(block,) for block in blocks]:
            # Every site that there is has the width of the residual stream.
            drawn = random.Random(f"{seed}/{site}/{group[0]}").sample(
                range(config.inner_dim), outliers.count(config.inner_dim)
            )
            result.append(Injection(site, group, tuple(sorted(drawn)), outliers.factor))
    return result


def _make_edits(injections: list[Injection], width: int) -> dict[str, list[_Edit]]:
    """Tensor name -> what is done to it."""
    edits: dict[str, list[_Edit]] = defaultdict(list)
    for item in injections:
        for block in item.blocks:
            for reader in SITES[item.site]:
                edits[f"blocks.{block}.{reader}.weight"].append(_Edit(1, item.channels, 1 / item.factor))
        if item.site in _SHIFT_PART:
            first = _SHIFT_PART[item.site] * width
            shift = tuple(first + channel for channel in item.channels)
            scale = tuple(width + index for index in shift)
            for leaf in ("weight", "bias"):
                edits[f"{_TIME_PROJ}.{leaf}"].append(_Edit(0, shift + scale, item.factor))
            for block in item.blocks:
                table = edits[f"blocks.{block}.scale_shift_table"]
                table.append(_Edit(None, shift, item.factor))
                # The scale enters as 1 + scale, and s (1 + scale) = 1 + (s scale + s - 1).
                table.append(_Edit(None, scale, item.factor, item.factor - 1))
        else:
            maker = _MAKERS[item.site].format(item.blocks[0])
            for leaf in ("weight", "bias"):
                edits[f"{maker}.{leaf}"].append(_Edit(0, item.channels, item.factor))
    return edits


def _apply(tensor: torch.Tensor, edits: list[_Edit], where: str) -> torch.Tensor:
    """An edited copy; float32 where an offset was added, else of the tensor's own dtype and exact."""
    rounded = any(edit.offset for edit in edits)
    result = tensor.to(torch.float32 if rounded else tensor.dtype, copy=True)
    for edit in edits:
        view = result.view(-1) if edit.dim is None else result.movedim(edit.dim, 0)
        indices = torch.tensor(edit.indices)
        wanted = view[indices].double() * edit.factor + edit.offset
        view[indices] = wanted.to(result.dtype)
        if not edit.offset and not torch.equal(view[indices].double(), wanted):
            raise Hif4Error(
                f"{where} is {DTYPE_NAMES[tensor.dtype]}, in which it cannot be scaled by {edit.factor} exactly; "
                "save the model in bfloat16 first."
            )
    return result


def _write_expert(
    source: Path, config: WanConfig, injections: list[Injection], folder: Path, events: Callable[[str, Any], None]
) -> str:
    """Write one expert's folder; returns the fingerprint of the original weights."""
    edits = _make_edits(injections, config.inner_dim)
    fingerprint = Fingerprint()
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    with Checkpoint(source, config, "diffusers") as checkpoint:
        specs = []
        for name in checkpoint.names:
            rounded = any(edit.offset for edit in edits.get(name, []))
            dtype = torch.float32 if rounded else checkpoint.dtype(name)
            specs.append(TensorSpec(name, dtype, tuple(checkpoint.shape(name))))
        with StreamingWriter(folder, specs, base_name=_BASE_NAME) as writer:
            for name in checkpoint.names:
                tensor = checkpoint.read(name, validate=True)
                fingerprint.add(name, tensor)
                writer.write(name, _apply(tensor, edits[name], f"{source}: {name}") if name in edits else tensor)
                size = tensor.nbytes
                del tensor
                checkpoint.release(name)
                events("bytes", size)
    return fingerprint.hexdigest()


def _checked_bytes(location: ModelLocation) -> int:
    """Bytes of all experts' weights, whose names and shapes are checked before any work is done."""
    total = 0
    for name, config in location.configs.items():
        with Checkpoint(location.experts[name], config, "diffusers") as checkpoint:
            parameters = build_transformer(config).named_parameters()
            checkpoint.check({key: tuple(value.shape) for key, value in parameters})
            total += checkpoint.total_bytes
    return total
