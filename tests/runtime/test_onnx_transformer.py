import sys

import onnxruntime
import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_transformer import OnnxTransformer, open_experts
from hif4c.runtime.transformer import TransformerOutput
from tests.support.small_onnx import CONFIG, write_small_onnx


def make_inputs(timestep=500.0, batch=2):
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(batch, 3, 2, 4, 6, generator=generator)
    text = torch.randn(batch, 7, 5, generator=generator)
    return video, torch.full((batch,), timestep), text


def expected(sample, factor):
    video, timestep, text = (item.float() for item in sample)
    return video * factor + timestep.max() + text.mean()


def test_configuration_and_dtype_as_diffusers_has_them(tmp_path):
    model = OnnxTransformer(write_small_onnx(tmp_path / "m.onnx"))
    assert model.config.in_channels == model.config["in_channels"] == 3
    assert dict(model.config) == CONFIG
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert not model.training
    assert model.to("cpu", torch.float32) is model
    with pytest.raises(Hif4Error, match=r"computes in torch.float32 and cannot be converted to torch.bfloat16"):
        model.to(torch.bfloat16)


def test_both_forms_of_output_and_inputs_of_any_number_type(tmp_path):
    model = OnnxTransformer(write_small_onnx(tmp_path / "m.onnx"))
    video, timestep, text = sample = make_inputs()
    with model.cache_context("cond"):
        (tensor,) = model(*sample, return_dict=False)
        output = model(hidden_states=video, timestep=timestep, encoder_hidden_states=text, attention_kwargs=None)
    assert isinstance(output, TransformerOutput)
    assert torch.equal(output.sample, tensor)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, expected(sample, 2.0))
    narrow = (video.bfloat16(), timestep.long(), text.bfloat16())
    torch.testing.assert_close(model(*narrow).sample, expected(narrow, 2.0))
    transposed = (video.transpose(3, 4).contiguous().transpose(3, 4), timestep, text)
    assert torch.equal(model(*transposed).sample, tensor)


def test_the_program_of_the_largest_timestep_runs(tmp_path):
    ranges = {"bf16_timesteps": [[0, 299], [900, 950]]}
    main = write_small_onnx(tmp_path / "main.onnx", **ranges)
    bf16 = write_small_onnx(tmp_path / "bf16.onnx", factor=3.0, variant="bf16", **ranges)
    for model in (OnnxTransformer(main, bf16), OnnxTransformer(bf16, main)):
        for timestep, factor in ((0, 3.0), (299, 3.0), (299.5, 2.0), (900, 3.0), (951, 2.0)):
            sample = make_inputs(timestep)
            torch.testing.assert_close(model(*sample).sample, expected(sample, factor), msg=str(timestep))
    video, _, text = make_inputs()
    mixed = (video, torch.tensor([10.0, 600.0]), text)
    torch.testing.assert_close(model(*mixed).sample, expected(mixed, 2.0))
    with pytest.raises(Hif4Error, match=r"at timesteps 0 to 299, 900 to 950 its expert runs another program"):
        OnnxTransformer(main)


def test_a_session_is_made_when_it_is_first_needed(tmp_path, monkeypatch):
    ranges = {"bf16_timesteps": [[0, 299]]}
    main = write_small_onnx(tmp_path / "main.onnx", **ranges)
    bf16 = write_small_onnx(tmp_path / "bf16.onnx", variant="bf16", **ranges)
    made, original = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, **rest: made.append((path, rest)) or original(path, **rest)
    )
    options = onnxruntime.SessionOptions()
    model = OnnxTransformer(main, bf16, session_options=options)
    assert made == []
    for timestep in (500.0, 600.0, 5.0):
        model(*make_inputs(timestep))
    assert [path for path, _ in made] == [str(main), str(bf16)]
    assert all(rest == {"sess_options": options, "providers": ["CPUExecutionProvider"]} for _, rest in made)


def test_inputs_that_do_not_fit(tmp_path):
    model = OnnxTransformer(write_small_onnx(tmp_path / "m.onnx"))
    video, timestep, text = make_inputs()
    with pytest.raises(Hif4Error, match=r"expected \[B, 3, F, H, W\]"):
        model(video[:, :2], timestep, text)
    with pytest.raises(Hif4Error, match=r"timestep \[1\]: expected \[2\]"):
        model(video, timestep[:1], text)
    with pytest.raises(Hif4Error, match="takes neither"):
        model(video, timestep, text, encoder_hidden_states_image=text)
    with pytest.raises(Hif4Error, match="takes neither"):
        model(video, timestep, text, attention_kwargs={"scale": 1.0})


def test_experts_are_found_by_what_the_files_say(tmp_path):
    second = {"expert": "transformer_2", "bf16_timesteps": [[0, 299]]}
    paths = [
        write_small_onnx(tmp_path / "a.onnx", variant="bf16", **second),
        write_small_onnx(tmp_path / "b.onnx"),
        write_small_onnx(tmp_path / "c.onnx", **second),
    ]
    experts = open_experts(paths)
    assert list(experts) == ["transformer", "transformer_2"]
    assert [model.expert for model in experts.values()] == list(experts)
    assert experts["transformer_2"].bf16_timesteps == ((0.0, 299.0),)
    write_small_onnx(paths[1], digest="1" * 64)
    with pytest.raises(Hif4Error, match="were exported from 2 artifacts"):
        open_experts(paths)
    with pytest.raises(Hif4Error, match="are not the programs of one expert of one artifact"):
        OnnxTransformer(paths[1], paths[0])
    with pytest.raises(Hif4Error, match="are not the programs of one expert"):
        OnnxTransformer(paths[1], paths[1])
    with pytest.raises(Hif4Error, match=r"a\.onnx: the expert's main program is not among them"):
        OnnxTransformer(paths[0])


def test_what_onnxruntime_refuses_is_one_sentence(tmp_path, monkeypatch):
    path = write_small_onnx(tmp_path / "m.onnx", change=lambda model: setattr(model.graph.node[0], "op_type", "Mull"))
    with pytest.raises(Hif4Error, match=r"m\.onnx: onnxruntime cannot load it \(.*Mull.*\)\.$") as caught:
        OnnxTransformer(path)(*make_inputs())
    assert "\n" not in str(caught.value)
    (tmp_path / "m.bin").write_bytes(bytes(200))
    path = write_small_onnx(tmp_path / "m.onnx", change=lambda model: model.graph.initializer[0].dims.__setitem__(0, 2))
    with pytest.raises(Hif4Error, match=r"m\.onnx: onnxruntime cannot load it"):
        OnnxTransformer(path)(*make_inputs())


def test_providers(tmp_path, monkeypatch):
    path = write_small_onnx(tmp_path / "m.onnx")
    with pytest.raises(Hif4Error, match=r"has no provider CUDAExecutionProvider here; it has .*CPUExecutionProvider"):
        OnnxTransformer(path, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Hif4Error, match=r"needs the package onnxruntime; install it with `pip install"):
        OnnxTransformer(path)
