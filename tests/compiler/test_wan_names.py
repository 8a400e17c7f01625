import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from hif4c.compiler.wan_names import is_original_layout, to_diffusers_name, to_original_name
from tests.support.checkpoints import VARIANTS, build_transformer, random_inputs, small_config

# As in wan/modules/model.py of the original repository, written out so that the test does not lean on the map itself.
ORIGINAL = [
    *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("time_projection.1", "head.head"),
    *(f"blocks.1.{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    *("blocks.1.norm3", "blocks.1.ffn.0", "blocks.1.ffn.2"),
]
ORIGINAL_NAMES = [
    *(f"{module}.{leaf}" for module in ORIGINAL for leaf in ("weight", "bias")),
    *(
        f"blocks.1.{attention}.{norm}.weight"
        for attention in ("self_attn", "cross_attn")
        for norm in ("norm_q", "norm_k")
    ),
    *("blocks.1.modulation", "head.modulation"),
]


def test_names_are_those_of_diffusers_own_converter():
    theirs = convert_wan_transformer_to_diffusers({name: name for name in ORIGINAL_NAMES})
    assert {to_diffusers_name(name): name for name in ORIGINAL_NAMES} == theirs


def test_names_cover_exactly_the_models_parameters():
    ours = {to_diffusers_name(name.replace("blocks.1.", f"blocks.{i}.")) for name in ORIGINAL_NAMES for i in (0, 1)}
    assert ours == set(build_transformer().state_dict())


def test_inverse():
    for name in ORIGINAL_NAMES:
        assert to_original_name(to_diffusers_name(name)) == name
    for name in build_transformer().state_dict():
        assert to_diffusers_name(to_original_name(name)) == name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_renamed_checkpoint_computes_the_same(variant):
    model = build_transformer(variant)
    original = {to_original_name(name): tensor for name, tensor in model.state_dict().items()}
    config = {key: value for key, value in small_config(variant).items() if not key.startswith("_")}
    again = WanTransformer3DModel(**config).eval()
    again.load_state_dict({to_diffusers_name(name): tensor for name, tensor in original.items()}, strict=True)
    inputs = random_inputs(variant)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        found = again(**inputs, return_dict=False)[0]
    assert expected.abs().max() > 0.1
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        "img_emb.proj.0.weight",
        "blocks.0.cross_attn.k_img.weight",
        "blocks.0.norm1.weight",
        "blocks.0.self_attn.norm_q.bias",
        "blocks.x.ffn.0.weight",
        "blocks.0.attn1.to_q.weight",
        "blocks.0.ffn.0.weight.extra",
        "modulation",
        "",
    ],
)
def test_other_names_are_unknown(name):
    assert to_diffusers_name(name) is None


def test_prefix_of_repackaged_files_is_dropped():
    assert to_diffusers_name("model.diffusion_model.blocks.7.ffn.2.bias") == "blocks.7.ffn.net.2.bias"


def test_layout_is_told_by_the_names():
    assert is_original_layout(ORIGINAL_NAMES)
    assert is_original_layout(["patch_embedding.bias", "blocks.0.norm3.weight"])
    assert not is_original_layout(build_transformer().state_dict())
    assert not is_original_layout([])
