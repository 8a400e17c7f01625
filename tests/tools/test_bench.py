"""`hif4c bench`, with layers and models that are small enough for a test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from hif4c.compiler import bench_linear, gpu_kernels, synthetic_ladder
from hif4c.compiler.bench_plots import group_operators
from hif4c.compiler.recipe import builtin_recipes
from hif4c.compiler.synthetic_ladder import SyntheticLayer
from hif4c.tools.cli import app

STEP = [
    "step", "--width", "128", "--heads", "4", "--ffn", "192", "--layers", "1", "--text", "8", "--text-dim", "64",
    "--latent", "2x4x4", "--repetitions", "2", "--no-torch-compile",
]  # fmt: skip


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def passed(*arguments: str) -> str:
    """What a run prints, with single spaces."""
    result = bench(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


@pytest.fixture(autouse=True)
def threads_stay() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bench_linear_times_every_format(tmp_path: Path) -> None:
    file, picture = tmp_path / "new" / "linear.json", tmp_path / "linear.png"
    text = passed(
        "linear", "--shapes", "256x128,128x64", "--rows", "1,5", "--threads", "1,2", "--seconds", "0",
        "--repetitions", "2", "-o", str(file), "--plot", str(picture),
    )  # fmt: skip
    assert "256 x 128" in text
    assert "; 1 thread" in text
    assert "; 2 threads" in text
    figures = json.loads(file.read_text())
    assert figures["machine"]["processors"] >= 1
    found = figures["linear"]
    assert [(item["threads"], item["k"], item["n"], item["m"]) for item in found] == [
        (threads, k, n, m) for threads in (1, 2) for k, n in ((256, 128), (128, 64)) for m in (1, 5)
    ]
    for item in found:
        assert {"fp32", "bf16", "int8", "hif4", "hif4-w4a16"} <= set(item["timings"])
        assert set(item["timings"]) | set(item["missing"]) == set(bench_linear.FORMATS)
        for timing in (*item["timings"].values(), item["quantize"], item["quantize_torch"]):
            assert timing["runs"] == 2
            assert 0 < timing["minimum"] <= timing["median"]
        assert item["ratios"]["bf16"] == item["timings"]["bf16"]["median"] / item["timings"]["hif4"]["median"]
        # fp32 sums of at most 4 units and a bias: 5 roundings of 2^-24, of terms that may be larger than the sum.
        assert item["error"] < 1e-6
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_a_format_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(linear: torch.nn.Linear, x: torch.Tensor) -> Any:
        raise RuntimeError("no engine\nat all")

    monkeypatch.setitem(bench_linear._BUILDERS, "int8", broken)
    text = passed(
        "linear", "--shapes", "64x64", "--rows", "1", "--seconds", "0", "--formats", "bf16,int8,hif4",
        "--repetitions", "1",
    )  # fmt: skip
    assert "int8 was not measured: RuntimeError: no engine" in text
    assert "fp32" not in text


def test_without_hif4_there_is_nothing_to_compare() -> None:
    text = passed("linear", "--shapes", "64x64", "--rows", "1", "--seconds", "0", "--formats", "fp32,bf16")
    assert "how many times" not in text


def test_the_error_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 128, generator=generator), torch.randn(600, 128, generator=generator)
    bias = torch.randn(600, generator=generator)
    planes, weight = torch.ops.hif4.quantize(x), torch.ops.hif4.quantize(w)
    y = torch.ops.hif4.linear(*planes, *weight, bias, None, torch.float32)
    assert bench_linear.relative_error(y, planes, weight, bias, 128) < 1e-6
    # Relative to the norm: a result that is off by a thousandth everywhere has just that error.
    assert bench_linear.relative_error(1.001 * y, planes, weight, bias, 128) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["linear", "--formats", "int3"], "format 'int3' is not known"),
        (["linear", "--shapes", "100x64", "--rows", "1"], "a multiple of 64"),
        (["linear", "--kernels", "fast", "--rows", "1"], "kernels='fast' is not known"),
        (["step", "--latent", "5x24"], "give FRAMESxHEIGHTxWIDTH"),
        (["step", "--latent", "5x23x52"], "multiples of the patch size"),
        (["step", "--latent", "5x2400x5200"], "tokens are more than"),
        (["step", "--width", "100"], "multiple of heads and of 64"),
        (["step", "--width", "192", "--heads", "64"], "must be even"),
        (["static", "--target", "cuda-sm70"], "target 'cuda-sm70' is not known"),
        (["static", "nowhere.hif4"], "there is no such directory"),
        (["model", "--model", "wan-tiny"], "not a published model"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], sentence: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 1
    assert sentence in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["linear", "--shapes", "64"], ["linear", "--rows", "0"], ["linear", "--rows", "1,,2"], ["linear", "-o", "."],
        ["linear", "--threads", "-1"], ["linear", "--repetitions", "0"], ["step", "--layers", "0"],
        ["model", "--tokens", "many"], ["layers", "--outputs", "0"], ["layers", "--outputs", "5121"],
        ["layers", "--tokens", "1"], ["layers", "-o", "."],
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    assert bench(*arguments).exit_code == 2


def test_bench_step_times_and_weighs(tmp_path: Path) -> None:
    file, picture, tables = tmp_path / "step.json", tmp_path / "step.png", tmp_path / "step.md"
    text = passed(*STEP, "-o", str(file), "--plot", str(picture), "--markdown", str(tables))
    assert tables.read_text().count("**") == 2 * 3  # times, memory, operators
    assert "where a step of 8 tokens goes" in text
    figures = json.loads(file.read_text())
    (step,) = figures["steps"]
    assert step["tokens"] == 8
    assert set(step["timings"]) == {"diffusers bf16", "hif4c W4A4", "hif4c W4A16"}
    for name, rows in step["operators"].items():
        assert sum(seconds for _, _, seconds in rows) > 0
        called = {operator for operator, _, _ in rows}
        linear = {"diffusers bf16": "aten::linear", "hif4c W4A4": "hif4::linear", "hif4c W4A16": "hif4::linear_w4"}
        assert linear[name] in called
        assert ("hif4::linear" in called) == (name == "hif4c W4A4")
    # One function: 4-bit rounding of random weights and activations, no more than a fifth, and not nothing.
    assert 0.01 < step["distance"] < 0.2
    before, after = figures["memory"]["diffusers bf16"], figures["memory"]["hif4c W4A4"]
    # Ten linears: eight of 128 x 128, two of 128 x 192, each with a bf16 bias, in bf16 and at 4.5 bits a weight.
    weights, biases = 8 * 128 * 128 + 2 * 128 * 192, 8 * 128 + 128 + 192
    assert before["quantized"] == 2 * (weights + biases)
    assert after["quantized"] == weights * 4.5 / 8 + 2 * biases
    # The rest is the same, but for 128 frequencies of the timestep embedding that the model computes in every call.
    assert after["weights"] - after["quantized"] == before["weights"] - before["quantized"] + 4 * 128
    for memory in (before, after):
        assert memory["resident"] > 0
        assert memory["peak"] >= 0
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_bench_step_without_memory() -> None:
    text = passed(*STEP, "--no-memory", "--latent", "1x4x4,2x4x4")
    assert "memory" not in text
    assert "where a step of 4 tokens goes" in text
    assert "where a step of 8 tokens goes" in text


def test_operators_are_grouped() -> None:
    rows = [("hif4::linear", 2, 3.0), ("aten::linear", 1, 1.0), ("aten::mul", 5, 0.5), ("", 0, 0.25)]
    groups = group_operators(rows)
    assert groups["linear"] == 4
    assert groups["other operators"] == 0.5
    assert groups["outside of operators"] == 0.25
    assert sum(groups.values()) == 4.75


def test_bench_static_reads_the_binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    every = gpu_kernels.list_jobs

    def two(target: str) -> list[gpu_kernels.Job]:
        return [next(job for job in every(target) if job.name == name) for name in ("linear_int8", "quantize")]

    monkeypatch.setattr(gpu_kernels, "list_jobs", two)
    file, tables = tmp_path / "static.json", tmp_path / "static.md"
    text = passed("static", "--target", "cuda-sm80", "-o", str(file), "--markdown", str(tables))
    assert "cuda-sm80" in text
    title, _, head, rule, *rows = tables.read_text().splitlines()
    assert title.startswith("**cuda-sm80")
    assert head.startswith("| kernel | variant | KB |")
    assert rule.startswith("| --- | --- | ---: |")
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| linear_int8", "128x128_w8_s3.bias"],
        ["| quantize", "16x4_w4.bf16"],
    ]
    linear, quantize = json.loads(file.read_text())["static"]
    assert linear["file"] == "linear_int8.128x128_w8_s3.bias.cubin"
    assert quantize["name"] == "quantize"
    assert linear["report"]["loop"]["matrix_instruction"].startswith("IMMA.16832.S8")
    assert linear["report"]["spills"] == 0
    assert quantize["report"]["loop"] is None
    assert quantize["fp32"] is None
    # What the paper model calculates with; a few instructions more or less do not matter there.
    from hif4c.compiler.roofline import LOOPS

    (loop,) = LOOPS["cuda-sm80"]
    assert loop.instructions == pytest.approx(linear["report"]["loop"]["instructions"], rel=0.05)
    assert loop.vector == pytest.approx(linear["fp32"], rel=0.05)
    assert loop.kernel == f"{linear['name']} {linear['variant']}"


def test_bench_static_of_an_artifact_without_gpu_kernels(artifacts: Callable[..., Path]) -> None:
    result = bench("static", str(artifacts()))
    assert result.exit_code == 1
    assert "has kernels for no GPU" in str(result.exception)


def test_bench_model_says_that_it_is_one(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    text = passed("model", "--tokens", "1000,32760", "-o", str(file))
    assert "nothing here was measured on a GPU" in text
    assert "MODEL, not measured" in text
    figures = json.loads(file.read_text())
    assert figures["measured"] is False
    assert [item["tokens"] for item in figures["blocks"]] == [1000] * 6 + [32760] * 6


def test_bench_layers_shows_every_recipe_on_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (SyntheticLayer("attn2.q", 256, 128), SyntheticLayer("ffn.2", 512, 64))
    monkeypatch.setattr(synthetic_ladder, "layers_of", lambda config: small)
    file = tmp_path / "new" / "layers.json"
    result = bench("layers", "--outputs", "32", "--tokens", "5120", "-o", str(file))
    assert result.exit_code == 0, (result.output, result.exception)
    lines = [line.split() for line in result.stdout.splitlines()]
    for name in builtin_recipes():
        assert any(line[:1] == [name] and len(line) == 4 for line in lines)
    assert "best: its W4A4 steps" in " ".join(result.stdout.split())
    assert result.stdout.count("0 of 64") == 4  # search and GPTQ, in the recipes gptq and best
    figures = json.loads(file.read_text())
    assert [item["layer"]["kind"] for item in figures["layers"]] == ["attn2.q", "ffn.2"]
    # Tokens are as the width of the input.
    assert [item["tokens"] for item in figures["layers"]] == [256, 512]
    shown = next(line for line in lines if line[:1] == ["rtn"])
    assert shown[1:3] == [f"{item['recipes'][0]['sqnr']:.1f}" for item in figures["layers"]]
