import copy

import pytest
import torch
from accelerate import cpu_offload_with_hook

from hif4c.runtime import load_pipeline
from hif4c.runtime import pipeline as pipeline_module
from hif4c.runtime.active_expert import ActiveExpert
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.transformer import CompiledTransformer, load

NAMES = ("transformer", "transformer_2")


@pytest.fixture
def experts(artifacts):
    return [load(artifacts("t2v", "rtn"), name) for name in NAMES]


def places(expert):
    return {buffer.device.type for buffer in expert.buffers()}


def test_the_expert_that_is_not_called_is_unloaded(experts, inputs, monkeypatch):
    expected = [expert(*inputs()).sample for expert in experts]
    unloaded = []
    unload = CompiledTransformer.unload
    monkeypatch.setattr(
        CompiledTransformer, "unload", lambda self: (unloaded.append(experts.index(self)), unload(self))
    )
    policy = ActiveExpert(experts)
    for number in (0, 0, 1, 1, 0):
        assert torch.equal(experts[number](*inputs()).sample, expected[number])
        assert policy.active is experts[number]
    assert unloaded == [1, 0, 1]


def test_weights_come_back_from_their_files(experts, inputs):
    """Here "meta" stands for a GPU: another device, on which shapes at least can be computed."""
    first, sample = experts[0], inputs()
    expected = first(*sample).sample
    stored = {buffer.data_ptr() for buffer in first.buffers()}
    first.to("meta")
    assert first.device.type == "meta"
    first.unload()
    assert first.device.type == "meta"  # there it runs
    assert places(first) == {"cpu"}
    assert {buffer.data_ptr() for buffer in first.buffers()} == stored
    with torch.inference_mode():
        assert first(*(value.to("meta") for value in sample)).sample.shape == expected.shape
    assert places(first) == {"meta"}
    first.to_empty(device="cpu")  # .to cannot leave "meta"
    assert first.device.type == "cpu"
    assert {buffer.data_ptr() for buffer in first.buffers()} == stored  # no copies
    assert torch.equal(first(*sample).sample, expected)
    first.unload(torch.device("meta"))
    assert (first.device.type, places(first)) == ("meta", {"cpu"})
    first.float()
    first.to("meta")
    assert (first.device.type, places(first)) == ("meta", {"cpu"})  # what is not needed stays away
    first.to_empty(device="cpu")
    assert torch.equal(first(*sample).sample, expected)


def test_tensors_that_are_in_no_file_stay(experts, inputs):
    model = experts[0]
    tensors = {
        item.name: value.clone() for item, value in zip(model.graph.tensors, model.executor.tensors, strict=True)
    }
    held = CompiledTransformer(model.graph, tensors, model.config, model.dtype, model.expand_timesteps)
    held.unload()
    assert torch.equal(held(*inputs()).sample, model(*inputs()).sample)
    with pytest.raises(ValueError, match="not stored in files"):
        CompiledTransformer(model.graph, tensors, model.config, model.dtype, False, release=True)


def test_a_copy_of_an_expert_is_its_own(experts, inputs):
    expected = experts[0](*inputs()).sample
    made = copy.deepcopy(experts[0])
    experts[0].unload()
    assert torch.equal(made(*inputs()).sample, expected)


def test_a_replica_is_bound_to_its_own_weights(experts, inputs):
    """As torch.nn.DataParallel makes one for each GPU."""
    first = experts[0]
    first(*inputs())
    replica = first._replicate_for_data_parallel()
    for name, buffer in first._buffers.items():
        replica._buffers[name] = torch.zeros_like(buffer)
    assert not torch.equal(replica(*inputs()).sample, first(*inputs()).sample)


def test_accelerates_hooks_move_experts(experts, inputs):
    """What diffusers' enable_model_cpu_offload hangs on each model, and asks a parameter where the model is."""
    expected = [expert(*inputs()).sample for expert in experts]
    previous = None
    for expert in experts:
        _, previous = cpu_offload_with_hook(expert, torch.device("cpu", 0), prev_module_hook=previous)
    for expert, sample in zip(experts, expected, strict=True):
        assert torch.equal(expert(*inputs()).sample, sample)


@pytest.fixture
def pipeline(artifacts, monkeypatch):
    """load_pipeline with stand-ins for text encoder, VAE and scheduler."""

    class Pipeline:
        place = None

        def to(self, device):
            self.place = device

        def register_modules(self, **modules):
            vars(self).update(modules)

    monkeypatch.setattr(pipeline_module, "load_components", lambda *arguments, **keywords: Pipeline())
    return lambda **keywords: load_pipeline(artifacts("t2v", "rtn"), base="none", **keywords)


def test_keep_and_offload_of_a_pipeline(pipeline, inputs):
    expected = [getattr(pipeline(), name)(*inputs()).sample for name in NAMES]
    for keywords in ({"keep": "active"}, {"offload": "blocks"}, {"keep": "active", "offload": "blocks"}):
        made = pipeline(**keywords)
        for name, sample in zip(NAMES, expected, strict=True):
            assert torch.equal(getattr(made, name)(*inputs()).sample, sample)
        hooks = made.transformer._forward_pre_hooks
        assert len(hooks) == ("keep" in keywords)
        first, second = made.transformer.blocks, made.transformer_2.blocks
        assert (second is not None) == ("offload" in keywords)
        assert (first is not None) == (keywords == {"offload": "blocks"})  # unloaded when the second one ran


def test_every_expert_may_have_a_device(pipeline, monkeypatch):
    moved = []
    monkeypatch.setattr(CompiledTransformer, "to", lambda self, device: moved.append(device))
    monkeypatch.setattr(pipeline_module, "check_device", torch.device)
    made = pipeline(device={"transformer": "cuda:0", "transformer_2": "cuda:1"})
    assert moved == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert made.place == torch.device("cuda:0")
    made = pipeline(device={"transformer": "cuda:0", "transformer_2": "cuda:1"}, keep="active")
    assert [getattr(made, name).device for name in NAMES] == [torch.device("cuda:0"), torch.device("cuda:1")]
    for device in ({}, {"transformer": "cpu"}, {"transformer": "cpu", "transformer_3": "cpu"}):
        with pytest.raises(Hif4Error, match="give one for transformer, transformer_2"):
            pipeline(device=device)


def test_inputs_may_be_elsewhere(experts, inputs, monkeypatch):
    """The expert moves them to where it runs, and its sample back; here the devices are written down."""
    asked = []
    to = torch.Tensor.to

    def watched(tensor, *args, **keywords):
        asked.append(args[0])
        return to(tensor, *args, **keywords)

    sample = inputs()
    expected = experts[0](*sample).sample
    monkeypatch.setattr(torch.Tensor, "to", watched)
    found = experts[0](*sample).sample
    monkeypatch.undo()
    assert torch.equal(found, expected)
    assert asked[:3] == [torch.device("cpu")] * 3
    assert asked[-1] == sample[0].device


def test_a_policy_that_there_is_not(pipeline):
    with pytest.raises(Hif4Error, match="keep='one' is not known; choose both or active"):
        pipeline(keep="one")
    with pytest.raises(Hif4Error, match="offload='disk' is not known"):
        pipeline(offload="disk")
