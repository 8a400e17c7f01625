import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import Graph, InputType, Node, Ref, TensorType
from hif4c.runtime.offload import BlockOffload, BlockStore
from hif4c.runtime.slots import StreamSlots, make_slots
from hif4c.runtime.transformer import CompiledTransformer, load

X = TensorType("float32", (8,))
CPU = torch.device("cpu")
COUNT = 6


def program(more=lambda add, weight: None, count=COUNT):
    """x * head, then for each of `count` blocks + weight and * scale, then what `more` adds.

    more(add, weight) -> the last value, or None for the blocks'; weight(name) is a stored tensor, add(target, *args)
    a node.
    """
    names = ["head", *(f"blocks.{block}.{name}" for block in range(count) for name in ("weight", "scale"))]
    stored = {name: Ref(1 + number) for number, name in enumerate(names)}
    nodes = []

    def add(target, *args):
        nodes.append(Node(target, args, {}, "", X))
        return Ref(len(names) + len(nodes))

    value = add("aten.mul.Tensor", Ref(0), stored["head"])
    for block in range(count):
        value = add("aten.add.Tensor", value, stored[f"blocks.{block}.weight"])
        value = add("aten.mul.Tensor", value, stored[f"blocks.{block}.scale"])
    extra = more(add, stored.get)
    if extra is not None:
        value = add("aten.add.Tensor", value, extra)
    graph = Graph([InputType("x", X)], [InputType(name, X) for name in names], nodes, [value])
    return graph, {name: torch.randn(8) for name in names}


def offloaded(graph, tensors):
    store = BlockStore(tensors, CPU)
    return Executor(graph, tensors, CPU, BlockOffload(graph, store)), store


def test_two_blocks_at_most_are_on_the_device_and_the_result_is_the_same():
    graph, tensors = program()
    found, store = offloaded(graph, tensors)
    plain = Executor(graph, tensors, CPU)
    assert store.names == {name for name in tensors if name != "head"}
    for _ in range(3):
        x = torch.randn(8)
        assert torch.equal(found(x)[0], plain(x)[0])
        assert all(torch.equal(a, b) for a, b in zip(found.trace(x), plain.trace(x), strict=True))
    assert (store.peak, store.resident) == (2, 0)
    assert [tensor is None for tensor in found.tensors] == [name != "head" for name in tensors]


def test_the_next_block_is_fetched_while_one_runs():
    graph, tensors = program()
    executor, store = offloaded(graph, tensors)
    fetched, running = [threading.Event() for _ in range(COUNT)], []
    fetch = store.fetch

    def watched(block, slot):
        result = fetch(block, slot)
        fetched[int(block.split(".")[1])].set()
        return result

    def see(number, arguments, result):
        if number and number % 2 and number // 2 + 1 < COUNT:  # the first of a block's two nodes
            assert fetched[number // 2 + 1].wait(10), number
            running.append(number // 2)

    store.fetch = watched
    executor.visit([torch.randn(8)], see)
    assert running == list(range(COUNT - 1))


def test_a_call_that_fails_leaves_room_for_the_next():
    graph, tensors = program()
    executor, store = offloaded(graph, tensors)

    def stop(number, arguments, result):
        if number == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        executor.visit([torch.ones(8)], stop)
    assert store.resident == 0
    store.fetch, fetch = None, store.fetch
    with pytest.raises(TypeError):
        executor(torch.ones(8))
    store.fetch = fetch
    assert torch.equal(executor(torch.ones(8))[0], Executor(graph, tensors, CPU)(torch.ones(8))[0])


def test_calls_of_several_threads_take_turns():
    graph, tensors = program()
    executor, store = offloaded(graph, tensors)
    plain, inputs = Executor(graph, tensors, CPU), [torch.randn(8) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for x, (found,) in zip(inputs, pool.map(executor, inputs), strict=True):
            assert torch.equal(found, plain(x)[0])
    assert store.peak == 2


def test_a_view_of_a_blocks_tensor_keeps_the_block():
    """Fetched early by a view, read late: of block 1 when block 2 has begun, which still is two blocks."""

    def late(count):
        graph, tensors = program(count=count)
        first = len(graph.inputs) + len(graph.tensors)
        stored = {item.name: Ref(1 + number) for number, item in enumerate(graph.tensors)}
        # A view in place of the weight of block 0, and the last node reads the view once more.
        nodes = [Node("aten.view.default", (stored["blocks.0.weight"], [2, 4]), {}, "", X)]
        nodes += [Node("aten.view.default", (Ref(first), [8]), {}, "", X)]

        def moved(argument):
            return Ref(argument.index + 2) if isinstance(argument, Ref) and argument.index >= first else argument

        nodes += [Node(node.target, tuple(moved(item) for item in node.args), {}, "", X) for node in graph.nodes]
        nodes.append(Node("aten.add.Tensor", (Ref(first + len(nodes) - 1), Ref(first + 1)), {}, "", X))
        return Graph(graph.inputs, graph.tensors, nodes, [Ref(first + len(nodes) - 1)]), tensors

    graph, tensors = late(2)
    executor, _ = offloaded(graph, tensors)
    assert torch.equal(executor(torch.ones(8))[0], Executor(graph, tensors, CPU)(torch.ones(8))[0])
    with pytest.raises(Hif4Error, match=r"still uses blocks\.0 when blocks\.2 begins"):
        offloaded(*late(3))


def test_a_program_without_blocks():
    graph, tensors = program(count=0)
    with pytest.raises(Hif4Error, match="nothing to offload by blocks"):
        offloaded(graph, tensors)


def test_what_sizes_decide_is_not_kept_from_tensors_that_come_and_go():
    """A table in a block, cut to the input's size: kept, it would be a view of a slot that holds another block."""

    def cut(add, weight):
        size = add("aten.sym_size.int", Ref(0), 0)
        return add("aten.slice.Tensor", weight(f"blocks.{COUNT - 1}.weight"), 0, 0, size)

    graph, tensors = program(cut)
    executor, _ = offloaded(graph, tensors)
    for _ in range(2):
        assert torch.equal(executor(torch.ones(8))[0], Executor(graph, tensors, CPU)(torch.ones(8))[0])
    assert not executor._of_sizes


class FakeDevice:
    """Streams and events that write down who waits for what."""

    def __init__(self):
        self.log, self.main, outer = [], FakeStream(self, "main"), self

        class Stream(FakeStream):
            def __init__(self, device):
                super().__init__(outer, "side")

        class Event:
            recorded = 0

            def record(self, stream):
                self.recorded += 1
                outer.log.append(("record", stream.name, self, self.recorded))

            def synchronize(self):
                outer.log.append(("synchronize", "host", self, self.recorded))

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device):
        return self.main

    @contextmanager
    def stream(self, stream):
        self.log.append(("copy", stream.name, None, 0))
        yield


class FakeStream:
    def __init__(self, device, name):
        self.device, self.name = device, name

    def wait_event(self, event):
        self.device.log.append(("wait", self.name, event, event.recorded))


def test_on_a_gpu_copies_wait_for_kernels_and_kernels_for_copies():
    graph, tensors = program()
    store, device = BlockStore(tensors, CPU), FakeDevice()
    slots = store.slots = StreamSlots(4096, CPU, device, pinned=False)
    executor = Executor(graph, tensors, CPU, BlockOffload(graph, store))
    for _ in range(2):
        assert torch.equal(executor(torch.ones(8))[0], Executor(graph, tensors, CPU)(torch.ones(8))[0])
    for slot in range(2):
        read, copied = slots._read[slot], slots._copied[slot]
        log = [entry[:2] + entry[3:] if entry[2] in (read, copied) else None for entry in device.log]
        of_slot = [
            (what, who, "read" if event is read else "copied", count)
            for what, who, event, count in device.log
            if event in (read, copied)
        ]
        assert log.count(None) > 0  # the other slot's, and the copies
        expected, reads, copies = [], 0, 0
        for _ in range(2):
            reads += 1
            expected.append(("record", "main", "read", reads))  # a call begins
            for _ in range(COUNT // 2):
                expected.append(("synchronize", "host", "copied", copies))  # the pinned buffer is free
                expected.append(("wait", "side", "read", reads))  # the slot is free
                copies += 1
                expected.append(("record", "side", "copied", copies))
                expected.append(("wait", "main", "copied", copies))  # before the block's kernels
                reads += 1
                expected.append(("record", "main", "read", reads))  # after them
        assert of_slot == expected
    at = [number for number, entry in enumerate(device.log) if entry[0] == "copy"]
    assert len(at) == 2 * COUNT
    for number in at:  # nothing else between the wait and the record on the side stream
        side = [entry[0] for entry in device.log[:number] if entry[1] == "side"]
        assert side[-1] == "wait"


def test_slots_of_the_cpu_are_plain_memory():
    slots = make_slots(1024, CPU)
    first, second = slots.fill(0, [(0, torch.arange(3.0)), (256, torch.arange(4, dtype=torch.uint8))])
    other = slots.fill(1, [(0, torch.ones(3))])
    assert torch.equal(first, torch.arange(3.0))
    assert torch.equal(second, torch.arange(4, dtype=torch.uint8))
    assert torch.equal(other[0], torch.ones(3))


@pytest.mark.parametrize("recipe", ["rtn", "weight-only"])
def test_an_offloaded_expert_computes_the_same(recipe, artifacts, inputs):
    plain, offloaded = (load(artifacts("t2v", recipe), offload=offload) for offload in ("none", "blocks"))
    assert offloaded.blocks is None
    for _ in range(2):
        assert torch.equal(offloaded(*inputs()).sample, plain(*inputs()).sample)
    assert offloaded.blocks.peak == 2
    held = {name for name, _ in offloaded.named_buffers()}
    assert held == {name for name, _ in plain.named_buffers() if not name.startswith("weights/blocks/")}
    assert offloaded.to("cpu") is offloaded
    assert torch.equal(offloaded.variant(None)(*inputs()).sample, plain(*inputs()).sample)
    offloaded.unload()
    assert offloaded.blocks is None
    with torch.inference_mode():
        assert torch.equal(offloaded(*inputs()).sample, plain(*inputs()).sample)
    assert torch.equal(offloaded(*inputs()).sample, plain(*inputs()).sample)


def test_a_policy_that_there_is_not(artifacts):
    with pytest.raises(Hif4Error, match="offload='layers' is not known; choose none or blocks"):
        load(artifacts(), offload="layers")
    model = load(artifacts())
    with pytest.raises(Hif4Error, match="choose none or blocks"):
        CompiledTransformer(model.graph, {}, model.config, model.dtype, False, offload="disk")
