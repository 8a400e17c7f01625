"""Small programs made by hand, as `torch.export` would leave them: fake values, module paths, sources of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.compiler.emit import to_graph
from hif4c.passes.program import Decision, Precision, Program, TensorSource, inverse_mask
from hif4c.runtime.executor import Executor
from hif4c.runtime.format import quantize
from hif4c.runtime.rotation import block_hadamard

__all__ = ["Builder", "bind", "decide", "draw", "evaluate", "stack", "state_of", "stored", "targets"]

aten = torch.ops.aten


class Builder:
    """Builds a program node by node; `module` is the path of the module that the next calls belong to."""

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        graph, mode = fx.Graph(), FakeTensorMode()
        self.program = Program(graph, {}, list(inputs), mode)
        self.inputs = [graph.placeholder(name) for name in inputs]
        for node, shape in zip(self.inputs, inputs.values(), strict=True):
            node.meta["val"] = self.fake(shape)
        self.module = "blocks.0"

    def fake(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        with self.program.fake_mode:
            return torch.empty(shape, dtype=dtype)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
        """A parameter of the checkpoint."""
        spec = TensorSource(name, dtype, shape, source=name)
        return self.program.add_tensor(spec, self.inputs[0])

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        spec = TensorSource(name, value.dtype, tuple(value.shape), value=value)
        return self.program.add_tensor(spec, self.inputs[0])

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        like = fx.Graph().placeholder("like")
        like.meta["nn_module_stack"] = stack(self.module)
        return self.program.call(target, args, kwargs, like=like)

    def linear(self, x: fx.Node, path: str, out_features: int, bias: bool = True) -> fx.Node:
        """A linear whose weight [out_features, last dimension of x] and bias come from the checkpoint."""
        value = x.meta["val"]
        weight = self.tensor(f"{path}.weight", out_features, value.shape[-1], dtype=value.dtype)
        arguments = [x, weight]
        if bias:
            arguments.append(self.tensor(f"{path}.bias", out_features, dtype=value.dtype))
        outer, self.module = self.module, path
        node = self.call(aten.linear.default, *arguments)
        self.module = outer
        return node

    def finish(self, *outputs: fx.Node) -> Program:
        self.program.graph.output(tuple(outputs))
        return self.program


def stack(path: str) -> dict[str, tuple[str, str]]:
    """An `nn_module_stack` whose innermost module is `path`."""
    return {"root": ("", "Wan"), path: (path, "Module")}


def decide(program: Program, precision: str = Precision.W4A4, **exceptions: str) -> None:
    """Decide every linear; exceptions by the last part of the path, as `to_q="high"`."""
    for node in program.linears():
        path = program.linear_path(node)
        chosen = exceptions.get(path.rpartition(".")[2], precision)
        program.decisions[path] = Decision(path, chosen, f"{chosen} for the test")


def targets(program: Program) -> list[str]:
    """The calls in order, by name."""
    return [_name(node.target) for node in program.graph.nodes if node.op == "call_function"]


def draw(program: Program) -> str:
    """The program as text, one node a line: name = target(arguments) : type @ module."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{_origin(program, node)} {node.name} : {_type(node.meta['val'])}")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(str, node.args[0]))}")
        else:
            arguments = [_argument(item) for item in node.args]
            arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
            where = next(reversed(node.meta["nn_module_stack"].values()))[0] if "nn_module_stack" in node.meta else "-"
            call = f"{_name(node.target)}({', '.join(arguments)})"
            lines.append(f"{node.name} = {call} : {_type(node.meta['val'])} @ {where}")
    return "\n".join(lines) + "\n"


def _origin(program: Program, node: fx.Node) -> str:
    if node.name not in program.tensors:
        return "input"
    spec = program.tensors[node.name]
    return "constant" if spec.source is None else spec.plane


def state_of(program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random checkpoint for a program: matrices of unit gain, vectors around 1, in the graph's dtypes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for spec in program.tensors.values():
        if spec.source is not None:
            gain = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 0.3
            value = torch.randn(spec.shape, generator=generator) * gain + (len(spec.shape) == 1)
            state[spec.source] = value.to(spec.packed_from or spec.dtype)
    return state


def stored(program: Program, state: dict[str, torch.Tensor], exact: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of a program at any stage, by name, made from a checkpoint as `TensorSource` says.

    The low-rank part is that of the masked weight's SVD. `exact` keeps everything in float64 without rounding; packed
    planes do not exist then.
    """
    work = torch.float64 if exact else torch.float32
    tensors = {}
    for spec in program.tensors.values():
        if spec.source is None:
            assert spec.value is not None
            value = spec.value
            if exact and spec.name.endswith(".inverse"):  # stored in float32, which rounds 1/m
                mask = program.masks[spec.name.removesuffix(".inverse")].double()
                value = torch.where(mask == 0, 0.0, 1.0 / mask)
        else:
            source = _shifted(program, spec, state, work)
            if spec.row_mask is not None:
                source = source * program.masks[spec.row_mask].to(work).view(-1, *[1] * (source.dim() - 1))
            value = source if spec.plane == "whole" and not spec.rank else _plane(program, spec, source, exact)
        tensors[spec.name] = value.double() if exact and value.is_floating_point() else value.to(spec.dtype)
    return tensors


def _shifted(program: Program, spec: TensorSource, state: dict[str, torch.Tensor], work: torch.dtype) -> torch.Tensor:
    """A tensor of the checkpoint with what its linear's input lacks, and without what its reader's input shall lack."""
    dtype = spec.packed_from or spec.dtype
    source = state[str(spec.source)].to(dtype).to(work)
    if spec.input_shift is not None:
        weight = state[f"{str(spec.source).removesuffix('.bias')}.weight"].to(dtype).double()
        source = source + (weight @ program.shifts[spec.input_shift].double()).to(work)
    rows = source.reshape(-1, source.shape[-1]).clone()
    for row, name in spec.row_shifts:
        rows[row] -= program.shifts[name].to(work)
    return rows.view(source.shape)


def _plane(program: Program, spec: TensorSource, weight: torch.Tensor, exact: bool) -> torch.Tensor:
    rank = spec.rank
    mask = torch.ones(weight.shape[1]) if spec.mask is None else program.masks[spec.mask].float()
    inverse = inverse_mask(mask)
    down, up = weight.new_zeros(0, weight.shape[1]), weight.new_zeros(0, weight.shape[0])
    if rank:
        left, values, right = torch.linalg.svd((weight * inverse).double(), full_matrices=False)
        down, up = right[:rank], (left * values).T[:rank]
    down, up = (down if spec.mask_folded else down * mask), torch.cat([up, weight.T[mask == 0]])
    if not exact:
        down, up = down.bfloat16(), up.bfloat16()
    seen = down * mask if spec.mask_folded else down  # in the coordinates of x
    residual = weight.double() - up[:rank].double().T @ seen.double()
    codes, scales = (None, None) if exact else quantize(residual.float(), inverse, spec.hadamard)
    return {"whole": residual, "codes": codes, "scales": scales, "down": down, "up": up}[spec.plane]


def bind(program: Program, state: dict[str, torch.Tensor]) -> Executor:
    """A program at any stage, runnable."""
    return Executor(to_graph(program), stored(program, state), torch.device("cpu"))


def evaluate(program: Program, state: dict[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results of a program before it is packed in exact arithmetic: float64, and quantizers that mask and rotate only.

    Two programs that compute the same function agree to some 1e-12, whatever 4 or 16 bits would round.
    """
    tensors = stored(program, state, exact=True)
    values: dict[fx.Node, Any] = {}
    given = dict(zip(program.inputs, inputs, strict=True))
    for node in program.graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            value = tensors[program.tensors[node.name].name] if node.name in program.tensors else given[node.name]
        elif node.op == "output":
            return list(args[0])
        elif node.target is torch.ops.hif4.quantize.default:
            x, mask, width = args
            x = x if mask is None else x * mask
            value = (block_hadamard(x, width) if width > 1 else x, None)
        elif node.target in (torch.ops.hif4.dequantize.default, aten.to.dtype):
            value = args[0]
        else:
            value = node.target(*args, **kwargs)
        values[node] = value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    raise AssertionError("the program has no output")


def _argument(value: Any) -> str:
    return str(value).removeprefix("torch.") if not isinstance(value, str) else repr(value)


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def _type(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_type, value))})"
    if value is None:
        return "nothing"
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
