"""Small inputs with expected outputs that travel with an artifact, made when it is compiled and replayed by verify.

Two kinds. Every 4-bit linear alone, on one seeded row: its quantizer must give the same codes bit for bit on every
machine, and its output agrees up to the order of float32 additions; this is what shows that weights and kernels are
right. And the whole expert: where it was compiled the output is equal bit for bit; elsewhere a last-bit difference
before a quantizer flips codes behind it, and in a deep 4-bit model flips grow, so that distance is only reported,
beside the one that a last-bit change of the input caused here, and refused when it is far beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Node, Ref
from hif4c.runtime.transformer import CompiledTransformer

__all__ = ["Replay", "make_golden", "replay"]

SEED = 20260101
FRAMES, PATCH_ROWS, PATCH_COLUMNS, TEXT = 2, 3, 4, 8
TIMESTEP = 500.0
# Every backend adds U exact unit products (U = K/64, 216 at most in Wan) in float32. The roundings, 2^-24 each, are
# independent over the outputs of a row, so the L2 error of the row is near sqrt(U) * 2^-24, at most 9e-7.
LINEAR_ERROR = 1e-6
# Not a proof of anything: a program that was assembled wrongly lands near a distance of 1 or at NaN.
FLIP_MARGIN = 8.0
LINEARS = ("hif4.linear", "hif4.linear_w4")


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay.

    Attributes:
        codes_differ: bytes of the quantized seeded row that differ (0 is right).
        linears: number of 4-bit linears that were replayed alone.
        linear_error: largest relative L2 error of their outputs (0 when all are identical).
        worst: path of the linear that has it, "" if none has an error.
        distance: relative L2 distance of the expert's output from the recorded one (0 when identical).
        flip_distance: the distance that last-bit changes of the input caused when the artifact was compiled.
    """

    codes_differ: int
    linears: int
    linear_error: float
    worst: str
    distance: float
    flip_distance: float

    @property
    def identical(self) -> bool:
        """Whether every number is bit for bit what was recorded."""
        return self.codes_differ == 0 and self.linear_error == 0 and self.distance == 0

    @property
    def passed(self) -> bool:
        """Whether the artifact computes here what it computed where it was compiled."""
        whole = self.distance <= FLIP_MARGIN * self.flip_distance
        return self.codes_differ == 0 and self.linear_error <= LINEAR_ERROR and whole


def make_golden(model: CompiledTransformer) -> dict[str, torch.Tensor]:
    """Run the expert on seeded inputs; returns the tensors to store, inputs and expected outputs.

    Raises:
        Hif4Error: the expert's output is not finite.
    """
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
    if not (torch.isfinite(sample).all() and torch.isfinite(moved).all()):
        raise Hif4Error(
            "the compiled expert gives NaN or infinite values on the golden inputs; check the checkpoint's weights, "
            "or compile without golden outputs."
        )
    widths = [_features(model, node) for node in _linears(model)]
    row = torch.randn(max(widths, default=64), generator=generator).to(torch.bfloat16)
    codes, scales = torch.ops.hif4.quantize(row)
    golden = {
        "hidden_states": video,
        "timestep": timestep,
        "encoder_hidden_states": text,
        "sample": sample,
        "flip_distance": torch.tensor([_distance(moved, sample)], dtype=torch.float64),
        "row": row,
        "row.codes": codes,
        "row.scales": scales,
    }
    golden |= {f"linear.{node.module}": _run_linear(model, node, row) for node in _linears(model)}
    return {name: value.contiguous() for name, value in golden.items()}


def replay(model: CompiledTransformer, golden: dict[str, torch.Tensor]) -> Replay:
    """Compare the expert with its recorded outputs.

    Raises:
        Hif4Error: the recorded tensors are incomplete, or the program cannot be run.
    """
    try:
        device = model.device
        inputs = [golden[name].to(device) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
        distance = _distance(model(*inputs, return_dict=False)[0].cpu(), golden["sample"])
        row = golden["row"]
        codes, scales = torch.ops.hif4.quantize(row.to(device))
        differ = int((codes.cpu() != golden["row.codes"]).sum() + (scales.cpu() != golden["row.scales"]).sum())
        errors = {
            node.module: _distance(_run_linear(model, node, row).cpu(), golden[f"linear.{node.module}"])
            for node in _linears(model)
        }
        worst = max(errors, key=lambda path: errors[path], default="")
        error = errors.get(worst, 0.0)
        flip = float(golden["flip_distance"])
        return Replay(differ, len(errors), error, worst if error else "", distance, flip)
    except KeyError as error:
        raise Hif4Error(f"the golden file lacks {error}; compile the artifact again.") from None
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"the program cannot be run on its golden inputs ({reason}); compile it again.") from error


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance, 0 for equal tensors; infinite when either is not finite, so that NaN never passes."""
    if found.shape != expected.shape:
        return float("inf")
    error = (found.double() - expected.double()).norm()
    if not torch.isfinite(error):
        return float("inf")
    return float(error / expected.double().norm()) if error else 0.0


def _linears(model: CompiledTransformer) -> list[Node]:
    return [node for node in model.graph.nodes if node.target in LINEARS]


def _planes_at(node: Node) -> int:
    """Position of the weight's codes among a linear's arguments."""
    return 2 if node.target == "hif4.linear" else 1


def _features(model: CompiledTransformer, node: Node) -> int:
    return 2 * _bound(model, node.args[_planes_at(node)]).shape[1]


def _bound(model: CompiledTransformer, argument: Any) -> Any:
    """A stored tensor for a reference to one; anything else as it is."""
    if isinstance(argument, Ref):
        return model.executor.tensors[argument.index - len(model.graph.inputs)]
    return argument


def _run_linear(model: CompiledTransformer, node: Node, row: torch.Tensor) -> torch.Tensor:
    """Output [N] float32 of a linear for the first K values of the row, without its activation."""
    first = _planes_at(node)
    codes, scales, bias = (_bound(model, argument) for argument in node.args[first : first + 3])
    x = row[: 2 * codes.shape[1]].to(model.device)
    if node.target == "hif4.linear":
        mask, hadamard = (_bound(model, argument) for argument in (*_quantizer(model, node).args, None, 0)[1:3])
        planes = torch.ops.hif4.quantize(x, mask, hadamard)
        return torch.ops.hif4.linear(*planes, codes, scales, bias, None, torch.float32)
    mask, hadamard = (_bound(model, argument) for argument in node.args[4:6])
    return torch.ops.hif4.linear_w4(x, codes, scales, bias, mask, hadamard, None, torch.float32)


def _quantizer(model: CompiledTransformer, node: Node) -> Node:
    """The quantize node whose planes a linear reads."""
    nodes, first = model.graph.nodes, model.graph.first_node
    getitem = nodes[node.args[0].index - first]
    return nodes[getitem.args[0].index - first]
