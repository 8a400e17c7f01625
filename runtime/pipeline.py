"""The whole sampling pipeline: diffusers' scheduler, text encoder and VAE around the compiled experts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from hif4c.runtime.active_expert import ActiveExpert, check_keep
from hif4c.runtime.artifact import Artifact, open_artifact
from hif4c.runtime.components import PIPELINE_CLASSES, check_components
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import check_word, select
from hif4c.runtime.offload import check_offload
from hif4c.runtime.transformer import check_device, load_expert

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_device", "load_components", "load_pipeline"]


def load_pipeline(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    verify: bool = True,
    device: str | torch.device | Mapping[str, str | torch.device] = "cpu",
    kernels: str = "auto",
    keep: str = "both",
    offload: str = "none",
) -> DiffusionPipeline:
    """Load an artifact as a diffusers pipeline with compiled experts.

    Args:
        path: the artifact's directory.
        base: directory or hub id of the original pipeline, for an artifact that was compiled without its own copy of
            text encoder, tokenizer, VAE and scheduler.
        verify: compare the sha256 of every file with the manifest before anything is used.
        device: where the pipeline runs; or for each expert where it runs, such as {"transformer": "cuda:0",
            "transformer_2": "cuda:1"}, with the rest of the pipeline on the first one's.
        kernels: as `load`.
        keep: "both" experts in memory, or "active": only the one that serves the current step. At the switch the other
            one's memory is given back, on the device or here, and the next one is read from its mapped file.
        offload: as `load`, for every expert.

    Raises:
        Hif4Error: as `load`; an artifact without a pipeline and no `base`; one expert of two is missing, or has no
            device.
    """
    check_word(kernels)
    check_keep(keep)
    check_offload(offload)
    artifact = open_artifact(path)
    devices = _devices(device, artifact)
    model = artifact.manifest["model"]
    missing = [name for name in model["experts"] if name not in artifact.experts]
    if missing:
        raise Hif4Error(
            f"{artifact.root}: was compiled without {', '.join(missing)}; a pipeline needs every expert, "
            "use hif4c.runtime.load for a single one."
        )
    if any(place.type == "cpu" for place in devices.values()):
        select(kernels, artifact)
    if verify:
        artifact.verify()
    source = _components(artifact, base)
    if base is None:
        check_components(Path(source))
    pipeline = load_components(source, model["pipeline_class"], without_experts=True)
    pipeline.to(next(iter(devices.values())))
    experts = {
        name: load_expert(artifact, name, verify=False, kernels=kernels, offload=offload) for name in artifact.experts
    }
    for name, expert in experts.items():
        if keep == "active":
            expert.unload(devices[name])
        else:
            expert.to(devices[name])
    if keep == "active" and len(experts) > 1:
        ActiveExpert(experts.values())
    pipeline.register_modules(**experts)
    return pipeline


def load_components(source: str, class_name: str, *, without_experts: bool = False) -> DiffusionPipeline:
    """Load a diffusers pipeline in the dtypes Wan is run in: bf16, the VAE in float32.

    Args:
        source: directory or hub id.
        class_name: one of `hif4c.runtime.components.PIPELINE_CLASSES`.
        without_experts: leave the transformers out.

    Raises:
        Hif4Error: diffusers is not installed, or cannot load the pipeline.
    """
    try:
        import diffusers
    except ImportError:
        raise Hif4Error("sampling needs diffusers; install it with `pip install 'hif4c[pipeline]'`.") from None
    if class_name not in PIPELINE_CLASSES:
        raise Hif4Error(f"pipeline class {class_name!r} is not supported; supported: {', '.join(PIPELINE_CLASSES)}.")
    absent: dict[str, Any] = {"transformer": None, "transformer_2": None} if without_experts else {}
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    try:
        with _without_progress_bars():
            return getattr(diffusers, class_name).from_pretrained(
                source, dtype=dtypes, use_safetensors=True, trust_remote_code=False, **absent
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"{source}: diffusers cannot load the pipeline ({type(error).__name__}: {reason}).") from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading a pipeline draws a bar for each component; the settings of both libraries are put back afterwards."""
    import diffusers.utils.logging
    import transformers.utils.logging

    shown = [
        module for module in (diffusers.utils.logging, transformers.utils.logging) if module.is_progress_bar_enabled()
    ]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


def _devices(
    device: str | torch.device | Mapping[str, str | torch.device], artifact: Artifact
) -> dict[str, torch.device]:
    """Expert -> its device."""
    if not isinstance(device, Mapping):
        return dict.fromkeys(artifact.experts, check_device(device))
    if device.keys() != artifact.experts.keys():
        raise Hif4Error(f"device: names {', '.join(device) or 'nothing'}; give one for {', '.join(artifact.experts)}.")
    return {name: check_device(device[name]) for name in artifact.experts}


def _components(artifact: Artifact, base: str | None) -> str:
    if base is not None:
        return base
    if "pipeline/model_index.json" not in artifact.files:
        raise Hif4Error(
            f"{artifact.root}: was compiled without the rest of the pipeline; "
            "say where the original model is (base=..., or --base)."
        )
    return str(Path(artifact.root) / "pipeline")
