"""An exported .onnx file as untrusted input: what it says of itself, and whether the weights it points to are there.

onnxruntime is asked only afterwards, so that what is missing or damaged is one sentence. No weights are read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hif4c.runtime.artifact import VARIANTS, timestep_ranges
from hif4c.runtime.components import EXPERT_NAMES, PIPELINE_CLASSES
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.transformer_checks import CONFIG_KEYS

__all__ = ["INPUTS", "INSTALL", "METADATA_KEY", "OUTPUTS", "OnnxFile", "is_location", "open_onnx", "read_model"]

METADATA_KEY = "hif4c"
"""Of the model's metadata_props; its value is JSON, see `hif4c.compiler.onnx_export.export_onnx`."""
INPUTS = ("hidden_states", "timestep", "encoder_hidden_states")
OUTPUTS = ("sample",)
INSTALL = "install it with `pip install 'hif4c[onnx]'`"

_MAX_BYTES = 2 << 30
"""protobuf's own limit."""


@dataclass(frozen=True)
class OnnxFile:
    """One program of an expert as .onnx, whose metadata and external data have been checked.

    Attributes:
        path: the .onnx file.
        expert: "transformer" or "transformer_2".
        variant: None for the main program, "bf16" for the one whose activations are not quantized.
        config: of the model class.
        expand_timesteps: whether `timestep` is [B, tokens] instead of [B].
        bf16_timesteps: ranges of timesteps in which the expert's "bf16" program runs.
        digest: of the manifest of the artifact that it was exported from.
        model: what that manifest says of the whole model: names of its experts, pipeline class, sampling settings.
        metadata: all that stands in the file.
    """

    path: Path
    expert: str
    variant: str | None
    config: dict[str, Any]
    expand_timesteps: bool
    bf16_timesteps: tuple[tuple[float, float], ...]
    digest: str
    model: dict[str, Any]
    metadata: dict[str, Any]


def open_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read a file that `hif4c export-onnx` wrote, without its weights, and look at the files that hold them.

    Raises:
        Hif4Error: the package onnx is not installed; the file is none of hif4c's, or damaged; or a file of weights is
            missing, too short, or not inside the folder of the .onnx file.
    """
    path = Path(path)
    model = read_model(path)
    texts = [item.value for item in model.metadata_props if item.key == METADATA_KEY]
    if len(texts) != 1:
        raise Hif4Error(f"{path}: was not written by hif4c; give a file that `hif4c export-onnx` wrote.")
    try:
        metadata = json.loads(texts[0])
        variant = metadata["variant"]
        if metadata["expert"] not in EXPERT_NAMES or variant not in (None, *VARIANTS):
            raise ValueError("its expert or variant is not known")
        if not isinstance(metadata["expand_timesteps"], bool) or not isinstance(metadata["digest"], str):
            raise TypeError("expand_timesteps or digest is of another type")
        opened = OnnxFile(
            path, metadata["expert"], variant, _config(metadata["config"]), metadata["expand_timesteps"],
            timestep_ranges(metadata["bf16_timesteps"]), metadata["digest"], _model(metadata["model"]), metadata,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Hif4Error(f"{path}: its metadata are not those of hif4c ({reason}); export it again.") from None
    inputs = {item.name for item in model.graph.input} - {item.name for item in model.graph.initializer}
    if inputs != set(INPUTS) or [item.name for item in model.graph.output] != list(OUTPUTS):
        raise Hif4Error(f"{path}: does not have the inputs and the output of a transformer; export it again.")
    _check_data(path, model)
    return opened


def read_model(path: Path) -> Any:
    """The `onnx.ModelProto` of a file without its external data; Hif4Error where it cannot be read."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise Hif4Error(f"{path}: reading it needs the package onnx; {INSTALL}.") from None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise Hif4Error(f"{path}: is larger than {_MAX_BYTES} bytes, which no .onnx file is.")
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}); give a .onnx file.") from None
    except (DecodeError, ValueError):
        raise Hif4Error(f"{path}: is not an ONNX file, or is damaged; copy it again or export it again.") from None


def _config(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("config is not an object")
    for key in CONFIG_KEYS:
        sizes = value[key] if key == "patch_size" else [value[key]]
        if not isinstance(sizes, list) or len(sizes) not in (1, 3) or any(type(size) is not int for size in sizes):
            raise TypeError(f"in config, {key} is of another type")
        if min(sizes) < 1 or (key == "patch_size") != (len(sizes) == 3):
            raise ValueError(f"in config, {key} is not a size")
    return dict(value)


def _model(value: Any) -> dict[str, Any]:
    experts = value["experts"]
    if not isinstance(experts, list) or not experts or not all(name in EXPERT_NAMES for name in experts):
        raise ValueError("the experts of its model are not known")
    if value["pipeline_class"] not in PIPELINE_CLASSES or not isinstance(value["sampling"], (dict, type(None))):
        raise ValueError("its pipeline class or sampling settings are not known")
    return dict(value)


def _check_data(path: Path, model: Any) -> None:
    """Refuse external data that is not there; each file is looked at once."""
    ends: dict[str, int] = {}
    for tensor in _external_tensors(model):
        entries = {item.key: item.value for item in tensor.external_data}
        location, end = _location(path, entries.get("location", "")), _end(path, entries)
        ends[location] = max(ends.get(location, 0), end)
    for location, end in ends.items():
        _check_file(path, location, end)


def _external_tensors(model: Any) -> Iterator[Any]:
    """Every tensor, wherever in the model, whose data is in another file."""
    from onnx import TensorProto

    graphs = [model.graph]
    attributes = [item for function in model.functions for item in function.attribute_proto]
    attributes += [item for function in model.functions for node in function.node for item in node.attribute]
    while graphs or attributes:
        if graphs:
            graph = graphs.pop()
            attributes += [item for node in graph.node for item in node.attribute]
            tensors = [*graph.initializer]
            sparse = [*graph.sparse_initializer]
        else:
            item = attributes.pop()
            graphs += [*item.graphs, *([item.g] if item.HasField("g") else [])]
            tensors = [item.t, *item.tensors]
            sparse = [item.sparse_tensor, *item.sparse_tensors]
        tensors += [part for item in sparse for part in (item.values, item.indices)]
        yield from (tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL)


def is_location(location: str) -> bool:
    """Whether external data may be there: a plain path in or below the .onnx's folder.

    An asterisk is refused as well: onnxruntime's sign for an address in memory in place of a file has one.
    """
    parts = PurePosixPath(location).parts
    inside = bool(parts) and not location.startswith("/") and ".." not in parts
    return inside and location.isprintable() and "\\" not in location and "*" not in location


def _location(path: Path, location: str) -> str:
    if not is_location(location):
        raise Hif4Error(
            f"{path}: reads weights from {location!r}, which is not a place in its own folder; do not use this file."
        )
    return location


def _end(path: Path, entries: Mapping[str, str]) -> int:
    """Where the data of a tensor ends in its file."""
    numbers = [entries.get("offset", "0"), entries.get("length", "")]
    if not all(number.isascii() and number.isdigit() and len(number) < 19 for number in numbers):
        raise Hif4Error(f"{path}: says of a tensor neither where it begins nor how long it is; export it again.")
    return int(numbers[0]) + int(numbers[1])


def _check_file(path: Path, location: str, end: int) -> None:
    data = path.parent / location
    try:
        found = data.stat()
    except OSError:
        raise Hif4Error(
            f"{data}: is missing, and {path.name} reads weights from it; put it there again, or export again."
        ) from None
    if not stat.S_ISREG(found.st_mode) or not data.resolve().is_relative_to(path.parent.resolve()):
        raise Hif4Error(f"{data}: is not a plain file in the folder of {path.name}; copy the weights there.")
    if found.st_size < end:
        raise Hif4Error(
            f"{data}: has {found.st_size} bytes, but {path.name} reads {end}; it is incomplete, copy it again."
        )
