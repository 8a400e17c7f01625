import operator
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hif4c.compiler import pipeline
from hif4c.compiler.recipe import Recipe
from hif4c.passes.add_side_branches import add_side_branches
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Decision, Precision, TensorSource
from hif4c.passes.verify import Stage, verify
from tests.passes.builder import Builder, decide

aten, hif4 = torch.ops.aten, torch.ops.hif4
PATH = "blocks.0.to_q"


def program_at(stage, precision=Precision.W4A4):
    """One 4-bit linear in a block and a high-precision one at the boundary, as far as `stage`."""
    build = Builder(x=(2, 64))
    hidden = build.linear(build.inputs[0], PATH, 64)
    program = build.finish(build.linear(hidden, "proj_out", 8))
    mark_boundaries(program)
    if stage >= Stage.PLANNED:
        decide(program, precision, proj_out=Precision.HIGH)
    if stage >= Stage.QDQ:
        insert_qdq(program)
    if stage >= Stage.PACKED:
        pack_weights(program)
    if stage >= Stage.LOWERED:
        lower_linears(program)
    return program


def find(program, target):
    return next(node for node in program.graph.nodes if node.target is target)


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.W4A16])
@pytest.mark.parametrize("stage", list(Stage))
def test_legal_programs_pass(stage, precision):
    program = program_at(stage, precision)
    for earlier in Stage:
        # What holds at a stage holds until the stage that undoes it: only Q/DQ itself is a state that passes away.
        if earlier == stage or (earlier < stage < Stage.QDQ):
            verify(program, earlier)


def breaks(program, stage, *words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        verify(program, stage)
    for word in words[1:]:
        assert word in str(caught.value)


def test_form_every_placeholder_has_a_spec():
    program = program_at(Stage.CAPTURED)
    del program.tensors["t_blocks_0_to_q_bias"]
    breaks(program, Stage.CAPTURED, "t_blocks_0_to_q_bias", "placeholders and tensors disagree")


def test_form_every_spec_has_a_placeholder():
    program = program_at(Stage.CAPTURED)
    program.tensors["ghost"] = TensorSource("ghost", torch.float32, (1,), source="ghost")
    breaks(program, Stage.CAPTURED, "ghost")


def test_form_inputs_are_last():
    program = program_at(Stage.CAPTURED)
    x = program.placeholder("x")
    next(iter(program.graph.nodes)).prepend(x)
    breaks(program, Stage.CAPTURED, "the user inputs are not the last placeholders")


def test_form_names_are_unique():
    program = program_at(Stage.CAPTURED)
    program.tensors["t_proj_out_bias"] = replace(program.tensors["t_proj_out_bias"], name=f"{PATH}.bias")
    breaks(program, Stage.CAPTURED, f"two tensors are called {PATH}.bias")


def test_form_only_calls():
    program = program_at(Stage.CAPTURED)
    with program.graph.inserting_before(program.graph.output_node()):
        node = program.graph.call_method("relu", (program.placeholder("x"),))
    breaks(program, Stage.CAPTURED, node.name, "is a call_method")


def test_form_every_node_has_a_value():
    program = program_at(Stage.CAPTURED)
    node = find(program, aten.linear.default)
    del node.meta["val"]
    breaks(program, Stage.CAPTURED, f"{node.name} has no value")


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"shape": (65,)}])
def test_form_specs_describe_the_values(change):
    program = program_at(Stage.CAPTURED)
    program.tensors["t_proj_out_bias"] = replace(program.tensors["t_proj_out_bias"], **change)
    breaks(program, Stage.CAPTURED, "t_proj_out_bias", "the spec says")


def test_functional_no_writes_no_uninitialised_memory_no_asserts():
    for target, arguments, words in (
        (aten.add_.Tensor, 2, "writes into its argument"),
        (aten.empty_like.default, 1, "is uninitialised memory"),
        (aten._assert_tensor_metadata.default, 1, "is a trace assert"),
    ):
        program = program_at(Stage.FUNCTIONAL)
        x = program.placeholder("x")
        with program.graph.inserting_before(program.graph.output_node()):
            node = program.call(target, (x,) * arguments, like=x)
        verify(program, Stage.CAPTURED)  # still legal in a trace
        breaks(program, Stage.FUNCTIONAL, node.name, words)


@pytest.mark.parametrize("stage", [Stage.CAPTURED, Stage.FUNCTIONAL, Stage.PLANNED])
def test_no_hif4_operator_before_qdq(stage):
    program = program_at(stage)
    x = program.placeholder("x")
    with program.graph.inserting_before(program.graph.output_node()):
        node = program.call(hif4.quantize.default, (x, None, 0), like=x)
    breaks(program, stage, node.name, "is a hif4 operator before Q/DQ insertion")


def test_planned_every_linear_has_a_decision():
    program = program_at(Stage.PLANNED)
    del program.decisions["proj_out"]
    breaks(program, Stage.PLANNED, "linear_default_1 (proj_out) has no decision")


@pytest.mark.parametrize(
    ("found", "decided"),
    [(Precision.W4A4, Precision.W4A16), (Precision.W4A16, Precision.W4A4), (Precision.W4A4, Precision.HIGH)],
)
def test_qdq_is_what_was_decided(found, decided):
    program = program_at(Stage.QDQ, found)
    program.decisions[PATH] = Decision(PATH, decided, "changed behind its back")
    breaks(program, Stage.QDQ, f"{PATH} is {decided}, but quantized (input, weight) is")


def test_packed_no_stored_tensor_is_quantized_at_run_time():
    program = program_at(Stage.QDQ)
    weight = "t_blocks_0_to_q_weight"
    breaks(program, Stage.PACKED, f"quantizes the stored tensor {weight}")


def test_packed_not_stored_twice():
    program = program_at(Stage.PACKED)
    whole = TensorSource(f"{PATH}.weight", torch.bfloat16, (64, 64), source=f"{PATH}.weight")
    program.add_tensor(whole, program.placeholder("x"))
    breaks(program, Stage.PACKED, f"{PATH}.weight is stored both packed and whole")


def test_packed_as_decided():
    program = program_at(Stage.PACKED)
    program.decisions["proj_out"] = Decision("proj_out", Precision.W4A4, "changed behind its back")
    breaks(program, Stage.PACKED, "packed tensors and decisions disagree about ['proj_out.weight']")


def test_packed_planes_fit_each_other():
    program = program_at(Stage.PACKED)
    name = "t_blocks_0_to_q_weight_scales"
    program.tensors[name] = replace(program.tensors[name], shape=(64, 2, 4))
    with program.fake_mode:
        program.placeholder(name).meta["val"] = torch.empty((64, 2, 4), dtype=torch.uint8)
    breaks(program, Stage.PACKED, f"{PATH}.weight: planes", "are not the two planes of one packed tensor")


def test_packed_needs_both_planes():
    program = program_at(Stage.PACKED)
    name = "t_blocks_0_to_q_weight_scales"
    program.tensors[name] = replace(program.tensors[name], source="other.weight")
    breaks(program, Stage.PACKED, "other.weight")


def test_lowered_nothing_unfused():
    program = program_at(Stage.PACKED)
    breaks(program, Stage.LOWERED, "dequantize_default (hif4.dequantize.default) is left unfused")


def test_lowered_counts_are_the_plan():
    program = program_at(Stage.LOWERED)
    fused = find(program, hif4.linear.default)
    with program.graph.inserting_before(fused):
        again = program.call(hif4.linear.default, fused.args, like=fused)
    proj_out = find(program, aten.linear.default)
    proj_out.replace_input_with(fused, again)
    with program.graph.inserting_before(program.graph.output_node()):
        program.call(aten.add.Tensor, (fused, 1), like=fused)
    breaks(program, Stage.LOWERED, "the plan has {'w4a4': 1, 'w4a16': 0, 'high': 1}, the graph {'w4a4': 2")


def test_lowered_no_fused_linear_in_a_boundary():
    program = program_at(Stage.LOWERED)
    fused = find(program, hif4.linear.default)
    fused.meta["nn_module_stack"] = {"root": ("", "Wan"), "proj_out": ("proj_out", "Linear")}
    breaks(program, Stage.LOWERED, fused.name, "is 4-bit in a boundary region")


def branched(stage, rank=2):
    """As `program_at`, with a low-rank branch and outlier columns in the 4-bit linear."""
    program = program_at(Stage.PLANNED)
    mask = torch.ones(64)
    mask[5] = 0
    program.masks["m"] = mask
    program.decisions[PATH] = replace(program.decisions[PATH], rank=rank, mask="m")
    insert_qdq(program)
    add_side_branches(program)
    verify(program, Stage.QDQ)
    if stage >= Stage.PACKED:
        pack_weights(program)
    if stage >= Stage.LOWERED:
        lower_linears(program)
    verify(program, stage)
    return program


def test_planned_only_quantized_linears_have_masks_and_branches():
    for change in ({"mask": "m"}, {"rank": 2}):
        program = program_at(Stage.PLANNED)
        program.masks["m"] = torch.ones(64)
        program.decisions["proj_out"] = replace(program.decisions["proj_out"], **change)
        breaks(program, Stage.PLANNED, "proj_out is not quantized, but has a mask or a low-rank branch")


def test_planned_what_is_folded_is_folded_somewhere():
    program = program_at(Stage.PLANNED)
    program.masks["m"] = torch.ones(64)
    program.decisions[PATH] = replace(program.decisions[PATH], mask="m", mask_folded=True)
    breaks(program, Stage.PLANNED, "masks of rows and folded masks differ: ['m']")
    bias = "t_blocks_0_to_q_bias"
    program.tensors[bias] = replace(program.tensors[bias], row_mask="m")
    verify(program, Stage.PLANNED)
    program.masks["m"][3] = 0
    breaks(program, Stage.PLANNED, f"{PATH}: a mask with zeros is folded")
    program.masks["m"] = torch.ones(128)
    breaks(program, Stage.PLANNED, f"{PATH}.bias has 64 rows, which the mask m does not fit")


def test_planned_what_is_taken_off_an_input_is_given_back():
    program = program_at(Stage.PLANNED)
    key = "t_blocks_0_to_q_bias"
    before, decision = program.tensors[key], program.decisions["proj_out"]
    program.tensors[key] = replace(before, row_shifts=((0, "s"),))
    breaks(program, Stage.PLANNED, "inputs are shifted by ['s'], linears by {}, their biases by {}")
    program.decisions["proj_out"] = replace(decision, shift="s")
    breaks(program, Stage.PLANNED, "linears by {'proj_out.bias': 's'}, their biases by {}")
    program.tensors["t_proj_out_bias"] = replace(program.tensors["t_proj_out_bias"], input_shift="s")
    verify(program, Stage.PLANNED)
    program.tensors[key] = before
    breaks(program, Stage.PLANNED, "inputs are shifted by [], linears by {'proj_out.bias': 's'}")


def test_packed_branches_are_those_of_the_decisions():
    program = branched(Stage.PACKED)
    program.decisions[PATH] = replace(program.decisions[PATH], rank=3)
    breaks(program, Stage.PACKED, f"{PATH} has rank 3 and a weight of 64 rows, but down is (2, 64)")
    program = branched(Stage.PACKED)
    program.decisions[PATH] = replace(program.decisions[PATH], rank=0)
    breaks(program, Stage.PACKED, f"{PATH} has rank 0")
    program = branched(Stage.PACKED)
    program.masks["m"][6] = 0
    breaks(program, Stage.PACKED, f"{PATH} needs a side branch of 4 columns for 64 rows, but up is (3, 64)")
    program = program_at(Stage.PACKED)
    program.masks["m"] = torch.zeros(64)
    program.decisions[PATH] = replace(program.decisions[PATH], mask="m")
    breaks(program, Stage.PACKED, f"{PATH} needs a side branch of 64 columns for 64 rows, but up is None")


def test_lowered_the_branch_is_read():
    program = branched(Stage.LOWERED)
    fused = find(program, hif4.linear.default)
    fused.args = (*fused.args[:7], None, None)
    source = f"'{PATH}.weight'"
    breaks(program, Stage.LOWERED, f"{fused.name} reads [({source}, 'codes'), ({source}, 'scales')], not", "'up')]")


def test_lowered_planes_are_of_one_weight():
    program = program_at(Stage.LOWERED)
    fused = find(program, hif4.linear.default)
    fused.args = (*fused.args[:2], fused.args[3], fused.args[2], *fused.args[4:])
    source = f"'{PATH}.weight'"
    breaks(program, Stage.LOWERED, f"{fused.name} reads [({source}, 'scales'), ({source}, 'codes')], not")


@pytest.mark.parametrize("stage", [Stage.LOWERED, Stage.FUSED])
def test_lowered_an_input_is_masked_and_rotated_as_its_weight(stage):
    program = branched(Stage.LOWERED)
    verify(program, stage)
    quantizer = find(program, hif4.quantize.default)
    x, mask, _ = quantizer.args
    quantizer.args = (x, mask, 64)
    breaks(program, stage, f"{PATH}: its input has (mask, rotation) ('m', 64), its weight ('m', 0)")
    quantizer.args = (x, None, 0)
    breaks(program, stage, f"{PATH}: its input has (mask, rotation) (None, 0), its weight ('m', 0)")


def test_lowered_both_planes_are_of_one_quantizer():
    program = program_at(Stage.LOWERED)
    fused = find(program, hif4.linear.default)
    fused.args = (fused.args[1], fused.args[0], *fused.args[2:])
    breaks(program, Stage.LOWERED, f"{fused.name} does not read the two planes of one quantizer")


def test_only_fused_programs_have_operators_of_rows():
    program = program_at(Stage.LOWERED)
    linear = find(program, aten.linear.default)
    x = linear.args[0]
    with program.graph.inserting_before(linear):
        values = (x, None, None, None, None, 1e-6, torch.bfloat16)
        linear.replace_input_with(x, program.call(hif4.norm.default, values, like=linear))
    verify(program, Stage.FUSED)
    breaks(program, Stage.LOWERED, "norm_default (hif4.norm.default) is fused before the program is lowered")


def plan_of(program):
    """The choices of a recipe without calibration, as far as the passes look at them."""
    chosen = {PATH: Precision.W4A4, "proj_out": Precision.HIGH}
    paths = [program.linear_path(node) for node in program.linears()]
    plan = SimpleNamespace(decisions=[Decision(path, chosen[path], "test") for path in paths])
    return SimpleNamespace(plan=plan, masks={}, mask_of={}, shifts={}, shift_of={})


def test_the_pipeline_runs_all_passes_in_order_or_stops():
    program = program_at(Stage.CAPTURED)
    seen = []
    records = pipeline.run_passes(
        program, plan_of(program), Recipe("rtn"), on_pass=lambda record, _: seen.append(record.name)
    )
    assert tuple(seen) == pipeline.PASS_NAMES == tuple(record.name for record in records)
    changed = {record.name for record in records if record.changed}
    assert changed == {"mark_boundaries", "choose_precision", "insert_qdq", "pack_weights", "lower_linears"}
    assert all(record.notes for record in records)
    program = program_at(Stage.CAPTURED)
    records = pipeline.run_passes(program, plan_of(program), Recipe("rtn"), stop_after="insert_qdq")
    assert records[-1].name == "insert_qdq"
    verify(program, Stage.QDQ)
    with pytest.raises(ValueError, match="no pass is called quantise"):
        pipeline.run_passes(program, plan_of(program), Recipe("rtn"), stop_after="quantise")


def test_an_error_names_the_pass_and_those_before(monkeypatch):
    def forget_the_bias(program, plan, recipe):
        linear = next(program.linears())
        linear.args = linear.args[:2]
        program.graph.erase_node(program.placeholder("t_blocks_0_to_q_bias"))  # but not its spec

    position = pipeline.PASS_NAMES.index("rotate_inputs")
    broken = ("rotate_inputs", forget_the_bias, Stage.PLANNED)
    passes = (*pipeline.PIPELINE[:position], broken, *pipeline.PIPELINE[position + 1 :])
    monkeypatch.setattr(pipeline, "PIPELINE", passes)
    program = program_at(Stage.CAPTURED)
    with pytest.raises(ValueError, match=r"^pass rotate_inputs failed: .*t_blocks_0_to_q_bias.*") as caught:
        pipeline.run_passes(program, plan_of(program), Recipe("rtn"))
    before = ", ".join(pipeline.PASS_NAMES[:position])
    assert str(caught.value).endswith(f"(passes before it: {before})")


def test_an_exception_inside_a_pass_is_named_too():
    program = program_at(Stage.CAPTURED)
    with pytest.raises(ValueError, match=r"^pass rotate_inputs failed: rotation width 3 is not a power of two"):
        pipeline.run_passes(program, plan_of(program), Recipe("rtn", hadamard=3))


def test_builder_programs_use_only_what_graphs_may_hold():
    """The hand-made programs are of the captured kind: a getitem reads a tuple, and every call is an operator."""
    for stage in Stage:
        for node in program_at(stage).graph.nodes:
            if node.op == "call_function":
                assert node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
