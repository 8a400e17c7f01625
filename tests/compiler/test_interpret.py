"""A program run over many samples gives what it gives sample by sample, with one block's weights in memory."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from hif4c.compiler import interpret as interpret_module
from hif4c.compiler.calibrate import plan_program
from hif4c.compiler.choose import Choices
from hif4c.compiler.interpret import interpret
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.compiler.spill import WaitingValues
from hif4c.passes.mark_boundaries import BLOCK_PATTERN
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import DEVICE, Graph, InputType, Node, Ref, TensorType, refs
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


class Look:
    """A watch that writes down what it is shown, and calls `also(number, sample)`."""

    def __init__(self, barriers=(), also=lambda number, sample: None):
        self.barriers = set(barriers)
        self.seen = []
        self.values = {}
        self.ready = []
        self.also = also

    def on_input(self, number, node, sample, value):
        self.seen.append((number, sample))
        self.values[number, sample] = value.clone() if isinstance(value, torch.Tensor) else value
        self.also(number, sample)

    def on_ready(self, number, inputs):
        self.ready.append((number, len(self.seen)))
        for sample, value in enumerate(inputs):
            assert same(value, self.values[number, sample])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def bind(captures, models, bound, variant, stage):
    """The executor of a small model and a store of its tensors."""
    executor = bound(stage(captures, variant), models[variant].experts["transformer"].state_dict())
    names = [item.name for item in executor.graph.tensors]
    return executor, Store(dict(zip(names, executor.tensors, strict=True)))


def sensible_barriers(graph):
    """Where GPTQ and calibration put them: where linears read their inputs; and a node that reads no sample."""
    return [number for number, node in enumerate(graph.nodes) if "linear" in node.target] + [7]


@pytest.mark.parametrize("stage", [planned, lowered])
@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_a_model_over_samples_of_all_sizes_bit_for_bit(
    variant, stage, captures, models, bound, inputs, tmp_path, monkeypatch
):
    written = []
    write = WaitingValues._write
    monkeypatch.setattr(WaitingValues, "_write", lambda self, storage: written.append(1) or write(self, storage))
    executor, store = bind(captures, models, bound, variant, stage)
    samples = [inputs(variant, *sizes, seed=seed) for seed, sizes in enumerate(SIZES)]
    expected = [executor(*sample)[0] for sample in samples]
    barriers = sensible_barriers(executor.graph)
    spilled = []
    # All in memory; some samples' values in files; all of them.
    for memory, nodes in ((1 << 30, ()), (30_000, barriers), (0, barriers)):
        written.clear()
        store.log.clear()
        (found,) = interpret(executor.graph, samples, store, watch=Look(nodes), scratch=tmp_path, memory=memory)
        assert all(map(torch.equal, found, expected))
        assert len(found) == len(samples)
        # One pass over the checkpoint: every tensor comes and goes once.
        for event in ("load", "release"):
            assert sorted(name for what, name in store.log if what == event) == sorted(store.tensors)
        assert not store.alive
        assert not any(tmp_path.iterdir())
        spilled.append(len(written))
    assert 0 == spilled[0] < spilled[1] < spilled[2]


@pytest.mark.parametrize("stage", [planned, lowered])
def test_one_block_of_weights_is_in_memory(stage, captures, models, bound, inputs):
    executor, store = bind(captures, models, bound, "t2v", stage)
    blocks = []

    def look(number, sample):
        blocks.append({match[1] for name in store.alive if (match := BLOCK_PATTERN.match(name))})

    interpret(executor.graph, [inputs(seed=seed) for seed in (1, 2)], store, watch=Look(also=look))
    assert set().union(*blocks) == {"0", "1"}
    assert all(len(found) <= 1 for found in blocks)
    assert not blocks[0]


def test_a_block_starts_where_the_least_waits(captures, models, bound):
    """Between two blocks: the residual stream in bf16, the time embedding, text, tables of the rotary embedding."""
    executor, _ = bind(captures, models, bound, "t2v", planned)
    graph = executor.graph
    (_, second) = interpret_module._block_starts(graph, interpret_module._dependent(graph))
    loads = next(
        number
        for number, node in enumerate(graph.nodes)
        if any(executor.graph.tensors[ref.index - 3].name.startswith("blocks.1.") for ref in refs(node.args)
               if 3 <= ref.index < graph.first_node)
    )  # fmt: skip
    # Just before the time embedding is brought to float32 for the next block, right after the last sum in bf16.
    assert second == loads - 1
    assert str(graph.nodes[second - 1].type) == "bfloat16[b, f*h*w, 128]"


def test_samples_go_one_after_the_other_up_to_a_barrier(tensors, samples):
    store = Store(tensors)
    look = Look([2], lambda number, sample: store.log.append((number, sample)))
    interpret(chain(), samples, store, watch=look)
    assert store.log == [
        (0, 0), ("load", "w"), (2, 0), (0, 1), (2, 1), (0, 2), ("release", "w"), (2, 2),  # node 1 reads no sample
        (3, 0), ("load", "v"), (3, 1), (3, 2), ("release", "v"),
    ]  # fmt: skip
    assert look.ready == [(2, 6)]
    for number, expected in ((0, lambda x: x), (2, lambda x: x + tensors["w"])):
        assert all(torch.equal(look.values[number, index], expected(x)) for index, (x,) in enumerate(samples))


def test_without_samples_only_barriers_are_told():
    """A process that has no calls still takes part in what all processes do there."""
    store = Store({})
    look = Look([0, 1, 3])
    assert interpret(chain(), [], store, watch=look) == [[]]
    assert look.ready == [(0, 0), (1, 0), (3, 0)]
    assert not store.log


def test_a_barrier_is_a_node(tensors, samples):
    with pytest.raises(ValueError, match="barrier 4"):
        interpret(chain(), samples, Store(tensors), watch=Look([4]))


def test_values_are_dropped_after_their_last_use(tensors, samples, monkeypatch):
    seen = []
    living = {}

    def add(a, b):
        seen.append(weakref.ref(made := torch.add(a, b)))
        return made

    def look(number, sample):
        living[number, sample] = sum(ref() is not None for ref in seen)

    monkeypatch.setitem(interpret_module.TARGETS, "aten.add.Tensor", add)
    interpret(chain(), samples, Store(tensors), watch=Look(also=look))
    # One sample's sum, while it is multiplied; not while its product is, and not while the next sample begins.
    assert living == {(number, sample): int(number == 2) for number in (0, 2, 3) for sample in range(3)}


def test_files_go_when_their_values_are_dead(tensors, samples, tmp_path):
    """With no memory every value that waits at a barrier has a file; what is dead by the next one has none."""
    files = {}

    def look(number, sample):
        files[number, sample] = sum(path.is_file() for path in tmp_path.rglob("*"))

    interpret(chain(), samples, Store(tensors), watch=Look([2, 3], look), scratch=tmp_path, memory=0)
    # The sums wait at node 2, the products at node 3: one file a sample. (The inputs are the caller's.)
    assert [files[2, sample] for sample in range(3)] == [0, 1, 2]
    assert [files[3, sample] for sample in range(3)] == [3, 3, 3]


def test_one_sample_is_mapped_at_a_time(tensors, samples, tmp_path):
    """Maps go with their values at once, not when the garbage collector comes round."""
    mapped = []

    def look(number, sample):
        mapped.append(Path("/proc/self/maps").read_text().count(str(tmp_path)))

    gc.disable()
    try:
        interpret(chain(), samples, Store(tensors), watch=Look([2, 3], look), scratch=tmp_path, memory=0)
    finally:
        gc.enable()
    # At node 3 a sample's sum has been read from its file and is dead already.
    assert set(mapped) == {0}


def test_views_of_one_storage_share_a_file_and_keep_their_strides(tmp_path):
    graph = graph_of(
        [
            ("aten.add.Tensor", (Ref(0), Ref(1)), {}),  # 2
            ("aten.chunk.default", (Ref(2), 2), {}),  # 3
            ("aten.transpose.int", (Ref(2), 0, 1), {}),  # 4
            ("getitem", (Ref(3), 1), {}),  # 5
            ("aten.mul.Tensor", (Ref(4), 2.0), {}),  # 6
        ],
        [4, 5, 6],
        tensors=("w",),
    )
    x, w = torch.randn(4, 6), torch.randn(6)
    turned, part, product = (
        values[0]
        for values in interpret(graph, [(x,)], Store({"w": w}), watch=Look([3, 4]), scratch=tmp_path, memory=0)
    )
    assert torch.equal(turned, (x + w).T)
    assert turned.stride() == (1, 6)
    assert torch.equal(part, (x + w)[2:])
    assert part.untyped_storage().nbytes() == x.nbytes
    assert torch.equal(product, (x + w).T * 2)


def test_memory_is_used_up_to_the_budget(tensors, samples, tmp_path):
    """Three sums of 16 bytes: two fit."""
    files = []

    def look(number, sample):
        files.append(sum(path.is_file() for path in tmp_path.rglob("*")))

    interpret(chain(), samples, Store(tensors), watch=Look([2], look), scratch=tmp_path, memory=47)
    assert files == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_the_scratch_folder_is_empty_after_an_error(tensors, samples, tmp_path):
    def look(number, sample):
        if (number, sample) == (3, 1):
            assert any(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interpret(chain(), samples, Store(tensors), watch=Look([3], look), scratch=tmp_path, memory=0)
    assert not any(tmp_path.iterdir())


def test_a_scratch_folder_that_cannot_be_written(tensors, samples, tmp_path):
    with pytest.raises(Hif4Error, match=r"gone: writing 16 bytes of intermediate values failed \(No such file"):
        interpret(chain(), samples, Store(tensors), watch=Look([3]), scratch=tmp_path / "gone", memory=0)


def test_values_without_samples_are_computed_once(tensors, samples, monkeypatch):
    calls = []

    def cos(x):
        calls.append(x)
        return torch.cos(x)

    monkeypatch.setitem(interpret_module.TARGETS, "aten.cos.default", cos)
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
