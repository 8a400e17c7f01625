"""Compare exported programs, as onnxruntime runs them, with the artifact's on its golden inputs.

onnxruntime computes in float32, so what it is compared with is the program in float32 (`float32_program`), where the
two differ by the order of additions alone. Of a program whose activations are quantized that is so until an activation
falls on the other side of a rounding: each such flip changes a code, and what follows. So every 4-bit linear is run
alone on the golden row, where codes must be equal bit for bit; the whole program is run with the reference's quantized
activations in place of its own, where what comes to every quantizer is compared, so that no flip can hide an operator
that is wrong; and once as it is, to count flips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from hif4c.compiler.float32_program import float32_executor
from hif4c.compiler.onnx_parts import (
    CODES,
    CUT,
    SCALES,
    LinearPart,
    argument,
    cut_model,
    find_linears,
    mask_of,
    quantizer_of,
    with_outputs,
)
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.golden import FLIP_MARGIN, MASK, PLANES, SIDE, golden_path, relative_distance
from hif4c.runtime.graph import Node, Ref
from hif4c.runtime.onnx_file import INPUTS, OnnxFile, open_onnx, read_model
from hif4c.runtime.onnx_session import CPU, make_session_of_part, run_session
from hif4c.runtime.reference import masked_and_rotated
from hif4c.runtime.rows import norm
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["PROGRAM_ERROR", "OnnxCheck", "linear_tolerance", "verify_onnx"]

Planes = tuple[torch.Tensor, torch.Tensor]

# Where nothing is quantized on the way: the largest difference over the largest value. Some 10^2 operators a block add
# roundings of 2^-24 of their values; 1e-6 to 2e-6 were seen in models of 2 to 40 blocks, an operator that is wrong is
# far beyond.
PROGRAM_ERROR = 1e-5


def linear_tolerance(k: int) -> float:
    """Relative L2 error that float32 additions in any order may leave in a product over k channels.

    Each of k additions rounds by 2^-24 / sqrt(3) of the partial sum in the mean square, independently; partial sums
    grow as the square root of their terms, so the error of a row is near sqrt(k / 6) * 2^-24, here taken 2.4 times.
    """
    return math.sqrt(k) * 2.0**-24


@dataclass(frozen=True)
class OnnxCheck:
    """What was found for one exported program.

    Attributes:
        path: the .onnx file.
        expert: its name.
        variant: None for the main program, "bf16" for the one whose activations are not quantized.
        linears: 4-bit linears that were run alone on the golden row.
        codes_differ: bytes of their quantized rows that differ (0 is right).
        linear_error: largest relative L2 error of their outputs, over what additions in another order may leave.
        worst: path of the linear that has it.
        program_error: largest difference of the output, or of what comes to a quantizer, from the float32 reference,
            over the largest value there, where both have the same quantized activations.
        worst_value: where that is: path of the first linear that reads it, or "sample".
        distance: relative L2 distance of the program as it is from the float32 reference.
        recorded: relative L2 distance from the output that was recorded when the artifact was compiled, in bf16.
        flips: quantized activations that differ from the reference's, of `activations`.
        activations: how many there are; 0 for a program without quantizers.
        flip_distance: the distance that last-bit changes of the input caused when the artifact was compiled.
    """

    path: Path
    expert: str
    variant: str | None
    linears: int
    codes_differ: int
    linear_error: float
    worst: str
    program_error: float
    worst_value: str
    distance: float
    recorded: float
    flips: int
    activations: int
    flip_distance: float

    @property
    def passed(self) -> bool:
        """Whether onnxruntime computes what the artifact's program says."""
        parts = self.codes_differ == 0 and self.linear_error <= 1 and self.program_error <= PROGRAM_ERROR
        return parts and (self.distance <= FLIP_MARGIN * self.flip_distance if self.flips else True)


def verify_onnx(
    artifact: Artifact,
    paths: Iterable[Path],
    *,
    providers: Sequence[str] = CPU,
    on_event: Callable[[str, Any], None] = lambda event, value: None,
) -> list[OnnxCheck]:
    """Run exported programs on the artifact's golden inputs: one check a file, one file at a time.

    Args:
        artifact: what they were exported from.
        paths: the .onnx files.
        providers: onnxruntime's execution providers.
        on_event: called with ("verifying", the file) before each.

    Raises:
        Hif4Error: a file is damaged, lacks its weights or was exported from another artifact; the artifact has no
            golden outputs; or onnxruntime cannot run a program. A result that differs is a check that did not pass.
    """
    checks = []
    for path in paths:
        on_event("verifying", path)
        file = open_onnx(path)
        if file.digest != artifact.manifest["digest"]:
            raise Hif4Error(f"{path}: was exported from another artifact than {artifact.root}; export it again.")
        checks.append(_check(artifact, file, providers))
    return checks


def _check(artifact: Artifact, file: OnnxFile, providers: Sequence[str]) -> OnnxCheck:
    try:
        return _Check(artifact, file, providers).run(file)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise Hif4Error(
            f"{file.path}: cannot be compared with the program of {artifact.root} ({reason}); compile "
            "and export it again."
        ) from error


class _Check:
    """One exported program beside the artifact's."""

    def __init__(self, artifact: Artifact, file: OnnxFile, providers: Sequence[str]) -> None:
        expert, variant = file.expert, file.variant
        self._path, self._providers = file.path, providers
        self._golden = TensorFile(golden_path(artifact, expert, variant))
        self._graph = artifact.graph(expert, variant)
        self._weights = artifact.tensors(expert, artifact.graph(expert).tensors)
        self._model = read_model(file.path)
        self._linears = find_linears(self._model, self._graph)
        self._quantizers: dict[int, LinearPart] = {}  # by number, the first linear that reads it
        for part in self._linears:
            if (number := quantizer_of(self._graph, part.node)) is not None:
                self._quantizers.setdefault(number, part)
        self._inputs = {name: self._golden.read(name).float() for name in INPUTS}

    def run(self, file: OnnxFile) -> OnnxCheck:
        """Everything that is compared."""
        differ, errors = self._linears_alone()
        quantized: dict[str, Planes] = {}
        expected = self._reference(quantized)
        sample, flips, activations = self._as_it_is(quantized)
        off = self._forced(quantized, expected) if quantized else {"sample": _largest(sample, expected["sample"])}
        worst, worst_value = (max(items, key=lambda name: items[name], default="") for items in (errors, off))
        return OnnxCheck(
            path=file.path,
            expert=file.expert,
            variant=file.variant,
            linears=len(errors),
            codes_differ=differ,
            linear_error=errors.get(worst, 0.0),
            worst=worst,
            program_error=off[worst_value],
            worst_value=worst_value,
            distance=relative_distance(sample, expected["sample"]),
            recorded=relative_distance(sample, self._golden.read("sample")),
            flips=flips,
            activations=activations,
            flip_distance=float(self._golden.read("flip_distance")),
        )

    def _linears_alone(self) -> tuple[int, dict[str, float]]:
        """Bytes of quantized rows that differ, and by path the error of each linear over its tolerance."""
        row = self._golden.read("row").float()
        feeds: dict[str, torch.Tensor] = {}
        for part in self._linears:
            feeds[part.source] = row[: part.channels].view(1, 1, -1)
            if part.side is not None:
                feeds[part.side] = self._golden.read(f"side.{part.node.module}").float().view(1, 1, -1)
        quantized = {part.rows: part for part in self._linears if part.rows != part.values}
        outputs = [*(part.result for part in self._linears), *(part.values for part in quantized.values())]
        shapes = {name: value.shape for name, value in feeds.items()}
        model = cut_model(self._model, shapes, dict.fromkeys(outputs), quantized)
        found = self._run(model, {CUT + name: value for name, value in feeds.items()})
        differ = 0
        for name, part in quantized.items():
            planes = quantize(row[: part.channels], *self._mask(part.node))
            for plane, ending in zip(planes, (CODES, SCALES), strict=True):
                differ += int((found[name + ending].flatten() != plane.flatten()).sum())
            differ += int((found[part.values].flatten() != _decoded(planes)).sum())
        errors = {}
        for part in self._linears:
            error = relative_distance(found[part.result].flatten(), self._alone(part, row))
            errors[part.node.module] = error / linear_tolerance(part.channels)
        return differ, errors

    def _alone(self, part: LinearPart, row: torch.Tensor) -> torch.Tensor:
        """What a linear makes of the row in float32 [N]: as recorded, or computed if bf16 is rounded on the way."""
        node, at = part.node, PLANES[part.node.target]
        if node.target == "hif4.linear":
            return self._golden.read(f"linear.{node.module}")
        weight = [self._bound(argument(node, position)) for position in (at, at + 1, at + 2)]
        branch = {}
        if part.side is not None:
            branch["side"] = self._golden.read(f"side.{node.module}").float().view(1, -1)
            branch["side_weight"] = self._bound(argument(node, SIDE[node.target] + 1)).float()
        x = row[: part.channels].view(1, -1)
        found = torch.ops.hif4.linear_w4(x, *weight, *self._mask(node), None, torch.float32, **branch)
        self._weights.release()
        return found.flatten()

    def _reference(self, quantized: dict[str, Planes]) -> dict[str, torch.Tensor]:
        """Values of the program in float32 by their names in the file: what comes to quantizers, and "sample".

        What they make of it goes into `quantized`.
        """
        expected: dict[str, torch.Tensor] = {}

        def keep(number: int, arguments: tuple[Any, ...], result: Any) -> None:
            if (part := self._quantizers.get(number)) is not None:
                at = MASK[self._graph.nodes[number].target]
                x = norm(*arguments[:at]) if at > 1 else arguments[0]
                mask, hadamard = (*arguments[at:], None, 0)[:2] if len(arguments) > at else (None, 0)
                expected[part.rows] = masked_and_rotated(x, mask, hadamard)
                quantized[part.values] = result

        executor = float32_executor(self._graph, self._weights)
        (expected["sample"],) = executor.visit(list(self._inputs.values()), keep)
        return expected

    def _as_it_is(self, quantized: Mapping[str, Planes]) -> tuple[torch.Tensor, int, int]:
        """The output; activations whose quantized value is not that of the reference's planes, and all there are."""
        found = self._run(with_outputs(self._model, quantized), {})
        flips = activations = 0
        for name, planes in quantized.items():
            value = _decoded(planes)
            flips += int((found.pop(name).view(value.shape) != value).sum())
            activations += value.numel()
        return found["sample"].clone(), flips, activations  # an output itself would keep the session's memory

    def _forced(self, quantized: Mapping[str, Planes], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The differences from what is expected, with these in place of the file's own quantized activations."""
        feeds = {name: _decoded(planes) for name, planes in quantized.items()}
        feeds = {name: value if value.dim() == 3 else value[None] for name, value in feeds.items()}
        model = cut_model(self._model, {name: value.shape for name, value in feeds.items()}, expected)
        found = self._run(model, {CUT + name: value for name, value in feeds.items()})
        paths = {part.rows: part.node.module for part in self._quantizers.values()}
        return {
            paths.get(name, name): _largest(found[name][..., : value.shape[-1]].view(value.shape), value)
            for name, value in expected.items()
        }

    def _run(self, model: ModelProto, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name of a part of the file's model; the golden inputs are what is not in `feeds`."""
        session = make_session_of_part(model.SerializeToString(), self._path, self._providers)
        given = {**self._inputs, **feeds}
        arrays = {item.name: given[item.name].numpy() for item in session.get_inputs()}
        return {name: torch.from_numpy(value) for name, value in run_session(session, arrays, self._path).items()}

    def _mask(self, node: Node) -> tuple[torch.Tensor | None, int]:
        """Mask [K] in float32, or None, and rotation width, of what a 4-bit linear reads."""
        mask, hadamard = mask_of(self._graph, node)
        bound = self._bound(mask)
        return None if bound is None else bound.float(), hadamard

    def _bound(self, value: Any) -> Any:
        """A stored tensor for a reference to one; anything else as it is."""
        if isinstance(value, Ref):
            return self._weights[self._graph.tensors[value.index - len(self._graph.inputs)].name]
        return value


def _decoded(planes: Planes) -> torch.Tensor:
    """The values [..., Kp] float32 of planes."""
    codes, scales = planes
    return dequantize(codes, scales, 2 * codes.shape[-1], torch.float32)


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value, 0 for equal tensors; infinite where one is not finite."""
    error = (found - expected).abs().max()
    if not torch.isfinite(error):
        return math.inf
    return float(error / expected.abs().max()) if error else 0.0
