"""A program run over many samples gives what it gives sample by sample, with one layer's weights in memory."""

import weakref

import pytest
import torch

from hif4c.compiler.calibrate import plan_program
from hif4c.compiler.choose import Choices
from hif4c.compiler.interpret import interpret
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import DEVICE, Graph, InputType, Node, Ref, TensorType
from tests.support.checkpoints import small_config

X = TensorType("float32", (4,))
CPU = torch.device("cpu")
# Batch, frames, height, width and text length all differ from sample to sample.
SIZES = [(2, 3, 8, 6, 7), (1, 1, 4, 10, 12), (3, 2, 2, 4, 1)]


class Store:
    """Tensors in memory; writes down what is asked of it and which of the tensors it gave out are still alive."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.log = []
        self.given = {}

    def load(self, name):
        self.log.append(("load", name))
        tensor = self.tensors[name].clone()
        self.given[name] = weakref.ref(tensor)
        return tensor

    def release(self, name):
        self.log.append(("release", name))

    @property
    def alive(self):
        return {name for name, given in self.given.items() if given() is not None}


def graph_of(nodes, outputs, tensors=("w", "v")):
    made = [Node(target, args, kwargs, "", X) for target, args, kwargs in nodes]
    return Graph([InputType("x", X)], [InputType(name, X) for name in tensors], made, [Ref(index) for index in outputs])


def chain():
    """x + w, cos w (no sample in it), their product, times v; values 3 to 6."""
    return graph_of(
        [
            ("aten.add.Tensor", (Ref(0), Ref(1)), {}),
            ("aten.cos.default", (Ref(1),), {}),
            ("aten.mul.Tensor", (Ref(3), Ref(4)), {}),
            ("aten.mul.Tensor", (Ref(5), Ref(2)), {}),
        ],
        [6],
    )


@pytest.fixture
def tensors():
    return {"w": torch.randn(4), "v": torch.randn(4)}


@pytest.fixture
def samples():
    return [(torch.randn(4),) for _ in range(3)]


def planned(captures, variant):
    config = WanConfig.from_dict(small_config(variant), "config.json")
    return plan_program(captures.variant(variant), config)


def lowered(captures, variant):
    program = captures.variant(variant)
    config = WanConfig.from_dict(small_config(variant), "config.json")
    recipe = load_recipe("rotate")
    run_passes(program, Choices(make_plan(config, recipe)), recipe)
    return program


@pytest.mark.parametrize("stage", [planned, lowered])
@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_a_model_over_samples_of_all_sizes_bit_for_bit(variant, stage, captures, models, bound, inputs):
    executor = bound(stage(captures, variant), models[variant].experts["transformer"].state_dict())
    names = [item.name for item in executor.graph.tensors]
    store = Store(dict(zip(names, executor.tensors, strict=True)))
    samples = [inputs(variant, *sizes, seed=seed) for seed, sizes in enumerate(SIZES)]
    (found,) = interpret(executor.graph, samples, store)
    assert len(found) == len(samples)
    for value, sample in zip(found, samples, strict=True):
        assert torch.equal(value, executor(*sample)[0])
    # One pass over the checkpoint: every tensor comes and goes once.
    for event in ("load", "release"):
        assert sorted(name for what, name in store.log if what == event) == sorted(names)
    assert not store.alive


def test_a_model_needs_one_block_linear_at_a_time(captures, models, bound, inputs):
    """Loads follow the order of the linears; when a block's weight comes, the one before has gone."""
    program = planned(captures, "t2v")
    executor = bound(program, models["t2v"].experts["transformer"].state_dict())
    store = Store({item.name: value for item, value in zip(executor.graph.tensors, executor.tensors, strict=True)})
    weights = [f"{path}.weight" for path, decision in program.decisions.items() if decision.quantized]
    alive = []

    def look(number, node, values):
        alive.append(store.alive & set(weights))

    interpret(executor.graph, [inputs()], store, look)
    assert [name for what, name in store.log if what == "load" and name in weights] == weights
    assert not any(alive)  # before a node is run, no weight of another linear is left


def test_weights_are_loaded_before_their_first_use_and_given_back_after_their_last(tensors, samples):
    store = Store(tensors)
    alive = []

    def look(number, node, values):
        store.log.append(("node", number))
        alive.append(store.alive)

    interpret(chain(), samples, store, look)
    assert store.log == [
        ("node", 0), ("load", "w"),
        ("release", "w"), ("node", 2),  # node 1 reads no sample
        ("node", 3), ("load", "v"), ("release", "v"),
    ]  # fmt: skip
    assert alive == [set(), set(), set()]


def test_values_are_dropped_after_their_last_use(tensors, samples):
    seen = []
    living = {}

    def look(number, node, values):
        seen.extend(weakref.ref(value) for value in values)
        living[number] = sum(ref() is not None for ref in seen)

    interpret(chain(), samples, Store(tensors), look)
    # The inputs belong to the caller; the three sums are gone when their products are looked at.
    assert living == {0: 3, 2: 6, 3: 6}
    assert sum(ref() is not None for ref in seen) == 3


def test_on_node_sees_first_arguments(tensors, samples):
    store = Store(tensors)
    seen = {}

    def see(number, node, values):
        seen[number] = (node.target, values)

    interpret(chain(), samples, store, see)
    assert [seen[number][0] for number in (0, 2, 3)] == ["aten.add.Tensor", "aten.mul.Tensor", "aten.mul.Tensor"]
    assert all(torch.equal(value, sample) for value, (sample,) in zip(seen[0][1], samples, strict=True))
    for value, (sample,) in zip(seen[2][1], samples, strict=True):
        assert torch.equal(value, sample + tensors["w"])


def test_values_without_samples_are_computed_once(tensors, samples, monkeypatch):
    from hif4c.compiler import interpret as module

    calls = []

    def cos(x):
        calls.append(x)
        return torch.cos(x)

    monkeypatch.setitem(module.TARGETS, "aten.cos.default", cos)
    (found,) = interpret(chain(), samples, Store(tensors))
    assert len(calls) == 1
    w, v = tensors["w"], tensors["v"]
    for value, (x,) in zip(found, samples, strict=True):
        assert torch.equal(value, (x + w) * w.cos() * v)


def test_lists_sizes_and_constants_made_on_the_device():
    graph = graph_of(
        [
            ("aten.chunk.default", (Ref(0), 2), {}),  # 2
            ("getitem", (Ref(2), 1), {}),  # 3
            ("aten.sym_size.int", (Ref(3), 0), {}),  # 4
            ("size.mul", (Ref(4), 3), {}),  # 5
            ("aten.arange.start", (0, Ref(4)), {"dtype": torch.float32, "device": DEVICE}),  # 6
            ("aten.cat.default", ([Ref(3), Ref(1), Ref(6)], 0), {}),  # 7
        ],
        [7, 5],
        tensors=("w",),
    )
    w = torch.randn(2)
    samples = [(torch.randn(4),), (torch.randn(10),)]
    found, sizes = interpret(graph, samples, Store({"w": w}))
    executor = Executor(graph, {"w": w}, CPU)
    for index, (x,) in enumerate(samples):
        expected, size = executor(x)
        assert torch.equal(found[index], expected)
        assert sizes[index] == size == 3 * len(x) // 2


def test_outputs_may_be_inputs_and_tensors(tensors, samples):
    graph = graph_of([("aten.cos.default", (Ref(1),), {})], [0, 2, 1, 3])
    given, stored, read, computed = interpret(graph, samples, Store(tensors))
    assert all(value is sample for value, (sample,) in zip(given, samples, strict=True))
    assert [len(values) for values in (stored, read, computed)] == [3, 3, 3]
    assert all(torch.equal(value, tensors["v"]) for value in stored)
    assert all(torch.equal(value, tensors["w"]) for value in read)
    assert all(torch.equal(value, tensors["w"].cos()) for value in computed)
