"""wan-tiny, compiled for this GPU: its golden outputs, and clips sampled from the artifact's own kernels."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.evaluation import evaluate_pair, sample_clips
from hif4c.compiler.models import tiny_directory
from hif4c.compiler.recipe import resolve_recipes
from hif4c.compiler.tiny.world import held_out_prompts
from hif4c.runtime import load, load_pipeline
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import FLIP_MARGIN, replay
from hif4c.runtime.gpu import registry
from hif4c.runtime.pipeline import load_components
from hif4c.runtime.safetensors_stream import TensorFile
from hif4c.runtime.sampling import SamplingSettings


@pytest.fixture(scope="module")
def artifact(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
    path = tmp_path_factory.mktemp("wan-tiny") / "wan-tiny.hif4"
    recipes = resolve_recipes(["transformer", "transformer_2"], ["rtn"], [])
    return compile_model("wan-tiny", path, CompileOptions(recipes, targets=("cpu", target)), lambda event, value: None)


@pytest.fixture(autouse=True)
def portable_afterwards() -> Iterator[None]:
    yield
    registry.select("portable")


@pytest.mark.parametrize("kernels", ["bundled", "jit", "portable"])
@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_golden_outputs(artifact: Path, device: torch.device, kernels: str, expert: str) -> None:
    golden = TensorFile(open_artifact(artifact).path(f"golden/{expert}.safetensors"))
    model = load(artifact, expert, kernels=kernels, device=device)
    assert registry.active_backend() == kernels
    result = replay(model, {name: golden.read(name) for name in golden.names})
    assert result.codes_differ == 0
    # Matrix units may cut off where they add: K * 2^-23 with K at most 2048 here.
    assert result.linear_error <= 2048 * 2.0**-23
    assert result.distance <= FLIP_MARGIN * result.flip_distance


def test_kernels_of_cpu_and_gpu_in_one_process(artifact: Path, device: torch.device) -> None:
    on_cpu, on_gpu = load(artifact), load(artifact, device=device, kernels="bundled")
    golden = TensorFile(open_artifact(artifact).path("golden/transformer.safetensors"))
    inputs = [golden.read(name) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    first, second = on_cpu(*inputs, return_dict=False)[0], on_gpu(*(x.to(device) for x in inputs), return_dict=False)[0]
    assert (first.float() - second.cpu().float()).norm() <= FLIP_MARGIN * golden.read("flip_distance") * first.norm()


def test_samples_what_the_prompt_says(artifact: Path, device: torch.device) -> None:
    """As tests/end_to_end has it on the CPU, with the same bounds."""
    chosen = held_out_prompts(4)
    prompts, expected = [text for text, _ in chosen], [attributes for _, attributes in chosen]
    settings = SamplingSettings.from_defaults(open_artifact(artifact).manifest["model"]["sampling"])
    original = load_components(str(tiny_directory()), "WanPipeline")
    compiled = load_pipeline(artifact, device=device, kernels="bundled")
    assert registry.active_backend() == "bundled"
    result = evaluate_pair(
        sample_clips(original, prompts, settings), sample_clips(compiled, prompts, settings), expected
    )
    assert result["scores"]["artifact"]["fully_right"] >= 0.5, result
    assert result["distance"]["latent_snr"] > 3, result


def test_an_untrusted_artifact_does_not_run_its_kernels(
    artifact: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(Hif4Error, match="hif4c trust"):
        load(artifact, kernels="bundled", device=device)
