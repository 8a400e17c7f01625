import dataclasses

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu import registry as gpu_registry
from hif4c.runtime.graph import Ref
from hif4c.runtime.transformer import CompiledTransformer, TransformerOutput, load
from tests.support.checkpoints import VARIANTS


@pytest.fixture(scope="module")
def loaded(artifacts):
    """variant, recipe -> the first expert; shared, so not to be moved."""
    made = {}

    def get(variant="t2v", recipe="rtn"):
        if (variant, recipe) not in made:
            made[variant, recipe] = load(artifacts(variant, recipe))
        return made[variant, recipe]

    return get


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_and_dtype_as_diffusers_has_them(variant, loaded, models):
    model, original = loaded(variant), models[variant].experts["transformer"]
    for key, value in original.config.items():
        if not key.startswith("_"):
            expected = list(value) if isinstance(value, tuple) else value
            assert getattr(model.config, key) == expected, key
            assert model.config[key] == expected
            assert model.config.get(key) == expected
    assert model.dtype == original.dtype == torch.bfloat16
    assert model.device == original.device
    assert not model.training
    with pytest.raises(AttributeError, match="has no nonsense"):
        _ = model.config.nonsense


def test_both_forms_of_output(loaded, inputs):
    sample = inputs()
    with loaded().cache_context("cond"):
        (tensor,) = loaded()(*sample, return_dict=False)
        output = loaded()(*sample)
    assert isinstance(output, TransformerOutput)
    assert [field.name for field in dataclasses.fields(output)] == ["sample"]
    assert torch.equal(output.sample, tensor)
    assert tensor.dtype == torch.bfloat16
    video, timestep, text = sample
    by_name = loaded()(
        hidden_states=video, timestep=timestep, encoder_hidden_states=text, attention_kwargs=None, return_dict=False
    )
    assert torch.equal(by_name[0], tensor)


def test_any_number_type_of_timestep_and_any_float_of_latents(loaded, inputs):
    video, _, text = inputs()
    timesteps = torch.tensor([999, 3])
    expected = loaded()(video, timesteps, text).sample
    for dtype in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(loaded()(video, timesteps.to(dtype), text).sample, expected)
    # bf16 values in a wider dtype are the same values.
    assert torch.equal(loaded()(video.float(), timesteps, text.double()).sample, expected)
    assert not torch.equal(loaded()(video, timesteps - 1, text).sample, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_close_to_the_original_and_weight_only_closer(variant, loaded, models, inputs):
    """Rounding a Gaussian to HiF4 leaves a relative error of some 0.09 (the format's own test measures its square).

    Every linear's output then has that error from the weights and again, with W4A4, from its input; the residual stream
    and the unquantized boundaries dilute it. So the whole stays around 0.1: 0.3 is no agreement by chance (unrelated
    outputs of equal size are at 1.4), and the bf16 model's own noise, 0.01, is a lower bound.
    """
    original = models[variant].experts["transformer"]
    for shape in ((1, 1, 2, 2, 1), (2, 3, 8, 6, 7), (1, 4, 6, 10, 3)):
        sample = inputs(variant, *shape)
        with torch.no_grad():
            expected = original(*sample, return_dict=False)[0]
        errors = {}
        for recipe in ("weight-only", "rtn") if variant != "i2v" else ("rtn",):
            found = loaded(variant, recipe)(*sample, return_dict=False)[0]
            assert found.shape == expected.shape
            assert found.isfinite().all()
            errors[recipe] = relative(found, expected)
        assert 0.01 < errors.get("weight-only", 0.02) < errors["rtn"] < 0.3, (shape, errors)


def test_the_second_expert_is_the_second_model(artifacts, models, inputs):
    sample = inputs()
    found = load(artifacts("t2v", "rtn"), "transformer_2")(*sample).sample
    with torch.no_grad():
        first, second = (model(*sample, return_dict=False)[0] for model in models["t2v"].experts.values())
    assert relative(found, second) < 0.3 < relative(found, first)


BAD = {
    "channels": (lambda v, t, e: (v[:, :15], t, e), "hidden_states [2, 15, 3, 8, 6]: expected [B, 16, F, H, W]"),
    "dimensions": (lambda v, t, e: (v[0], t, e), "hidden_states [16, 3, 8, 6]"),
    "odd height": (lambda v, t, e: (v[..., :7, :], t, e), "latent height 7 is not a multiple of the patch size 2"),
    "odd width": (lambda v, t, e: (v[..., :5], t, e), "latent width 5 is not a multiple of the patch size 2"),
    "no height": (lambda v, t, e: (v[..., :0, :], t, e), "latent height 0"),
    "no frames": (lambda v, t, e: (v[:, :, :0], t, e), "0 latent frames: the model has positions for 1 to 1024"),
    "frames": (lambda v, t, e: (v[:, :, :1].expand(2, 16, 1025, 8, 6), t, e), "1025 latent frames"),
    "height": (lambda v, t, e: (v[..., :1, :].expand(2, 16, 3, 2050, 6), t, e), "height 2050: the model has"),
    "timestep": (lambda v, t, e: (v, t[:1], e), "timestep [1]: expected [2]"),
    "expanded timestep": (lambda v, t, e: (v, t[:, None].expand(2, 36), e), "timestep [2, 36]: expected [2]"),
    "text width": (lambda v, t, e: (v, t, e[..., :63]), "encoder_hidden_states [2, 7, 63]: expected [2, text, 64]"),
    "text batch": (lambda v, t, e: (v, t, e[:1]), "encoder_hidden_states [1, 7, 64]: expected [2, text, 64]"),
    "no text": (lambda v, t, e: (v, t, e[:, :0]), "encoder_hidden_states [2, 0, 64]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_inputs_that_do_not_fit(what, loaded, inputs):
    change, words = BAD[what]
    with pytest.raises(Hif4Error) as caught:
        loaded()(*change(*inputs()))
    assert words in str(caught.value)


def test_expanded_timesteps_are_one_a_token(loaded, inputs):
    video, timestep, text = inputs("ti2v")
    with pytest.raises(Hif4Error, match=r"timestep \[2\]: expected \[2, 36\] for these latents"):
        loaded("ti2v")(video, timestep[:, 0], text)


def test_what_a_compiled_transformer_does_not_take(loaded, inputs):
    with pytest.raises(Hif4Error, match="encoder_hidden_states_image: this model was compiled without"):
        loaded()(*inputs(), encoder_hidden_states_image=torch.zeros(2, 1, 64))
    with pytest.raises(Hif4Error, match=r"attention_kwargs \['scale'\]"):
        loaded()(*inputs(), attention_kwargs={"scale": 1.0})


def test_moving_keeps_every_dtype(artifacts, inputs):
    model = load(artifacts("t2v", "rtn"))
    sample = inputs()
    expected = model(*sample).sample
    dtypes = [buffer.dtype for buffer in model.buffers()]
    assert {torch.uint8, torch.bfloat16, torch.float32} <= set(dtypes)
    for refused in (torch.float32, torch.float16):
        with pytest.raises(Hif4Error, match=rf"compiled for torch.bfloat16 and cannot be converted to {refused}"):
            model.to(refused)
        with pytest.raises(Hif4Error, match="cannot be converted"):
            model.to("cpu", refused)
    assert model.to("cpu") is model
    assert model.to(torch.bfloat16) is model
    assert model.to(device="cpu", dtype=torch.bfloat16) is model
    for convert in (model.float, model.half, model.bfloat16, model.double):
        convert()
        assert [buffer.dtype for buffer in model.buffers()] == dtypes
    assert torch.equal(model(*sample).sample, expected)
    model.to("meta")
    assert model.device.type == "meta"
    assert [buffer.dtype for buffer in model.buffers()] == dtypes
    assert model(*(value.to("meta") for value in sample)).sample.shape == expected.shape


def test_the_result_does_not_depend_on_the_number_of_threads(loaded, inputs):
    """The portable linear is exact a unit and adds units in order: its bits are those of every thread count."""
    model, sample = loaded(), inputs()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        values = model.executor.trace(*sample)
        first = model.graph.first_node
        tensors = dict(enumerate([*sample, *model.executor.tensors, *values]))
        torch.set_num_threads(2)
        checked = 0
        for number, node in enumerate(model.graph.nodes):
            if node.target == "hif4.linear":
                arguments = [tensors[item.index] if isinstance(item, Ref) else item for item in node.args]
                assert torch.equal(torch.ops.hif4.linear(*arguments), tensors[first + number]), node.module
                checked += 1
    finally:
        torch.set_num_threads(before)
    assert checked == 20


@pytest.mark.parametrize("recipe", ["rtn", "weight-only"])
def test_no_full_precision_copy_is_held(recipe, artifacts, inputs):
    """4.5 bits a quantized weight, before the first call and after it."""
    model = load(artifacts("t2v", recipe))
    quantized = 2 * (8 * 128 * 128 + 2 * 128 * 256)  # two blocks: eight attention linears and two of the feed-forward
    for _ in range(2):
        held = dict(model.named_buffers())
        planes = sum(buffer.nbytes for name, buffer in held.items() if name.endswith(("codes", "scales")))
        assert 8 * planes == 4.5 * quantized
        assert not [name for name in held if "attn1" in name and name.endswith("to_q/weight")]
        bound = {tensor.data_ptr() for tensor in model.executor.tensors}
        assert bound == {buffer.data_ptr() for buffer in held.values()}  # the executor works on them, not on copies
        assert sum(parameter.numel() for parameter in model.parameters()) == 0
        assert model.state_dict() == {}
        model(*inputs())


def test_kernels_of_a_gpu_are_selected_when_the_model_gets_there(artifacts, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_registry, "select", lambda kernels, artifact: calls.append((kernels, artifact.root)))
    model = load(artifacts(), kernels="portable")
    model.to("cpu")
    assert calls == []
    # There is no GPU here; what the module sees is a device that changed.
    cpu, first, second = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
    for before, after, count in ((cpu, first, 1), (first, first, 1), (first, second, 2), (second, cpu, 2)):
        devices = iter([before, after, after])
        monkeypatch.setattr(CompiledTransformer, "device", property(lambda self, devices=devices: next(devices)))
        model.to("cpu")
        assert calls == [("portable", artifacts())] * count
    monkeypatch.undo()
    assert (model.variant(None).kernels, model.variant(None).artifact) == ("portable", model.artifact)
