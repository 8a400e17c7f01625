"""Bad input to a compile: one Hif4Error that names the thing, and nothing left beside the output."""

import json
import os
import re
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import compile as compile_module
from hif4c.compiler import experts as experts_module
from hif4c.compiler import fresh_process
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.recipe import Recipe
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import write_diffusers_model

SINGLE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(models, tmp_path):
    """A copy of a checkpoint of two experts, to be damaged."""
    return shutil.copytree(models["t2v"].directory, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    write_diffusers_model(tmp_path / "model", "t2v", experts=1, shards=True)
    return tmp_path / "model"


@pytest.fixture
def refusal(quick_compile, tmp_path):
    """Compile what must be refused; returns the message once it is seen that nothing was left behind."""

    def run(model, *, output=None, **options):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        target = folder / "out" if output is None else output
        before = sorted(folder.rglob("*"))
        with pytest.raises(Hif4Error) as caught:
            quick_compile(model, target, **options)
        assert sorted(folder.rglob("*")) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_undamaged_models_compile(sharded, quick_compile, tmp_path):
    """So that each refusal below is of what that test changed."""
    quick_compile(sharded, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_missing_shard(sharded, refusal):
    shard = sorted((sharded / "transformer").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    message = refusal(sharded)
    assert shard.name in message
    assert "missing, though diffusion_pytorch_model.safetensors.index.json lists it" in message


def test_a_missing_index(sharded, refusal):
    (sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "no index says how they belong together" in refusal(sharded)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file(model, refusal, keep):
    path = model / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    message = refusal(model)
    assert str(path) in message
    assert "truncated" in message


def test_a_truncated_shard_of_the_second_expert(model, refusal):
    """Both checkpoints are looked at before the first is compiled."""
    path = model / "transformer_2" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert str(path) in refusal(model)


def test_a_header_that_lies(model, refusal):
    path = model / SINGLE
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 2**40)
    path.write_bytes(data)
    assert str(path) in refusal(model)


def test_a_missing_tensor(model, refusal):
    edit(model / SINGLE, lambda tensors: tensors.pop("blocks.1.attn1.to_q.weight"))
    message = refusal(model)
    assert "lacks 1 tensor (blocks.1.attn1.to_q.weight) that the configuration asks for" in message
    assert str(model / "transformer") in message


def test_an_additional_tensor(model, refusal):
    edit(model / SINGLE, lambda tensors: tensors.update({"blocks.2.attn1.to_q.weight": torch.zeros(128, 128)}))
    assert "holds 1 tensor (blocks.2.attn1.to_q.weight) that the configuration has no place for" in refusal(model)


def test_a_tensor_of_another_shape(model, refusal):
    edit(model / SINGLE, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(63)}))
    assert "proj_out.bias [63] where the configuration makes [64]" in refusal(model)


def test_a_tensor_that_was_quantized_already(model, refusal):
    edit(model / SINGLE, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(64, dtype=torch.int8)}))
    assert "proj_out.bias I8" in refusal(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["blocks.1.ffn.net.2.weight", "proj_out.bias", "scale_shift_table"])
def test_a_weight_that_is_not_finite(model, refusal, name, value):
    """Noticed as it is read, that is, when the expert is half written; the quantized and the copied ones alike."""
    edit(model / SINGLE, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert name in refusal(model, recipe={"transformer": "rtn"})


def test_a_weight_that_is_not_finite_in_the_second_expert(model, refusal):
    path = model / "transformer_2" / "diffusion_pytorch_model.safetensors"
    edit(path, lambda tensors: tensors["blocks.0.attn2.to_k.weight"][3, 4:5].fill_(torch.nan))
    assert "blocks.0.attn2.to_k.weight" in refusal(model)


def test_a_model_of_another_class(model, refusal):
    edit_json(model / "transformer" / "config.json", lambda values: values.update(_class_name="FluxTransformer2DModel"))
    message = refusal(model)
    assert "'FluxTransformer2DModel' is not supported" in message
    assert str(model / "transformer" / "config.json") in message


def test_a_pipeline_of_another_class(model, refusal):
    edit_json(model / "model_index.json", lambda values: values.update(_class_name="FluxPipeline"))
    assert "'FluxPipeline' is not supported" in refusal(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_config_that_is_not_json(model, refusal, text):
    (model / "transformer" / "config.json").write_text(text)
    assert str(model / "transformer" / "config.json") in refusal(model)


def test_a_config_that_is_not_that_of_the_weights(model, refusal):
    edit_json(model / "transformer" / "config.json", lambda values: values.update(num_layers=3))
    assert "blocks.2." in refusal(model)


def test_a_temporal_patch(tmp_path, refusal):
    write_diffusers_model(tmp_path / "model", "t2v", experts=1, patch_size=[2, 2, 2])
    assert "patch_size [2, 2, 2]: only a temporal patch of 1 is supported" in refusal(tmp_path / "model")


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_component_that_is_missing(model, refusal, mode):
    message = refusal(model, components=mode, golden=False)
    assert f"{model / 'vae'}: is missing, though model_index.json names it" in message


def test_a_component_with_pickled_weights_only(model, refusal):
    (model / "vae").mkdir()
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(model, components="copy", golden=False)
    assert f"{model / 'vae'}: has only pickled weights" in message


def with_vae(model, weights):
    (model / "vae").mkdir()
    (model / "vae" / "config.json").write_text("{}")
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(weights)


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_component_that_is_truncated(model, refusal, mode):
    weights = (model / SINGLE).read_bytes()
    with_vae(model, weights[:-1])
    message = refusal(model, components=mode, golden=False)
    assert "vae/diffusion_pytorch_model.safetensors" in message
    assert "truncated" in message


def test_a_component_outside_of_the_model(model, refusal):
    """Named by model_index.json: nothing is read from there or written beside the artifact."""
    with_vae(model, (model / SINGLE).read_bytes())
    (model.parent / "outside").mkdir()
    (model.parent / "outside" / "config.json").write_text("{}")
    for name in ("../outside", str(model.parent / "outside")):
        edit_json(model / "model_index.json", lambda values, name=name: values.update({name: ["diffusers", "Any"]}))
        message = refusal(model, components="copy", golden=False)
        assert f"{model / 'model_index.json'}: a Wan pipeline has no component '../outside'" in message


def test_a_component_of_another_class_or_with_code(model, refusal):
    with_vae(model, (model / SINGLE).read_bytes())
    (model / "vae" / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert "vae/config.json: has auto_map" in refusal(model, components="copy", golden=False)
    edit_json(model / "model_index.json", lambda values: values.update(vae=["diffusers", "AutoencoderKL"]))
    assert "only diffusers.AutoencoderKLWan can be used" in refusal(model, components="copy", golden=False)


def test_an_unknown_way_with_components(model, refusal):
    assert "components 'move': choose one of copy, link, none" in refusal(model, components="move")


@pytest.mark.parametrize("kind", ["directory", "file", "broken link"])
def test_an_output_that_exists(model, tmp_path, refusal, kind):
    output = tmp_path / "results" / "out"
    output.parent.mkdir()
    if kind == "directory":
        output.mkdir()
        (output / "precious").write_text("mine")
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to("nowhere")
    assert f"{output}: already exists" in refusal(model, output=output)
    if kind == "directory":
        assert (output / "precious").read_text() == "mine"


def test_an_output_below_a_file(model, tmp_path, refusal):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "file").write_text("mine")
    message = refusal(model, output=tmp_path / "results" / "file" / "out")
    assert str(tmp_path / "results" / "file") in message


def test_a_directory_that_is_no_model(tmp_path, refusal):
    (tmp_path / "empty" / "transformer").mkdir(parents=True)
    assert str(tmp_path / "empty") in refusal(tmp_path / "empty")


def test_a_glob_of_the_recipe_that_matches_nothing(model, tmp_path):
    options = CompileOptions({"transformer": Recipe("mine", keep_high=("blocks.99.*",))}, components="none")
    with pytest.raises(Hif4Error, match=r"keep_high 'blocks.99.\*' matches no linear"):
        compile_model(str(model), tmp_path / "results" / "out", options, lambda event, value: None)
    assert not (tmp_path / "results").exists()


def test_parents_that_were_made_are_removed_again(model, refusal, tmp_path):
    edit(model / SINGLE, lambda tensors: tensors["proj_out.bias"][:1].fill_(torch.nan))
    refusal(model, output=tmp_path / "results" / "a" / "b" / "out", recipe={"transformer": "rtn"})
    assert not (tmp_path / "results" / "a").exists()


def test_a_full_disk(model, refusal, monkeypatch, tmp_path):
    """Known before anything is made."""
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr("hif4c.compiler.disk_space.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(compile_module, "partial_directory", None)
    target = tmp_path / "results" / "out"
    message = refusal(model, output=target)
    assert re.fullmatch(
        rf"{target}: compiling needs .* MB of disk there \(.*\) and 1\.0 kB are free in {target.parent}; free some, or "
        r"choose another place\.",
        message,
    )


def test_a_full_disk_that_an_unfinished_compile_has_filled(model, refusal, monkeypatch, tmp_path):
    """What is there already is not needed again: the compile goes on to what stops it next, here a missing --resume."""
    usage = SimpleNamespace(total=10**9, used=10**9 - 10**6, free=10**6)
    monkeypatch.setattr("hif4c.compiler.disk_space.shutil.disk_usage", lambda path: usage)
    target = tmp_path / "results" / "out"
    assert "of disk there" in refusal(model, output=target)
    unfinished = target.parent / ".out.partial" / "artifact"
    unfinished.mkdir(parents=True)
    (unfinished / "weights").write_bytes(bytes(8_000_000))
    (unfinished.parent / "inputs.json").write_text("{}")
    assert "continue it with --resume" in refusal(model, output=target)


@pytest.mark.parametrize(
    ("ends", "sentence", "kept"),
    [
        (
            "import sys; sys.exit('Hif4Error: something')",
            "the written artifact does not verify in a fresh process, so it was not kept: Hif4Error: something",
            [],
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "a process that verifies the artifact was ended by SIGKILL; .* continue with --resume",
            [".out.partial"],
        ),
    ],
    ids=["wrong", "killed"],
)
def test_an_artifact_that_does_not_verify(models, captures, tmp_path, monkeypatch, ends, sentence, kept):
    """One sentence with the reason, and no directory; but where nobody knows, what is finished stays."""
    monkeypatch.setattr(experts_module, "capture", captures)
    monkeypatch.setattr(fresh_process, "_CODE", ends)
    options = CompileOptions({"transformer": Recipe("rtn")}, components="none", golden=False)
    with pytest.raises(Hif4Error, match=sentence):
        compile_model(str(models["t2v"].directory), tmp_path / "out", options, lambda event, value: None)
    assert [path.name for path in tmp_path.iterdir()] == kept
