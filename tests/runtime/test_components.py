"""The rest of a pipeline as untrusted input: what diffusers and transformers would read is checked before they do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save

from hif4c.runtime import components, load_pipeline, pipeline
from hif4c.runtime.components import FORBIDDEN_KEYS, check_components, component_names
from hif4c.runtime.errors import Hif4Error
from tests.support.forging import forge

WEIGHTS = save({"weight": torch.ones(64)})
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": [None, None],
    "transformer_2": ["anything", "At all"],  # never loaded from here
    "image_encoder": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def as_json(value):
    return json.dumps(value).encode()


def files(**changes):
    """A whole pipeline directory as relative path -> bytes, but the changes; None leaves a file out."""
    found = {
        "model_index.json": as_json(INDEX),
        "scheduler/scheduler_config.json": as_json({"_class_name": "UniPCMultistepScheduler"}),
        "text_encoder/config.json": as_json({"d_model": 64, "auto_map": None, "layers": [{"name": "first"}]}),
        "text_encoder/model.safetensors.index.json": as_json({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}),
        **{f"text_encoder/{shard}": WEIGHTS for shard in SHARDS},
        "tokenizer/tokenizer.json": as_json({"version": "1.0"}),
        "tokenizer/special_tokens_map.json": as_json([]),
        "vae/config.json": as_json({"_class_name": "AutoencoderKLWan"}),
        "vae/diffusion_pytorch_model.safetensors": WEIGHTS,
    }
    found |= {
        name: data if data is None or isinstance(data, bytes) else as_json(data) for name, data in changes.items()
    }
    return {name: data for name, data in found.items() if data is not None}


def index(**changes):
    return {"model_index.json": {**INDEX, **changes}}


def nested(depth):
    value = {"auto_map": {"AutoModel": "evil.Model"}}
    for _ in range(depth):
        value = {"a": [value]}
    return value


BAD = {
    "no index": ({"model_index.json": None}, "model_index.json: is missing"),
    "an index that is not JSON": ({"model_index.json": b"{"}, "model_index.json: is not valid JSON"),
    "an index that is a list": ({"model_index.json": []}, "model_index.json: must hold a JSON object"),
    "another pipeline": (index(_class_name="FluxPipeline"), "pipeline class 'FluxPipeline' is not supported"),
    "a pipeline in a file": (index(_class_name=["../evil", "Pipeline"]), "is not supported"),
    "unknown component": (index(controlnet=["diffusers", "ControlNet"]), "no component 'controlnet'"),
    "component outside": (index(**{"../outside": ["diffusers", "AutoencoderKLWan"]}), "no component '../outside'"),
    "absolute component": (index(**{"/etc": ["diffusers", "AutoencoderKLWan"]}), "no component '/etc'"),
    "unknown class": (index(vae=["diffusers", "AutoencoderKL"]), "vae is ['diffusers', 'AutoencoderKL'], but only"),
    "class of another component": (index(vae=["transformers", "UMT5EncoderModel"]), "but only diffusers.Auto"),
    "library": (index(vae=["evil", "AutoencoderKLWan"]), "but only diffusers.AutoencoderKLWan can be used"),
    "library that is a list": (index(vae=[["diffusers"], "AutoencoderKLWan"]), "but only"),
    "class that is a list": (index(vae=["diffusers", ["AutoencoderKLWan"]]), "but only"),
    "half a class": (index(vae=["diffusers"]), "but only"),
    "three halves": (index(vae=["diffusers", "AutoencoderKLWan", "evil"]), "but only"),
    "half absent": (index(vae=[None, "AutoencoderKLWan"]), "but only"),
    "missing folder": (
        {"vae/config.json": None, "vae/diffusion_pytorch_model.safetensors": None},
        "vae: is missing, though model_index.json names it",
    ),
    "missing weights": ({"vae/diffusion_pytorch_model.safetensors": None}, "vae: holds no .safetensors weights"),
    "pickled weights": (
        {"vae/diffusion_pytorch_model.safetensors": None, "vae/diffusion_pytorch_model.bin": b"\x80\x04."},
        "vae: holds no .safetensors weights",
    ),
    "truncated weights": ({"vae/diffusion_pytorch_model.safetensors": WEIGHTS[:-1]}, "truncated"),
    "weights cut in the header": ({"vae/diffusion_pytorch_model.safetensors": WEIGHTS[:9]}, "diffusion_pytorch_model"),
    "empty weights": ({"vae/diffusion_pytorch_model.safetensors": b""}, "vae/diffusion_pytorch_model.safetensors"),
    "truncated shard": ({f"text_encoder/{SHARDS[1]}": WEIGHTS[:-7]}, SHARDS[1]),
    "missing shard": ({f"text_encoder/{SHARDS[1]}": None}, f"{SHARDS[1]}: is missing, though model.safetensors.index"),
    "shard outside": (
        {"text_encoder/model.safetensors.index.json": {"weight_map": {"a": "../vae/model.safetensors"}}},
        "is missing, though",
    ),
    "no weight map": ({"text_encoder/model.safetensors.index.json": {}}, "weight_map does not say"),
    "weight map that is a list": ({"text_encoder/model.safetensors.index.json": {"weight_map": [1]}}, "weight_map"),
    "shards that are no names": (
        {"text_encoder/model.safetensors.index.json": {"weight_map": {"a": 1, "b": ["x"], "c": "y"}}}, "weight_map",
    ),
    "shard index that is a list": ({"text_encoder/model.safetensors.index.json": []}, "must hold a JSON object"),
    "config that is not JSON": ({"vae/config.json": b"\xff"}, "vae/config.json: is not valid JSON"),
    "config nested without end": ({"vae/config.json": b"[" * 10**5}, "vae/config.json: is not valid JSON"),
    "tokenizer that is not JSON": ({"tokenizer/tokenizer.json": b""}, "tokenizer.json: is not valid JSON"),
    "nested code": ({"text_encoder/config.json": nested(3)}, "text_encoder/config.json: has auto_map"),
    "deeply nested code": ({"text_encoder/config.json": nested(90)}, "text_encoder/config.json: has auto_map"),
    "code in a tokenizer": ({"tokenizer/tokenizer_config.json": nested(0)}, "tokenizer_config.json: has auto_map"),
    "code in a deeper folder": ({"vae/more/config.json": nested(1)}, "vae/more/config.json: has auto_map"),
    "another model": (
        {"text_encoder/adapter_config.json": {"base_model_name_or_path": "evil/model"}}, "has base_model_name_or_path",
    ),
    "a kernel": ({"text_encoder/config.json": {"_attn_implementation": "evil/kernel"}}, "has _attn_implementation"),
}  # fmt: skip


def write(directory, content):
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def test_a_whole_pipeline_is_accepted(tmp_path):
    check_components(write(tmp_path, files()))
    assert component_names(INDEX, tmp_path) == ["scheduler", "text_encoder", "tokenizer", "vae"]


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named(what, tmp_path):
    changes, words = BAD[what]
    write(tmp_path, files(**changes))
    with pytest.raises(Hif4Error) as caught:
        check_components(tmp_path)
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize("key", FORBIDDEN_KEYS)
@pytest.mark.parametrize("name", ["vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_keys_that_lead_to_code_elsewhere(key, name, tmp_path):
    for value in ("evil/repository", {"AutoModel": "evil.Model"}, False, 0):
        write(tmp_path, files(**{name: {"a": [1, {"b": {key: value}}]}}))
        with pytest.raises(Hif4Error, match=rf"{name}: has {key}, which may load code from elsewhere; remove it"):
            check_components(tmp_path)
    check_components(write(tmp_path, files(**{name: {"a": [{key: None}]}})))


def test_every_component_has_classes_of_its_own_library():
    """The list itself: data classes only, nothing that picks a class from a file (Auto...)."""
    assert components.COMPONENT_CLASSES.keys() >= {"scheduler", "tokenizer", "text_encoder", "vae"}
    for name, libraries in components.COMPONENT_CLASSES.items():
        assert set(libraries) <= {"diffusers", "transformers"}, name
        kinds = {kind for found in libraries.values() for kind in found} - {"AutoencoderKLWan"}
        assert not any(kind.startswith(("Auto", "Diffusion")) for kind in kinds), name


@pytest.fixture
def forged(artifacts, tmp_path, monkeypatch):
    """(changes) -> an artifact with a pipeline folder and digests that fit; diffusers must not be reached."""

    def refuse(*arguments, **keywords):
        raise AssertionError("diffusers was reached")

    monkeypatch.setattr(pipeline, "load_components", refuse)
    path = shutil.copytree(artifacts("t2v", "rtn"), tmp_path / "artifact")

    def make(changes):
        listed = {f"pipeline/{name}": data for name, data in files(**changes).items() if not name.endswith(".bin")}
        forge(path, **listed)
        return path

    return make


def test_a_whole_forged_pipeline_reaches_diffusers(forged):
    """So that the refusals below are of what was changed."""
    with pytest.raises(AssertionError, match="diffusers was reached"):
        load_pipeline(forged({}))


@pytest.mark.parametrize("what", [name for name in BAD if name != "no index"])
def test_a_forged_artifact_is_refused_before_diffusers_is_called(what, forged):
    changes, words = BAD[what]
    with pytest.raises(Hif4Error) as caught:
        load_pipeline(forged(changes))
    assert words in str(caught.value)


def test_hashes_are_compared_before_anything_is_read(forged):
    path = forged({})
    (path / "pipeline/vae/config.json").write_bytes(as_json({"_class_name": "AutoencoderKLWaN"}))
    with pytest.raises(Hif4Error, match=r"vae/config.json: its content does not match the manifest"):
        load_pipeline(path)


def test_a_device_that_cannot_be_used_is_named_before_anything_is_loaded(forged):
    path = forged({})
    for device in ("foo", "meta", "cuda:99", "cpu:x"):
        with pytest.raises(Hif4Error, match=rf"device '{device}' cannot be used here"):
            load_pipeline(path, device=device)
