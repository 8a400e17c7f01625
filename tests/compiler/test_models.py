import json

import pytest
from diffusers import WanTransformer3DModel
from torch import device

from hif4c.compiler.models import (
    BUILTIN_NAMES,
    PipelineConfig,
    WanConfig,
    load_builtin,
    read_json_object,
    tiny_directory,
)
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import VARIANTS, small_config


def test_published_models():
    t2v, i2v, ti2v = (load_builtin(name) for name in BUILTIN_NAMES[1:])
    assert [model.hub_id for model in (t2v, i2v, ti2v)] == [
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    ]
    assert t2v.pipeline == PipelineConfig("WanPipeline", 0.875, False)
    assert i2v.pipeline == PipelineConfig("WanImageToVideoPipeline", 0.9, False)
    assert ti2v.pipeline == PipelineConfig("WanPipeline", None, True)
    assert list(t2v.experts) == list(i2v.experts) == ["transformer", "transformer_2"]
    assert list(ti2v.experts) == ["transformer"]
    for model, channels, width in ((t2v, (16, 16), 5120), (i2v, (36, 16), 5120), (ti2v, (48, 48), 3072)):
        for config in model.experts.values():
            assert (config.in_channels, config.out_channels) == channels
            assert config.inner_dim == width
            assert config.image_dim is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    # 14.29 and 5.00 billion, as the names say; a wrong width or depth misses by far more than a percent.
    [("Wan2.2-T2V-A14B", 14.29e9), ("Wan2.2-I2V-A14B", 14.29e9), ("Wan2.2-TI2V-5B", 5.0e9)],
)
def test_published_configs_build_models_of_their_size(name, parameters):
    arguments = load_builtin(name).experts["transformer"].to_dict()
    del arguments["_class_name"]
    with device("meta"):
        model = WanTransformer3DModel(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_tiny_is_files_not_a_description():
    assert tiny_directory().name == "wan_tiny"
    with pytest.raises(Hif4Error, match="wan-tiny: not a published model"):
        load_builtin("wan-tiny")


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_round_trip(variant):
    values = {**small_config(variant), "_name_or_path": "/home/someone/model"}
    config = WanConfig.from_dict(values, "config.json")
    assert config.private["_name_or_path"] == "/home/someone/model"
    written = config.to_dict()
    assert "/home" not in json.dumps(written)
    assert written == {key: value for key, value in values.items() if key == "_class_name" or key[0] != "_"}
    again = WanConfig.from_dict(json.loads(json.dumps(written)), "again")
    assert again == config
    assert hash(again) == hash(config)


def test_config_of_the_installed_diffusers_is_accepted(tmp_path):
    with device("meta"):
        WanTransformer3DModel(num_layers=1).save_config(tmp_path)
    config = WanConfig.from_dict(read_json_object(tmp_path / "config.json"), "config.json")
    assert (config.num_layers, config.inner_dim, config.text_dim) == (1, 5120, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel' is not supported.*WanTransformer3DModel"),
        ({"_class_name": None}, "None is not supported"),
        ({"num_layers": -1}, "num_layers must be a whole number"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"num_layers": 2.0}, "num_layers"),
        ({"ffn_dim": 10**12}, "ffn_dim"),
        ({"text_dim": "4096"}, "text_dim .* got '4096'"),
        ({"attention_head_dim": 33}, "attention_head_dim must be even"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": 2}, "patch_size"),
        ({"patch_size": [1, 2, 0]}, "patch_size"),
        ({"cross_attn_norm": 1}, "cross_attn_norm must be true or false"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not supported"),
        ({"eps": 0}, "eps"),
        ({"eps": "1e-6"}, "eps"),
        ({"image_dim": -5}, "image_dim"),
        ({"image_dim": 1280}, "image_dim or added_kv_proj_dim is set, as in Wan2.1.*only Wan2.2 is compiled"),
        ({"added_kv_proj_dim": 128}, "image_dim or added_kv_proj_dim is set"),
        ({"patch_size": [2, 2, 2]}, r"patch_size \[2, 2, 2\]: only a temporal patch of 1 is supported"),
        ({"vace_layers": [1], "vace_in_channels": 96}, "has no vace_in_channels, vace_layers"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(Hif4Error, match=rf"some/config\.json: .*{message}"):
        WanConfig.from_dict({**small_config(), **changes}, "some/config.json")


@pytest.mark.parametrize("key", ["_class_name", "num_layers", "patch_size", "eps", "qk_norm", "cross_attn_norm"])
def test_missing_keys_are_named(key):
    values = small_config()
    del values[key]
    with pytest.raises(Hif4Error, match=rf"config\.json: .*{key}"):
        WanConfig.from_dict(values, "config.json")


def test_optional_keys_may_be_missing():
    values = small_config()
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        del values[key]
    assert WanConfig.from_dict(values, "x") == WanConfig.from_dict(small_config(), "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "'FluxPipeline' is not supported; hif4c compiles WanPipeline and"),
        ({}, "None is not supported"),
        ({"_class_name": "WanPipeline", "boundary_ratio": 1.5}, "boundary_ratio .* got 1.5"),
        ({"_class_name": "WanPipeline", "boundary_ratio": True}, "boundary_ratio"),
        ({"_class_name": "WanPipeline", "boundary_ratio": "0.9"}, "boundary_ratio"),
        ({"_class_name": "WanPipeline", "expand_timesteps": 1}, "expand_timesteps"),
    ],
)
def test_bad_pipelines_are_named(values, message):
    with pytest.raises(Hif4Error, match=rf"model_index\.json: .*{message}"):
        PipelineConfig.from_dict(values, "model_index.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[1]", "JSON object"), (b"[" * 10**5, "not valid JSON")],
)
def test_bad_json_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Hif4Error, match=rf"config\.json: .*{message}"):
        read_json_object(tmp_path / "config.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(Hif4Error, match=r"config\.json: not found"):
        read_json_object(tmp_path / "config.json")
    with pytest.raises(Hif4Error, match="cannot be read"):
        read_json_object(tmp_path)
