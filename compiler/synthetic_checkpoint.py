"""Checkpoints of made-up weights on disk, at any size, as diffusers or as Wan's own releases have them."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.capture import build_transformer
from hif4c.compiler.disk_space import check_disk
from hif4c.compiler.locate import ModelDescription, describe_model
from hif4c.compiler.models import EXPERT_NAMES, PipelineConfig, WanConfig
from hif4c.compiler.staging import staged_directory
from hif4c.compiler.synthetic_pipeline import write_components
from hif4c.compiler.synthetic_weights import synthetic_tensor
from hif4c.compiler.wan_names import to_original_name
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "CheckpointOptions",
    "checkpoint_bytes",
    "chosen_configs",
    "make_checkpoint",
    "write_expert",
]

LAYOUTS = ("diffusers", "wan")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BASE_NAME = "diffusion_pytorch_model"
_COMPONENT_BYTES = 64_000_000  # the small text encoder, which is as wide as the text, is nearly all of it
_DROP_BYTES = 256_000_000
_WAN_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}

Events = Callable[[str, Any], None]


@dataclass(frozen=True)
class CheckpointOptions:
    """What is written.

    Attributes:
        layout: "diffusers", or "wan" for Wan's own releases.
        layers: transformer blocks, None for the model's own number. Those that are written do not depend on it.
        experts: of the model's, None for all.
        shard_bytes: the most bytes of weights in one file; above that there are several and an index.
        seed: of the values.
        dtype: of all tensors.
        components: a small VAE, text encoder and tokenizer with random weights, and a scheduler, so that the pipeline
            can be run; in diffusers' layout alone.
        threads: that make values, None for one a processor.
    """

    layout: str = "diffusers"
    layers: int | None = None
    experts: tuple[str, ...] | None = None
    shard_bytes: int = 5_000_000_000
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    components: bool = False
    threads: int | None = None


def make_checkpoint(
    model: str | ModelDescription, directory: Path, options: CheckpointOptions, events: Events
) -> dict[str, int]:
    """Write a checkpoint; the directory appears under its name only when it is complete.

    Memory stays constant: a few tensors at a time are made, by several threads, and written in the order of the file.

    Args:
        model: a name or directory as everywhere, of which only the configuration is read; or a description.
        directory: must not exist.
        options: see `CheckpointOptions`.
        events: as in a compile: ("step", sentence), ("total", bytes), ("unit", "bytes"), ("bytes", written).

    Returns:
        Bytes of weights by expert.

    Raises:
        Hif4Error: no such model, layout or expert, too little disk, or writing failed.
    """
    description = describe_model(model) if isinstance(model, str) else model
    configs = chosen_configs(description, options.experts, options.layers)
    if options.layout not in LAYOUTS:
        raise Hif4Error(f"layout {options.layout!r}: choose one of {', '.join(LAYOUTS)}.")
    if options.components and options.layout != "diffusers":
        raise Hif4Error("the rest of a pipeline is written in diffusers' layout only; leave it out, or the layout.")
    sizes = {name: checkpoint_bytes(config, options.dtype) for name, config in configs.items()}
    needs = {f"of {name}": size for name, size in sizes.items()}
    check_disk(directory, needs | ({"of the rest": _COMPONENT_BYTES} if options.components else {}), doing="writing it")
    with staged_directory(directory, "writing the checkpoint") as staging:
        pipeline = description.pipeline
        for name, config in configs.items():
            events("step", f"writing {name} ({format_bytes(sizes[name])})")
            events("total", sizes[name])
            events("unit", "bytes")
            folder = staging / _folder(name, list(configs), options.layout)
            folder.mkdir(parents=True, exist_ok=True)
            values = _wan_config(config, pipeline) if options.layout == "wan" else config.to_dict()
            _write_json(folder / "config.json", values)
            write_expert(folder, config, name, options, lambda count: events("bytes", count))
        if options.layout == "diffusers":
            components: Mapping[str, Any] = {}
            if options.components:
                events("step", "writing the rest of the pipeline")
                components = write_components(staging, next(iter(configs.values())), pipeline, options.seed)
            _write_json(staging / "model_index.json", _model_index(pipeline, list(configs), components))
        os.rename(staging, directory)
    return sizes


def chosen_configs(
    description: ModelDescription, experts: Sequence[str] | None, layers: int | None
) -> dict[str, WanConfig]:
    """The configurations of a model's experts, all or some, with its own number of layers or another; or Hif4Error."""
    names = experts or tuple(description.configs)
    if unknown := [name for name in names if name not in description.configs]:
        raise Hif4Error(f"{description.source} has no expert {unknown[0]!r}; it has {', '.join(description.configs)}.")
    configs = {name: config for name, config in description.configs.items() if name in names}
    if layers is None:
        return configs
    if layers < 1:
        raise Hif4Error(f"layers {layers}: must be at least 1.")
    return {name: replace(config, num_layers=layers) for name, config in configs.items()}


def write_expert(
    folder: Path,
    config: WanConfig,
    expert: str = "transformer",
    options: CheckpointOptions = CheckpointOptions(),
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one expert's weights into an existing folder; `progress` is told the bytes of each tensor.

    Experts of one seed have different values. Those of `layout`, `shard_bytes`, `seed`, `dtype` and `threads` alone are
    heeded of the options.
    """
    shapes = _parameters(config)
    rename = to_original_name if options.layout == "wan" else str
    specs = [TensorSpec(str(rename(name)), options.dtype, shape) for name, shape in shapes.items()]
    seed = f"{options.seed}/{expert}"

    def make(name: str) -> torch.Tensor:
        return synthetic_tensor(name, shapes[name], config.inner_dim, options.dtype, seed)

    with StreamingWriter(
        folder, specs, base_name=_BASE_NAME, shard_bytes=options.shard_bytes, metadata={"format": "pt"}, fsync=True
    ) as writer:
        written = 0
        for spec, tensor in zip(specs, _made_ahead(make, list(shapes), options.threads), strict=True):
            writer.write(spec.name, tensor)
            progress(spec.nbytes)
            written += spec.nbytes
            if written >= _DROP_BYTES:
                _drop_pages(folder)
                written = 0
    _drop_pages(folder)


def checkpoint_bytes(config: WanConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of all weights of an expert."""
    return dtype.itemsize * sum(math.prod(shape) for shape in _parameters(config).values())


@cache
def _parameters(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in build_transformer(config).named_parameters()}


def _made_ahead(
    make: Callable[[str], torch.Tensor], names: Sequence[str], threads: int | None
) -> Iterator[torch.Tensor]:
    """The tensors in order; as many as there are threads are in the making, and one more is ready."""
    count = threads or len(os.sched_getaffinity(0))
    waiting: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for name in names:
                waiting.append(pool.submit(make, name))
                if len(waiting) > count + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _folder(expert: str, experts: Sequence[str], layout: str) -> str:
    if layout == "diffusers":
        return expert
    # Wan's code finds a lone model at the root.
    return _WAN_FOLDERS[expert] if len(experts) == 2 else ""


def _wan_config(config: WanConfig, pipeline: PipelineConfig) -> dict[str, Any]:
    kind = "ti2v" if pipeline.expand_timesteps else "i2v" if config.in_channels != config.out_channels else "t2v"
    values = {
        "_class_name": "WanModel",
        "dim": config.inner_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": kind,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_dim": config.text_dim,
        "text_len": 512,
    }
    return values


def _model_index(pipeline: PipelineConfig, experts: Sequence[str], components: Mapping[str, Any]) -> dict[str, Any]:
    entry = ["diffusers", "WanTransformer3DModel"]
    return {
        "_class_name": pipeline.class_name,
        "boundary_ratio": pipeline.boundary_ratio if len(experts) == 2 else None,
        "expand_timesteps": pipeline.expand_timesteps,
        **{name: entry if name in experts else [None, None] for name in EXPERT_NAMES},
        **components,
    }


def _drop_pages(folder: Path) -> None:
    """Have the system start to write what it holds of the files, and forget what it has written."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
