"""Small inputs with expected outputs that travel with an artifact, made when it is compiled and replayed by verify.

Two kinds are recorded. Every 4-bit linear alone, on one seeded row: its quantizer must give the same codes bit for bit
on every machine, and its output agrees up to the order of float32 additions; this is what shows that weights and
kernels are right. (What a side branch makes of the row is rounded to 16 bits before the linear reads it, and may round
elsewhere to the neighbour: it is recorded too, compared by itself, and the linear is replayed on what was recorded.)
And the whole expert: where it was compiled the output is equal bit for bit; elsewhere a last-bit difference before a
quantizer flips codes behind it, and in a deep 4-bit model flips grow, so that distance is only reported, beside the one
that a last-bit change of the input caused here, and refused when it is far beyond it.

That leaves room for a wrong operator (one activation or norm of many moves the whole expert by less). So every kind of
4-bit operator is also run on what reaches it in that call, and compared with its portable definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize
from hif4c.runtime.graph import DEVICE, DTYPE_NAMES, DTYPES, TARGETS, Node, Ref, TensorType
from hif4c.runtime.ops import NAMESPACE, PORTABLE
from hif4c.runtime.transformer import CompiledTransformer

__all__ = ["Replay", "golden_path", "make_golden", "relative_distance", "replay"]

OnNode = Callable[[], None]

SEED = 20260101
FRAMES, PATCH_ROWS, PATCH_COLUMNS, TEXT = 2, 3, 4, 8
TIMESTEP = 500.0
# Every backend adds U exact unit products (U = K/64, 216 at most in Wan) and S exact side products (some tens) in
# float32. The roundings, at most 2^-24 / sqrt(3) each in the mean square, are independent over the outputs of a row, so
# the L2 error of the row is near sqrt((U + S) / 3) * 2^-24, below 6e-7.
LINEAR_ERROR = 1e-6
# Not a proof of anything: a program that was assembled wrongly lands near a distance of 1 or at NaN.
FLIP_MARGIN = 8.0
# The last place of bf16, relative to the smallest number that has it: a side branch may round to either neighbour.
SIDE_ERROR = 2.0**-7
# A kernel may add in another order, which rounds some values to the neighbour in bf16 (2^-7 at most, if all of them)
# and flips the codes of a few. What leaves out a part of an operator, or takes the wrong one, is far beyond it.
OPERATOR_ERROR = 2.0**-5
# Positions among the arguments of the 4-bit linears: the weight's codes, with scales and bias behind them, and `side`.
PLANES = {"hif4.linear": 2, "hif4.linear_w4": 1}
SIDE = {"hif4.linear": 7, "hif4.linear_w4": 8}
# Position of the mask, with the rotation behind it, among the arguments of what masks and rotates an input.
MASK = {"hif4.linear_w4": 4, "hif4.quantize": 1, "hif4.norm_quantize": 7}
NORM_DTYPE = 6


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay.

    Attributes:
        codes_differ: bytes of the quantized seeded row that differ (0 is right).
        linears: number of 4-bit linears that were replayed alone.
        linear_error: largest relative L2 error of their outputs (0 when all are identical), or of a side branch that is
            further off than rounding explains.
        worst: path of the linear that has it, "" if none has an error.
        distance: relative L2 distance of the expert's output from the recorded one (0 when identical).
        flip_distance: the distance that last-bit changes of the input caused when the artifact was compiled.
        side_error: largest relative L2 error of what the side branches compute from the row.
        operator_error: largest relative L2 distance of an operator's result from its portable definition.
        worst_operator: the operator that has it, and where, "" if all are identical.
    """

    codes_differ: int
    linears: int
    linear_error: float
    worst: str
    distance: float
    flip_distance: float
    side_error: float = 0.0
    operator_error: float = 0.0
    worst_operator: str = ""

    @property
    def identical(self) -> bool:
        """Whether every number is bit for bit what was recorded."""
        return self.codes_differ == 0 and self.linear_error == self.side_error == self.distance == 0

    @property
    def passed(self) -> bool:
        """Whether the artifact computes here what it computed where it was compiled."""
        whole = self.distance <= FLIP_MARGIN * self.flip_distance
        parts = self.linear_error <= LINEAR_ERROR and self.operator_error <= OPERATOR_ERROR
        return self.codes_differ == 0 and parts and whole


def golden_path(artifact: Artifact, expert: str, variant: str | None = None) -> Path:
    """The file with the golden outputs of a program; Hif4Error where the artifact has none."""
    relative = f"golden/{expert if variant is None else f'{expert}.{variant}'}.safetensors"
    if relative not in artifact.files:
        raise Hif4Error(f"{artifact.root}: has no {relative}; only what has golden outputs can be verified.")
    return artifact.path(relative)


def make_golden(model: CompiledTransformer, on_node: OnNode = lambda: None) -> dict[str, torch.Tensor]:
    """Run the expert on seeded inputs; returns the tensors to store, inputs and expected outputs.

    Args:
        model: one program of an expert.
        on_node: called after every node.

    Raises:
        Hif4Error: the expert's output is not finite.
    """
    config = model.config
    generator = torch.Generator().manual_seed(SEED)
    rows, columns = PATCH_ROWS * config.patch_size[1], PATCH_COLUMNS * config.patch_size[2]
    video = torch.randn(1, config.in_channels, FRAMES, rows, columns, generator=generator).to(model.dtype)
    tokens = FRAMES * PATCH_ROWS * PATCH_COLUMNS
    timestep = torch.full((2, tokens) if model.expand_timesteps else (2,), TIMESTEP)
    text = torch.randn(1, TEXT, config.text_dim, generator=generator).to(model.dtype).repeat(2, 1, 1)
    # In one batch with the same moved by its last bits: every weight is read and decoded once.
    video = torch.cat([video, torch.nextafter(video, torch.full_like(video, torch.inf))])
    linears = _linears(model)
    row = torch.randn(max((_features(model, node) for node in linears), default=64), generator=generator)
    row = row.to(torch.bfloat16)
    alone: dict[str, torch.Tensor] = {}

    def record(number: int, arguments: tuple[Any, ...], result: Any) -> None:
        on_node()
        node = model.graph.nodes[number]
        if node.target in PLANES:
            x = _input(model, node, row)
            side = _side(model, node, x)
            if side is not None:
                alone[f"side.{node.module}"] = side
            alone[f"linear.{node.module}"] = _run_linear(model, node, x, side)

    sample = _call(model, [video, timestep, text], record)
    if not torch.isfinite(sample).all():
        raise Hif4Error(
            "the compiled expert gives NaN or infinite values on the golden inputs; check the checkpoint's weights, "
            "or compile without golden outputs."
        )
    codes, scales = torch.ops.hif4.quantize(row)
    golden = {
        "hidden_states": video,
        "timestep": timestep,
        "encoder_hidden_states": text,
        "sample": sample,
        "flip_distance": torch.tensor([relative_distance(sample[1:], sample[:1])], dtype=torch.float64),
        "row": row,
        "row.codes": codes,
        "row.scales": scales,
        **alone,
    }
    return {name: value.contiguous() for name, value in golden.items()}


def replay(model: CompiledTransformer, golden: dict[str, torch.Tensor], on_node: OnNode = lambda: None) -> Replay:
    """Compare the expert with its recorded outputs; `on_node` is called after every node of the program.

    Raises:
        Hif4Error: the recorded tensors are incomplete, or the program cannot be run.
    """
    try:
        device = model.device
        inputs = [golden[name].to(device) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
        linears: dict[str, tuple[float, float]] = {}
        operators = _OperatorCheck(model)

        def compare(number: int, arguments: tuple[Any, ...], result: Any) -> None:
            on_node()
            operators.compare(number, arguments, result)
            node = model.graph.nodes[number]
            if node.target in PLANES:
                linears[node.module] = _replay_linear(model, node, golden)

        distance = relative_distance(_call(model, inputs, compare).cpu(), golden["sample"])
        row = golden["row"]
        codes, scales = torch.ops.hif4.quantize(row.to(device))
        differ = int((codes.cpu() != golden["row.codes"]).sum() + (scales.cpu() != golden["row.scales"]).sum())
        errors = {path: max(error, off if off > SIDE_ERROR else 0.0) for path, (error, off) in linears.items()}
        worst = max(errors, key=lambda path: errors[path], default="")
        error = errors.get(worst, 0.0)
        side_error = max((off for _, off in linears.values()), default=0.0)
        flip = float(golden["flip_distance"])
        operator = max(operators.errors, key=lambda name: operators.errors[name], default="")
        off = operators.errors.get(operator, 0.0)
        return Replay(
            differ, len(errors), error, worst if error else "", distance, flip, side_error, off, operator if off else ""
        )
    except KeyError as error:
        raise Hif4Error(f"the golden file lacks {error}; compile the artifact again.") from None
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(f"the program cannot be run on its golden inputs ({reason}); compile it again.") from error


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance, 0 for equal tensors; infinite when either is not finite, so that NaN never passes."""
    if found.shape != expected.shape:
        return float("inf")
    error = (found.double() - expected.double()).norm()
    if not torch.isfinite(error):
        return float("inf")
    return float(error / expected.double().norm()) if error else 0.0


def _call(
    model: CompiledTransformer,
    inputs: list[torch.Tensor],
    see: Callable[[int, tuple[Any, ...], Any], None],
) -> torch.Tensor:
    """The main program's output, and `see` as in `Executor.visit`."""
    video, timestep, text = inputs
    (sample,) = model.executor.visit((video.to(model.dtype), timestep.to(torch.float32), text.to(model.dtype)), see)
    return sample


class _OperatorCheck:
    """Compares what 4-bit operators give with what their portable definitions make of the same arguments.

    Of each kind of node (operator, shapes and dtypes of the arguments) the first: kernels know no other difference.
    `errors`: operator and module -> distance.
    """

    def __init__(self, model: CompiledTransformer) -> None:
        self.errors: dict[str, float] = {}
        self._nodes = model.graph.nodes
        self._known: set[Any] = set()

    def compare(self, number: int, arguments: tuple[Any, ...], result: Any) -> None:
        """Look at one node that has run."""
        node = self._nodes[number]
        namespace, _, name = node.target.partition(".")
        if namespace != NAMESPACE:
            return
        shapes = [(item.shape, item.dtype) if isinstance(item, torch.Tensor) else item for item in arguments]
        kind = (name, tuple(shapes), tuple(node.kwargs.items()))
        if kind in self._known:
            return
        self._known.add(kind)
        expected = PORTABLE[name](
            *(item.cpu() if isinstance(item, torch.Tensor) else item for item in arguments), **node.kwargs
        )
        # A module may have operators of several kinds.
        where = f"{node.target} of {node.module}"
        distance = relative_distance(_decoded(result), _decoded(expected))
        self.errors[where] = max(self.errors.get(where, 0.0), distance)


def _decoded(value: Any) -> torch.Tensor:
    """A tensor on the CPU, for two planes what they hold."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    codes, scales = (plane.cpu() for plane in value)
    return dequantize(codes, scales, 2 * codes.shape[-1], torch.float64)


def _linears(model: CompiledTransformer) -> list[Node]:
    return [node for node in model.graph.nodes if node.target in PLANES]


def _replay_linear(model: CompiledTransformer, node: Node, golden: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Distances from what was recorded: of a linear's output, and of its side branch (0 without one)."""
    x = _input(model, node, golden["row"])
    side, off = _side(model, node, x), 0.0
    if side is not None:
        recorded = golden[f"side.{node.module}"]
        off = relative_distance(side.cpu(), recorded)
        side = recorded.to(model.device)
    return relative_distance(_run_linear(model, node, x, side).cpu(), golden[f"linear.{node.module}"]), off


def _bound(model: CompiledTransformer, argument: Any) -> Any:
    """A stored tensor for a reference to one; anything else as it is."""
    if isinstance(argument, Ref):
        return model.executor.tensors[argument.index - len(model.graph.inputs)]
    return argument


def _input(model: CompiledTransformer, node: Node, row: torch.Tensor) -> torch.Tensor:
    """The first K values of the row in dtype and rank of what the linear reads: [1, ..., K]."""
    kind = _input_type(model, node)
    x = row[: _features(model, node)].to(model.device, DTYPES[kind.dtype])
    return x.view(*(1 for _ in kind.shape[1:]), -1)


def _input_type(model: CompiledTransformer, node: Node) -> TensorType:
    graph, index = model.graph, _data(model, node).index
    kind = graph.inputs[index].type if index < len(graph.inputs) else graph.nodes[index - graph.first_node].type
    if not isinstance(kind, TensorType):
        raise ValueError(f"what {node.module} reads is not a tensor")
    reader = _reader(model, node)
    if reader.target == "hif4.norm_quantize":  # between what it reads and what it quantizes the dtype may change
        return TensorType(DTYPE_NAMES[reader.args[NORM_DTYPE]], kind.shape)
    return kind


def _features(model: CompiledTransformer, node: Node) -> int:
    k = _input_type(model, node).shape[-1]
    if not isinstance(k, int):
        raise ValueError(f"what {node.module} reads has no static number of channels")
    return k


def _run_linear(model: CompiledTransformer, node: Node, x: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
    """Output [N] float32 of a linear for the one row x, without its activation, gate and residual."""
    first, last = PLANES[node.target], SIDE[node.target] + 1
    codes, scales, bias = (_bound(model, argument) for argument in node.args[first : first + 3])
    branch = (None, None) if side is None else (side, _bound(model, node.args[last]))
    reader = _reader(model, node)
    at = MASK[reader.target]
    mask, hadamard = (_bound(model, argument) for argument in (*reader.args, None, 0)[at : at + 2])
    if node.target == "hif4.linear":
        planes = torch.ops.hif4.quantize(x, mask, hadamard)
        return torch.ops.hif4.linear(*planes, codes, scales, bias, None, torch.float32, *branch).flatten()
    return torch.ops.hif4.linear_w4(x, codes, scales, bias, mask, hadamard, None, torch.float32, *branch).flatten()


def _reader(model: CompiledTransformer, node: Node) -> Node:
    """The node that masks and rotates the input of a 4-bit linear: its quantizer, or itself where it has none."""
    if node.target != "hif4.linear":
        return node
    nodes, first = model.graph.nodes, model.graph.first_node
    getitem = nodes[node.args[0].index - first]
    return nodes[getitem.args[0].index - first]


def _data(model: CompiledTransformer, node: Node) -> Ref:
    """What a linear's input is made from: itself, or what a norm reads that is fused with the quantizer.

    A side branch reads the input itself; a norm that it reads is not fused.
    """
    return _reader(model, node).args[0]


def _side(model: CompiledTransformer, node: Node, x: torch.Tensor) -> torch.Tensor | None:
    """What a linear's side branch computes from the input x, [1, ..., S]; None for a linear without one."""
    at = SIDE[node.target]
    if len(node.args) <= at or node.args[at] is None:
        return None
    return _evaluate(model, node.args[at], {_data(model, node): x})


def _evaluate(model: CompiledTransformer, argument: Any, values: dict[Ref, Any]) -> Any:
    """An argument of a program, by way of the nodes before it up to the known values, where new ones are kept."""
    graph = model.graph
    if isinstance(argument, list):
        return [_evaluate(model, item, values) for item in argument]
    if argument is DEVICE:
        return model.device
    if not isinstance(argument, Ref):
        return argument
    if argument not in values:
        if argument.index < len(graph.inputs):
            raise ValueError("a side branch depends on more than its linear's input")
        if argument.index < graph.first_node:
            values[argument] = _bound(model, argument)
        else:
            node = graph.nodes[argument.index - graph.first_node]
            positional = [_evaluate(model, item, values) for item in node.args]
            keywords = {name: _evaluate(model, item, values) for name, item in node.kwargs.items()}
            values[argument] = TARGETS[node.target](*positional, **keywords)
    return values[argument]
