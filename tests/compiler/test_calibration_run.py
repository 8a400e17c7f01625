"""From a located model to its calibration: prompts, the pipeline's part, and what is refused before it starts."""

import dataclasses
import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler import calibration_memory as memory_module
from hif4c.compiler import calibration_run as module
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.calibration_memory import pipeline_bytes
from hif4c.compiler.calibration_run import CalibrationOptions, builtin_prompts, run_calibration
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import describe_model, locate_model
from hif4c.compiler.lora import fuse_loras
from hif4c.compiler.tiny.world import all_captions, held_out_attributes, held_out_prompts, render_batch
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.media import save_clip
from tests.support.checkpoints import write_diffusers_model, write_wan_model
from tests.support.tiny import write_short_tiny

SHORT = (("steps", 2), ("frames", 5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """wan-tiny with one block."""
    return locate_model(str(write_short_tiny(tmp_path_factory.mktemp("tiny") / "short-tiny")))


@pytest.fixture
def stopped(monkeypatch):
    """Stop before the pass over the checkpoint; what it would have been given is kept."""
    given = {}

    def calibrate(location, calls, output, runs, **options):
        given.update(calls=calls, runs=runs, **options)

    monkeypatch.setattr(module, "calibrate", calibrate)
    return given


@pytest.fixture
def loaded(monkeypatch):
    """The pipelines that were loaded: (options, weak reference)."""
    pipelines = []
    load = module.load_components

    def watched(source, class_name, **options):
        pipeline = load(source, class_name, **options)
        pipelines.append((options, weakref.ref(pipeline.text_encoder)))
        return pipeline

    monkeypatch.setattr(module, "load_components", watched)
    return pipelines


# ------------------------------------------------------------------------------------------------------------- prompts


def test_wan_tinys_prompts_are_captions_that_it_is_not_evaluated_with(tiny):
    prompts = builtin_prompts(tiny, 64, 0)
    assert len(set(prompts)) == 64
    assert set(prompts) <= set(all_captions())
    evaluated = {text for text, _ in held_out_prompts(3 * len(held_out_attributes()))}
    everything = builtin_prompts(tiny, len(all_captions()) - len(evaluated), 1)
    assert not set(everything) & evaluated


def test_prompts_depend_on_the_seed(tiny):
    assert builtin_prompts(tiny, 8, 3) == builtin_prompts(tiny, 8, 3)
    assert builtin_prompts(tiny, 8, 3) != builtin_prompts(tiny, 8, 4)


def test_a_large_models_prompts_are_general():
    prompts = builtin_prompts(describe_model("Wan2.2-T2V-A14B"), 16, 0)
    assert len(set(prompts)) == 16
    assert not set(prompts) & set(all_captions())
    assert all(prompt.strip() == prompt and len(prompt) > 10 for prompt in prompts)


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_a_number_of_prompts_that_there_are_not(tiny, count):
    with pytest.raises(Hif4Error, match=rf"{count} calibration prompts: there are 1 to \d+ built in; give a file"):
        builtin_prompts(tiny, count, 0)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_over_a_pipeline(tiny, captures, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_module, "capture", captures)
    output, events = tmp_path / "new" / "calib.safetensors", []
    options = CalibrationOptions(count=2, seed=7, calls=2, sampling=SHORT)
    run_calibration(tiny, output, options, lambda *event: events.append(event))
    assert list(output.parent.iterdir()) == [output]
    with Calibration(output) as calibration:
        assert calibration.model == "short-tiny"
        assert calibration.runs == [
            {
                "source": "trajectory", "prompts": builtin_prompts(tiny, 2, 7), "seed": 7, "steps": 2, "guidance": 5.0,
                "height": 32, "width": 32, "frames": 5, "calls": {"transformer": 2, "transformer_2": 2},
                "timesteps": [999.0, 750.0],
            }
        ]  # fmt: skip
        for name, low, high in (("transformer", 875, 1000), ("transformer_2", 0, 875)):
            expert = calibration.expert(name)
            assert (expert.call_count, len(expert.groups)) == (2, 7)
            assert all(low <= call.noise_level <= high for call, _ in expert.calls())
    # Each bar that was announced was filled.
    filled, totals = [], []
    for event, value in events:
        if event == "total":
            totals.append(value)
            filled.append(0)
        elif event == "bytes":
            filled[-1] += value
    assert filled == totals
    assert totals[0] == 2 * 2
    assert len(totals) == 3


def test_loras_are_in_the_samples_in_the_pass_and_in_the_header(tiny, captures, tmp_path, monkeypatch):
    """The pass runs the very weights that sampled, so its outputs are those of the fused pipeline."""
    monkeypatch.setattr(calibrate_module, "capture", captures)
    name = "blocks.0.attn1.to_q"
    with Checkpoint(tiny.experts["transformer"]) as checkpoint:
        rows, columns = checkpoint.shape(f"{name}.weight")
    factors = {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, tmp_path / "l.safetensors")
    loras = {"transformer": ((tmp_path / "l.safetensors", 0.5),)}
    sampled = []
    sample = module.calls_from_trajectory

    def watched(pipeline, *arguments, **options):
        sampled.append(pipeline.transformer.get_parameter(f"{name}.weight").clone())
        return sample(pipeline, *arguments, **options)

    monkeypatch.setattr(module, "calls_from_trajectory", watched)
    options = CalibrationOptions(count=1, calls=1, batch=1, sampling=SHORT, loras=loras)
    run_calibration(tiny, tmp_path / "c", options)
    with (
        Calibration(tmp_path / "c") as calibration,
        Checkpoint(tiny.experts["transformer"]) as stored,
        fuse_loras(stored, loras["transformer"], "transformer") as fused,
    ):
        assert torch.equal(sampled[0], fused.read(f"{name}.weight").to(sampled[0].dtype))
        assert not torch.equal(sampled[0], stored.read(f"{name}.weight").to(sampled[0].dtype))
        assert calibration.experts["transformer"].fingerprint == fused.fingerprint() != stored.fingerprint()
        assert calibration.runs[0]["loras"] == {"transformer": fused.record}


@pytest.mark.usefixtures("no_sampling")
def test_a_lora_for_an_expert_that_is_not_there(tiny, tmp_path):
    options = CalibrationOptions(loras={"transformer_3": ((tmp_path / "l", 1.0),)})
    with pytest.raises(Hif4Error, match=r"has no transformer_3 for a LoRA, only transformer, transformer_2"):
        run_calibration(tiny, tmp_path / "c", options)


@pytest.mark.usefixtures("no_sampling")
def test_a_pipeline_that_does_not_fit_is_not_loaded(tiny, tmp_path, monkeypatch):
    needed = pipeline_bytes(tiny)
    stored = sum(path.stat().st_size for path in tiny.root.rglob("*.safetensors"))
    assert 0.9 * stored < needed < 1.1 * stored  # bf16 in the files as in memory; headers and small files aside
    monkeypatch.setattr(memory_module, "_memory_of", lambda device: needed - 1)
    words = r"needs the whole pipeline in memory, [\d.]+ MB, and cpu has [\d.]+ MB; calibrate from clips \(--clips"
    with pytest.raises(Hif4Error, match=words):
        run_calibration(tiny, tmp_path / "c", CalibrationOptions())
    assert list(tmp_path.iterdir()) == []
    # Clips do not calibrate an image-to-video model, so they are no way out for it.
    pipeline = dataclasses.replace(tiny.pipeline, class_name="WanImageToVideoPipeline")
    with pytest.raises(Hif4Error, match=r"MB; calibrate on a larger machine\.$"):
        memory_module.check_pipeline_fits(dataclasses.replace(tiny, pipeline=pipeline), torch.device("cpu"))


def test_given_prompts_are_used(tiny, stopped, tmp_path):
    events = []
    options = CalibrationOptions(prompts=("a red ring",), seed=2, batch=1, sampling=SHORT)
    run_calibration(tiny, tmp_path / "c", options, lambda *event: events.append(event))
    (run,) = stopped["runs"]
    assert (run["prompts"], run["source"], run["seed"], stopped["seed"]) == (["a red ring"], "trajectory", 2, 2)
    assert run["calls"] == {name: len(calls) for name, calls in stopped["calls"].items()}
    assert ("step", "sampling 1 prompts") in events


def test_the_pipeline_is_gone_before_the_checkpoint_is_read(tiny, loaded, tmp_path, monkeypatch):
    alive = []

    def calibrate(*arguments, **options):
        gc.disable()
        alive.extend(pipeline() is not None for _, pipeline in loaded)

    monkeypatch.setattr(module, "calibrate", calibrate)
    try:
        run_calibration(tiny, tmp_path / "c", CalibrationOptions(count=1, calls=1, sampling=SHORT))
    finally:
        gc.enable()
    assert alive == [False]


def test_clips_need_no_expert(tiny, stopped, loaded, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    save_clip(render_batch(np.zeros((1, 4), np.int64), np.random.default_rng(0))[0], folder / "a.mp4", fps=8)
    (folder / "a.gif").unlink()
    (folder / "a.txt").write_text("a red triangle", encoding="utf-8")
    options = CalibrationOptions(clips=folder, calls=3, sampling=(("steps", 4), ("frames", 5)))
    run_calibration(tiny, tmp_path / "c", options)
    assert [options for options, _ in loaded] == [{"without_experts": True}]
    (run,) = stopped["runs"]
    assert (run["source"], run["clips"]) == ("clips", ["a.mp4"])
    assert run["calls"] == {"transformer": 3, "transformer_2": 3}


# ------------------------------------------------------------------------------------------ refused before any sampling


@pytest.fixture
def no_sampling(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(module, "load_components", load)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "0 calibration prompts"),
        ({"device": "foo"}, "device 'foo' cannot be used"),
        ({"sampling": (("steps", 0),)}, "steps 0: must be a positive whole number"),
        ({"image": "frame.png"}, "this model takes no --image"),
        ({"clips": "nothing"}, "nothing: no such folder"),
        ({"clips": ".", "prompts": ("a",)}, "clips bring their own captions and frames"),
        ({"clips": ".", "image": "frame.png"}, "clips bring their own captions and frames"),
    ],
)
@pytest.mark.usefixtures("no_sampling")
def test_options_that_do_not_go(tiny, tmp_path, options, words):
    options = {name: tmp_path / value if name in ("clips", "image") else value for name, value in options.items()}
    with pytest.raises(Hif4Error, match=words):
        run_calibration(tiny, tmp_path / "c", CalibrationOptions(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_sampling")
def test_an_output_that_cannot_be(tiny, tmp_path):
    with pytest.raises(Hif4Error, match=r"the calibration cannot be written there \(is a directory\)"):
        run_calibration(tiny, tmp_path, CalibrationOptions())


@pytest.mark.usefixtures("no_sampling")
def test_models_without_a_pipeline(tmp_path):
    write_wan_model(tmp_path / "wan", "ti2v")
    write_diffusers_model(tmp_path / "diffusers", experts=1)
    usual = CalibrationOptions(sampling=(("height", 64), ("width", 64), ("frames", 5), ("steps", 2), ("guidance", 5)))
    for directory in (tmp_path / "wan", tmp_path / "diffusers" / "transformer"):
        with pytest.raises(Hif4Error, match="has no pipeline"):
            run_calibration(locate_model(str(directory)), tmp_path / "c", usual)


@pytest.mark.usefixtures("no_sampling")
def test_clips_of_an_image_to_video_model(models, tmp_path):
    with pytest.raises(Hif4Error, match=r"clips do not calibrate an image-to-video model; let it sample prompts"):
        run_calibration(
            locate_model(str(models["i2v"].directory)), tmp_path / "c", CalibrationOptions(clips=tmp_path)
        )  # fmt: skip


def test_a_pipeline_that_is_not_complete(tiny, tmp_path):
    directory = shutil.copytree(tiny.root, tmp_path / "model")
    shutil.rmtree(directory / "text_encoder")
    with pytest.raises(Hif4Error, match="diffusers cannot load the pipeline"):
        run_calibration(locate_model(str(directory)), tmp_path / "c", CalibrationOptions())
    assert list(tmp_path.iterdir()) == [directory]


def test_a_schedule_that_leaves_an_expert_out(tiny, tmp_path):
    options = CalibrationOptions(count=1, sampling=(("steps", 1), ("frames", 5)))
    with pytest.raises(Hif4Error, match="transformer_2: no calibration call reached it; use more steps"):
        run_calibration(tiny, tmp_path / "c", options)
    assert list(tmp_path.iterdir()) == []


def test_weights_with_nan_are_found(tiny, tmp_path, captures, monkeypatch):
    """The pipeline samples nothing but NaN then; the file that is at fault is what is named."""
    monkeypatch.setattr(calibrate_module, "capture", captures)
    directory = shutil.copytree(tiny.root, tmp_path / "model")
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["patch_embedding.weight"].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Hif4Error, match=r"patch_embedding\.weight holds NaN or infinite values"):
        run_calibration(
            locate_model(str(directory)), tmp_path / "c", CalibrationOptions(count=1, calls=1, sampling=SHORT)
        )  # fmt: skip
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_an_unknown_kind_of_model_needs_settings(tmp_path):
    write_diffusers_model(tmp_path / "m", in_channels=20, out_channels=20, experts=1)
    index = tmp_path / "m" / "model_index.json"
    assert json.loads(index.read_text())["_class_name"] == "WanPipeline"
    with pytest.raises(Hif4Error, match="this model has no usual settings; give --"):
        run_calibration(locate_model(str(tmp_path / "m")), tmp_path / "c", CalibrationOptions())
