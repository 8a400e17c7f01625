import copy
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hif4c.runtime import executor as executor_module
from hif4c.runtime.executor import Executor, ReleaseAfterUse
from hif4c.runtime.graph import DEVICE, Graph, InputType, Node, Ref, TensorType

X = TensorType("float32", (4,))
CPU = torch.device("cpu")


def graph_of(nodes, outputs, tensors=("w",)):
    made = [Node(target, args, kwargs, "", X) for target, args, kwargs in nodes]
    return Graph([InputType("x", X)], [InputType(name, X) for name in tensors], made, [Ref(index) for index in outputs])


def chain():
    """x -> silu -> add w -> add (the first silu again) -> mul; the silu is read twice, the sum once."""
    return graph_of(
        [
            ("aten.silu.default", (Ref(0),), {}),
            ("aten.add.Tensor", (Ref(2), Ref(1)), {}),
            ("aten.add.Tensor", (Ref(3), Ref(2)), {"alpha": 2}),
            ("aten.mul.Tensor", (Ref(4), 3.0), {}),
        ],
        [5],
    )


def test_runs_a_graph_made_by_hand():
    x, w = torch.randn(4), torch.randn(4)
    (found,) = Executor(chain(), {"w": w}, CPU)(x)
    silu = torch.nn.functional.silu(x)
    assert torch.equal(found, (silu + w + 2 * silu) * 3.0)


def test_tensors_are_found_by_name_and_several_outputs_are_in_order():
    graph = graph_of([("aten.sub.Tensor", (Ref(1), Ref(2)), {})], [3, 0, 2], tensors=("a", "b"))
    a, b, x = torch.randn(4), torch.randn(4), torch.randn(4)
    found = Executor(graph, {"b": b, "a": a}, CPU)(x)
    assert torch.equal(found[0], a - b)
    assert found[1] is x
    assert found[2] is b


def test_lists_tuples_and_sizes():
    graph = graph_of(
        [
            ("aten.chunk.default", (Ref(0), 2), {}),
            ("getitem", (Ref(2), 1), {}),
            ("aten.sym_size.int", (Ref(3), 0), {}),
            ("size.mul", (Ref(4), 3), {}),
            ("size.floordiv", (Ref(5), 2), {}),
            ("aten.cat.default", ([Ref(3), Ref(1), Ref(3)], 0), {}),
            ("aten.reshape.default", (Ref(7), [Ref(4), -1]), {}),
        ],
        [8, 6],
    )
    x, w = torch.randn(4), torch.randn(4)
    found, size = Executor(graph, {"w": w}, CPU)(x)
    assert torch.equal(found, torch.cat([x[2:], w, x[2:]]).reshape(2, -1))
    assert size == 3


def test_constants_are_made_on_the_device_of_the_program():
    nodes = [("aten.arange.start", (0, 4), {"dtype": torch.float32, "device": DEVICE})]
    for device in (CPU, torch.device("meta")):
        (found,) = Executor(graph_of(nodes, [2]), {"w": torch.empty(4)}, device)(torch.empty(4))
        assert found.device == device
    assert found.dtype == torch.float32


def test_trace_returns_every_value_in_order():
    x, w = torch.randn(4), torch.randn(4)
    executor = Executor(chain(), {"w": w}, CPU)
    values = executor.trace(x)
    silu = torch.nn.functional.silu(x)
    assert torch.equal(values[0], silu)
    assert torch.equal(values[1], silu + w)
    assert torch.equal(values[3], executor(x)[0])
    assert len(values) == 4


def test_a_value_is_freed_right_after_its_last_use(monkeypatch):
    """Every operator looks at who is still alive when it is called: references alone free a value, no collector."""
    made, alive = [], []

    def watch(function):
        def call(*arguments, **keywords):
            alive.append([reference() is not None for reference in made])
            result = function(*arguments, **keywords)
            made.append(weakref.ref(result))
            return result

        return call

    watched = {name: watch(function) for name, function in executor_module.TARGETS.items()}
    monkeypatch.setattr(executor_module, "TARGETS", watched)
    executor = Executor(chain(), {"w": torch.randn(4)}, CPU)
    (output,) = executor(torch.randn(4))
    # Before each call: silu lives through both of its readers and is gone before the last call.
    assert alive == [[], [True], [True, True], [False, False, True]]
    assert [reference() is not None for reference in made] == [False, False, False, True]
    assert made[-1]() is output


def test_outputs_and_tensors_are_kept():
    graph = graph_of([("aten.silu.default", (Ref(0),), {}), ("aten.add.Tensor", (Ref(2), Ref(1)), {})], [2, 3])
    executor = Executor(graph, {"w": torch.ones(4)}, CPU)
    for _ in range(2):  # nothing that a second run needs is dropped by the first
        first, second = executor(torch.ones(4))
        assert torch.equal(first + 1, second)


def test_nothing_is_recorded_for_a_gradient():
    x = torch.randn(4, requires_grad=True)
    (found,) = Executor(chain(), {"w": torch.randn(4)}, CPU)(x)
    assert not found.requires_grad
    assert all(not value.requires_grad for value in Executor(chain(), {"w": torch.randn(4)}, CPU).trace(x))


def test_a_missing_tensor():
    with pytest.raises(KeyError, match="w"):
        Executor(chain(), {}, CPU)


def test_values_are_passed_by_position():
    graph = graph_of([("aten.add.Tensor", (Ref(0), Ref(1)), {"alpha": Ref(0)})], [2])
    with pytest.raises(ValueError, match="values are passed by position"):
        Executor(graph, {"w": torch.ones(4)}, CPU)


def by_sizes():
    """x [n, 4] + the first n rows of a table, doubled: two nodes depend on n alone, the size apart."""
    return graph_of(
        [
            ("aten.sym_size.int", (Ref(0), 0), {}),
            ("aten.slice.Tensor", (Ref(1), 0, 0, Ref(2)), {}),
            ("aten.mul.Tensor", (Ref(3), 2.0), {}),
            ("aten.add.Tensor", (Ref(0), Ref(4)), {}),
            ("aten.mul.Tensor", (Ref(1), 3.0), {}),
        ],
        [5, 6, 2],
    )


def counted(monkeypatch):
    calls = []

    def watch(name, function):
        def call(*arguments, **keywords):
            calls.append(name)
            return function(*arguments, **keywords)

        return call

    watched = {name: watch(name, function) for name, function in executor_module.TARGETS.items()}
    monkeypatch.setattr(executor_module, "TARGETS", watched)
    return calls


def test_what_depends_on_sizes_alone_is_computed_once_for_each(monkeypatch):
    calls, table = counted(monkeypatch), torch.randn(9, 4)
    executor = Executor(by_sizes(), {"w": table}, CPU)
    # What depends on the table alone is not kept: there it might be a decoded weight.
    again = ["aten.add.Tensor", "aten.mul.Tensor"]
    for rows, first in ((3, True), (5, True), (3, False), (5, False)):
        calls.clear()
        x = torch.randn(rows, 4)
        found, other, size = executor(x)
        assert torch.equal(found, x + 2 * table[:rows])
        assert torch.equal(other, 3 * table)
        assert size == rows
        assert calls == (["aten.sym_size.int", "aten.slice.Tensor", "aten.mul.Tensor"] if first else []) + again


def test_the_sizes_that_were_used_last_are_kept(monkeypatch):
    calls, most = counted(monkeypatch), executor_module.MAX_SIZES
    executor = Executor(by_sizes(), {"w": torch.randn(9, 4)}, CPU)

    def is_known(rows):
        calls.clear()
        executor(torch.randn(rows, 4))
        return "aten.sym_size.int" not in calls

    assert not any(is_known(rows) for rows in range(most))
    assert is_known(0)
    assert not is_known(most)  # takes the place of 1, which is the one not used for longest
    assert is_known(0)
    assert not is_known(1)
    assert len(executor._of_sizes) == most


def test_what_is_kept_is_shared_by_threads():
    table = torch.randn(9, 4)
    executor = Executor(by_sizes(), {"w": table}, CPU)
    inputs = [torch.randn(1 + number % 9, 4) for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        for x, (found, _, size) in zip(inputs, pool.map(executor, inputs), strict=True):
            assert torch.equal(found, x + 2 * table[:size])


def test_a_program_without_sizes_keeps_nothing():
    executor = Executor(chain(), {"w": torch.randn(4)}, CPU)
    executor(torch.randn(4))
    assert not executor._of_sizes


def test_a_copy_has_tensors_of_its_own():
    table = torch.randn(9, 4)
    executor = Executor(by_sizes(), {"w": table}, CPU)
    x = torch.randn(3, 4)
    executor(x)
    made = copy.deepcopy(executor)
    expected = x + 2 * table[:3]
    table.zero_()
    assert torch.equal(made(x)[0], expected)
    assert made.tensors[0] is not table


def test_a_visit_shows_every_node_and_drops_values_as_a_call_does():
    executor, shown, alive = Executor(chain(), {"w": torch.randn(4)}, CPU), [], []
    x = torch.randn(4)

    def see(number, arguments, result):
        if number == 3:
            assert torch.equal(arguments[0] * 3, result)
        shown.append((number, weakref.ref(result)))
        alive.append([reference() is not None for _, reference in shown])

    (found,) = executor.visit([x], see)
    assert torch.equal(found, executor(x)[0])
    assert [number for number, _ in shown] == list(range(4))
    # The silu lives until the third node has run, the sum as well; each is gone when the next one is shown.
    assert alive == [[True], [True, True], [True, True, True], [False, False, True, True]]


def test_stored_tensors_are_given_back_after_their_last_use():
    nodes = [
        ("aten.add.Tensor", (Ref(0), Ref(1)), {}),
        ("aten.add.Tensor", (Ref(4), Ref(2)), {}),
        ("aten.cat.default", ([Ref(5), Ref(1)],), {}),
        ("aten.mul.Tensor", (Ref(6), 2.0), {}),
    ]
    graph = graph_of(nodes, [7], tensors=("a", "b", "unread"))
    events = []

    class Weights(dict):
        def release(self, names):
            events.append(sorted(names))

    weights = Weights({name: torch.randn(4) for name in ("a", "b", "unread")})
    executor = Executor(graph, weights, CPU, ReleaseAfterUse(graph, weights))
    found = executor.visit([torch.ones(4)], lambda number, arguments, result: events.append(number))[0]
    assert events == [0, 1, ["b"], 2, ["a"], 3]
    assert torch.equal(found, Executor(graph, weights, CPU)(torch.ones(4))[0])
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(executor)
