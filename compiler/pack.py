"""Write an expert's tensors: read one from the checkpoint, make its stored form, append it, let it go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.passes.program import Program, TensorSource
from hif4c.runtime.format import quantize
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec

__all__ = ["stored_tensors", "write_weights"]

Progress = Callable[[int], None]


def stored_tensors(program: Program, checkpoint: Checkpoint) -> list[TensorSpec]:
    """Name, dtype and shape of every tensor of the weight file, in the program's order."""
    return [
        TensorSpec(source.name, _stored_dtype(source, checkpoint), source.shape) for source in program.tensors.values()
    ]


def write_weights(
    program: Program, checkpoint: Checkpoint, directory: Path, progress: Progress | None = None
) -> tuple[dict[str, tuple[int, str]], str]:
    """Write `weights*.safetensors`, one checkpoint tensor at a time.

    Args:
        program: a packed or lowered program.
        checkpoint: where its sources are; every tensor is checked for NaN and infinity as it is read.
        directory: existing; the files must not be there.
        progress: called with the bytes read from the checkpoint after every tensor.

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
            for source, stored in zip(sources, _stored_forms(sources, tensor, program), strict=True):
                writer.write(source.name, stored.to(dtypes[source.name]))
            size = tensor.nbytes
            del tensor
            checkpoint.release(name)
            if progress is not None:
                progress(size)
    return dict(writer.files), fingerprint.hexdigest()


def _stored_dtype(source: TensorSource, checkpoint: Checkpoint) -> torch.dtype:
    """The program's dtype; but 16-bit tensors that are computed in float32 stay in 16 bits, which is exact."""
    if source.source is None or source.plane != "whole":
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


def _stored_forms(sources: list[TensorSource], tensor: torch.Tensor, program: Program) -> list[torch.Tensor]:
    first = sources[0]
    if first.plane == "whole":
        return [tensor for _ in sources]
    inverse = None if first.mask is None else 1.0 / program.masks[first.mask].to(torch.float32)
    # In the dtype that the unquantized model computes in: the same numbers that the Q/DQ program quantizes.
    codes, scales = quantize(tensor.to(first.packed_from), inverse, first.hadamard)
    planes = {"codes": codes, "scales": scales}
    return [planes[source.plane] for source in sources]
