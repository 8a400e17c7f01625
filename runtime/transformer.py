"""A compiled expert as diffusers' pipelines call it: a drop-in for `WanTransformer3DModel`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hif4c.runtime.artifact import Artifact, open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.executor import Executor, ReleaseAfterUse, Residency
from hif4c.runtime.graph import Graph
from hif4c.runtime.native import check_word, select
from hif4c.runtime.offload import BlockOffload, BlockStore, block_of, check_offload
from hif4c.runtime.stored_weights import StoredWeights
from hif4c.runtime.transformer_checks import (
    CONFIG_KEYS,
    TransformerConfig,
    check_inputs,
    check_shared_tensors,
    in_ranges,
)

__all__ = ["CompiledTransformer", "TransformerConfig", "TransformerOutput", "check_device", "load", "load_expert"]

INPUTS = ["hidden_states", "timestep", "encoder_hidden_states"]


@dataclass
class TransformerOutput:
    """What a call returns with `return_dict=True`; sample: [B, C_out, F, H, W]."""

    sample: torch.Tensor


class CompiledTransformer(nn.Module):
    """One expert of an artifact.

    Weights are views of the memory-mapped file until the module is moved to another device, and are so again when it
    is moved back. Their dtypes are part of the program: `.to(device)` moves, `.to(dtype)` is refused. A call takes
    inputs from any device and gives its sample there.

    An expert may have a second program over the same weights, with activations in bf16. A call runs it when the largest
    of its timesteps lies in one of the ranges of `bf16_timesteps`. The largest: with one timestep a token, tokens of
    a given first frame have timestep 0 at every step; a batch of samples at different steps runs one program for all.

    Args:
        graph: the program.
        tensors: name -> tensor, one for each of `graph.tensors`, on the CPU.
        config: of the model class.
        dtype: of inputs and sample.
        expand_timesteps: whether `timestep` is [B, tokens] instead of [B].
        bf16_graph: the second program.
        bf16_timesteps: ranges (low, high) of timesteps in 0 to 1000, both ends included, in which it runs.
        kernels: which GPU kernels are selected when it is moved to a GPU, as in `load`.
        artifact: where bundled kernels are.
        release: give the memory of every weight back after its last use in a call, on the CPU; for `StoredWeights`.
        offload: "none", or "blocks": as in `load`.

    Raises:
        Hif4Error: the second program reads a tensor that the first does not, or of another dtype or shape; or there are
            no blocks to offload.
        ValueError: ranges without a second program, or `release` for tensors that cannot be read again.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        dtype: torch.dtype,
        expand_timesteps: bool,
        bf16_graph: Graph | None = None,
        bf16_timesteps: Sequence[tuple[float, float]] = (),
        kernels: str = "auto",
        artifact: Artifact | None = None,
        release: bool = False,
        offload: str = "none",
    ) -> None:
        super().__init__()
        check_offload(offload)
        if bf16_timesteps and bf16_graph is None:
            raise ValueError("there are timesteps with bf16 activations, but no program for them")
        if release and not isinstance(tensors, StoredWeights):
            raise ValueError("tensors that are not stored in files cannot be released")
        if bf16_graph is not None:
            check_shared_tensors(graph, bf16_graph)
        self.graph = graph
        self.bf16_graph = bf16_graph
        self.bf16_timesteps = tuple(bf16_timesteps)
        self.config = TransformerConfig(config)
        self.expand_timesteps = expand_timesteps
        self.kernels = kernels
        self.artifact = artifact
        self.offload = offload
        self._dtype = dtype
        self._release = release
        self._weights = tensors
        resident = [item.name for item in graph.tensors if offload == "none" or block_of(item.name) is None]
        # A prefix, so that no tensor can take the name of one of the module's own attributes.
        self._buffer_names = {name: "weights/" + name.replace(".", "/") for name in resident}
        for name, buffer_name in self._buffer_names.items():
            self.register_buffer(buffer_name, tensors[name], persistent=False)
        # Accelerate's hooks, which diffusers offloads with, ask a parameter where a module is.
        self.place = self._make_place()
        self._executors: dict[bool, Executor] = {}
        self._blocks: BlockStore | None = None
        self._unloaded_from: torch.device | None = None
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs and of the sample."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._unloaded_from or next(self.buffers()).device

    @property
    def executor(self) -> Executor:
        """The main program bound to the weights where they are now."""
        return self._bind(False)

    @property
    def blocks(self) -> BlockStore | None:
        """What is on the device of an offloaded expert; None where nothing is offloaded, or before it ran."""
        return self._blocks

    def _bind(self, bf16: bool) -> Executor:
        """An executor of one of the two programs, made when it is first needed."""
        if self._unloaded_from is not None:
            device, self._unloaded_from = self._unloaded_from, None
            self.to(device)
        if bf16 not in self._executors:
            graph = self.bf16_graph if bf16 else self.graph
            assert graph is not None
            self._executors[bf16] = Executor(graph, self._tensors(), self.device, self._residency(graph))
        return self._executors[bf16]

    def _residency(self, graph: Graph) -> Residency | None:
        if self.offload == "blocks":
            if self._blocks is None:
                self._blocks = BlockStore(self._weights, self.device)
            return BlockOffload(graph, self._blocks)
        if self._release and isinstance(self._weights, StoredWeights) and self.device.type == "cpu":
            return ReleaseAfterUse(graph, self._weights)
        return None

    def _tensors(self) -> dict[str, torch.Tensor]:
        buffers = dict(self.named_buffers())
        return {name: buffers[buffer_name] for name, buffer_name in self._buffer_names.items()}

    def unload(self, device: torch.device | None = None) -> None:
        """Give back the memory of the weights, wherever they are; the next call reads them from their files again.

        Args:
            device: where it runs from then on; None for where it runs now.

        Without effect for tensors that are not stored in files.
        """
        if isinstance(self._weights, StoredWeights):
            device = device or self.device
            self._map_again()
            self._unloaded_from = None if device.type == "cpu" else device
            self._weights.release()

    def _make_place(self) -> nn.Parameter:
        """A parameter of no elements on the CPU."""
        return nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)

    def _save_to_state_dict(self, *args: Any) -> None:
        """Nothing: what is there to be saved is the artifact."""

    def _map_again(self) -> None:
        """Have the stored tensors for weights."""
        self._executors.clear()
        self._blocks = None
        self.place = self._make_place()
        for name, buffer_name in self._buffer_names.items():
            self._buffers[buffer_name] = self._weights[name]

    def variant(self, name: str | None) -> CompiledTransformer:
        """A transformer that runs one program at every timestep, on the tensors that this one has now.

        Args:
            name: "bf16" for the program with activations in bf16, None for the main one.

        Raises:
            Hif4Error: the expert has no such program.
        """
        if name is None:
            graph = self.graph
        elif name == "bf16" and self.bf16_graph is not None:
            graph = self.bf16_graph
        else:
            raise Hif4Error(f"the transformer has no variant {name!r}; it has {'bf16' if self.bf16_graph else 'none'}.")
        moved = self.device.type != "cpu"
        if moved and self.offload != "none":
            raise Hif4Error("the variants of an offloaded transformer are taken before it is moved to a device.")
        return CompiledTransformer(
            graph, self._tensors() if moved else self._weights, self.config, self.dtype, self.expand_timesteps,
            kernels=self.kernels, artifact=self.artifact, release=self._release and not moved, offload=self.offload,
        )  # fmt: skip

    def uses_bf16(self, timestep: torch.Tensor) -> bool:
        """Whether a call at these timesteps, of any shape, runs the program with activations in bf16.

        Where there are ranges and the timesteps are on a GPU, this waits for it: one number is read back.
        """
        return in_ranges(timestep, self.bf16_timesteps)

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
        check_inputs(self.config, self.expand_timesteps, hidden_states, timestep, encoder_hidden_states)
        device = self.device
        (sample,) = self._bind(self.uses_bf16(timestep))(
            hidden_states.to(device, self.dtype),
            timestep.to(device, torch.float32),
            encoder_hidden_states.to(device, self.dtype),
        )
        sample = sample.to(hidden_states.device)
        return TransformerOutput(sample) if return_dict else (sample,)

    @contextmanager
    def cache_context(self, name: str, **settings: Any) -> Iterator[None]:
        """Accepted because diffusers' pipelines enter it around every call; nothing is cached."""
        yield

    def to(self, *args: Any, **kwargs: Any) -> CompiledTransformer:
        """Move to a device. A dtype other than the program's is refused: it was fixed when the model was compiled.

        Raises:
            Hif4Error: another dtype; or a GPU for which the chosen kernels cannot be had.
        """
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None and dtype != self.dtype:
            raise Hif4Error(f"the transformer was compiled for {self.dtype} and cannot be converted to {dtype}.")
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledTransformer:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # Weights keep their dtypes (norms in float32, planes in uint8) whatever the conversion asked for.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = self.device
        origin = self._unloaded_from or next(self.buffers()).device
        after = fn(torch.empty(0, dtype=torch.uint8, device=origin)).device
        if self._unloaded_from is not None:  # weights come when they are needed, to where it is now to run
            self._unloaded_from = None if after.type == "cpu" else after
            return self
        self._executors.clear()
        self._blocks = None
        if isinstance(self._weights, StoredWeights) and after.type == "cpu" != origin.type:
            self._map_again()
            return self
        result = super()._apply(move, recurse)
        after = self.device
        if after.type == "cuda" and after != before:  # HIP devices are called so as well
            from hif4c.runtime.gpu.registry import select as select_gpu

            select_gpu(self.kernels, self.artifact)
        return result

    def _replicate_for_data_parallel(self) -> CompiledTransformer:
        """A replica gets weights of its own, to which no executor is bound yet."""
        replica: CompiledTransformer = super()._replicate_for_data_parallel()
        replica._executors, replica._blocks = {}, None
        return replica


def load(
    path: str | os.PathLike[str],
    expert: str = "transformer",
    *,
    verify: bool = True,
    kernels: str = "auto",
    device: str | torch.device = "cpu",
    offload: str = "none",
) -> CompiledTransformer:
    """Load one expert of an artifact.

    Args:
        path: the artifact's directory.
        expert: "transformer" (high noise, or the only one) or "transformer_2".
        verify: compare the sha256 of the expert's files with the manifest before anything is used.
        kernels: what runs on the device, for the whole process:
            "bundled": the kernels in the artifact, when they are trusted on this machine (`hif4c trust`, or compiled
            here); "jit": built on this machine, for the CPU from the sources in this package with a C++ compiler, for
            a GPU with Triton; "portable": plain torch, many times slower; "auto": the first of these that can be had,
            on a GPU without "jit", and portable with one warning that says how to get the speed.
        device: where it runs. One that is moved to a GPU later gets that GPU's kernels then.
        offload: "blocks" keeps two blocks on the device, the one that runs and the next one, which is fetched from the
            mapped file meanwhile; of A14B some 0.9 GB instead of 8.4 GB. "none" keeps all.

    Raises:
        Hif4Error: the artifact is damaged, incomplete, newer than this hif4c, or lacks the expert; or the kernels
            that were asked for cannot be had.
    """
    check_word(kernels)
    check_offload(offload)
    device = check_device(device)
    artifact = open_artifact(path)
    if device.type == "cpu":
        select(kernels, artifact)
    model = load_expert(artifact, expert, verify=verify, kernels=kernels, offload=offload)
    return model if device.type == "cpu" else model.to(device)


def check_device(device: str | torch.device) -> torch.device:
    """Fail before anything is loaded (Hif4Error) when there is no such device."""
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()  # "meta" is a device as well, but computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"device {str(device)!r} cannot be used here ({reason}).") from None
    return found


def load_expert(
    artifact: Artifact,
    expert: str,
    *,
    verify: bool = True,
    kernels: str = "auto",
    release: bool = False,
    offload: str = "none",
) -> CompiledTransformer:
    """Load one expert of an opened artifact, on the CPU; arguments and errors as in `load`.

    The process's choice of CPU kernels stays what it was. `release` as in `CompiledTransformer`: for a few calls in
    little memory.
    """
    info = artifact.expert(expert)
    if verify:
        artifact.verify(f"{expert}/")
    if missing := [key for key in CONFIG_KEYS if key not in info.config]:
        raise Hif4Error(f"{artifact.root / expert}: the manifest's config lacks {', '.join(missing)}.")
    graph = _read_program(artifact, expert, None)
    bf16_graph = _read_program(artifact, expert, "bf16") if "bf16" in artifact.variants(expert) else None
    tensors = artifact.tensors(expert, graph.tensors)
    try:
        return CompiledTransformer(
            graph, tensors, info.config, info.dtype, artifact.expand_timesteps, bf16_graph, info.bf16_timesteps,
            kernels, artifact, release, offload,
        )  # fmt: skip
    except Hif4Error as error:
        raise Hif4Error(f"{artifact.root / expert}: {error}") from None


def _read_program(artifact: Artifact, expert: str, variant: str | None) -> Graph:
    graph = artifact.graph(expert, variant)
    if [item.name for item in graph.inputs] != INPUTS or len(graph.outputs) != 1:
        which = "" if variant is None else f" for {variant} steps"
        raise Hif4Error(
            f"{artifact.root / expert}: the program{which} does not have the inputs and output of a transformer."
        )
    return graph
