"""An expert that was exported to ONNX as diffusers' pipelines call it, run by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_file import INPUTS, OnnxFile, open_onnx
from hif4c.runtime.onnx_session import CPU, check_providers, make_session, run_session
from hif4c.runtime.transformer import TransformerConfig, TransformerOutput
from hif4c.runtime.transformer_checks import check_inputs, in_ranges

__all__ = ["OnnxTransformer", "open_experts"]


class OnnxTransformer(nn.Module):
    """One expert, from the .onnx files of its programs.

    It computes in float32: `dtype` is that of its inputs and of its sample. A call takes inputs from any device and
    gives its sample there; where it computes is the providers' matter. Sessions are made when they are first needed.

    Args:
        path: the main program, or both programs in either order.
        providers: onnxruntime's execution providers, the first that can run a node runs it.
        session_options: an `onnxruntime.SessionOptions`; None for the defaults.

    Raises:
        Hif4Error: onnx or onnxruntime is not installed; a file is none of hif4c's, or damaged, or lacks its weights;
            the files are not one expert's; the expert has a program for some timesteps that is not among them; or a
            provider is not there.
    """

    def __init__(
        self,
        *path: str | os.PathLike[str] | OnnxFile,
        providers: Sequence[str] = CPU,
        session_options: Any = None,
    ) -> None:
        super().__init__()
        files = [item if isinstance(item, OnnxFile) else open_onnx(item) for item in path]
        self._files = _programs(files)
        main = self._files[None]
        check_providers(providers)
        self.config = TransformerConfig(main.config)
        self.expand_timesteps = main.expand_timesteps
        self.bf16_timesteps = main.bf16_timesteps
        self.expert = main.expert
        self.path = main.path
        self.model = main.model
        self._providers = tuple(providers)
        self._session_options = session_options
        self._sessions: dict[str | None, Any] = {}
        # Pipelines ask a parameter where a module is.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs and of the sample."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where a pipeline takes it to be; inputs may be anywhere."""
        return self.place.device

    def uses_bf16(self, timestep: torch.Tensor) -> bool:
        """Whether a call at these timesteps, of any shape, runs the program whose activations are not quantized."""
        return in_ranges(timestep, self.bf16_timesteps)

    def session(self, variant: str | None = None) -> Any:
        """The `onnxruntime.InferenceSession` of one of the programs, made when it is first asked for.

        Raises:
            Hif4Error: onnxruntime cannot load the file.
        """
        if variant not in self._sessions:
            self._sessions[variant] = make_session(self._files[variant].path, self._providers, self._session_options)
        return self._sessions[variant]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> TransformerOutput | tuple[torch.Tensor]:
        """Predict the flow; arguments as those of `hif4c.runtime.CompiledTransformer`, the sample is float32.

        Raises:
            Hif4Error: an input does not fit the model, or onnxruntime cannot run it.
        """
        if encoder_hidden_states_image is not None or attention_kwargs:
            raise Hif4Error("an exported transformer takes neither encoder_hidden_states_image nor attention_kwargs.")
        check_inputs(self.config, self.expand_timesteps, hidden_states, timestep, encoder_hidden_states)
        given = (hidden_states, timestep, encoder_hidden_states)
        arrays = [item.detach().to("cpu", torch.float32).contiguous().numpy() for item in given]
        variant = "bf16" if self.uses_bf16(timestep) else None
        feeds = dict(zip(INPUTS, arrays, strict=True))
        found = run_session(self.session(variant), feeds, self._files[variant].path)
        sample = torch.from_numpy(found["sample"]).to(hidden_states.device)
        return TransformerOutput(sample) if return_dict else (sample,)

    @contextmanager
    def cache_context(self, name: str, **settings: Any) -> Iterator[None]:
        """Accepted because diffusers' pipelines enter it around every call; nothing is cached."""
        yield

    def to(self, *args: Any, **kwargs: Any) -> OnnxTransformer:
        """Say where a pipeline is to take it to be. A dtype other than float32 is refused.

        Raises:
            Hif4Error: another dtype.
        """
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None and dtype != self.dtype:
            raise Hif4Error(f"an exported transformer computes in {self.dtype} and cannot be converted to {dtype}.")
        return super().to(*args, **kwargs)


def open_experts(
    paths: Iterable[str | os.PathLike[str]], *, providers: Sequence[str] = CPU, session_options: Any = None
) -> dict[str, OnnxTransformer]:
    """Open the .onnx files of a model, in any order: expert -> transformer; arguments and errors as there."""
    files: dict[str, list[OnnxFile]] = {}
    for file in map(open_onnx, paths):
        files.setdefault(file.expert, []).append(file)
    if len(digests := {file.digest for group in files.values() for file in group}) > 1:
        shown = ", ".join(str(file.path) for group in files.values() for file in group)
        raise Hif4Error(f"{shown}: were exported from {len(digests)} artifacts; give the files of one.")
    return {
        name: OnnxTransformer(*files[name], providers=providers, session_options=session_options)
        for name in sorted(files)
    }


def _programs(files: Sequence[OnnxFile]) -> dict[str | None, OnnxFile]:
    """Variant -> file, of one expert."""
    programs = {file.variant: file for file in files}
    shown = ", ".join(str(file.path) for file in files)
    if None not in programs:
        raise Hif4Error(f"{shown or 'no file'}: the expert's main program is not among them; give its .onnx file too.")
    main = programs[None]
    if len(programs) < len(files) or len({(file.expert, file.digest) for file in files}) > 1:
        raise Hif4Error(f"{shown}: are not the programs of one expert of one artifact; give those.")
    if main.bf16_timesteps and "bf16" not in programs:
        ranges = ", ".join(f"{low:g} to {high:g}" for low, high in main.bf16_timesteps)
        raise Hif4Error(
            f"{main.path}: at timesteps {ranges} its expert runs another program; give that .onnx file (.bf16.) too."
        )
    return programs
