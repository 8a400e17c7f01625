"""Exported programs in stock onnxruntime against the runtime: single calls, and clips of wan-tiny."""

from pathlib import Path

import pytest
import torch

from hif4c.compiler.evaluation import latent_snr, measure_distance, sample_clips, score_clips
from hif4c.compiler.float32_program import float32_executor
from hif4c.compiler.models import tiny_directory
from hif4c.compiler.onnx_export import export_onnx
from hif4c.compiler.onnx_verify import PROGRAM_ERROR
from hif4c.compiler.tiny.world import held_out_prompts
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_pipeline import load_onnx_pipeline
from hif4c.runtime.onnx_transformer import OnnxTransformer
from hif4c.runtime.pipeline import load_pipeline
from hif4c.runtime.sampling import SamplingSettings
from hif4c.tools.console import console
from hif4c.tools.sample_onnx import sample_onnx

# None of them is a size with which the model was traced or its golden inputs were made.
SHAPES = [
    {"batch": 1, "frames": 1, "height": 4, "width": 10, "text": 5},
    {"batch": 2, "frames": 5, "height": 6, "width": 4, "text": 13},
    {"batch": 1, "frames": 3, "height": 12, "width": 14, "text": 77},
]


@pytest.fixture(scope="module")
def exported(artifacts, tmp_path_factory):
    """variant, recipe -> artifact, and its first expert in onnxruntime."""
    made = {}

    def get(variant, recipe):
        if (variant, recipe) not in made:
            artifact = open_artifact(artifacts(variant, recipe))
            output = tmp_path_factory.mktemp("onnx") / "model.onnx"
            programs = export_onnx(artifact, output, experts=["transformer"])
            made[variant, recipe] = artifact, OnnxTransformer(*(item.path for item in programs))
        return made[variant, recipe]

    return get


def reference(artifact, sample):
    """The program in float32, by the runtime."""
    graph = artifact.graph("transformer")
    weights = artifact.tensors("transformer", graph.tensors)
    (found,) = float32_executor(graph, weights)(*(item.float() for item in sample))
    return found


def largest(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_a_weight_only_program_is_the_runtimes_to_rounding(variant, exported, inputs):
    """Largest difference over the largest value; see `PROGRAM_ERROR` for what leaves it."""
    artifact, model = exported(variant, "weight-only")
    for shape in SHAPES:
        sample = inputs(variant, **shape)
        found = model(*sample).sample
        assert found.shape == (len(sample[0]), found.shape[1], *sample[0].shape[2:])
        assert largest(found, reference(artifact, sample)) < PROGRAM_ERROR == 1e-5


@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_a_program_with_quantized_activations_moves_by_less_than_a_last_bit_of_its_input(variant, exported, inputs):
    """Without a flip it agrees as a weight-only one; a flip is what a rounding of float32 makes, and so it is rarer and
    smaller than what the last bits of bf16 inputs, 2^16 times as large, make."""
    artifact, model = exported(variant, "rtn")
    for shape in SHAPES:
        video, timestep, text = inputs(variant, **shape)
        expected = reference(artifact, (video, timestep, text))
        moved = reference(artifact, (torch.nextafter(video, torch.full_like(video, torch.inf)), timestep, text))
        error = largest(model(video, timestep, text).sample, expected)
        assert 0 < error < max(PROGRAM_ERROR, largest(moved, expected))


def test_a_file_of_weights_that_is_missing_or_short(exported, tmp_path, artifacts):
    artifact = open_artifact(artifacts("t2v", "rtn"))
    (program, *_) = export_onnx(artifact, tmp_path / "model.onnx", experts=["transformer"])
    data = tmp_path / program.data[0][0]
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(Hif4Error, match=rf"{data.name}: has {len(content) - 100} bytes, but .* is incomplete"):
        OnnxTransformer(program.path)
    data.unlink()
    with pytest.raises(Hif4Error, match=rf"{data.name}: is missing"):
        OnnxTransformer(program.path)


def test_the_example_of_the_docs_runs_in_stock_onnxruntime(exported, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    assert "hif4c." not in example
    _, model = exported("t2v", "rtn")
    example = example.replace("model.transformer.onnx", model.path.name)
    monkeypatch.chdir(model.path.parent)
    values = {}
    exec(compile(example, "docs/onnx.md", "exec"), values)
    assert values["sample"].shape == values["inputs"]["hidden_states"].shape


@pytest.fixture(scope="module")
def tiny_files(wan_tiny_artifact, tmp_path_factory):
    """wan-tiny with 4-bit weights and activations as .onnx files."""
    output = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return [item.path for item in export_onnx(open_artifact(wan_tiny_artifact), output)]


def test_a_clip_sampled_through_onnxruntime_shows_the_same(wan_tiny_artifact, tiny_files):
    """A few steps of both experts: that is enough for the scorer to see what was asked for."""
    ((prompt, attributes),) = held_out_prompts(1)
    settings = SamplingSettings(height=32, width=32, frames=9, steps=8, guidance=5.0, text_tokens=32)
    pipelines = load_pipeline(wan_tiny_artifact), load_onnx_pipeline(wan_tiny_artifact, tiny_files)
    (expected,), (found,) = (sample_clips(pipeline, [prompt], settings) for pipeline in pipelines)
    scores = score_clips([expected], [attributes]), score_clips([found], [attributes])
    for axis in ("shape", "colour", "background", "direction"):
        assert scores[0][axis] == scores[1][axis] == 1.0, axis
    # Float32 in place of bf16 moves latents by as much: 12 dB in 20 steps. Those of another prompt are near 0 dB.
    assert latent_snr(expected.latents, found.latents) > 6


def test_the_example_script_writes_a_clip(wan_tiny_artifact, tiny_files, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    output = tmp_path / "clip.mp4"
    sample_onnx(wan_tiny_artifact, tiny_files[::-1], "a red circle", output, steps=2, size="16x16", frames=1)
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".gif", ".png"}
    with pytest.raises(Hif4Error, match=r"lack transformer; a pipeline needs every expert"):
        sample_onnx(wan_tiny_artifact, tiny_files[1:], "a red circle", output)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "least"), [("weight-only", 30.0), ("rtn", 8.0)])
def test_clips_of_eight_prompts_score_the_same(recipe, least, quick_compile, tmp_path):
    """The figures are in docs/onnx.md: a median of 35 dB with 4-bit weights, 12 dB with activations as well."""
    artifact = open_artifact(quick_compile(tiny_directory(), tmp_path / "artifact", recipe))
    programs = export_onnx(artifact, tmp_path / "model.onnx")
    settings = SamplingSettings.from_defaults(artifact.manifest["model"]["sampling"])
    prompts, attributes = zip(*held_out_prompts(8), strict=True)
    base = tiny_directory()
    expected = sample_clips(load_pipeline(artifact.root, base=str(base)), prompts, settings)
    found = sample_clips(load_onnx_pipeline(base, [item.path for item in programs]), prompts, settings)
    scores = score_clips(expected, attributes), score_clips(found, attributes)
    for axis in ("shape", "colour", "background", "direction", "fully_right"):
        assert scores[0][axis] == scores[1][axis], axis
    # Means of eight clips. Without a change of the model they move by this much from seed to seed.
    for axis in ("fit_iou", "subject_consistency", "motion_smoothness"):
        assert abs(scores[0][axis] - scores[1][axis]) < 0.03, axis
    assert measure_distance(expected, found)["distance"]["latent_snr"] > least


@pytest.mark.slow
def test_wan_tiny_with_weights_alone_quantized_agrees_to_rounding(quick_compile, inputs, tmp_path):
    """Six blocks and weights that were trained, in place of two blocks and random ones."""
    artifact = open_artifact(quick_compile(tiny_directory(), tmp_path / "artifact", "weight-only"))
    programs = export_onnx(artifact, tmp_path / "model.onnx")
    for program in programs:
        model = OnnxTransformer(program.path)
        graph = artifact.graph(program.expert)
        executor = float32_executor(graph, artifact.tensors(program.expert, graph.tensors))
        for shape in SHAPES:
            video, timestep, text = (item.float() for item in inputs("t2v", **shape))
            video = video[:, :8]  # wan-tiny has fewer channels
            (expected,) = executor(video, timestep, text)
            assert largest(model(video, timestep, text).sample, expected) < PROGRAM_ERROR
