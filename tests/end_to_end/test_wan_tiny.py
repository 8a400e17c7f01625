"""The trained model, compiled: sizes, load time, and a pipeline that samples from the artifact alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hif4c.compiler.evaluation import evaluate_pair, sample_clips
from hif4c.compiler.models import tiny_directory
from hif4c.compiler.tiny.world import held_out_prompts
from hif4c.runtime import load, load_pipeline
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.pipeline import load_components
from hif4c.runtime.sampling import SamplingSettings


def settings_of(artifact: Path, **asked: float) -> SamplingSettings:
    """The settings that the artifact records, but what is asked for."""
    return SamplingSettings.from_defaults(open_artifact(artifact).manifest["model"]["sampling"], **asked)


def test_transformer_files_are_small(wan_tiny_artifact: Path) -> None:
    """Under 35 % of the bf16 files, program and headers included."""
    for expert in ("transformer", "transformer_2"):
        compiled = sum(path.stat().st_size for path in (wan_tiny_artifact / expert).iterdir())
        original = sum(path.stat().st_size for path in (tiny_directory() / expert).glob("*.safetensors"))
        assert compiled < 0.35 * original
    report = json.loads((wan_tiny_artifact / "report.json").read_text())
    for expert in report["experts"].values():
        assert expert["bits_per_quantized_weight"] == 4.5
        assert expert["precisions"] == {"w4a4": 60, "high": 6}


def test_an_expert_loads_in_less_than_two_seconds(wan_tiny_artifact: Path) -> None:
    started = time.perf_counter()
    load(wan_tiny_artifact, expert="transformer_2")
    assert time.perf_counter() - started < 2


def test_pipeline_samples_what_the_prompt_says(wan_tiny_artifact: Path) -> None:
    """The artifact alone samples clips near the original's: bf16 against 4 bits on equal seeds."""
    chosen = held_out_prompts(4)
    prompts, expected = [text for text, _ in chosen], [attributes for _, attributes in chosen]
    settings = settings_of(wan_tiny_artifact)
    compiled = load_pipeline(wan_tiny_artifact)
    original = load_components(str(tiny_directory()), "WanPipeline")
    found = sample_clips(compiled, prompts, settings)
    reference = sample_clips(original, prompts, settings)
    result = evaluate_pair(reference, found, expected)
    scores = result["scores"]["artifact"]
    # Chance is 1/3 for the shape and 1/5 for the direction; plain rounding keeps most of the clips.
    assert scores["fully_right"] >= 0.5, result
    assert result["distance"]["latent_snr"] > 3, result


def test_both_experts_are_called_at_their_noise_levels(wan_tiny_artifact: Path) -> None:
    pipeline = load_pipeline(wan_tiny_artifact)
    seen: dict[str, list[float]] = {"transformer": [], "transformer_2": []}
    for name, steps in seen.items():
        expert = getattr(pipeline, name)
        expert.register_forward_pre_hook(
            lambda module, args, kwargs, steps=steps: steps.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
    settings = settings_of(wan_tiny_artifact, steps=8)
    sample_clips(pipeline, ["a red square"], settings)
    boundary = 0.875 * pipeline.scheduler.config.num_train_timesteps
    assert min(seen["transformer"]) >= boundary > max(seen["transformer_2"])


def test_one_artifact_serves_other_sizes_and_batches(wan_tiny_artifact: Path) -> None:
    pipeline = load_pipeline(wan_tiny_artifact)
    for width, height, frames, batch in ((32, 48, 5, 1), (64, 32, 13, 3)):
        settings = settings_of(wan_tiny_artifact, steps=2, width=width, height=height, frames=frames)
        clips = sample_clips(pipeline, ["a red square moving left on a blue background"] * batch, settings)
        assert len(clips) == batch
        assert clips[0].frames.shape == (frames, height, width, 3)
        assert all(torch.isfinite(clip.latents).all() for clip in clips)


def test_runtime_never_sees_the_compiler(wan_tiny_artifact: Path) -> None:
    """A fresh process samples with load_pipeline; neither compiler nor passes are imported."""
    code = """
import sys
from hif4c.runtime import load_pipeline
pipeline = load_pipeline(sys.argv[1])
frames = pipeline(prompt="a red square", height=32, width=32, num_frames=5, num_inference_steps=2).frames
assert frames.shape == (1, 5, 32, 32, 3), frames.shape
bad = [name for name in sys.modules if name.startswith(("hif4c.compiler", "hif4c.passes"))]
assert not bad, bad
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(wan_tiny_artifact)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_scores_on_many_prompts(wan_tiny_artifact: Path) -> None:
    """The yardstick itself: the bf16 pipeline is right on at least 80 % of 96 held-out prompts."""
    chosen = held_out_prompts(96)
    settings = settings_of(wan_tiny_artifact)
    original = load_components(str(tiny_directory()), "WanPipeline")
    clips = sample_clips(original, [text for text, _ in chosen], settings, batch=16)
    result = evaluate_pair(clips, clips, [attributes for _, attributes in chosen])
    assert result["scores"]["reference"]["fully_right"] >= 0.8
