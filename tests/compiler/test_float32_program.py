import pytest
import torch
from safetensors.torch import load_file

from hif4c.compiler.float32_program import float32_executor, float32_program
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import Graph, InputType, Node, Ref, TensorType

NARROW = (torch.bfloat16, torch.float16)


def test_types_and_dtype_arguments_become_float32_and_nothing_else_changes():
    half, planes = TensorType("bfloat16", ("b", 64)), TensorType("uint8", ("b", 32))
    graph = Graph(
        [InputType("x", half)],
        [InputType("mask", TensorType("float16", (64,))), InputType("steps", TensorType("int64", (3,)))],
        [
            Node("hif4.norm_quantize", (Ref(0), None, None, None, None, 1e-6, torch.bfloat16, Ref(1), 64), {}, "a",
                 (planes, TensorType("uint8", ("b", 1, 4)))),
            Node("aten.to.dtype", (Ref(0), torch.float64), {}, "b", TensorType("float64", ("b", 64))),
            Node("aten.cat.default", ([Ref(0), Ref(0)], -1), {"dtype": torch.float16}, "c", half),
        ],
        [Ref(5)],
    )  # fmt: skip
    wide = float32_program(graph)
    assert wide.inputs == [InputType("x", TensorType("float32", ("b", 64)))]
    assert [item.type.dtype for item in wide.tensors] == ["float32", "int64"]
    norm, to, cat = wide.nodes
    assert norm.args == (Ref(0), None, None, None, None, 1e-6, torch.float32, Ref(1), 64)
    assert norm.type == graph.nodes[0].type
    assert to == graph.nodes[1]
    assert cat.args == ([Ref(0), Ref(0)], -1)
    assert cat.kwargs == {"dtype": torch.float32}
    assert cat.type == TensorType("float32", ("b", 64))
    assert wide.outputs == graph.outputs
    assert graph.inputs[0].type is half
    assert graph.nodes[2].kwargs == {"dtype": torch.float16}


@pytest.fixture(scope="module")
def with_branches(models, quick_compile, tmp_path_factory):
    """W4A4 with a side branch of bf16 at every 4-bit linear."""
    folder = tmp_path_factory.mktemp("branches")
    recipe = folder / "branches.toml"
    recipe.write_text('description = "Side branches."\nhadamard = 32\nrank = 8\n')
    return quick_compile(models["t2v"].directory, folder / "out", str(recipe))


@pytest.mark.parametrize("kind", ["t2v, branches", "ti2v, rtn"])
def test_widened_as_it_is_read_it_computes_what_it_does_with_every_tensor_widened(
    kind, artifacts, with_branches, inputs
):
    variant = kind.partition(",")[0]
    artifact = open_artifact(with_branches if variant == "t2v" else artifacts(variant))
    graph = artifact.graph("transformer")
    wide = float32_program(graph)
    sample = [item.float() for item in inputs(variant)]
    held = Executor(wide, artifact.tensors("transformer", wide.tensors), torch.device("cpu"))
    every_value = held.trace(*sample)
    assert not any(isinstance(value, torch.Tensor) and value.dtype in NARROW for value in every_value)
    (expected,) = held(*sample)

    weights = artifact.tensors("transformer", graph.tensors)
    executor = float32_executor(graph, weights)
    for _ in range(2):  # the second time with what was dropped
        assert torch.equal(executor(*sample)[0], expected)


def test_widened_tensors_are_dropped_and_stored_ones_released_after_their_last_use(with_branches, inputs):
    artifact = open_artifact(with_branches)
    graph = artifact.graph("transformer")
    weights = artifact.tensors("transformer", graph.tensors)
    released = []
    weights.release = lambda names=None: released.extend(names)
    executor = float32_executor(graph, weights)
    residency, alive = executor.residency, []
    bound = [index for index, item in enumerate(graph.tensors, len(graph.inputs)) if item.type.dtype == "bfloat16"]
    before = residency.before

    def watch(number, values):
        before(number, values)
        alive.append(sum(values[index] is not None for index in bound))

    residency.before = watch
    executor(*(item.float() for item in inputs()))
    assert sorted(released) == sorted(item.name for item in graph.tensors)
    assert len(bound) > 20
    assert 0 < max(alive) < len(bound) / 4


def test_it_is_the_stored_program_but_for_roundings(artifacts):
    """A weight-only program has no quantizers, so nothing magnifies the roundings to bf16 (2^-9 each)."""
    artifact = open_artifact(artifacts("t2v", "weight-only"))
    golden = load_file(artifact.path("golden/transformer.safetensors"))
    graph = artifact.graph("transformer")
    sample = [golden[name].float() for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    (found,) = float32_executor(graph, artifact.tensors("transformer", graph.tensors))(*sample)
    assert found.dtype == torch.float32
    distance = float((found - golden["sample"]).norm() / golden["sample"].norm())
    assert 1e-5 < distance < 2e-2
