"""What safetensors files say of their tensors: names, dtypes, shapes, places; and how many tensors are cut into shards.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data without holes).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "PlannedFile",
    "TensorSpec",
    "index_name",
    "index_text",
    "is_tensor_name",
    "plan_files",
    "shortened",
    "tensor_bytes",
]

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_MAX_NAME_LENGTH = 1024


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's data in row-major order as flat bytes; a copy is made only of a non-contiguous or device tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class PlannedFile(NamedTuple):
    """A file that holds some of the tensors.

    Attributes:
        name: of the file.
        specs: its tensors, in order.
        header: its first bytes, up to the data.
    """

    name: str
    specs: list[TensorSpec]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def plan_files(
    tensors: Iterable[TensorSpec], base_name: str, shard_bytes: int, metadata: Mapping[str, str] | None
) -> list[PlannedFile]:
    """The files of a list of tensors: `BASE.safetensors`, or shards named as on the Hugging Face hub.

    Args:
        tensors: in the order of the data.
        base_name: how the names of the files begin.
        shard_bytes: the most bytes of data in one file, except that a larger tensor gets a file of its own.
        metadata: at most one key, because several would not keep their order in other writers and readers; None for
            the usual one.

    Raises:
        ValueError: no tensors, a name that is none or comes twice, a dtype without a name, several metadata keys.
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if len(metadata) > 1:
        raise ValueError(f"at most one metadata key, not {sorted(metadata)}")
    specs = [TensorSpec(*spec) for spec in tensors]
    _check_specs(specs)
    shards = _split_into_shards(specs, shard_bytes)
    names = [f"{base_name}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = [f"{base_name}.safetensors"]
    return [
        PlannedFile(name, shard, _encode_header(shard, metadata)) for name, shard in zip(names, shards, strict=True)
    ]


def index_name(base_name: str) -> str:
    """The file beside several shards that says which tensor is where."""
    return f"{base_name}.safetensors.index.json"


def index_text(files: Iterable[PlannedFile]) -> str:
    """What that file holds."""
    places = [(spec, file.name) for file in files for spec in file.specs]
    weight_map = {spec.name: name for spec, name in places}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec, _ in places)}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def is_tensor_name(name: str) -> bool:
    """Whether a file may call a tensor so."""
    return 0 < len(name) <= _MAX_NAME_LENGTH and name.isprintable()


def shortened(value: Any) -> str:
    """What a message shows of something from a file."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_specs(specs: list[TensorSpec]) -> None:
    if not specs:
        raise ValueError("no tensors to write")
    seen: set[str] = set()
    for spec in specs:
        if not is_tensor_name(spec.name) or spec.name == "__metadata__" or spec.name in seen:
            raise ValueError(f"not a tensor name, or twice in the list: {shortened(spec.name)}")
        if spec.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {spec.name}: no safetensors dtype for {spec.dtype}")
        seen.add(spec.name)


def _split_into_shards(specs: list[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _encode_header(specs: list[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        dtype = DTYPE_NAMES[spec.dtype]
        header[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
