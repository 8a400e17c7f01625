"""Commands in the pages: they exist, and so do their options. (What they print is checked by a person.)"""

import re
import shlex
from pathlib import Path

import pytest
import typer

from hif4c.tools.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """Every `hif4c ...` of a page, in its blocks and in its lines, as words."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^(?:\$ )?(?:torchrun .*? --no-python )?(hif4c .*?)(?: +#.*)?$", joined, re.MULTILINE)
    found += re.findall(r"`(hif4c [^`]*)`", joined)
    return [shlex.split(command) for command in found]


def known_options(words):
    """The options of the command that these words call."""
    command = typer.main.get_command(app)
    for word in words[1:]:
        inner = getattr(command, "commands", {})
        if word not in inner:
            break
        command = inner[word]
    assert not getattr(command, "commands", {}) or command.name in ("hif4c", "bench"), words
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_pages_give_them(page):
    for words in commands(page.read_text(encoding="utf-8")):
        first = words[1] if len(words) > 1 else "--help"
        assert first in typer.main.get_command(app).commands or not re.fullmatch(r"[a-z][a-z-]+", first), words
        options = {re.sub(r"=.*", "", word) for word in words if re.match(r"--?[a-z]", word)}
        absent = sorted(options - known_options(words) - {"--help"})
        assert not absent, f"{page.name}: {' '.join(words[:2])} has no {', '.join(absent)}"


def test_there_is_something_to_check():
    found = [words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 30
    assert {"inspect", "compile", "calibrate", "export-onnx"} <= {words[1] for words in found if len(words) > 1}
    assert "--diff" in known_options(["hif4c", "inspect"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"
