import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import DEVICE, TARGETS, Graph, InputType, Node, Ref, TensorType, decode, encode

X = TensorType("bfloat16", ("b", 64))


def small_graph():
    """y = gelu(x) quantized, read back, multiplied by a stored mask, and a size."""
    planes = (TensorType("uint8", ("b", 32)), TensorType("uint8", ("b", 1, 4)))
    nodes = [
        Node("aten.gelu.default", (Ref(0),), {"approximate": "tanh"}, "blocks.0.ffn", X),
        Node("hif4.quantize", (Ref(2), Ref(1), 0), {}, "blocks.0.ffn", planes),
        Node("getitem", (Ref(3), 0), {}, "blocks.0.ffn", planes[0]),
        Node("getitem", (Ref(3), 1), {}, "blocks.0.ffn", planes[1]),
        Node("hif4.dequantize", (Ref(4), Ref(5), 64, torch.bfloat16), {}, "", X),
        Node("aten.sym_size.int", (Ref(0), 0), {}, "", "b"),
        Node("aten.expand.default", (Ref(1), [Ref(7), 64]), {}, "", X),
        Node(
            "aten.arange.start", (0, 64), {"dtype": torch.float32, "device": DEVICE}, "", TensorType("float32", (64,))
        ),
        Node("aten.add.Tensor", (Ref(6), Ref(8)), {}, "", X),
    ]
    return Graph([InputType("x", X)], [InputType("mask", TensorType("float32", (64,)))], nodes, [Ref(10)])


def test_what_is_written_is_read():
    graph = small_graph()
    data = encode(graph)
    assert decode(data, "graph.json") == graph
    assert encode(decode(data, "graph.json")) == data
    assert str(X) == "bfloat16[b, 64]"
    assert graph.first_node == 2


def test_one_node_a_line():
    lines = encode(small_graph()).decode().splitlines()
    nodes = lines[lines.index('"nodes":[') + 1 :]
    assert nodes[0] == '[0,["%0"],{"approximate":"\'tanh"},0,0],'
    assert nodes[7] == '[6,[0,64],{"dtype":":float32","device":"@"},1,3],'


@pytest.mark.parametrize(
    "value", [1.5, -0.0, 1e300, 2**62, True, False, None, [1, [2, [3]]], torch.int64, "text", DEVICE]
)
def test_every_kind_of_argument(value):
    graph = Graph(
        [InputType("x", X)], [], [Node("aten.add.Tensor", (Ref(0), value), {"alpha": value}, "", X)], [Ref(1)]
    )
    (node,) = decode(encode(graph), "graph.json").nodes
    for found in (node.args[1], node.kwargs["alpha"]):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have(value):
    graph = Graph([InputType("x", X)], [], [Node("aten.add.Tensor", (Ref(0), value), {}, "", X)], [Ref(1)])
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(graph)


def test_an_argument_that_cannot_be_stored():
    graph = Graph([InputType("x", X)], [], [Node("aten.add.Tensor", (Ref(0), {1}), {}, "", X)], [Ref(1)])
    with pytest.raises(TypeError, match="an argument of type set cannot be stored"):
        encode(graph)


def test_the_allow_list_has_nothing_that_reaches_out():
    for name, target in TARGETS.items():
        assert callable(target)
        assert name.split(".")[0] in ("aten", "hif4", "getitem", "size"), name
        if isinstance(target, torch._ops.OpOverload):
            assert not target._schema.is_mutable, name


@pytest.mark.parametrize(
    "name",
    [
        "aten._to_copy.default", "aten.clone.default", "aten.select.int", "aten.type_as.default", "size.add",
        "size.sub", "operator.mul", "aten.copy_.default", "hif4", "",
    ],
)  # fmt: skip
def test_operators_that_no_program_needs_are_refused(name):
    assert name not in TARGETS
    with pytest.raises(Hif4Error, match=f"calls {name!r}, which is not an operator"):
        decode(change(["targets", 0], name), "graph.json")


def test_operators_of_side_branches_are_on_the_allow_list():
    x = torch.arange(8.0).view(2, 4)
    assert TARGETS["aten.index_select.default"](x, -1, torch.tensor([3, 0])).tolist() == [[3, 0], [7, 4]]
    assert torch.equal(TARGETS["aten.matmul.default"](x, x.t()), x @ x.t())


@pytest.mark.parametrize("name", ["size.mul", "size.floordiv"])
def test_sizes_are_whole_numbers(name):
    """Python's own operators would make a list of a billion items of `[0] * 10**9`."""
    expected = {"size.mul": 21, "size.floordiv": 2}
    assert TARGETS[name](7, 3) == expected[name]
    for a, b in (([0], 10**9), ("x", 10**9), (10**9, "x"), (2.5, 2), (True, 2), (2, None), (torch.ones(2), 2)):
        with pytest.raises(TypeError, match="sizes are whole numbers"):
            TARGETS[name](a, b)


def raw():
    return json.loads(encode(small_graph()))


def change(path, value):
    """The graph as JSON with one place changed."""
    values = raw()
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(values).encode()


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


BAD = {
    "not JSON": (b"{", "is not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "deep nesting": (b"[" * 200_000, "is not valid JSON"),
    "a list": (b"[]", "does not have the structure"),
    "a number": (b"1", "does not have the structure"),
    "newer schema": (change(["schema"], 2), "has schema 2 and this hif4c reads 1"),
    "unknown operator": (
        change(["targets", 0], "aten.add_.Tensor"),
        "calls 'aten.add_.Tensor', which is not an operator",
    ),
    "python function": (change(["targets", 0], "os.system"), "calls 'os.system'"),
    "operator that is a list": (change(["targets", 0], ["aten"]), "does not have the structure"),
    "unused operator": (json.dumps({**raw(), "targets": [*raw()["targets"], "eval"]}).encode(), "calls 'eval'"),
    "forward reference": (change(["nodes", 0, 1, 0], "%5"), "index 5 is not in [0, 2)"),
    "reference to itself": (change(["nodes", 0, 1, 0], "%2"), "index 2 is not in [0, 2)"),
    "negative reference": (change(["nodes", 0, 1, 0], "%-1"), "index -1"),
    "reference in a keyword": (change(["nodes", 0, 2, "approximate"], "%0"), "index 0 is not in [0, 0)"),
    "unknown output": (change(["outputs", 0], 11), "index 11"),
    "bad dtype of a type": (change(["types", 0, 0], "float8"), "unknown dtype 'float8'"),
    "bad dtype of an argument": (change(["nodes", 4, 1, 3], ":object"), "does not have the structure"),
    "bad size": (change(["types", 0, 1], 1.5), "a size is a number or an expression"),
    "unknown type": (change(["nodes", 0, 4], 99), "index 99"),
    "type that is true": (change(["nodes", 0, 4], True), "index True"),
    "unknown module": (change(["nodes", 0, 3], -1), "index -1"),
    "module that is a number": (change(["modules", 0], 5), "expected a string"),
    "nested argument": (change(["nodes", 6, 1, 1], nested(6)), "nested too deeply"),
    "object as an argument": (change(["nodes", 6, 1, 1], {"a": 1}), "an argument may not be a dict"),
    "unknown kind of argument": (change(["nodes", 6, 1, 1], "!rm"), "unknown kind of argument"),
    "argument name": (change(["nodes", 0, 2], {"a b": 1}), "is not an argument name"),
    "arguments are no list": (change(["nodes", 0, 1], {}), "arguments must be a list"),
    "short node": (change(["nodes", 0], [0, []]), "does not have the structure"),
    "input and tensor of one name": (change(["tensors", 0, 0], "x"), "two values are called 'x'"),
    "no nodes": (json.dumps({key: value for key, value in raw().items() if key != "nodes"}).encode(), "'nodes'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what):
    data, words = BAD[what]
    with pytest.raises(Hif4Error) as caught:
        decode(data, "a/graph.json")
    assert str(caught.value).startswith("a/graph.json")
    assert words in str(caught.value)


def test_too_many_nodes(monkeypatch):
    monkeypatch.setattr("hif4c.runtime.graph.MAX_NODES", 8)
    with pytest.raises(Hif4Error, match="the program has 9 nodes, more than the 8"):
        decode(encode(small_graph()), "graph.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["%0", "%99999999999999999999", "%x", "@", ":float32", ":", "'", "aten.add.Tensor", -1, 2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(values, path, kind, replacement):
    if not path:
        return replacement
    place = values
    for key in path[:-1]:
        place = place[key]
    key = path[-1]
    if kind == "replace":
        place[key] = replacement
    elif kind == "delete":
        del place[key]
    elif isinstance(place, list):
        place.insert(key, replacement)
    else:
        place["extra"] = replacement
    return values


def decodes_or_refuses(data):
    try:
        graph = decode(data, "graph.json")
    except Hif4Error:
        return
    for number, node in enumerate(graph.nodes):  # what is read is well-formed
        assert node.target in TARGETS
        for argument in node.args:
            assert not isinstance(argument, Ref) or argument.index < graph.first_node + number


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_change_of_the_json_decodes_or_is_refused(data):
    values = raw()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(values))))
        values = mutate(values, path, data.draw(st.sampled_from(["replace", "delete", "insert"])), data.draw(JSON))
    decodes_or_refuses(json.dumps(values).encode())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(encode(small_graph())) - 1), st.binary(max_size=3))
def test_any_change_of_the_bytes_decodes_or_is_refused(position, replacement):
    data = encode(small_graph())
    decodes_or_refuses(data[:position] + replacement + data[position + 1 :])
