"""Replace every weight quantize by the stored planes of the packed weight."""

from __future__ import annotations

import operator

import torch

from hif4c.passes.program import PassResult, Program, TensorSource
from hif4c.runtime.format import packed_shapes

__all__ = ["pack_weights"]


def pack_weights(program: Program) -> PassResult:
    """Turn quantize(W, 1/m, R) into two tensors `W.codes` and `W.scales` that the artifact stores; W itself is dropped.

    The bytes are made when the artifact is written, one tensor of the checkpoint at a time.
    """
    packed = 0
    for quantize in list(program.graph.nodes):
        if quantize.target is not torch.ops.hif4.quantize.default or quantize.args[0].op != "placeholder":
            continue
        source, inverse, hadamard = quantize.args
        spec = program.tensors.get(source.name)
        if spec is None:
            continue  # a user input: quantized when the program runs
        mask = program.tensors[inverse.name].name.removesuffix(".inverse") if inverse is not None else None
        codes_shape, scales_shape = packed_shapes(spec.shape)
        for index, (plane, shape) in enumerate((("codes", codes_shape), ("scales", scales_shape))):
            stored = TensorSource(
                f"{spec.name}.{plane}",
                torch.uint8,
                tuple(shape),
                source=spec.source,
                plane=plane,
                mask=mask,
                hadamard=hadamard,
                packed_from=spec.dtype,
            )
            placeholder = program.add_tensor(stored, source)
            for user in list(quantize.users):
                if user.target is operator.getitem and user.args[1] == index:
                    user.replace_all_uses_with(placeholder)
        packed += 1
    program.clean()
    return PassResult(packed > 0, [f"packed {packed} weights"])
