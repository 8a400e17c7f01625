"""The legal program at each stage. Runs after every pass; a violation is a bug of the pass that ran last."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import fx

from hif4c.passes.mark_boundaries import BLOCK_PATTERN
from hif4c.passes.matching import QUANTIZERS, input_quantizer
from hif4c.passes.program import Decision, Precision, Program, module_path, outlier_columns
from hif4c.runtime.format import UNIT, packed_shapes

__all__ = ["Stage", "verify"]

hif4 = torch.ops.hif4
# Positions of the weight's planes and of the side branch among the arguments; gate and residual follow it.
FUSED = {hif4.linear.default: ((2, 3), (7, 8)), hif4.linear_w4.default: ((1, 2), (8, 9))}
ROW_OPERATORS = (
    hif4.norm.default,
    hif4.norm_quantize.default,
    hif4.rms_rotary.default,
    hif4.attention.default,
)


class Stage(IntEnum):
    """How far a program has come."""

    CAPTURED = 0
    FUNCTIONAL = 1
    PLANNED = 2
    QDQ = 3
    PACKED = 4
    LOWERED = 5
    FUSED = 6


def verify(program: Program, stage: Stage) -> None:
    """Check everything that holds from `stage` on.

    Raises:
        ValueError: names the node and the rule that it breaks.
    """
    _check_form(program)
    if stage >= Stage.FUNCTIONAL:
        _check_functional(program)
    if stage < Stage.QDQ:
        _forbid(program, lambda node: str(node.target).startswith("hif4."), "is a hif4 operator before Q/DQ insertion")
    if stage >= Stage.PLANNED:
        _check_planned(program)
    if stage == Stage.QDQ:
        _check_qdq(program)
    if stage >= Stage.PACKED:
        _check_packed(program)
    if stage >= Stage.LOWERED:
        _check_lowered(program)
    if stage < Stage.FUSED:
        _forbid(program, _is_fused_with_others, "is fused before the program is lowered")


def _check_form(program: Program) -> None:
    """Every stage: well-formed graph, a value for every node, tensors and placeholders in step."""
    program.graph.lint()
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    if set(placeholders) != {*program.tensors, *program.inputs}:
        odd = set(placeholders) ^ {*program.tensors, *program.inputs}
        raise ValueError(f"placeholders and tensors disagree about {sorted(odd)}")
    if placeholders[-len(program.inputs) :] != program.inputs:
        raise ValueError("the user inputs are not the last placeholders")
    names = [spec.name for spec in program.tensors.values()]
    if len(set(names)) != len(names):
        raise ValueError(f"two tensors are called {max(names, key=names.count)}")
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise ValueError(f"{node.name} is a {node.op}, which no program may hold")
        if node.op != "output" and "val" not in node.meta:
            raise ValueError(f"{node.name} has no value")
        if node.op == "placeholder" and node.name in program.tensors:
            spec, value = program.tensors[node.name], node.meta["val"]
            if (spec.dtype, spec.shape) != (value.dtype, tuple(value.shape)):
                raise ValueError(f"{node.name}: the spec says {spec.dtype} {spec.shape}, the graph {value}")


def _check_functional(program: Program) -> None:
    def writes(node: fx.Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

    _forbid(program, writes, "writes into its argument")
    _forbid(program, lambda node: node.target is torch.ops.aten.empty_like.default, "is uninitialised memory")
    _forbid(program, lambda node: node.target is torch.ops.aten._assert_tensor_metadata.default, "is a trace assert")


def _check_planned(program: Program) -> None:
    for node in program.linears():
        path = program.linear_path(node) if not _reads_planes(program, node) else None
        if path is not None and path not in program.decisions:
            raise ValueError(f"{node.name} ({path}) has no decision")
    _check_masks(program)
    _check_shifts(program)


def _check_masks(program: Program) -> None:
    """Row masks fit; what is folded is folded somewhere; only quantized linears have masks and branches."""
    row_masks = set()
    for spec in program.tensors.values():
        if spec.row_mask is not None:
            row_masks.add(spec.row_mask)
            rows = spec.shape[1] if spec.plane == "up" else spec.shape[0]
            if spec.plane != "down" and program.masks[spec.row_mask].shape != (rows,):
                raise ValueError(f"{spec.name} has {rows} rows, which the mask {spec.row_mask} does not fit")
    folded = set()
    for path, decision in program.decisions.items():
        if not decision.quantized and (decision.mask is not None or decision.rank):
            raise ValueError(f"{path} is not quantized, but has a mask or a low-rank branch")
        if decision.mask_folded:
            folded.add(decision.mask)
            if outlier_columns(program, decision).numel():
                raise ValueError(f"{path}: a mask with zeros is folded, so its outlier columns are lost")
    if row_masks != folded:
        raise ValueError(f"masks of rows and folded masks differ: {sorted(map(str, row_masks ^ folded))}")


def _check_shifts(program: Program) -> None:
    """What is taken off an input is given back by the linears that read it, and there alone."""
    taken = {name for spec in program.tensors.values() for _, name in spec.row_shifts}
    given = {spec.source: spec.input_shift for spec in program.tensors.values() if spec.input_shift is not None}
    decided = {f"{path}.bias": item.shift for path, item in program.decisions.items() if item.shift is not None}
    if given != decided or set(given.values()) != taken:
        raise ValueError(f"inputs are shifted by {sorted(taken)}, linears by {decided}, their biases by {given}")


def _check_qdq(program: Program) -> None:
    """Each quantized linear reads what its decision says; the others read no dequantized value."""
    for node in program.linears():
        decision = program.decisions[program.linear_path(node)]
        source, weight = node.args[:2]
        found = (_is_round_trip(source), _is_round_trip(weight))
        expected = (decision.precision == Precision.W4A4, decision.quantized)
        if found != expected:
            raise ValueError(
                f"{decision.path} is {decision.precision}, but quantized (input, weight) is {found}, not {expected}"
            )


def _check_packed(program: Program) -> None:
    """No weight is quantized in the graph; planes have the shapes of the format, branches those of the decisions."""
    for node in program.graph.nodes:
        if node.target is hif4.quantize.default and node.args[0].name in program.tensors:
            raise ValueError(f"{node.name} quantizes the stored tensor {node.args[0].name} at run time")
    whole = {spec.source for spec in program.tensors.values() if spec.plane == "whole"}
    planes: dict[str | None, dict[str, tuple[int, ...]]] = {}
    for spec in program.tensors.values():
        if spec.plane != "whole":
            if spec.source in whole:
                raise ValueError(f"{spec.source} is stored both packed and whole")
            planes.setdefault(spec.source, {})[spec.plane] = spec.shape
    expected = {f"{path}.weight" for path, decision in program.decisions.items() if decision.quantized}
    if set(planes) != expected:
        raise ValueError(f"packed tensors and decisions disagree about {sorted(map(str, set(planes) ^ expected))}")
    for source, found in planes.items():
        rows, columns = found["codes"][0], 2 * found["codes"][1]
        if tuple(map(tuple, packed_shapes((rows, columns)))) != (found["codes"], found.get("scales")):
            raise ValueError(f"{source}: planes {found} are not the two planes of one packed tensor")
        _check_branch(program, program.decisions[str(source).removesuffix(".weight")], found)


def _check_branch(program: Program, decision: Decision, planes: dict[str, tuple[int, ...]]) -> None:
    """down [r, K] where the decision has a rank r; up [r + c, N] where that or the c zeros of the mask ask for it."""
    # Padding is part of the planes but not of K; the mask and down know K.
    rows, padded = planes["codes"][0], 2 * planes["codes"][1]
    wide = decision.rank + outlier_columns(program, decision).numel()
    down, up = planes.get("down"), planes.get("up")
    fits = (down is None) if decision.rank == 0 else down is not None and down[0] == decision.rank
    if not fits or (down is not None and not padded - UNIT < down[1] <= padded):
        raise ValueError(f"{decision.path} has rank {decision.rank} and a weight of {rows} rows, but down is {down}")
    if up != ((wide, rows) if wide else None):
        raise ValueError(f"{decision.path} needs a side branch of {wide} columns for {rows} rows, but up is {up}")


def _check_lowered(program: Program) -> None:
    """One fused node for every quantized linear, one `aten.linear` for every other; none in a boundary region."""
    _forbid(program, lambda node: node.target is hif4.dequantize.default, "is left unfused")
    counts = {
        precision: sum(decision.precision == precision for decision in program.decisions.values())
        for precision in (Precision.W4A4, Precision.W4A16, Precision.HIGH)
    }
    found = {
        precision: sum(node.target is target for node in program.graph.nodes)
        for precision, target in zip(counts, FUSED, strict=False)
    }
    found[Precision.HIGH] = sum(1 for _ in program.linears())
    if counts != found:
        raise ValueError(f"the plan has {counts}, the graph {found}")
    _forbid(
        program,
        lambda node: node.target in FUSED and not BLOCK_PATTERN.match(module_path(node)),
        "is 4-bit in a boundary region",
    )
    _check_fused(program)
    _check_inputs(program)


def _check_inputs(program: Program) -> None:
    """What a fused linear reads is masked and rotated as its weight was when it was packed."""
    for node in program.graph.nodes:
        if node.target not in FUSED:
            continue
        reader, positions = node, (4, 5)
        if node.target is hif4.linear.default:
            reader = input_quantizer(node)
            positions = QUANTIZERS[reader.target]
        mask, width = (reader.args[at] if len(reader.args) > at else None for at in positions)
        found = (None if mask is None else program.tensors[mask.name].name, width or 0)
        planes, _ = FUSED[node.target]
        path = str(program.tensors[node.args[planes[0]].name].source).removesuffix(".weight")
        decision = program.decisions[path]
        expected = (None if decision.mask_folded else decision.mask, decision.hadamard)
        if found != expected:
            raise ValueError(f"{path}: its input has (mask, rotation) {found}, its weight {expected}")


def _is_fused_with_others(node: fx.Node) -> bool:
    """Whether a node is one that only the passes behind the lowering make."""
    if node.target in FUSED:
        _, (_, side_weight) = FUSED[node.target]
        return any(argument is not None for argument in node.args[side_weight + 1 :])
    return node.target in ROW_OPERATORS


def _check_fused(program: Program) -> None:
    """The planes that a fused linear reads are of one weight, and it has a side branch if the weight has one."""
    branches = {spec.source for spec in program.tensors.values() if spec.plane == "up"}
    for node in program.graph.nodes:
        if node.target not in FUSED:
            continue
        planes, (side, side_weight) = FUSED[node.target]
        read = [*planes, side_weight] if len(node.args) > side and node.args[side] is not None else [*planes]
        specs = [program.tensors.get(node.args[position].name) for position in read]
        found = [(None, None) if spec is None else (spec.source, spec.plane) for spec in specs]
        source = found[0][0]
        expected = [(source, plane) for plane in ("codes", "scales", *(["up"] if source in branches else []))]
        if found != expected:
            raise ValueError(f"{node.name} reads {found}, not {expected}")


def _is_round_trip(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is hif4.dequantize.default


def _reads_planes(program: Program, node: fx.Node) -> bool:
    """Whether the linear's weight is already packed, so that its path is no longer that of a stored weight."""
    weight = node.args[1]
    while isinstance(weight, fx.Node) and weight.op == "call_function" and weight.target is not operator.getitem:
        weight = weight.args[0]
    return (
        isinstance(weight, fx.Node) and weight.name in program.tensors and program.tensors[weight.name].plane != "whole"
    )


def _forbid(program: Program, rule: Callable[[fx.Node], bool], what: str) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and rule(node):
            raise ValueError(f"{node.name} ({node.target}) {what}")
