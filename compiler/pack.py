"""Write an expert's tensors: read one from the checkpoint, make its stored form, append it, let it go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.compiler.planes import InputStatistics, Planes, make_planes, whole_tensor
from hif4c.passes.program import Program, TensorSource
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec

__all__ = ["stored_tensors", "write_weights"]

Progress = Callable[[int], None]


def stored_tensors(program: Program, checkpoint: Checkpoint) -> list[TensorSpec]:
    """Name, dtype and shape of every tensor of the weight file, in the program's order."""
    return [
        TensorSpec(source.name, _stored_dtype(source, checkpoint), source.shape) for source in program.tensors.values()
    ]


def write_weights(
    program: Program,
    checkpoint: Checkpoint,
    directory: Path,
    progress: Progress | None = None,
    *,
    solved: Callable[[str], Planes | None] = lambda source: None,
    statistics: Callable[[TensorSource], InputStatistics | None] = lambda source: None,
    on_planes: Callable[[TensorSource, Planes], None] = lambda source, planes: None,
) -> tuple[dict[str, tuple[int, str]], str]:
    """Write `weights*.safetensors`, one checkpoint tensor at a time.

    Args:
        program: a packed or lowered program.
        checkpoint: where its sources are; every tensor is checked for NaN and infinity as it is read.
        directory: existing; the files must not be there.
        progress: called with the bytes read from the checkpoint after every tensor.
        solved: planes that were made before (with a Hessian), by the name of the checkpoint's tensor.
        statistics: of a weight's input, for a rounding other than "nearest".
        on_planes: called with a plane's source and all planes of every packed weight.

    Returns:
        File name -> (bytes, sha256), and the fingerprint of the checkpoint's weights.

    Raises:
        Hif4Error: a weight is not finite, or the disk is full.
    """
    fingerprint = Fingerprint()
    specs = stored_tensors(program, checkpoint)
    dtypes = {spec.name: spec.dtype for spec in specs}
    with StreamingWriter(directory, specs) as writer:
        for sources in _by_checkpoint_tensor(program):
            name = sources[0].source
            if name is None:
                for source in sources:
                    assert source.value is not None
                    writer.write(source.name, source.value)
                continue
            tensor = checkpoint.read(name, validate=True)
            fingerprint.add(name, tensor)
            if sources[0].plane == "whole":
                whole = whole_tensor(sources[0], program, checkpoint)
                writer.write(sources[0].name, whole.to(dtypes[sources[0].name]))
            else:
                planes = solved(name)
                if planes is None:
                    known = None if sources[0].rounding == "nearest" else statistics(sources[0])
                    planes = make_planes(sources[0], tensor, program, known)
                for source in sources:
                    writer.write(source.name, planes[source.plane])
                on_planes(sources[0], planes)
            size = tensor.nbytes
            del tensor
            checkpoint.release(name)
            if progress is not None:
                progress(size)
    return dict(writer.files), fingerprint.hexdigest()


def _stored_dtype(source: TensorSource, checkpoint: Checkpoint) -> torch.dtype:
    """The program's dtype; but 16-bit tensors that are computed in float32 stay in 16 bits, which is exact."""
    if source.source is None or source.plane != "whole" or source.changed:
        return source.dtype
    found = checkpoint.dtype(source.source)
    return found if source.dtype == torch.float32 and found.itemsize < 4 else source.dtype


def _by_checkpoint_tensor(program: Program) -> Iterator[list[TensorSource]]:
    """The tensors in order, those made from one checkpoint tensor together (its planes stand side by side)."""
    group: list[TensorSource] = []
    for source in program.tensors.values():
        if group and (source.source is None or source.source != group[0].source):
            yield group
            group = []
        group.append(source)
    if group:
        yield group
