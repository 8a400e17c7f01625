"""graph.json: an expert's program as data. Read with an allow-list; nothing is imported, unpickled or executed from it.

The file is JSON with one node a line. Strings that repeat (targets, module paths, types) are tables; a node is
`[target, args, kwargs, module, type]`. Values are numbered: inputs first, then tensors, then nodes. In arguments a
string carries its kind in its first character: `%12` value 12, `'tanh` the string tanh, `:bfloat16` a dtype, `@` the
device on which the program runs. Numbers, booleans, null and lists are themselves.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import hif4c.runtime.ops  # noqa: F401  (registers torch.ops.hif4)
from hif4c.runtime.errors import Hif4Error

__all__ = ["DEVICE", "DTYPES", "TARGETS", "Graph", "InputType", "Node", "Ref", "TensorType", "decode", "encode"]

SCHEMA = 1
MAX_NODES = 1_000_000
MAX_DEPTH = 4

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ATEN = [
    "add.Tensor",
    "arange.start",
    "cat.default",
    "chunk.default",
    "contiguous.default",
    "conv3d.default",
    "cos.default",
    "div.Tensor",
    "exp.default",
    "expand.default",
    "flatten.using_ints",
    "gelu.default",
    "index_select.default",
    "layer_norm.default",
    "linear.default",
    "matmul.default",
    "mul.Tensor",
    "permute.default",
    "reshape.default",
    "rms_norm.default",
    "scaled_dot_product_attention.default",
    "silu.default",
    "sin.default",
    "slice.Tensor",
    "split_with_sizes.default",
    "squeeze.dim",
    "stack.default",
    "sub.Tensor",
    "sym_size.int",
    "to.dtype",
    "transpose.int",
    "unbind.int",
    "unflatten.int",
    "unsqueeze.default",
    "view.default",
]


def _aten(name: str) -> Callable[..., Any]:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _size_operator(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """Arithmetic on sizes alone: Python's operators would also repeat lists and strings."""

    def checked(a: int, b: int) -> int:
        if type(a) is not int or type(b) is not int:
            raise TypeError("sizes are whole numbers")
        return function(a, b)

    return checked


TARGETS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": _aten(name) for name in _ATEN},
    "hif4.quantize": torch.ops.hif4.quantize.default,
    "hif4.dequantize": torch.ops.hif4.dequantize.default,
    "hif4.linear": torch.ops.hif4.linear.default,
    "hif4.linear_w4": torch.ops.hif4.linear_w4.default,
    "hif4.norm": torch.ops.hif4.norm.default,
    "hif4.norm_quantize": torch.ops.hif4.norm_quantize.default,
    "hif4.rms_rotary": torch.ops.hif4.rms_rotary.default,
    "hif4.attention": torch.ops.hif4.attention.default,
    "getitem": operator.getitem,
    "size.mul": _size_operator(operator.mul),
    "size.floordiv": _size_operator(operator.floordiv),
}
"""Everything a program may call, by the name that stands in the file."""


@dataclass(frozen=True)
class Ref:
    """A value of the program: input, tensor or node number `index`."""

    index: int


class _Device:
    """The device on which the program runs; stands for it in arguments."""

    def __repr__(self) -> str:
        return "DEVICE"


DEVICE = _Device()


@dataclass(frozen=True)
class TensorType:
    """dtype name and shape; dynamic sizes are expressions for people, for example "b" or "2*h"."""

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class InputType:
    """A user input or stored tensor of the program; `name` is that of the call's argument or in the weight files."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Node:
    """One call.

    Attributes:
        target: what is called, one of `TARGETS`.
        args: positional arguments: a `Ref` for a value, a list, number, string, `torch.dtype`, `DEVICE` or None.
        kwargs: keyword arguments, which are constants.
        module: path of the module that it comes from, "" for the model itself.
        type: of the result: a TensorType, a tuple of them for several results, or an expression for a size.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    type: TensorType | tuple[TensorType, ...] | str | None


@dataclass
class Graph:
    """A program. Its values are numbered: inputs first, then tensors, then nodes.

    Attributes:
        inputs: what the caller gives, in order.
        tensors: what is read from the weight files.
        nodes: in execution order; each reads only values before it.
        outputs: the values that it returns.
    """

    inputs: list[InputType]
    tensors: list[InputType]
    nodes: list[Node]
    outputs: list[Ref]

    @property
    def first_node(self) -> int:
        """Number of the first node's value."""
        return len(self.inputs) + len(self.tensors)


def refs(value: Any) -> Iterator[Ref]:
    """Yield every Ref inside an argument."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from refs(item)


class _Table:
    """Interns values in order of first use."""

    def __init__(self) -> None:
        self.index: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self.index.setdefault(value, len(self.index))

    def lines(self) -> str:
        return "[\n" + ",\n".join(_dump(value) for value in self.index) + "\n]"


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def encode(graph: Graph) -> bytes:
    """Serialize; equal graphs give equal bytes."""
    targets, modules, types = _Table(), _Table(), _Table()
    rows = []
    for node in graph.nodes:
        kwargs = {name: _encode_argument(value) for name, value in node.kwargs.items()}
        args = [_encode_argument(value) for value in node.args]
        rows.append(_dump([targets(node.target), args, kwargs, modules(node.module), _encode_type(node.type, types)]))
    parts = {
        "schema": str(SCHEMA),
        "inputs": _dump([[item.name, _encode_type(item.type, types)] for item in graph.inputs]),
        "tensors": "[\n"
        + ",\n".join(_dump([item.name, _encode_type(item.type, types)]) for item in graph.tensors)
        + "\n]",
        "outputs": _dump([ref.index for ref in graph.outputs]),
        "targets": targets.lines(),
        "modules": modules.lines(),
        "types": types.lines(),
        "nodes": "[\n" + ",\n".join(rows) + "\n]",
    }
    return ("{" + ",\n".join(f'"{key}":{text}' for key, text in parts.items()) + "}\n").encode()


def _encode_type(value: Any, types: _Table) -> Any:
    if isinstance(value, TensorType):
        return types((value.dtype, *value.shape))
    if isinstance(value, tuple):
        return [_encode_type(item, types) for item in value]
    return value


def _encode_argument(value: Any) -> Any:
    if isinstance(value, Ref):
        return f"%{value.index}"
    if value is DEVICE:
        return "@"
    if isinstance(value, torch.dtype):
        return ":" + DTYPE_NAMES[value]
    if isinstance(value, str):
        return "'" + value
    if isinstance(value, (list, tuple)):
        return [_encode_argument(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} cannot be stored: {value!r}")


def decode(data: bytes, where: str) -> Graph:
    """Read graph.json as untrusted input.

    Args:
        data: bytes of the file.
        where: what to call the file in errors.

    Raises:
        Hif4Error: not JSON, not this schema, an operator that is not allowed, or a reference to a later value.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Hif4Error(f"{where} is not valid JSON ({error}); the artifact is damaged, compile it again.") from None
    try:
        return _Decoder(raw).graph()
    except Hif4Error as error:
        raise Hif4Error(f"{where}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Hif4Error(f"{where} does not have the structure of a program ({reason}); compile it again.") from None


class _Decoder:
    def __init__(self, raw: dict[str, Any]) -> None:
        schema = raw["schema"]
        if schema != SCHEMA:
            raise Hif4Error(
                f"the program has schema {schema!r} and this hif4c reads {SCHEMA}; "
                "install a hif4c that matches, or compile again."
            )
        self.raw = raw
        self.types = [TensorType(_dtype_name(row[0]), tuple(_size(size) for size in row[1:])) for row in raw["types"]]
        self.modules = [_text(item) for item in raw["modules"]]
        self.targets = [self._target(item) for item in raw["targets"]]

    @staticmethod
    def _target(name: Any) -> str:
        if name not in TARGETS:
            raise Hif4Error(
                f"the program calls {name!r}, which is not an operator that an artifact may use; "
                "do not run this artifact."
            )
        return name

    def graph(self) -> Graph:
        inputs = [InputType(_text(name), self._type(row)) for name, row in self.raw["inputs"]]
        tensors = [InputType(_text(name), self._type(row)) for name, row in self.raw["tensors"]]
        names = [item.name for item in (*inputs, *tensors)]
        if len(set(names)) != len(names):
            raise ValueError(f"two values are called {max(names, key=names.count)!r}")
        rows = self.raw["nodes"]
        if len(rows) > MAX_NODES:
            raise Hif4Error(f"the program has {len(rows)} nodes, more than the {MAX_NODES} that are read.")
        first = len(inputs) + len(tensors)
        nodes = [self._node(row, first + number) for number, row in enumerate(rows)]
        outputs = [Ref(_index(item, first + len(nodes))) for item in self.raw["outputs"]]
        return Graph(inputs, tensors, nodes, outputs)

    def _node(self, row: list[Any], number: int) -> Node:
        target, args, kwargs, module, kind = row
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise TypeError("arguments must be a list and an object")
        return Node(
            self.targets[_index(target, len(self.targets))],
            tuple(_decode_argument(item, number, 0) for item in args),
            {_identifier(name): _decode_keyword(item) for name, item in kwargs.items()},
            self.modules[_index(module, len(self.modules))],
            self._node_type(kind),
        )

    def _type(self, index: Any) -> TensorType:
        return self.types[_index(index, len(self.types))]

    def _node_type(self, kind: Any) -> TensorType | tuple[TensorType, ...] | str | None:
        if isinstance(kind, list):
            return tuple(self._type(item) for item in kind)
        if kind is None or isinstance(kind, str):
            return kind
        return self._type(kind)


def _decode_argument(value: Any, number: int, depth: int) -> Any:
    """Decode one argument of node `number`, which may read only values before it."""
    if isinstance(value, str):
        kind, rest = value[:1], value[1:]
        if kind == "%":
            return Ref(_index(int(rest), number))
        if kind == "'":
            return rest
        if kind == ":":
            return DTYPES[rest]
        if value == "@":
            return DEVICE
        raise ValueError(f"unknown kind of argument {value!r}")
    if isinstance(value, list):
        if depth >= MAX_DEPTH:
            raise ValueError("an argument is nested too deeply")
        return [_decode_argument(item, number, depth + 1) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise TypeError(f"an argument may not be a {type(value).__name__}")


def _decode_keyword(value: Any) -> Any:
    """Decode a keyword argument, which is a constant: values are passed by position."""
    return _decode_argument(value, 0, 0)


def _index(value: Any, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise IndexError(f"index {value!r} is not in [0, {end})")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {value!r}")
    return value


def _identifier(value: str) -> str:
    if not value.isidentifier():
        raise ValueError(f"{value!r} is not an argument name")
    return value


def _dtype_name(value: Any) -> str:
    if value not in DTYPES:
        raise ValueError(f"unknown dtype {value!r}")
    return value


def _size(value: Any) -> int | str:
    if type(value) is not int and not isinstance(value, str):
        raise TypeError(f"a size is a number or an expression, not {value!r}")
    return value
