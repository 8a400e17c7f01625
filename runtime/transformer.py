"""A compiled expert as diffusers' pipelines call it: a drop-in for `WanTransformer3DModel`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hif4c.runtime.artifact import Artifact, open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import Graph
from hif4c.runtime.native import select

__all__ = ["CompiledTransformer", "TransformerConfig", "TransformerOutput", "load", "load_expert"]

INPUTS = ["hidden_states", "timestep", "encoder_hidden_states"]
CONFIG_KEYS = ("in_channels", "patch_size", "rope_max_seq_len", "text_dim")  # those that a call looks at


class TransformerConfig(dict[str, Any]):
    """The model's config; keys are attributes as well, as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the transformer's config has no {name}") from None


@dataclass
class TransformerOutput:
    """What a call returns with `return_dict=True`; sample: [B, C_out, F, H, W]."""

    sample: torch.Tensor


class CompiledTransformer(nn.Module):
    """One expert of an artifact.

    Weights are views of the memory-mapped file until the module is moved to another device. Their dtypes are part of
    the program: `.to(device)` moves, `.to(dtype)` is refused.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        dtype: torch.dtype,
        expand_timesteps: bool,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.config = TransformerConfig(config)
        self.expand_timesteps = expand_timesteps
        self._dtype = dtype
        # A prefix, so that no tensor can take the name of one of the module's own attributes.
        self._buffer_names = {item.name: "weights/" + item.name.replace(".", "/") for item in graph.tensors}
        for name, buffer_name in self._buffer_names.items():
            self.register_buffer(buffer_name, tensors[name], persistent=False)
        self._executor: Executor | None = None
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs and of the sample."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.buffers()).device

    @property
    def executor(self) -> Executor:
        """The program bound to the weights where they are now."""
        if self._executor is None:
            buffers = dict(self.named_buffers())
            tensors = {name: buffers[buffer_name] for name, buffer_name in self._buffer_names.items()}
            self._executor = Executor(self.graph, tensors, self.device)
        return self._executor

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> TransformerOutput | tuple[torch.Tensor]:
        """Predict the flow.

        Args:
            hidden_states: latents [B, C, F, H, W]; H and W multiples of the patch size.
            timestep: [B], or [B, tokens] for a model compiled with expanded timesteps; any number type.
            encoder_hidden_states: text embeddings [B, text, D].
            encoder_hidden_states_image: not supported by Wan2.2 models; must be None.
            return_dict: return a `TransformerOutput`, else a tuple of one tensor.
            attention_kwargs: must be empty.

        Raises:
            Hif4Error: an input does not fit the model.
        """
        if encoder_hidden_states_image is not None:
            raise Hif4Error(
                "encoder_hidden_states_image: this model was compiled without an image encoder; leave it out."
            )
        if attention_kwargs:
            raise Hif4Error(f"attention_kwargs {sorted(attention_kwargs)}: a compiled transformer takes none.")
        self._check(hidden_states, timestep, encoder_hidden_states)
        (sample,) = self.executor(
            hidden_states.to(self.dtype), timestep.to(torch.float32), encoder_hidden_states.to(self.dtype)
        )
        return TransformerOutput(sample) if return_dict else (sample,)

    def _check(self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> None:
        config = self.config
        if video.dim() != 5 or video.shape[1] != config.in_channels:
            raise Hif4Error(f"hidden_states {list(video.shape)}: expected [B, {config.in_channels}, F, H, W].")
        batch, _, frames, height, width = video.shape
        patches = frames
        for name, size, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
            if size % patch or size == 0:
                raise Hif4Error(
                    f"latent {name} {size} is not a multiple of the patch size {patch}; choose another size."
                )
            if size // patch > config.rope_max_seq_len:
                raise Hif4Error(f"latent {name} {size}: the model has positions for {config.rope_max_seq_len * patch}.")
            patches *= size // patch
        if not 0 < frames <= config.rope_max_seq_len:
            raise Hif4Error(f"{frames} latent frames: the model has positions for 1 to {config.rope_max_seq_len}.")
        expected = (batch, patches) if self.expand_timesteps else (batch,)
        if tuple(timestep.shape) != expected:
            raise Hif4Error(f"timestep {list(timestep.shape)}: expected {list(expected)} for these latents.")
        if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != config.text_dim or text.shape[1] == 0:
            raise Hif4Error(f"encoder_hidden_states {list(text.shape)}: expected [{batch}, text, {config.text_dim}].")

    @contextmanager
    def cache_context(self, name: str, **settings: Any) -> Iterator[None]:
        """Accepted because diffusers' pipelines enter it around every call; nothing is cached."""
        yield

    def to(self, *args: Any, **kwargs: Any) -> CompiledTransformer:
        """Move to a device. A dtype other than the program's is refused: it was fixed when the model was compiled."""
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None and dtype != self.dtype:
            raise Hif4Error(f"the transformer was compiled for {self.dtype} and cannot be converted to {dtype}.")
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledTransformer:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # Weights keep their dtypes (norms in float32, planes in uint8) whatever the conversion asked for.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._executor = None
        return super()._apply(move, recurse)


def load(
    path: str | os.PathLike[str], expert: str = "transformer", *, verify: bool = True, kernels: str = "auto"
) -> CompiledTransformer:
    """Load one expert of an artifact.

    Args:
        path: the artifact's directory.
        expert: "transformer" (high noise, or the only one) or "transformer_2".
        verify: compare the sha256 of the expert's files with the manifest before anything is used.
        kernels: what runs the 4-bit layers on the CPU, for the whole process: "native" (compiled on this machine from
            the sources in this package, the first time in some seconds), "portable" (plain torch, many times slower;
            the same bits), or "auto" (native where there is a C++ compiler, else portable with one warning).

    Raises:
        Hif4Error: the artifact is damaged, incomplete, newer than this hif4c, or lacks the expert; or native kernels
            were asked for and cannot be had.
    """
    artifact = open_artifact(path)
    select(kernels)
    return load_expert(artifact, expert, verify=verify)


def load_expert(artifact: Artifact, expert: str, *, verify: bool = True) -> CompiledTransformer:
    """Load one expert of an opened artifact; arguments and errors as in `load`."""
    info = artifact.expert(expert)
    if verify:
        artifact.verify(f"{expert}/")
    graph = artifact.graph(expert)
    if [item.name for item in graph.inputs] != INPUTS or len(graph.outputs) != 1:
        raise Hif4Error(f"{artifact.root / expert}: the program does not have the inputs and output of a transformer.")
    if missing := [key for key in CONFIG_KEYS if key not in info.config]:
        raise Hif4Error(f"{artifact.root / expert}: the manifest's config lacks {', '.join(missing)}.")
    tensors = artifact.tensors(expert, graph.tensors)
    return CompiledTransformer(graph, tensors, info.config, info.dtype, artifact.expand_timesteps)
