import torch

from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Precision
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.passes.verify import Stage, verify
from tests.passes.builder import Builder, decide, draw, targets

PATH = "blocks.0.to_q"


def one_linear(precision=Precision.W4A4, in_features=128):
    build = Builder(x=(2, in_features))
    program = build.finish(build.linear(build.inputs[0], PATH, 8))
    decide(program, precision)
    return program


def test_the_weight_becomes_two_planes(golden_text):
    program = one_linear()
    insert_qdq(program)
    before = draw(program)
    result = pack_weights(program)
    assert (result.changed, result.notes) == (True, ["packed 1 weights"])
    planes = {spec.plane: spec for spec in program.tensors.values()}
    assert planes["codes"].shape == (8, 64)
    assert planes["scales"].shape == (8, 2, 4)
    for plane in ("codes", "scales"):
        spec = planes[plane]
        assert (spec.name, spec.source) == (f"{PATH}.weight.{plane}", f"{PATH}.weight")
        assert (spec.dtype, spec.packed_from) == (torch.uint8, torch.bfloat16)
    assert f"{PATH}.weight" not in {spec.name for spec in program.tensors.values()}
    verify(program, Stage.PACKED)
    golden_text("pack_weights", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


def test_the_input_is_still_quantized_when_the_program_runs():
    program = one_linear()
    insert_qdq(program)
    pack_weights(program)
    assert targets(program).count("hif4.quantize.default") == 1
    (quantize,) = (node for node in program.graph.nodes if node.target is torch.ops.hif4.quantize.default)
    assert quantize.args[0].name == "x"


def test_mask_and_rotation_are_remembered_and_the_inverse_is_dropped():
    program = one_linear()
    program.masks = {"m": torch.full((128,), 2.0)}
    apply_channel_masks(program, {PATH: "m"})
    rotate_inputs(program, 64)
    insert_qdq(program)
    pack_weights(program)
    specs = {spec.name: spec for spec in program.tensors.values()}
    for plane in ("codes", "scales"):
        assert (specs[f"{PATH}.weight.{plane}"].mask, specs[f"{PATH}.weight.{plane}"].hadamard) == ("m", 64)
    assert "m" in specs  # the activation's
    assert "m.inverse" not in specs
    verify(program, Stage.PACKED)


def test_nothing_to_pack():
    program = one_linear(Precision.HIGH)
    insert_qdq(program)
    result = pack_weights(program)
    assert (result.changed, result.notes) == (False, ["packed 0 weights"])
