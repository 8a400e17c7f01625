"""An ONNX graph in the making: nodes with readable names, a type for every value, constants and shapes shared.

Every value gets a `value_info` with its dimensions, symbolic ones by name ("b", "f*h*w"): onnxruntime's allocation
planner takes quadratic time in values of unknown shape. A node that is there already, with the same inputs and
attributes, is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from hif4c.compiler import onnx_functions
from hif4c.runtime.graph import TensorType

__all__ = ["ELEMENT_TYPES", "OnnxGraph", "Size", "Tensor", "computed", "plain"]

ELEMENT_TYPES = {
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}
END = 2**63 - 1
"""The end of a slice that goes to the end."""


@dataclass(frozen=True)
class Tensor:
    """A value of the ONNX graph: its name and type, in which no float is narrower than float32."""

    name: str
    type: TensorType

    @property
    def shape(self) -> tuple[int | str, ...]:
        return self.type.shape

    @property
    def rank(self) -> int:
        return len(self.type.shape)

    def axis(self, dim: int) -> int:
        """A dimension that may be counted from the end, counted from the front."""
        if not -self.rank <= dim < self.rank:
            raise IndexError(f"dimension {dim} of a tensor of {self.rank}")
        return dim % self.rank


@dataclass(frozen=True)
class Size:
    """A size of the program: a number, or the name of an int64 value of one element."""

    value: int | str


def computed(kind: TensorType) -> TensorType:
    """The type that is computed with in place of the program's: float32 for bf16 and fp16."""
    return replace(kind, dtype="float32") if kind.dtype in ("bfloat16", "float16") else kind


def plain(text: str) -> str:
    """Text from an artifact as a name: without what does not print or cannot be encoded."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@dataclass
class OnnxGraph:
    """The graph and what has been made of it so far.

    Attributes:
        opset: of the default domain.
        module: path of the module that is being lowered; begins the names of new nodes.
        sizes: symbolic dimension -> the value that holds it, as far as known.
        functions: of domain `hif4` that are called.
        quantized: value that holds quantized activations -> module of the first linear that reads it.
        last_product: what the linear before has computed: the next weight is decoded after it.
    """

    opset: int
    module: str = ""
    nodes: list[NodeProto] = field(default_factory=list)
    types: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    quantized: dict[str, str] = field(default_factory=dict)
    last_product: Tensor | None = None
    _made: dict[Any, list[Tensor]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _constants: dict[Any, str] = field(default_factory=dict)

    def reserve(self, name: str) -> str:
        """The name, or one like it that is not taken."""
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return self.reserve(f"{name}_{count}") if count else name

    def add(self, operator: str, inputs: Sequence[str], kind: TensorType, **attributes: Any) -> Tensor:
        """A node with one result of this type."""
        return self.add_many(operator, inputs, [kind], **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], kinds: Sequence[TensorType], **attributes: Any
    ) -> list[Tensor]:
        """A node with several results."""
        return self._add(operator, inputs, kinds, attributes)

    def call(self, function: str, inputs: Sequence[Tensor], kinds: Sequence[TensorType]) -> list[Tensor]:
        """A call of a function of domain `hif4`."""
        self.functions.add(function)
        return self._add(function, [item.name for item in inputs], kinds, None)

    def _add(
        self, operator: str, inputs: Sequence[str], kinds: Sequence[TensorType], attributes: dict[str, Any] | None
    ) -> list[Tensor]:
        key = (operator, tuple(inputs), len(kinds), repr(attributes))
        if key not in self._made:
            name = self.reserve(f"{self.module}/{operator}")
            outputs = [name] if len(kinds) == 1 else [self.reserve(f"{name}:{index}") for index in range(len(kinds))]
            if attributes is None:
                node = onnx_functions.call(operator, inputs, outputs, name)
            else:
                node = helper.make_node(operator, inputs, outputs, name=name, **attributes)
            self.nodes.append(node)
            kinds = [computed(kind) for kind in kinds]
            self.types.update(zip(outputs, kinds, strict=True))
            self._made[key] = [Tensor(output, kind) for output, kind in zip(outputs, kinds, strict=True)]
        return self._made[key]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A constant, by its value; equal ones are one initializer."""
        array = np.asarray(value, dtype)
        if array.size <= 8:
            text = f"{array.dtype}[{', '.join(map(str, array.reshape(-1).tolist()))}]" + ("" if array.ndim else ".")
        else:
            text = f"{array.dtype}{list(array.shape)} of {array.reshape(-1)[0]}"
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.reserve(f"constant/{text}")
            self.constants[self._constants[key]] = array
        return self._constants[key]

    def shape_vector(self, sizes: Sequence[int | Size]) -> str:
        """The sizes as one int64 vector."""
        parts: list[str] = []
        numbers: list[int] = []
        for size in [*(item.value if isinstance(item, Size) else item for item in sizes), None]:
            if isinstance(size, int):
                numbers.append(size)
                continue
            if numbers:
                parts.append(self.constant(numbers, np.int64))
                numbers = []
            if size is not None:
                parts.append(size)
        if len(parts) <= 1:
            return parts[0] if parts else self.constant([], np.int64)
        return self.add("Concat", parts, TensorType("int64", (len(sizes),)), axis=0).name

    def size(self, x: Tensor, axis: int) -> Size:
        """A dimension of a tensor."""
        size = x.shape[axis]
        if isinstance(size, int):
            return Size(size)
        if size not in self.sizes:
            found = self.add("Shape", [x.name], TensorType("int64", (1,)), start=axis, end=axis + 1)
            self.sizes[size] = Size(found.name)
        return self.sizes[size]

    def reshape(self, x: Tensor, sizes: Sequence[int | Size], kind: TensorType) -> Tensor:
        """x in another shape, of which one size may be -1.

        Symbolic sizes are copied (0) or inferred (-1) where that says enough: such a shape is a constant.
        """
        if len(sizes) != len(kind.shape):
            raise ValueError(f"{len(sizes)} sizes for a result of {len(kind.shape)} dimensions")
        if x.shape == kind.shape:
            return x
        wanted: list[int | Size] = []
        for position, (size, known) in enumerate(zip(sizes, kind.shape, strict=True)):
            if isinstance(known, int):
                wanted.append(known)
            elif position < x.rank and x.shape[position] == known:
                wanted.append(0)
            else:
                wanted.append(size)
        unknown = [position for position, size in enumerate(wanted) if isinstance(size, Size) or size == -1]
        if len(unknown) == 1:
            wanted[unknown[0]] = -1
        return self.add("Reshape", [x.name, self.shape_vector(wanted)], kind)

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """x in the dtype that stands for a dtype of the program; itself where it has it."""
        kind = computed(replace(x.type, dtype=dtype))
        if kind.dtype == x.type.dtype:
            return x
        return self.add("Cast", [x.name], kind, to=ELEMENT_TYPES[kind.dtype])

    def rename(self, old: str, new: str) -> None:
        """Give a node's result another name, wherever it is read."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
        self.types[new] = self.types.pop(old)
        if old in self.quantized:
            self.quantized[new] = self.quantized.pop(old)

    def remove_unread(self, outputs: Sequence[str]) -> None:
        """Drop the nodes and constants that nothing reads."""
        read, kept = set(outputs), []
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                read.update(node.input)
                kept.append(node)
            else:
                for name in node.output:
                    self.types.pop(name, None)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in read}

    def value_info(self, names: Sequence[str]) -> list[ValueInfoProto]:
        """The types of values, for the file."""
        return [
            helper.make_tensor_value_info(
                name,
                ELEMENT_TYPES[self.types[name].dtype],
                [plain(size) if isinstance(size, str) else size for size in self.types[name].shape],
            )
            for name in names
        ]

    def constant_tensors(self) -> list[TensorProto]:
        """The constants, for the file."""
        return [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
