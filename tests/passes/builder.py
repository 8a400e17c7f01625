"""Small programs made by hand, as `torch.export` would leave them: fake values, module paths, sources of tensors."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.passes.program import Decision, Precision, Program, TensorSource

__all__ = ["Builder", "decide", "draw", "stack", "targets"]

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


def _argument(value: Any) -> str:
    return str(value).removeprefix("torch.") if not isinstance(value, str) else repr(value)


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def _type(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_type, value))})"
    if value is None:
        return "nothing"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
