"""What each pass did: the steps end in the stored program, and equal regions are stored once."""

import json
from collections import Counter
from unittest import mock

import pytest
import torch

from hif4c.compiler import inspection
from hif4c.compiler.pipeline import PASS_NAMES
from hif4c.compiler.program_views import OUTSIDE, InputView, NodeDetails, NodeView, region_of, view_regions
from hif4c.compiler.report_passes import CAPTURED, RELAXED, STORED, NotApplied, artifact_passes, expert_passes
from hif4c.runtime.artifact import Artifact, open_artifact
from hif4c.runtime.graph import Graph, InputType, Node, Ref, TensorType, refs
from hif4c.runtime.graph_text import count_targets

KEPT = "blocks.1.attn1.to_k"


@pytest.fixture(scope="module")
def artifact(mixed):
    return open_artifact(mixed)


@pytest.fixture(scope="module")
def passes(artifact, captures):
    with mock.patch.object(inspection, "capture", captures):
        return expert_passes(artifact, "transformer")


def step_of(passes, name):
    return next(index for index, step in enumerate(passes.passes) if step.name == name)


def structures(passes, name):
    step = passes.passes[step_of(passes, name)]
    return {region: passes.structures[number] for region, number in step.blocks.items()}


def nodes_of(passes, name):
    """(region, node) of a step."""
    return [(region, node) for region, found in structures(passes, name).items() for node in found.nodes]


def absolute(region, node):
    return ".".join(part for part in (region if region != OUTSIDE else "", node.module) if part)


@pytest.mark.parametrize(("step", "variant"), [(STORED, None), (RELAXED, "bf16")])
def test_the_last_steps_are_the_stored_programs(step, variant, artifact, passes):
    """Every node with its type and module, every edge inside a region, every tensor that is read."""
    graph = artifact.graph("transformer", variant)
    found = structures(passes, step)
    regions = [region_of(node.module) for node in graph.nodes]
    assert set(found) == {*regions} == {OUTSIDE, "blocks.0", "blocks.1"}
    assert passes.passes[step_of(passes, step)].nodes == len(graph.nodes)
    for region, structure in found.items():
        members = [index for index, other in enumerate(regions) if other == region]
        expected = [(graph.nodes[i].target, graph.nodes[i].module, graph.nodes[i].type) for i in members]
        kinds = [kind if isinstance(kind, tuple) else str(kind or "") for _, _, kind in expected]
        shown = [(node.target, absolute(region, node), node.type) for node in structure.nodes]
        assert [item[:2] for item in shown] == [item[:2] for item in expected]
        assert [item[2] for item in shown] == [
            kind if isinstance(kind, str) else f"({', '.join(map(str, kind))})" for kind in kinds
        ]
        place = {graph.first_node + index: position for position, index in enumerate(members)}
        edges = {
            (place[ref.index], place[graph.first_node + index])
            for index in members
            for ref in refs(graph.nodes[index].args)
            if ref.index in place
        }
        assert set(structure.edges) == edges
        assert len(structure.edges) == len(edges)
        tensors = {
            graph.tensors[ref.index - len(graph.inputs)].name
            for index in members
            for ref in refs(graph.nodes[index].args)
            if len(graph.inputs) <= ref.index < graph.first_node
        }
        prefix = "" if region == OUTSIDE else f"{region}."
        read = {item.split(":")[0] for node in structure.nodes for item in node.reads}
        assert read == {name.removeprefix(prefix) for name in tensors}


def test_the_steps_are_the_passes_and_the_stored_programs(passes, artifact):
    assert [step.name for step in passes.passes] == [CAPTURED, *PASS_NAMES, STORED, RELAXED]
    assert passes.passes[-2].blocks == passes.passes[-3].blocks  # traced again, it is what was compiled
    assert not passes.passes[-2].changed
    for before, step in zip(passes.passes, passes.passes[1:], strict=False):
        assert step.what.endswith(".")
        assert "\n" not in step.what
        if not step.changed:
            assert step.blocks == before.blocks, step.name
    same = [s.name for b, s in zip(passes.passes, passes.passes[1:], strict=False) if b.blocks == s.blocks]
    # Marks of regions are not part of a program; a norm that a side branch reads as well is not fused.
    assert same == ["mark_boundaries", "fuse_norm_quantize", STORED]


def test_what_a_pass_did_to_a_block(passes):
    went, came = passes.difference(step_of(passes, "lower_attention"), "blocks.0")
    assert Counter(node.label for node in went) == {"scaled_dot_product_attention": 2, "permute": 2}
    assert Counter(node.label for node in came) == {"attention": 2, "permute": 2}
    assert {node.name for node in went} & {node.name for node in came} == {n.name for n in came if n.label == "permute"}
    went, came = passes.difference(step_of(passes, "choose_precision"), "blocks.1")
    assert len(went) == len(came) == 10
    assert [node.marks for node in came if node.module == "attn1.to_k"] == ["high"]
    assert {"high", "w4a4, rank 2"} <= {node.marks for node in came}
    _, came = passes.difference(step_of(passes, "fold_channel_masks"), "blocks.0")
    assert [node.reads for node in came if node.module == "norm2"] == [
        (
            "norm2.weight: float32[128]; rows times attn2.to_q.mask",
            "norm2.bias: float32[128]; less attn2.to_q.shift; rows times attn2.to_q.mask",
        )
    ]
    first, nothing = passes.difference(0, "blocks.0")
    assert (first, len(nothing)) == ([], len(structures(passes, CAPTURED)["blocks.0"].nodes))


def test_a_value_keeps_its_name_from_pass_to_pass(passes):
    """A linear that no pass rewrites is the same value in the trace and in the artifact."""
    names = [
        next(
            node.name
            for region, node in nodes_of(passes, name)
            if absolute(region, node) == KEPT and node.label == "linear"
        )
        for name in (CAPTURED, "insert_qdq", STORED)
    ]
    assert len(set(names)) == 1
    for name in (CAPTURED, "insert_qdq", STORED):
        for structure in structures(passes, name).values():
            assert len({node.name for node in structure.nodes}) == len(structure.nodes)


def test_precisions_follow_the_plan_and_then_the_operators(passes, artifact):
    products = {"linear", "linear_w4"}

    def count(name):
        found = nodes_of(passes, name)
        return Counter(node.precision for _, node in found if node.label in products and node.marks)

    planned = Counter(linear["precision"] for linear in artifact.expert("transformer").linears)
    assert planned["w4a4"] > 10
    assert planned["w4a16"] == 19 - planned["w4a4"] > 0
    assert planned["high"] == 7
    assert not any(node.marks for _, node in nodes_of(passes, "mark_boundaries"))
    assert {node.precision for _, node in nodes_of(passes, CAPTURED)} == {"high", "none"}
    for name in ("choose_precision", "insert_qdq", "pack_weights", STORED):
        assert count(name) == planned, name
    assert count(RELAXED) == {"w4a16": 19, "high": 7}
    for region, node in nodes_of(passes, "choose_precision"):
        if absolute(region, node) == KEPT:
            assert node.precision == "high"
    stored = {node.label: node.precision for _, node in nodes_of(passes, STORED) if node.label != "linear"}
    assert stored["quantize"] == "w4a4"
    assert stored["conv3d"] == stored["attention"] == "high"
    assert stored["norm"] == stored["getitem"] == "none"
    # Down projections of side branches are computed in 16 bits.
    branches = [node for _, node in nodes_of(passes, "add_side_branches") if "weight.down" in node.args]
    assert len(branches) == 19
    assert {(node.precision, node.marks) for node in branches} == {("high", "")}


def test_what_did_not_apply_and_why(passes, artifact):
    found = passes.not_applied
    assert NotApplied("4 bits: proj_out", "boundary: output projection", "choose_precision") in found
    assert NotApplied(f"4 bits: {KEPT}", f"recipe mixed keeps {KEPT}", "choose_precision") in found
    for what, precision in (("4 bits: ", "high"), ("4-bit activations: ", "w4a16")):
        named = {
            path: item.why
            for item in found
            if item.pass_name == "choose_precision" and item.what.startswith(what)
            for path in item.what.removeprefix(what).split(", ")
        }
        linears = artifact.expert("transformer").linears
        assert named == {item["path"]: item["reason"] for item in linears if item["precision"] == precision}
    whys = {item.why for item in found if item.what.startswith("not fused: ")}
    assert "what reads it does not quantize" in whys
    assert [item.what for item in found if item.pass_name == "fuse_activation"] == [
        "not fused: condition_embedder.text_embedder.act_1"
    ]
    # Every note that says "not" is there, and so is the pass that found nothing to do.
    notes = [note for step in passes.passes for note in step.notes if " not " in f" {note}"]
    told = [item for item in found if item.pass_name not in ("choose_precision", RELAXED)]
    whole = NotApplied("the whole pass", "fused 0 norms with the quantizer of their result", "fuse_norm_quantize")
    assert whole in told
    assert len(told) - 1 == len(notes) > 4
    (steps,) = (item for item in found if item.pass_name == RELAXED)
    low, high = artifact.expert("transformer").bf16_timesteps[0]
    assert steps.what == f"4-bit activations: timesteps {low:g} to {high:g}"
    assert steps.why == "the recipe keeps bf16 activations in up to 40% of the steps"


def test_weight_only_lacks_what_needs_a_calibration(artifacts, captures):
    opened = open_artifact(artifacts("t2v", "weight-only"))
    with mock.patch.object(inspection, "capture", captures):
        passes = expert_passes(opened, "transformer_2")
    whole = {item.pass_name: item.why for item in passes.not_applied if item.what == "the whole pass"}
    assert whole["add_side_branches"] == "the recipe has no side branches"
    assert whole["apply_channel_masks"] == "the recipe has no channel masks"
    assert passes.passes[-1].name == STORED
    shown = Counter(node.target for _, node in nodes_of(passes, STORED))
    assert shown == count_targets(opened.graph("transformer_2"))
    assert {node.precision for _, node in nodes_of(passes, STORED) if node.label == "linear_w4"} == {"w4a16"}
    # The weight is what is quantized, never its input.
    assert {node.precision for _, node in nodes_of(passes, "insert_qdq") if node.label == "quantize"} == {"w4a16"}


def test_experts_of_one_config_share_a_trace(artifacts, captures):
    opened = open_artifact(artifacts("t2v", "rtn"))
    with mock.patch.object(inspection, "capture", side_effect=captures) as traced:
        found = artifact_passes(opened)
    assert traced.call_count == 1
    first, second = (found[expert].to_json() for expert in ("transformer", "transformer_2"))
    # Rounded to nearest, both experts have one program; neither has changed what the other started from.
    assert first == {**second, "expert": "transformer"}
    quantizers = {node.precision for _, node in nodes_of(found["transformer"], STORED) if "quantize" in node.label}
    assert quantizers == {"w4a4"}
    assert any(node.label == "norm_quantize" for _, node in nodes_of(found["transformer_2"], STORED))


def test_plain_data_holds_every_node_once(passes):
    data = json.loads(json.dumps(passes.to_json()))
    assert data["node_fields"] == [*NodeView.__dataclass_fields__]
    rows = [tuple(map(json.dumps, row)) for row in data["nodes"]]
    assert len(set(rows)) == len(rows)
    for number, structure in enumerate(passes.structures):
        stored = data["structures"][number]
        views = [NodeView(*(tuple(v) if isinstance(v, list) else v for v in data["nodes"][i])) for i in stored["nodes"]]
        assert tuple(views) == structure.nodes
        assert tuple(map(tuple, stored["edges"])) == structure.edges
        assert tuple(InputView(*item) for item in stored["inputs"]) == structure.inputs
    index = step_of(passes, "lower_linears")
    before, after = (
        set(data["structures"][step["blocks"]["blocks.1"]]["nodes"]) for step in data["passes"][index - 1 : index + 1]
    )
    went, came = passes.difference(index, "blocks.1")
    assert (len(before - after), len(after - before)) == (len(went), len(came))


def test_a_stored_program_that_is_not_the_traced_one_is_shown_as_it_is(artifacts, captures):
    opened = open_artifact(artifacts("t2v", "rtn"))
    graph = opened.graph("transformer")
    last = graph.nodes[-1]
    other = Node(last.target, last.args, last.kwargs, last.module, TensorType("float32", (7,)))
    changed = Graph(graph.inputs, graph.tensors, [*graph.nodes[:-1], other], graph.outputs)
    with (
        mock.patch.object(inspection, "capture", captures),
        mock.patch.object(Artifact, "graph", return_value=changed),
    ):
        passes = expert_passes(opened, "transformer")
    step = passes.passes[-1]
    assert step.name == STORED
    assert step.changed
    assert step.notes[0].startswith("not what this version")
    assert passes.structures[step.blocks[OUTSIDE]].nodes[-1].type == "float32[7]"
    assert {node.precision for _, node in nodes_of(passes, STORED) if node.target == "hif4.linear"} == {"w4a4"}


def chain(blocks):
    """A made-up program: an embedding, `blocks` equal blocks in a chain that all read it, and a head."""
    kind = TensorType("bfloat16", ("b", 64))
    tensors = [InputType(f"blocks.{i}.fc.weight", TensorType("bfloat16", (64, 64))) for i in range(blocks)]
    tensors.append(InputType("table", kind))
    first = 1 + len(tensors)
    nodes = [Node("aten.add.Tensor", (Ref(0), Ref(blocks + 1)), {}, "embed", kind)]
    for i in range(blocks):
        before = Ref(first + 2 * i)
        nodes.append(Node("aten.linear.default", (before, Ref(1 + i)), {}, f"blocks.{i}.fc", kind))
        arguments = ([Ref(first + 1 + 2 * i), Ref(first)], torch.float32)
        nodes.append(Node("aten.cat.default", arguments, {"dim": 0}, f"blocks.{i}", kind))
    nodes.append(Node("aten.gelu.default", (Ref(first + len(nodes) - 1),), {}, "head", kind))
    return Graph([InputType("x", kind)], tensors, nodes, [Ref(first + len(nodes) - 1)])


def details(graph):
    counts = Counter()
    found = []
    for node in graph.nodes:
        region = region_of(node.module)
        found.append(NodeDetails(counts[region], "none", f"mask {region}.fc.mask"))
        counts[region] += 1
    return found


def test_equal_blocks_are_equal_structures():
    graph = chain(40)
    made = {f"blocks.{i}.fc.weight": (f"rows times blocks.{i}.fc.mask",) for i in range(40)}
    regions = view_regions(graph, details(graph), made)
    assert list(regions) == [OUTSIDE, *(f"blocks.{i}" for i in range(40))]
    # The first block reads the embedding, the others the block before.
    assert len(set(regions.values())) == 3
    assert regions["blocks.0"] != regions["blocks.1"] == regions["blocks.39"]
    block = regions["blocks.12"]
    assert [node.line for node in block.nodes] == [
        "%0 = aten.linear.default(previous%1, fc.weight) : bfloat16[b, 64]  # mask fc.mask",
        "%1 = aten.cat.default([%0, outside%0], float32, dim=0) : bfloat16[b, 64]  # mask fc.mask",
    ]
    assert [node.module for node in block.nodes] == ["fc", ""]
    assert block.nodes[0].reads == ("fc.weight: bfloat16[64, 64]; rows times fc.mask",)
    assert block.nodes[1].inputs == ("outside%0",)
    assert block.edges == ((0, 1),)
    assert block.inputs == (
        InputView("previous%1", "bfloat16[b, 64]", "cat"),
        InputView("outside%0", "bfloat16[b, 64]", "embed add"),
    )
    assert regions[OUTSIDE].inputs == (
        InputView("x", "bfloat16[b, 64]", ""),
        InputView("blocks.39%1", "bfloat16[b, 64]", "blocks.39 cat"),
    )
    assert regions[OUTSIDE].edges == ()


def test_a_value_of_a_block_that_is_not_the_one_before():
    graph = chain(3)
    skip = graph.nodes[5]
    graph.nodes[5] = Node(skip.target, (Ref(graph.first_node + 2), skip.args[1]), {}, skip.module, skip.type)
    block = view_regions(graph, details(graph), {})["blocks.2"]
    assert block.inputs[0] == InputView("blocks.0%1", "bfloat16[b, 64]", "blocks.0 cat")
