"""An artifact as ONNX: one .onnx file a program, whose weights are read from safetensors files in or below its folder.

What is exported is the artifact's own program (`compiler.onnx_lowering`): neither the original checkpoint nor torch's
exporter has a part in it, and weights are read only to compare their hashes and to copy their files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hif4c.compiler.disk_space import check_disk
from hif4c.compiler.onnx_functions import MAX_OPSET, MIN_OPSET, check_opset
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import DTYPE_NAMES, Graph, InputType
from hif4c.runtime.onnx_file import INSTALL, METADATA_KEY, is_location
from hif4c.runtime.safetensors_stream import TensorFile
from hif4c.runtime.transformer_checks import check_shared_tensors

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

    from hif4c.compiler.onnx_lowering import LoweredProgram

__all__ = ["DEFAULT_OPSET", "MAX_OPSET", "MIN_OPSET", "WEIGHTS", "ExportedProgram", "export_onnx"]

DEFAULT_OPSET = 21
WEIGHTS = ("auto", "artifact", "copy")
ONNX_BYTES, GRAPH_FACTOR = 2 << 20, 16
"""An .onnx file takes so many bytes for functions and tables, and so many for each byte of graph.json, generously."""
CHUNK = 16 << 20

Events = Callable[[str, Any], None]


@dataclass(frozen=True)
class ExportedProgram:
    """One .onnx file.

    Attributes:
        expert: its name.
        variant: None for the main program, "bf16" for the one whose activations are not quantized.
        path: the .onnx file.
        nodes: nodes of its main graph, calls of functions counted once.
        onnx_bytes: size of the .onnx file.
        data: (location relative to the .onnx's folder, size in bytes) of each file of external data.
        quantized: for each quantizer of the program, the module path of the first linear that reads it and the name
            of the value that holds the quantized activations [B, T, Kp] float32.
    """

    expert: str
    variant: str | None
    path: Path
    nodes: int
    onnx_bytes: int
    data: tuple[tuple[str, int], ...]
    quantized: tuple[tuple[str, str], ...]


def export_onnx(
    artifact: Artifact,
    output: Path,
    *,
    experts: Sequence[str] | None = None,
    opset: int = DEFAULT_OPSET,
    weights: str = "auto",
    qdq: bool = False,
    on_event: Events = lambda event, value: None,
) -> list[ExportedProgram]:
    """Write an artifact's programs as ONNX, which stock onnxruntime runs in float32.

    A single program is written to `output`, say model.onnx; several to model.EXPERT.onnx and model.EXPERT.VARIANT.onnx.
    Inputs are hidden_states [b, C, f, 2*h, 2*w], timestep [b] (or one a token) and encoder_hidden_states
    [b, text, C], the output is sample, all float32 with free sizes. Stored tensors are external data. The model's
    metadata has one key, `METADATA_KEY`, with the JSON object {"expert", "variant", "config", "expand_timesteps",
    "bf16_timesteps", "model", "digest" (of the artifact's manifest), "form", "opset", "data": [{"location", "bytes"}]}.
    Equal inputs give equal bytes. Files appear under their names when they are complete.

    Args:
        artifact: opened; all its hashes are compared first.
        output: a path that ends in .onnx, in a folder that is there and not in the artifact.
        experts: only these; None for all.
        opset: of ONNX's default domain, `MIN_OPSET` to `MAX_OPSET`.
        weights: "artifact": external data are the artifact's own files, which must lie below the output's folder and
            have no other hard links, as ONNX demands. "copy": they are copied beside the output. "auto": the first
            where it is possible.
        qdq: keep Quantize and Dequantize apart, with the 4-bit planes between them, instead of one node.
        on_event: see `tools.console.Reporter`.

    Raises:
        Hif4Error: the artifact does not verify, a file is there already, the disk is full, or an argument is wrong.
    """
    _require_onnx()
    check_opset(opset)
    chosen = [artifact.expert(name).name for name in dict.fromkeys(experts or artifact.experts)]
    programs = [(name, variant) for name in chosen for variant in (None, *artifact.variants(name))]
    paths = _program_paths(output, programs)
    data = {name: _DataFiles(artifact, name, output, len(programs) == 1) for name in chosen}
    copied = _resolve_weights(artifact, output, weights, data.values())
    new_files = [*paths.values(), *(path for files in data.values() if copied for path in files.copies)]
    _check_output(artifact, output, new_files)
    needs = {"programs": sum(ONNX_BYTES + GRAPH_FACTOR * _graph_bytes(artifact, *program) for program in programs)}
    if copied:
        needs["weights"] = sum(files.nbytes for files in data.values())
    check_disk(output, needs, doing="exporting")

    on_event("step", f"comparing hashes of {artifact.root}")
    on_event("total", sum(size for size, _ in artifact.files.values()))
    on_event("unit", "bytes")
    artifact.verify(progress=lambda name, count: on_event("bytes", count))
    with _NewFiles() as made:
        if copied:
            on_event("step", f"copying weights to {output.parent}")
            on_event("total", needs["weights"])
            on_event("unit", "bytes")
            for files in data.values():
                files.copy(made, on_event)
        else:
            on_event("note", f"the weights stay in {artifact.root}; keep it where it is")
        on_event("step", "writing programs")
        on_event("total", len(programs))
        found = []
        for (expert, variant), path in paths.items():
            graph = artifact.graph(expert, variant)
            main = graph if variant is None else artifact.graph(expert)
            artifact.tensors(expert, main.tensors)  # refuses a program that does not fit its tensors
            check_shared_tensors(main, graph)
            places = data[expert].places(copied)
            lowered = _lower(graph, places, artifact.root / expert, opset, qdq)
            metadata = _metadata(artifact, expert, variant, places, opset, qdq)
            try:
                model = lowered.model(places.tensor, metadata)
            except (TypeError, ValueError) as error:  # a size or a text that protobuf cannot hold
                raise Hif4Error(
                    f"{path}: ONNX cannot hold the program ({error}); compile the artifact again."
                ) from error
            found.append(_write(made, model, lowered, path, expert, variant, places))
            on_event("bytes", 1)
        made.keep()
    return found


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError:
        raise Hif4Error(f"export to ONNX needs the package onnx; {INSTALL}.") from None


def _graph_bytes(artifact: Artifact, expert: str, variant: str | None) -> int:
    name = "graph.json" if variant is None else f"graph.{variant}.json"
    return artifact.files[f"{expert}/{name}"][0] if f"{expert}/{name}" in artifact.files else 0


def _program_paths(output: Path, programs: Sequence[tuple[str, str | None]]) -> dict[tuple[str, str | None], Path]:
    """Where each program goes."""
    if output.suffix != ".onnx" or not output.stem:
        raise Hif4Error(f"{output}: is not the name of an ONNX file; give one that ends in .onnx.")
    if len(programs) == 1:
        return {programs[0]: output}
    return {
        (expert, variant): output.with_name(".".join([output.stem, expert, *([variant] if variant else []), "onnx"]))
        for expert, variant in programs
    }


def _resolve_weights(artifact: Artifact, output: Path, weights: str, data: Iterable[_DataFiles]) -> bool:
    """Whether weights are copied."""
    if weights not in WEIGHTS:
        raise Hif4Error(f"--weights {weights}: is none of {', '.join(WEIGHTS)}.")
    below = artifact.root.resolve().is_relative_to(output.parent.resolve())
    if weights == "artifact" and not below:
        raise Hif4Error(
            f"{artifact.root}: does not lie below {output.parent}, and ONNX finds weights only below its file's "
            "folder; write the .onnx beside the artifact, or copy them with --weights copy."
        )
    paths = [path for files in data for path in files.paths]
    unnameable = [path for path in paths if below and not is_location(_relative(path, output.parent))]
    if weights == "artifact" and unnameable:
        raise Hif4Error(
            f"{unnameable[0]}: is not a name that an .onnx file may refer to; rename the artifact's folder, or copy "
            "the weights with --weights copy."
        )
    linked = [path for path in paths if path.stat().st_nlink > 1]
    if weights == "artifact" and linked:
        raise Hif4Error(
            f"{linked[0]}: has several hard links, and ONNX refuses such files; copy the weights with --weights copy."
        )
    return weights == "copy" or not below or bool(linked or unnameable)


def _relative(path: Path, folder: Path) -> str:
    """Where ONNX is told that a file below a folder is."""
    return path.resolve().relative_to(folder.resolve()).as_posix()


def _check_output(artifact: Artifact, output: Path, new_files: Sequence[Path]) -> None:
    if not output.parent.is_dir():
        raise Hif4Error(f"{output.parent}: there is no such folder; make it, or choose another place for the output.")
    if output.parent.resolve().is_relative_to(artifact.root.resolve()):
        raise Hif4Error(
            f"{output}: lies in the artifact, which holds nothing but what its manifest lists; write it beside the "
            "artifact."
        )
    for path in new_files:
        if path.exists() or path.is_symlink():
            raise Hif4Error(f"{path}: already exists; choose another output or remove it.")


@dataclass(frozen=True)
class _Places:
    """Where the tensors of an expert are: file of the data -> what is in it, and the file's location for ONNX."""

    files: tuple[tuple[str, TensorFile, int], ...]

    @property
    def data(self) -> tuple[tuple[str, int], ...]:
        """Location and size of each file."""
        return tuple((location, size) for location, _, size in self.files)

    @property
    def dtypes(self) -> dict[str, str]:
        """Name -> dtype as stored."""
        return {name: DTYPE_NAMES[file.info(name)[0]] for _, file, _ in self.files for name in file.names}

    def tensor(self, item: InputType) -> TensorProto:
        """The initializer of a stored tensor: a place in a file."""
        from onnx import TensorProto

        from hif4c.compiler.onnx_graph import ELEMENT_TYPES

        location, file = next((location, file) for location, file, _ in self.files if item.name in file.names)
        offset, nbytes = file.place(item.name)
        found = TensorProto(name=item.name, data_type=ELEMENT_TYPES[item.type.dtype], dims=map(int, item.type.shape))
        found.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", nbytes)):
            found.external_data.add(key=key, value=str(value))
        return found


class _DataFiles:
    """The safetensors files of one expert, and what their copies are called."""

    def __init__(self, artifact: Artifact, expert: str, output: Path, alone: bool) -> None:
        self.artifact = artifact
        self.folder = output.parent
        self.names = sorted(
            name for name in artifact.files if name.startswith(f"{expert}/") and name.endswith(".safetensors")
        )
        base = output.stem if alone else f"{output.stem}.{expert}"
        count = len(self.names)
        endings = [f"-{number + 1:05d}-of-{count:05d}" for number in range(count)] if count > 1 else [""]
        self.copies = [output.with_name(f"{base}{ending}.safetensors") for ending in endings[:count]]

    @property
    def paths(self) -> list[Path]:
        return [self.artifact.path(name) for name in self.names]

    @property
    def nbytes(self) -> int:
        return sum(self.artifact.files[name][0] for name in self.names)

    def copy(self, made: _NewFiles, on_event: Events) -> None:
        """Copy them, byte for byte."""
        for path, target in zip(self.paths, self.copies, strict=True):
            with open(path, "rb") as source, made.open(target) as file:
                while data := source.read(CHUNK):
                    made.write(file, data, target)
                    on_event("bytes", len(data))
            made.rename(target)

    def places(self, copied: bool) -> _Places:
        """Where ONNX finds the tensors."""
        found = []
        for name, target in zip(self.names, self.copies, strict=True):
            path = self.artifact.path(name)
            location = target.name if copied else _relative(path, self.folder)
            found.append((location, TensorFile(path), self.artifact.files[name][0]))
        return _Places(tuple(found))


class _NewFiles:
    """Files that are written under other names and renamed; unless they are to be kept, none stays behind."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._stack = ExitStack()

    def __enter__(self) -> _NewFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        for path in self._paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def open(self, target: Path) -> Any:
        """A file for the bytes of `target`, under its temporary name."""
        path = self.temporary(target)
        try:
            path.unlink(missing_ok=True)  # of an export that was killed; a link there must not be written through
            file = open(path, "xb", buffering=0)  # noqa: SIM115 - the caller's; its close has nothing left to write
        except OSError as error:
            raise Hif4Error(f"{path}: cannot be written ({error.strerror}); choose another output.") from error
        self._paths.append(path)
        return file

    @staticmethod
    def temporary(target: Path) -> Path:
        """What a file is called until it is complete."""
        return target.with_name(f".{target.name}.partial")

    @staticmethod
    def write(file: Any, data: bytes, target: Path) -> None:
        """Append to the file that `open` gave for a target."""
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise Hif4Error(
                f"{target}: writing failed ({error.strerror}); free some space or choose another output."
            ) from error

    def rename(self, target: Path) -> None:
        """Give a complete file its name."""
        os.replace(self.temporary(target), target)
        self._paths.remove(self.temporary(target))
        self._paths.append(target)

    def keep(self) -> None:
        """All is well."""
        self._paths.clear()


def _lower(graph: Graph, places: _Places, where: Path, opset: int, qdq: bool) -> LoweredProgram:
    from hif4c.compiler.onnx_lowering import lower_program

    return lower_program(graph, opset=opset, qdq=qdq, stored=places.dtypes, where=str(where))


def _metadata(
    artifact: Artifact, expert: str, variant: str | None, places: _Places, opset: int, qdq: bool
) -> dict[str, str]:
    info = artifact.expert(expert)
    value = {
        "expert": expert,
        "variant": variant,
        "config": info.config,
        "expand_timesteps": artifact.expand_timesteps,
        "bf16_timesteps": [list(item) for item in info.bf16_timesteps],
        "model": artifact.manifest["model"],
        "digest": artifact.manifest["digest"],
        "form": "qdq" if qdq else "lean",
        "opset": opset,
        "data": [{"location": location, "bytes": size} for location, size in places.data],
    }
    return {METADATA_KEY: json.dumps(value, sort_keys=True, separators=(",", ":"))}


def _write(
    made: _NewFiles,
    model: ModelProto,
    lowered: LoweredProgram,
    path: Path,
    expert: str,
    variant: str | None,
    places: _Places,
) -> ExportedProgram:
    """Write a model, let ONNX's checker see it where it will be, and give it its name."""
    import onnx

    data = model.SerializeToString(deterministic=True)
    with made.open(path) as file:
        made.write(file, data, path)
    try:  # by path: only so does the checker look at the external data as well
        onnx.checker.check_model(str(made.temporary(path)), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Hif4Error(
            f"{path}: ONNX's checker refuses the program ({reason}); compile the artifact again."
        ) from error
    made.rename(path)
    nodes = len(model.graph.node)
    return ExportedProgram(expert, variant, path, nodes, len(data), places.data, lowered.quantized)
