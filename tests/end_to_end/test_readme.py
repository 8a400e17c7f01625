"""README.md: its Python runs as it stands, on wan-tiny; its commands and those of docs/ are ones that hif4c knows."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from hif4c.compiler.models import tiny_directory
from hif4c.runtime.transformer import CompiledTransformer
from hif4c.tools.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
HUB_ID = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
SIZE = "height=480, width=832, num_frames=81"
COMMANDS = sorted({
    re.split(r"\s{2,}#|\s#|>|;", line)[0].strip()
    for page in PAGES.values()
    for line in [
        *re.findall(r"^(?:\$ )?(hif4c [a-z].*)$", page, re.MULTILINE), *re.findall(r"`(hif4c [a-z][^`]*)`", page)
    ]
})  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(code: str, artifact: Path) -> dict[str, Any]:
    """Run a block with the artifact's path, the model, the device and the sizes replaced by what a test can afford."""
    for old, new in (
        ('"t2v.hif4"', repr(str(artifact))),
        (f'"{HUB_ID}"', repr(str(tiny_directory()))),
        ('device="cuda"', 'device="cpu"'),
        (SIZE, "height=32, width=32, num_frames=9, num_inference_steps=2"),
    ):
        code = code.replace(old, new)
    assert "t2v" not in code.replace(str(artifact), "").replace(str(tiny_directory()), "").lower()
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_blocks_are_found() -> None:
    first, second = blocks("python")
    assert 'load_pipeline("t2v.hif4", device="cuda")' in first
    assert SIZE in first
    assert HUB_ID in second
    assert 'load("t2v.hif4", expert="transformer_2")' in second


def test_a_pipeline_from_an_artifact(wan_tiny_artifact: Path) -> None:
    names = run(blocks("python")[0], wan_tiny_artifact)
    assert names["frames"].shape == (9, 32, 32, 3)
    assert isinstance(names["pipeline"].transformer, CompiledTransformer)


def test_compiled_experts_in_a_pipeline_of_ones_own(wan_tiny_artifact: Path) -> None:
    pipeline = run(blocks("python")[1], wan_tiny_artifact)["pipeline"]
    assert isinstance(pipeline.transformer, CompiledTransformer)
    assert isinstance(pipeline.transformer_2, CompiledTransformer)
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.bfloat16
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(prompt="a red square", height=32, width=32, num_frames=9, num_inference_steps=2).frames[0]
    assert frames.shape == (9, 32, 32, 3)


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) >= 6
    assert {"plan", "compile", "verify", "sample", "evaluate", "inspect"} <= {line.split()[1] for line in COMMANDS}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str) -> None:
    """Parsed, not run: every command, argument and option exists."""
    arguments = shlex.split(re.sub(r"\bN\b", "1", line))  # N stands for a number
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and len(arguments) > 1:
        _, *arguments = arguments
        assert arguments[0] in command.commands
        command = command.commands[arguments[0]]
    name, *arguments = arguments
    if arguments:
        command.make_context(name, arguments)


@pytest.mark.parametrize(
    "option", sorted({text for page in PAGES.values() for text in re.findall(r"`(--[a-z-]+)", page)})
)
def test_an_option_that_is_mentioned_exists(option: str) -> None:
    def options(command: Any) -> set[str]:
        own = {text for item in command.params for text in (*item.opts, *item.secondary_opts)}
        return own.union(*(options(item) for item in getattr(command, "commands", {}).values()))

    assert option in options(typer.main.get_command(app))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[path]):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_recipes_are_those_that_there_are() -> None:
    from hif4c.compiler.recipe import load_recipe

    table = re.findall(r"^\| `([a-z-]+)`", README, re.MULTILINE)
    assert sorted(table) == sorted(path.stem for path in (tiny_directory().parents[1] / "recipes").glob("*.toml"))
    assert all(load_recipe(name).name == name for name in table)
