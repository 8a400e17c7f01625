"""wan-tiny as a user compiles it: with the default recipe, which calibrates the model on the way."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler import compile as compile_module
from hif4c.compiler import experts as experts_module
from hif4c.compiler.calibration_run import CalibrationOptions
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.evaluation import evaluate_pair, sample_clips
from hif4c.compiler.models import tiny_directory
from hif4c.compiler.recipe import resolve_recipes
from hif4c.compiler.tiny.world import held_out_prompts
from hif4c.runtime import load_pipeline
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.pipeline import load_components
from hif4c.runtime.sampling import SamplingSettings
from hif4c.runtime.verify import verify_artifact
from hif4c.tools.cli import app

EXPERTS = ["transformer", "transformer_2"]
CALIBRATION = CalibrationOptions(count=4, sampling=(("steps", 8),))
"""Instead of 16 prompts and 20 steps: for a test, a quarter of the time."""


@dataclass(frozen=True)
class Compiled:
    path: Path
    events: list[tuple[str, Any]]


@pytest.fixture(scope="module")
def compiled(captures, tmp_path_factory) -> Iterator[Compiled]:
    path, events = tmp_path_factory.mktemp("default") / "wan-tiny.hif4", []
    recipes = resolve_recipes(EXPERTS, [], [])
    with (
        mock.patch.object(compile_module, "CalibrationOptions", return_value=CALIBRATION),
        mock.patch.object(experts_module, "capture", captures),
        mock.patch.object(calibrate_module, "capture", captures),
        mock.patch.object(compile_module, "verify_in_fresh_processes"),  # a test below
    ):
        compile_model("wan-tiny", path, CompileOptions(recipes), lambda *event: events.append(event))
    return Compiled(path, events)


def test_the_artifact_is_small_and_whole(compiled: Compiled) -> None:
    """Masks, tensors that were folded into in float32, and a second program: 1.6 % more than plain rounding takes."""
    assert [(check.expert, check.passed) for check in verify_artifact(compiled.path) if check.replay] == [
        (name, True) for name in EXPERTS for _ in range(2)
    ]
    report = json.loads((compiled.path / "report.json").read_text())
    for name in EXPERTS:
        original = sum(path.stat().st_size for path in (tiny_directory() / name).glob("*.safetensors"))
        assert sum(path.stat().st_size for path in (compiled.path / name).iterdir()) < 0.37 * original
        entry = report["experts"][name]
        assert (entry["recipe"], entry["bits_per_quantized_weight"]) == ("best", 4.5)
        assert entry["precisions"] == {"w4a4": 60, "high": 6}


def test_it_is_nearer_to_the_original_than_plain_rounding(compiled: Compiled, wan_tiny_artifact: Path) -> None:
    chosen = held_out_prompts(4)
    prompts, expected = [text for text, _ in chosen], [attributes for _, attributes in chosen]
    settings = SamplingSettings.from_defaults(open_artifact(compiled.path).manifest["model"]["sampling"])
    reference = sample_clips(load_components(str(tiny_directory()), "WanPipeline"), prompts, settings)
    best, plain = (
        evaluate_pair(reference, sample_clips(load_pipeline(path), prompts, settings), expected)
        for path in (compiled.path, wan_tiny_artifact)
    )
    assert best["scores"]["artifact"]["fully_right"] >= 0.75
    # A quarter of the noise at most; an eighth was measured.
    assert best["distance"]["latent_snr"] > plain["distance"]["latent_snr"] + 6, (best, plain)


def test_the_manifest_says_what_was_chosen_and_from_what(compiled: Compiled) -> None:
    manifest = open_artifact(compiled.path).manifest
    for name in EXPERTS:
        entry = manifest["experts"][name]
        (run,) = entry["calibration"]["runs"]
        assert (len(run["prompts"]), run["steps"], run["seed"], run["source"]) == (4, 8, 0, "trajectory")
        assert len(entry["calibration"]["sha256"]) == 64
        quantized = [linear for linear in entry["linears"] if linear["precision"] == "w4a4"]
        assert all(linear["sqnr"] > 10 and linear["rounding"] == "gptq" for linear in quantized)
        assert len({linear["shift"] for linear in quantized} - {None}) >= 30
        assert any(linear["mask_folded"] for linear in quantized)


def test_events_add_up_to_what_was_announced(compiled: Compiled) -> None:
    step, totals, sums = "", {}, {}
    for kind, value in compiled.events:
        if kind == "step":
            step = value
        elif kind == "total":
            assert step not in totals
            totals[step] = value
        elif kind == "bytes":
            sums[step] = sums.get(step, 0) + value
    assert sums == totals
    assert {f"packing {name}" for name in EXPERTS} < totals.keys()
    assert {f"rounding {name} on its calibration calls (GPTQ)" for name in EXPERTS} < totals.keys()


def test_inspect_shows_what_was_chosen(compiled: Compiled) -> None:
    result = CliRunner().invoke(app, ["inspect", str(compiled.path)])
    assert result.exit_code == 0, result.exception
    text = " ".join(result.stdout.split())
    for name in EXPERTS:
        assert f"calibration of {name}: 4 prompts, seed 0 (sha256 " in text
        assert f"bf16 activations of {name}: at" in text
    assert "60 gptq" in text
    variant = CliRunner().invoke(app, ["inspect", str(compiled.path), "--block", "0", "--variant", "bf16"])
    assert variant.stdout.count("hif4.linear_w4(") == 10
