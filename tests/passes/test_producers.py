import pytest
import torch

from hif4c.passes.functionalize_rotary import functionalize_rotary
from hif4c.passes.producers import Producer, find_producer, some_paths
from hif4c.passes.remove_noops import remove_noops
from tests.passes.builder import Builder
from tests.support.checkpoints import VARIANTS

aten = torch.ops.aten
CHANNELS = "the way from the producer changes the channels"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_makes_the_inputs_of_a_wan_model(variant, captures):
    program = captures.variant(variant)
    remove_noops(program)
    functionalize_rotary(program)
    found = {program.linear_path(node): find_producer(node.args[0]) for node in program.linears()}
    for block in ("blocks.0", "blocks.1"):
        norm = found[f"{block}.attn2.to_q"]
        assert norm.node.target is aten.layer_norm.default
        assert [norm.weight.name, norm.bias.name] == [
            f"p_{block.replace('.', '_')}_norm2_{x}" for x in ("weight", "bias")
        ]
        assert norm.keeps_offsets
        for attention in ("attn1", "attn2"):
            value = found[f"{block}.{attention}.to_out.0"]
            assert program.linear_path(value.node) == f"{block}.{attention}.to_v"
            assert value.node.args[1:] == (value.weight, value.bias)
            assert value.keeps_offsets
        assert found[f"{block}.attn1.to_q"] == "the input is made by aten.add.Tensor"
        assert found[f"{block}.ffn.net.2"] == "the input is made by aten.gelu.default"
        text = found[f"{block}.attn2.to_k"]
        assert program.linear_path(text.node) == "condition_embedder.text_embedder.linear_2"
    assert found["condition_embedder.text_embedder.linear_1"] == "the input is made by the caller"


def attended(*more, value_is_key=False, **options):
    """What `find_producer` says of the output of an attention whose value is a linear's output, in 4 heads of 16."""
    build = Builder(x=(2, 8, 64), q=(2, 4, 8, 16), mask=(8, 8))
    x, q, mask = build.inputs
    value = build.call(aten.unflatten.int, build.linear(x, "blocks.0.to_v", 64), 2, [4, 16])
    value = build.call(aten.transpose.int, value, 1, 2)
    key = value if value_is_key else q
    more = [mask if item == "mask" else item for item in more]
    node = build.call(aten.scaled_dot_product_attention.default, q, key, value, *more, **options)
    return find_producer(build.call(aten.flatten.using_ints, build.call(aten.transpose.int, node, 1, 2), 2))


@pytest.mark.parametrize(
    ("more", "options", "keeps"),
    [
        ((), {}, True),
        ((None, 0.0, True), {}, True),
        ((), {"is_causal": True, "scale": 0.3}, True),
        (("mask",), {}, False),
        ((None, 0.1), {}, False),
        ((), {"dropout_p": 0.1}, False),
    ],
)
def test_an_attention_keeps_offsets_where_its_weights_sum_to_one(more, options, keeps):
    """A mask for channels can be folded there all the same."""
    found = attended(*more, **options)
    assert isinstance(found, Producer)
    assert found.keeps_offsets == keeps


def test_an_attention_that_mixes_channels_has_no_producer():
    assert attended(enable_gqa=True) == CHANNELS
    assert attended(value_is_key=True) == CHANNELS


@pytest.mark.parametrize(
    ("steps", "keeps"),
    [
        ([(aten.unflatten.int, 1, [4, 16]), (aten.flatten.using_ints, 1, 2)], True),
        ([(aten.unflatten.int, 0, [2, 4]), (aten.flatten.using_ints, 0, 1)], True),
        ([(aten.transpose.int, 0, 1), (aten.permute.default, [1, 0])], True),
        ([(aten.transpose.int, 0, 1)], False),
        ([(aten.unflatten.int, 1, [4, 16])], False),
        ([(aten.unflatten.int, 1, [4, 16]), (aten.transpose.int, 1, 2), (aten.flatten.using_ints, 1, 2)], False),
        ([(aten.unflatten.int, 0, [2, 4]), (aten.flatten.using_ints, 1, 2)], False),
        ([(aten.to.dtype, torch.float32), (aten.to.dtype, torch.bfloat16)], True),
        ([(aten.to.dtype, torch.int32), (aten.to.dtype, torch.bfloat16)], False),
    ],
)
def test_layouts_on_the_way(steps, keeps):
    build = Builder(x=(8, 64))
    linear = build.linear(build.inputs[0], "blocks.0.to_v", 64, bias=False)
    x = linear
    for target, *arguments in steps:
        x = build.call(target, x, *arguments)
    assert find_producer(x) == (Producer(linear, linear.args[1], None, keeps_offsets=True) if keeps else CHANNELS)


def test_nothing_else_may_read_a_value_on_the_way():
    build = Builder(x=(8, 64))
    linear = build.linear(build.inputs[0], "blocks.0.to_v", 64)
    x = build.call(aten.to.dtype, linear, torch.float32)
    assert isinstance(find_producer(x), Producer)
    build.call(aten.silu.default, x)  # what reads x itself is not the producer's affair
    assert isinstance(find_producer(x), Producer)
    build.call(aten.silu.default, linear)
    assert find_producer(x) == "others read the same values"


def test_a_note_names_the_first_of_several():
    assert some_paths(["a"]) == "a"
    assert some_paths(["a", "b", "c"]) == "a and 2 more"
