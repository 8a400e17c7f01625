"""`hif4c bench layers`, with layers that are small enough for a test."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hif4c.compiler import synthetic_ladder
from hif4c.compiler.recipe import builtin_recipes
from hif4c.compiler.synthetic_ladder import SyntheticLayer
from hif4c.tools.cli import app


def test_bench_layers_shows_every_recipe_on_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (SyntheticLayer("attn2.q", 256, 128), SyntheticLayer("ffn.2", 512, 64))
    monkeypatch.setattr(synthetic_ladder, "layers_of", lambda config: small)
    file = tmp_path / "new" / "layers.json"
    result = CliRunner().invoke(app, ["bench", "layers", "--outputs", "32", "--tokens", "5120", "-o", str(file)])
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


@pytest.mark.parametrize("arguments", [["--outputs", "0"], ["--outputs", "5121"], ["--tokens", "1"], ["-o", "."]])
def test_bench_layers_refuses_what_it_cannot_measure(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", "layers", *arguments]).exit_code == 2
