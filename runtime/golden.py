"""Small inputs with expected outputs that travel with an artifact, made when it is compiled and replayed by verify.

Two kinds. One 4-bit linear alone: its codes must be equal bit for bit on every machine, and its output up to the order
of float32 additions. The whole expert: on the machine that compiled it the output is equal bit for bit; elsewhere a
last-bit difference before a quantizer can flip codes behind it, so the distance is compared with the one that flips of
that kind cause here, which is recorded as `flip_distance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Ref
from hif4c.runtime.transformer import CompiledTransformer

__all__ = ["Replay", "make_golden", "replay"]

SEED = 20260101
FRAMES, PATCH_ROWS, PATCH_COLUMNS, TEXT = 2, 3, 4, 8
TIMESTEP = 500.0
# A machine may differ from the compiling one by last-bit roundings in many places; one input's worth of them is the
# recorded distance. Eight times that is far below what a wrong weight or kernel does (a distance near 1).
FLIP_MARGIN = 8.0


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay.

    Attributes:
        codes_differ: number of codes of the single linear's input that differ (0 is right).
        linear_error: largest relative error of the single linear's output, None if the program has no such linear.
        distance: relative L2 distance of the expert's output from the recorded one (0 when identical).
        flip_distance: the distance that last-bit changes of the input caused when the artifact was compiled.
    """

    codes_differ: int
    linear_error: float | None
    distance: float
    flip_distance: float

    @property
    def passed(self) -> bool:
        """Whether the artifact computes here what it computed where it was compiled."""
        linear = self.linear_error is None or self.linear_error <= 1e-6
        return self.codes_differ == 0 and linear and self.distance <= FLIP_MARGIN * self.flip_distance


def make_golden(model: CompiledTransformer) -> dict[str, torch.Tensor]:
    """Run the expert on seeded inputs; returns the tensors to store, inputs and expected outputs."""
    config = model.config
    generator = torch.Generator().manual_seed(SEED)
    rows, columns = PATCH_ROWS * config.patch_size[1], PATCH_COLUMNS * config.patch_size[2]
    video = torch.randn(1, config.in_channels, FRAMES, rows, columns, generator=generator).to(model.dtype)
    tokens = FRAMES * PATCH_ROWS * PATCH_COLUMNS
    timestep = torch.full((1, tokens) if model.expand_timesteps else (1,), TIMESTEP)
    text = torch.randn(1, TEXT, config.text_dim, generator=generator).to(model.dtype)
    sample = model(video, timestep, text, return_dict=False)[0]
    nudged = torch.nextafter(video, torch.full_like(video, torch.inf))
    moved = model(nudged, timestep, text, return_dict=False)[0]
    golden = {
        "hidden_states": video,
        "timestep": timestep,
        "encoder_hidden_states": text,
        "sample": sample,
        "flip_distance": torch.tensor([_distance(moved, sample)], dtype=torch.float64),
    }
    linear = _first_linear(model)
    if linear is not None:
        x, planes, output = _linear_values(model, linear, video, timestep, text)
        golden |= {"linear.input": x, "linear.codes": planes[0], "linear.scales": planes[1], "linear.output": output}
    return {name: value.contiguous() for name, value in golden.items()}


def replay(model: CompiledTransformer, golden: dict[str, torch.Tensor]) -> Replay:
    """Compare the expert with its recorded outputs.

    Raises:
        Hif4Error: the recorded tensors are incomplete.
    """
    try:
        device = model.device
        inputs = [golden[name].to(device) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
        sample = model(*inputs, return_dict=False)[0]
        distance = _distance(sample.cpu(), golden["sample"])
        codes_differ, linear_error = 0, None
        linear = _first_linear(model)
        if linear is not None:
            codes_differ, linear_error = _replay_linear(model, linear, golden)
        return Replay(codes_differ, linear_error, distance, float(golden["flip_distance"]))
    except KeyError as error:
        raise Hif4Error(f"the golden file lacks {error}; compile the artifact again.") from None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; 1 when either holds a NaN, so that NaN never passes."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if torch.isfinite(difference) else 1.0


def _first_linear(model: CompiledTransformer) -> int | None:
    """Node number of the first `hif4.linear` that has no fused activation (its error would be relative to a tail)."""
    for number, node in enumerate(model.graph.nodes):
        if node.target == "hif4.linear" and node.args[5] is None:
            return number
    return None


def _linear_values(
    model: CompiledTransformer, number: int, *inputs: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Input of the quantizer, planes, and output of a linear within one run."""
    first = model.graph.first_node
    values = model.executor.trace(*inputs)
    linear = model.graph.nodes[number]
    codes, scales = (values[ref.index - first] for ref in linear.args[:2])
    quantize = _quantizer(model, number)
    return values[quantize.args[0].index - first], (codes, scales), values[number]


def _quantizer(model: CompiledTransformer, number: int) -> Any:
    """The quantize node whose planes a linear reads."""
    nodes, first = model.graph.nodes, model.graph.first_node
    getitem = nodes[nodes[number].args[0].index - first]
    return nodes[getitem.args[0].index - first]


def _replay_linear(model: CompiledTransformer, number: int, golden: dict[str, torch.Tensor]) -> tuple[int, float]:
    x = golden["linear.input"].to(model.device)
    tensors = dict(zip((item.name for item in model.graph.tensors), model.executor.tensors, strict=True))
    start = len(model.graph.inputs)

    def bound(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return tensors[model.graph.tensors[argument.index - start].name]
        return argument

    mask, hadamard = (*_quantizer(model, number).args, None, 0)[1:3]
    codes, scales = torch.ops.hif4.quantize(x, bound(mask), hadamard)
    linear = model.graph.nodes[number]
    output = torch.ops.hif4.linear(codes, scales, *(bound(argument) for argument in linear.args[2:]))
    differ = int((codes.cpu() != golden["linear.codes"]).sum() + (scales.cpu() != golden["linear.scales"]).sum())
    expected = golden["linear.output"].double()
    error = (output.cpu().double() - expected).norm() / expected.norm()
    return differ, float(error) if torch.isfinite(error) else 1.0
