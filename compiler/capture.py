"""Capture: one expert as a `Program`, traced by `torch.export` without a single weight in memory.

The module is built from its config under a fake-tensor mode, given the dtypes that `from_pretrained` would give it, and
traced once with dynamic batch, latent frames, height, width and text length. Only the rotary tables are real.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from hif4c.compiler.models import WanConfig
from hif4c.passes.program import Program, TensorSource

__all__ = ["build_transformer", "capture", "export_transformer"]

MAX_BATCH = 64
MAX_TEXT = 4096
# Sample sizes: at least 2 in every dynamic dimension (1 would be specialised), all different so that no two are tied.
SAMPLE = {"b": 2, "f": 3, "h": 4, "w": 5, "text": 7}


def capture(config: WanConfig, dtype: torch.dtype = torch.bfloat16, expand_timesteps: bool = False) -> Program:
    """Trace one expert.

    Args:
        config: the transformer's config.
        dtype: dtype of the modules that diffusers does not keep in float32.
        expand_timesteps: trace `timestep` as [B, tokens] (Wan2.2-TI2V-5B) instead of [B].

    Returns:
        The captured program; inputs are `hidden_states` [b, C, f, 2h, 2w] dtype, `timestep` float32, and
        `encoder_hidden_states` [b, text, D] dtype; its only output is the sample [b, C_out, f, 2h, 2w].
    """
    exported, buffers = export_transformer(config, dtype, expand_timesteps)
    return _to_program(exported, buffers)


def build_transformer(config: WanConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The diffusers module with fake parameters, in the dtypes of `from_pretrained(torch_dtype=dtype)`."""
    return _build(config, dtype)[0]


def export_transformer(
    config: WanConfig, dtype: torch.dtype, expand_timesteps: bool
) -> tuple[ExportedProgram, dict[str, torch.Tensor]]:
    """Run `torch.export` on the fake transformer; returns the exported program and its real buffers (RoPE tables)."""
    model, mode = _build(config, dtype)
    rows = columns = frames = config.rope_max_seq_len
    _, p_h, p_w = config.patch_size
    b, f, text = Dim("b", min=1, max=MAX_BATCH), Dim("f", min=1, max=frames), Dim("text", min=1, max=MAX_TEXT)
    # Height and width are patch multiples; a plain Dim would leave guards that torch cannot prove for odd sizes.
    height: Any = p_h * Dim("h", min=1, max=rows)
    width: Any = p_w * Dim("w", min=1, max=columns)
    size = SAMPLE
    tokens = size["f"] * size["h"] * size["w"]
    with mode:
        sample = {
            "hidden_states": torch.empty(
                size["b"], config.in_channels, size["f"], p_h * size["h"], p_w * size["w"], dtype=dtype
            ),
            "timestep": torch.empty((size["b"], tokens) if expand_timesteps else (size["b"],), dtype=torch.float32),
            "encoder_hidden_states": torch.empty(size["b"], size["text"], config.text_dim, dtype=dtype),
            "return_dict": False,
        }
    dynamic = {
        "hidden_states": {0: b, 2: f, 3: height, 4: width},
        "timestep": {0: b, 1: Dim.AUTO} if expand_timesteps else {0: b},
        "encoder_hidden_states": {0: b, 1: text},
        "return_dict": None,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (), sample, dynamic_shapes=dynamic, strict=False)
    return exported, dict(model.named_buffers())


def _build(config: WanConfig, dtype: torch.dtype) -> tuple[nn.Module, FakeTensorMode]:
    """Build the diffusers module with fake parameters in the dtypes of a mixed-precision load."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = WanTransformer3DModel.from_config(config.to_dict()).eval()
        keep = set(WanTransformer3DModel._keep_in_fp32_modules)
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    kept = keep & {*path.split("."), name}
                    fake = torch.empty(parameter.shape, dtype=torch.float32 if kept else dtype)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    # The rotary tables are computed, not loaded: they must be real.
    model.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    return model, mode


def _to_program(exported: ExportedProgram, buffers: dict[str, torch.Tensor]) -> Program:
    """Turn the graph signature into a table of tensors; keep the graph."""
    graph = exported.graph
    tensors: dict[str, TensorSource] = {}
    inputs: list[str] = []
    signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        spec = signature[node.name]
        if spec.kind == InputKind.USER_INPUT:
            if node.meta.get("val") is None or not isinstance(node.meta["val"], torch.Tensor):
                graph.erase_node(node)  # return_dict: a constant of the trace
            else:
                inputs.append(node.name)
        elif spec.kind == InputKind.PARAMETER:
            value = node.meta["val"]
            tensors[node.name] = TensorSource(spec.target, value.dtype, tuple(value.shape), source=spec.target)
        elif spec.kind == InputKind.BUFFER:
            table = buffers[spec.target]
            tensors[node.name] = TensorSource(spec.target, table.dtype, tuple(table.shape), value=table)
        else:
            raise NotImplementedError(f"{node.name}: an input of kind {spec.kind} was not expected in this model")
    mode = next(node.meta["val"].fake_mode for node in graph.nodes if node.name in inputs)
    video = next(node for node in graph.nodes if node.name == "hidden_states").meta["val"].shape
    text = next(node for node in graph.nodes if node.name == "encoder_hidden_states").meta["val"].shape
    symbols = {str(video[0]): "b", str(video[2]): "f", str(text[1]): "text"}
    for size, name in ((video[3], "h"), (video[4], "w")):
        (symbol,) = size.node.expr.free_symbols
        symbols[str(symbol)] = name
    program = Program(graph, tensors, inputs, mode, symbols)
    with unset_fake_temporarily():
        program.clean()
    return program
