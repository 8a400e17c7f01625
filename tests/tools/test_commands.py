"""What the commands do, on wan-tiny: plan, compile, verify, sample, inspect, evaluate."""

import json
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import kernel_targets
from hif4c.tools.cli import app

PROMPT = "a red triangle moving left on a black background"


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; an Hif4Error is found in `result.exception`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments: str | Path) -> str:
    """Run a command that must succeed; returns what it printed."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def message(*arguments: str | Path) -> str:
    """Run a command that must fail on its input; returns the sentence."""
    result = run(*arguments)
    assert isinstance(result.exception, Hif4Error), (result.output, result.exception)
    return str(result.exception)


def test_plan_lists_every_linear_with_a_reason() -> None:
    text = output("plan", "wan-tiny", "--recipe", "rtn")
    assert text.count("block linear, recipe rtn") == 2 * 60
    assert text.count("boundary: ") == 2 * 6
    assert "blocks.5.ffn.net.2" in text
    assert "from a calibration" not in text


def test_plan_says_what_a_calibration_decides() -> None:
    """By default; sizes are those of the recipe before that."""
    text = output("plan", "wan-tiny", "--summary", "--recipe", "transformer_2=svd")
    chosen = [line.strip() for line in text.splitlines() if line.startswith("  from a calibration: ")]
    assert chosen == [
        "from a calibration: channel means, masks, rounding, steps with bf16 activations",
        "from a calibration: masks",
    ]
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  transformer")}
    assert (rows["transformer"][1], rows["transformer_2"][1]) == ("best", "svd")
    assert float(rows["transformer"][-1].rstrip("%")) < 35 < float(rows["transformer_2"][-1].rstrip("%"))


def test_plan_takes_a_recipe_for_one_expert() -> None:
    text = output("plan", "wan-tiny", "--recipe", "transformer_2=weight-only")
    assert text.count("w4a16") == 60
    assert text.count("w4a4") == 60


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "rtm"], "did you mean rtn"),
        (["--recipe", "transformer_3=rtn"], "transformer_3"),
        (["--expert", "high"], "transformer, transformer_2"),
    ],
)
def test_plan_says_what_there_is(arguments: list[str], expected: str) -> None:
    assert expected in message("plan", "wan-tiny", *arguments)


def test_compile_refuses_an_existing_directory(tmp_path: Path) -> None:
    assert "already exists" in message("compile", "wan-tiny", "-o", tmp_path)


def test_verify_accepts_what_was_compiled(wan_tiny_artifact: Path) -> None:
    """Golden outputs are the portable kernels'; others may differ in the last bits."""
    text = output("verify", wan_tiny_artifact, "--kernels", "portable")
    assert text.count("identical") == 2 * 3
    assert text.count(" ok ") == 2


def test_verify_fails_when_golden_outputs_differ(wan_tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hif4c.runtime.verify as module
    from hif4c.runtime.golden import Replay

    monkeypatch.setattr(
        module, "replay", lambda model, golden, on_node: Replay(3, 60, 0.25, "blocks.5.ffn.net.2", 0.5, 0.001)
    )
    result = run("verify", wan_tiny_artifact)
    assert result.exit_code == 1
    for words in ("3 differ", "60: differs by 2.5e-01 blocks.5.ffn.net.2", "differs by 5.0e-01", "1.0e-03"):
        assert words in " ".join(result.stdout.split()), words
    assert result.stdout.count(" ok ") == 0


def test_verify_names_a_wrong_operator(wan_tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hif4c.runtime.verify as module
    from hif4c.runtime.golden import Replay

    wrong = Replay(0, 60, 0.0, "", 0.0, 0.001, operator_error=0.5, worst_operator="hif4.norm of norm_out")
    monkeypatch.setattr(module, "replay", lambda model, golden, on_node: wrong)
    result = run("verify", wan_tiny_artifact)
    assert result.exit_code == 1
    assert "hif4.norm of norm_out differs by 5.0e-01" in " ".join(result.stdout.split())


def test_verify_names_a_damaged_file(wan_tiny_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(wan_tiny_artifact, tmp_path / "copy")
    weights = copy / "transformer_2" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "transformer_2/weights.safetensors" in message("verify", copy)


def test_inspect_summarizes_and_prints_programs(wan_tiny_artifact: Path) -> None:
    summary = output("inspect", wan_tiny_artifact)
    assert f"kernels: {', '.join(kernel_targets(open_artifact(wan_tiny_artifact))) or 'none'}" in summary
    assert "4.50" in summary
    assert "hif4.linear" in summary
    assert summary.count("60 nearest") == 2
    assert "mask" not in summary.split("transformer: linears")[1].split("reason")[0]  # no linear has one
    assert "calibration of" not in summary
    block = output("inspect", wan_tiny_artifact, "--block", "3", "--expert", "transformer_2")
    assert block.count("hif4.linear(") == 10
    # q, k and v share one quantized input; the text tokens are quantized before the first block; of the six quantizers
    # three stand behind a norm that nothing else reads.
    assert block.count("hif4.quantize(") == block.count("hif4.norm_quantize(") == 3
    assert "blocks.2." not in block


def test_inspect_shows_a_stage_between_passes(wan_tiny_artifact: Path) -> None:
    text = output("inspect", wan_tiny_artifact, "--block", "0", "--stage", "insert_qdq")
    assert text.count("aten.linear.default(") == 10
    # Ten weights and eight inputs: the text tokens, which are read by two linears, are quantized before the blocks.
    assert text.count("hif4.dequantize(") == 18
    assert "hif4.linear(" not in text
    assert "insert_qdq" in message("inspect", wan_tiny_artifact, "--stage", "insert")


def test_inspect_names_what_is_not_there(wan_tiny_artifact: Path) -> None:
    assert "no block 17" in message("inspect", wan_tiny_artifact, "--block", "17")
    assert "transformer_2" in message("inspect", wan_tiny_artifact, "--expert", "low")


def test_sample_writes_clip_gif_and_contact_sheet(wan_tiny_artifact: Path, tmp_path: Path) -> None:
    clip = tmp_path / "new" / "clip.mp4"
    output("sample", wan_tiny_artifact, "--prompt", PROMPT, "-o", clip, "--steps", "3", "--frames", "5")
    video = iio.imread(clip, plugin="pyav")
    assert video.shape == (5, 256, 256, 3)
    assert iio.imread(clip.with_suffix(".gif"), plugin="pillow").shape[0] == 5
    sheet = iio.imread(clip.with_suffix(".png"))
    assert sheet.shape == (264, 5 * 260 + 4, 3)
    assert np.unique(sheet.reshape(-1, 3), axis=0).shape[0] > 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-o", "clip.avi"], ".mp4"),
        (["-o", "clip.mp4", "--size", "36x32"], "width 36"),
        (["-o", "clip.mp4", "--frames", "8"], "frames 8"),
        (["-o", "clip.mp4", "--steps", "0"], "steps 0"),
    ],
)
def test_sample_checks_what_was_asked_for(wan_tiny_artifact: Path, arguments: list[str], expected: str) -> None:
    assert expected in message("sample", wan_tiny_artifact, "--prompt", PROMPT, *arguments)


def test_evaluate_prints_both_scores_and_writes_figures(wan_tiny_artifact: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    text = output(
        "evaluate", wan_tiny_artifact, "--against", "wan-tiny", "--prompts", "3", "--steps", "4", "-o", figures
    )  # fmt: skip
    assert "subject consistency" in text
    result = json.loads(figures.read_text())
    assert result["prompts"] == 3
    assert set(result["scores"]) == {"reference", "artifact"}
    assert 0 < result["distance"]["latent_snr"] < 60
    assert 0 < result["distance"]["frame_psnr"] < 80


def test_evaluate_with_a_prompt_file_has_no_scorer(wan_tiny_artifact: Path, tmp_path: Path) -> None:
    prompts, figures = tmp_path / "prompts.txt", tmp_path / "figures.json"
    prompts.write_text(f"{PROMPT}\n\n")
    output(
        "evaluate", wan_tiny_artifact, "--against", "wan-tiny", "--prompt-file", prompts, "--steps", "2", "-o", figures
    )  # fmt: skip
    result = json.loads(figures.read_text())
    assert result["prompts"] == 1
    assert result["scores"] is None


def test_manifest_records_the_usual_sampling_settings(wan_tiny_artifact: Path) -> None:
    model = open_artifact(wan_tiny_artifact).manifest["model"]
    assert model["source"] == "wan-tiny"
    assert model["boundary_ratio"] == 0.875
    assert (model["sampling"]["height"], model["sampling"]["frames"]) == (32, 9)
