"""Synthetic checkpoints: the same tensors however they are written, in files and with activations like the models'."""

import dataclasses
import json
import math
import shutil
import threading
from collections import defaultdict
from statistics import median, mode

import pytest
import torch
from diffusers import WanTransformer3DModel

from hif4c.compiler import synthetic_checkpoint
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import describe_model, locate_model
from hif4c.compiler.models import BUILTIN_NAMES, TINY_NAME
from hif4c.compiler.synthetic_checkpoint import CheckpointOptions, make_checkpoint, write_expert
from hif4c.compiler.synthetic_weights import synthetic_tensor
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.pipeline import load_components
from hif4c.runtime.sampling import SamplingSettings, sample_latents
from tests.support.checkpoints import narrow_model

NAMES = [name for name in BUILTIN_NAMES if name != TINY_NAME]


def ignore(event, value):
    pass


def tensors_of(folder, layout=None):
    with Checkpoint(folder, layout=layout) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.names}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_it_is_found_as_the_model_it_is_like(name, layout, tmp_path):
    model = narrow_model(name)
    sizes = make_checkpoint(model, tmp_path / "out", CheckpointOptions(layout=layout, shard_bytes=300_000), ignore)
    found = locate_model(str(tmp_path / "out"))
    assert (found.layout, dict(found.configs), found.pipeline) == (layout, dict(model.configs), model.pipeline)
    for expert, folder in found.experts.items():
        assert len(list(folder.glob("*.safetensors"))) > 1
        with Checkpoint(folder, layout=layout) as checkpoint:
            shapes = synthetic_checkpoint._parameters(model.configs[expert])
            checkpoint.check(shapes)
            assert checkpoint.total_bytes == sizes[expert] == 2 * sum(map(math.prod, shapes.values()))


def test_how_it_is_written_changes_no_value(tmp_path):
    model = narrow_model(NAMES[0])
    variants = {
        "plain": CheckpointOptions(),
        "wan": CheckpointOptions(layout="wan"),
        "shards": CheckpointOptions(shard_bytes=100_000, threads=1),
        "fewer": CheckpointOptions(layers=1, experts=("transformer_2",), threads=5),
        "wide": CheckpointOptions(dtype=torch.float32),
    }
    for name, options in variants.items():
        make_checkpoint(model, tmp_path / name, options, ignore)
    for expert, folder in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        plain = tensors_of(tmp_path / "plain" / expert)
        assert_same(plain, tensors_of(tmp_path / "wan" / folder, "wan"))
        assert_same(plain, tensors_of(tmp_path / "shards" / expert))
        wide = tensors_of(tmp_path / "wide" / expert)
        assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
        assert_same(plain, {name: tensor.bfloat16() for name, tensor in wide.items()})
    fewer = tensors_of(tmp_path / "fewer" / "transformer_2")
    assert_same(fewer, {name: tensor for name, tensor in plain.items() if not name.startswith("blocks.1.")})
    assert not (tmp_path / "fewer" / "transformer").exists()


def test_no_two_tensors_are_alike(tmp_path):
    """Of two experts, of two seeds, and within one: nothing that compresses or caches may profit from repetition."""
    model = narrow_model(NAMES[0])
    make_checkpoint(model, tmp_path / "0", CheckpointOptions(), ignore)
    make_checkpoint(model, tmp_path / "1", CheckpointOptions(seed=1), ignore)
    seen = set()
    for folder in ("0/transformer", "0/transformer_2", "1/transformer"):
        for tensor in tensors_of(tmp_path / folder).values():
            rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[None]
            parts = {row.view(torch.int16).numpy().tobytes() for row in rows}
            assert len(parts) == len(rows)
            assert not parts & seen
            seen |= parts


def test_memory_does_not_grow_with_the_model():
    """At any time a tensor for each thread and one in reserve, whatever the number of tensors."""
    lock = threading.Lock()
    made = 0

    def make(name):
        nonlocal made
        with lock:
            made += 1
        return torch.tensor(int(name))

    ahead = synthetic_checkpoint._made_ahead(make, [str(i) for i in range(100)], 3)
    for taken, tensor in enumerate(ahead, 1):
        assert tensor == taken - 1
        assert made - taken <= 3 + 1


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    model = narrow_model(NAMES[0])
    for options, words in (
        (CheckpointOptions(layout="gguf"), "choose one of diffusers, wan"),
        (CheckpointOptions(experts=("transformer_3",)), "has no expert 'transformer_3'; it has transformer, transf"),
        (CheckpointOptions(layers=0), "layers 0: must be at least 1"),
        (CheckpointOptions(layout="wan", components=True), "in diffusers' layout only"),
    ):
        with pytest.raises(Hif4Error, match=words):
            make_checkpoint(model, tmp_path / "out", options, ignore)

    def stop(event, value):
        if event == "bytes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(model, tmp_path / "out", CheckpointOptions(), stop)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(Hif4Error, match=r"out: writing it needs .* kB of disk there .* and 1\.0 kB are free"):
        make_checkpoint(model, tmp_path / "out", CheckpointOptions(), ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_a_whole_pipeline_samples(name, tmp_path):
    model = narrow_model(name)
    path = tmp_path / "out"
    make_checkpoint(model, path, CheckpointOptions(components=True, layers=1), ignore)
    pipeline = load_components(str(path), model.pipeline.class_name)
    settings = SamplingSettings(32, 64, 5, 2, 3.0, text_tokens=16)
    latents = sample_latents(pipeline, ["a red triangle"], [0], settings)
    factor = 16 if name == "Wan2.2-TI2V-5B" else 8
    assert latents.shape == (1, model.configs["transformer"].out_channels, 2, 32 // factor, 64 // factor)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("layers", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_activations_are_about_as_large_as_those_published(layers, tmp_path):
    """In a model 256 wide instead of 5120. The largest of fewer tokens and channels is smaller: maxima may be a quarter
    of those published, and no more than twice as large. What the massive channel reaches is known exactly: 53.5 is 0.75
    of the bound sqrt(5120) of a normalized channel."""
    width = 256
    config = dataclasses.replace(
        describe_model("Wan2.2-T2V-A14B").configs["transformer"],
        num_attention_heads=2, ffn_dim=704, text_dim=512, num_layers=layers,
    )  # fmt: skip
    assert config.inner_dim == width
    write_expert(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    largest, lowest, channels, stream = defaultdict(list), {}, [], []

    def watch(kind):
        def hook(module, arguments):
            x = arguments[0].float().flatten(0, -2)
            largest[kind].append(float(x.abs().max()))
            lowest[kind] = min(float(x.min()), lowest.get(kind, 0.0))
            if kind == "attn2.to_q":
                channels.append(int(x.abs().amax(0).argmax()))

        return hook

    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: stream.append(arguments[0].float().abs().median()))
        for kind in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_out.0", "ffn.net.0.proj",
                     "ffn.net.2"):  # fmt: skip
            block.get_submodule(kind).register_forward_pre_hook(watch(kind))
    generator = torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 16, 2, 12, 16, generator=generator), torch.randn(1, 64, 512, generator=generator)
    with torch.no_grad():
        output = model(video, torch.tensor([500.0]), text, return_dict=False)[0]
    published = {"attn1.to_q": 9.9, "attn1.to_out.0": 8.9, "attn2.to_k": 1.1, "attn2.to_out.0": 1.2,
                 "ffn.net.0.proj": 5.2}  # fmt: skip
    for kind, value in published.items():
        assert value / 4 < median(largest[kind]) < 2 * value, kind
    assert mode(channels) == width // 3
    # In some blocks more than in others: 26 to 74 of 71.6 are published.
    assert 0.36 < min(largest["attn2.to_q"]) / math.sqrt(width) < 0.75
    assert max(largest["attn2.to_q"]) / math.sqrt(width) < 1.04
    assert median(largest["ffn.net.2"]) > 5
    assert -0.1701 < lowest["ffn.net.2"] < -0.16  # GELU's minimum, and far more above it
    assert 0.5 < float(output.float().std()) < 2
    assert stream[-1] < 3 * stream[0]


def test_one_tensor_is_fixed():
    """So that a later version writes the same checkpoint for the same seed."""
    tensor = synthetic_tensor("blocks.0.attn1.to_q.weight", (4, 6), 6, torch.float32, "0/transformer")
    assert tensor.flatten()[:3].tolist() == pytest.approx([-0.339376628, 0.0932225361, -0.494045585], rel=1e-6)


def test_weights_have_tails_and_channels_of_different_sizes():
    weight = synthetic_tensor("blocks.0.ffn.net.0.proj.weight", (1024, 512), 512).double()
    assert float(weight.square().sum(1).mean()) == pytest.approx(1, rel=0.3)  # of unit variance, so the spread of rows
    kurtosis = float((weight**4).mean() / weight.square().mean() ** 2)
    assert kurtosis > 4.5  # a normal distribution has 3, Student's t with 8 degrees of freedom 4.5
    for axis in (0, 1):
        sizes = weight.square().mean(axis).sqrt()
        assert float(sizes.max() / sizes.min()) > 2
