"""What people mistype: each mistake is one clear sentence on stderr and a status, never a traceback."""

import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hif4c.compiler.models import tiny_directory
from hif4c.tools.cli import app
from hif4c.tools.console import run

PROMPT = "a red square moving left on a blue background"
EXPERT_FILE = "diffusion_pytorch_model.safetensors"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command line as `hif4c` does, with all its error handling; returns status, stdout, stderr."""

    def execute(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(lambda: app([str(argument) for argument in arguments]))
        status = caught.value.code
        assert isinstance(status, int | None)
        return status or 0, *capsys.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield execute
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def mistake(command: Command) -> Callable[..., str]:
    """Run what must fail on its input: status 1 and one line; returns it."""

    def execute(*arguments: str | Path) -> str:
        status, _, stderr = command(*arguments)
        assert status == 1
        sentences = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, stderr
        assert "Traceback" not in stderr
        assert stderr.rstrip().endswith(sentences[0])
        assert sentences[0].endswith((".", ")", "'"))
        return sentences[0]

    return execute


@pytest.fixture
def misuse(command: Command) -> Callable[..., str]:
    """Run what the parser of the command line must refuse: status 2 and a usage; returns its words in one line."""

    def execute(*arguments: str | Path) -> str:
        status, _, stderr = command(*arguments)
        assert status == 2
        assert "Usage" in stderr
        assert "Traceback" not in stderr
        return re.sub(r"[\s│]+", " ", stderr)

    return execute


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    """wan-tiny after a little more training, as it were: one weight of its second expert is another."""
    directory = shutil.copytree(tiny_directory(), tmp_path / "wan-tiny")
    weights = directory / "transformer_2" / EXPERT_FILE
    tensors = load_file(weights)
    tensors["blocks.5.ffn.net.2.weight"][3, 4] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("path", ["/x/[/nope]", "/x/[bold red]", "/x/\\[b]", "[", "/x/:smile:", "/x/%s{0}"])
def test_a_path_is_printed_as_it_was_typed(mistake: Callable[..., str], path: str) -> None:
    for name, rest in (("verify", []), ("inspect", []), ("sample", ["--prompt", "a", "-o", "clip.mp4"])):
        assert mistake(name, path, *rest).startswith(f"error: {path}: there is no such directory")
    assert mistake("plan", path).startswith(f"error: {path}: no such directory or model")


def test_a_name_of_300_characters(mistake: Callable[..., str], tmp_path: Path) -> None:
    name = "x" * 300
    assert name in mistake("plan", name)
    assert name in mistake("compile", name, "-o", tmp_path / "out")
    assert name in mistake("verify", name)
    assert name in mistake("compile", "wan-tiny", "-o", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "foo"], "device 'foo' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--frames", "100001"], "frames 100001: the model has positions for"),
        (["--frames", "-3"], "frames -3: must be a positive whole number"),
        (["--size", "0x32"], "width 0: must be a positive"),
        (["--size", "64000x32"], "width 64000: the model has positions for"),
        (["--guidance", "nan"], "guidance nan: must be a positive number"),
        (["--image", "first.png"], "this model takes no --image"),
    ],
)
def test_sample_names_what_does_not_fit(
    mistake: Callable[..., str], wan_tiny_artifact: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    clip = tmp_path / "clip.mp4"
    assert words in mistake("sample", wan_tiny_artifact, "--prompt", PROMPT, "-o", clip, *arguments)
    assert not clip.exists()


@pytest.mark.parametrize("seed", ["99999999999999999999", "-1", "1.5", "many"])
def test_a_seed_that_is_none(misuse: Callable[..., str], wan_tiny_artifact: Path, seed: str) -> None:
    assert "--seed" in misuse("sample", wan_tiny_artifact, "--prompt", PROMPT, "-o", "clip.mp4", "--seed", seed)
    assert "--seed" in misuse("evaluate", wan_tiny_artifact, "--against", "wan-tiny", "--seed", seed)


def test_a_size_that_is_none(misuse: Callable[..., str], wan_tiny_artifact: Path) -> None:
    for size in ("big", "32", "32x", "x32", "32x32x9", "-32x32", "3²x32"):
        text = misuse("sample", wan_tiny_artifact, "--prompt", PROMPT, "-o", "clip.mp4", "--size", size)
        assert f"'{size}' is not WIDTHxHEIGHT" in text


@pytest.mark.parametrize("name", ["plan", "compile", "verify", "sample", "inspect", "evaluate"])
def test_arguments_that_are_missing_or_unknown(misuse: Callable[..., str], name: str) -> None:
    assert "Missing" in misuse(name)
    assert "No such option" in misuse(name, "--nonsense")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "1000"], "--prompts 1000: the synthetic world has 1 to 135 prompts"),
        (["--prompts", "136"], "--prompts 136: the synthetic world has 1 to 135 prompts"),
        (["--prompts", "0"], "--prompts 0: the synthetic world has 1 to"),
        (["--device", "foo"], "device 'foo' cannot be used here"),
        (["--prompt-file", "/no/such/file"], "/no/such/file: cannot be read"),
        (["--image", "first.png"], "this model takes no --image"),
        (["--frames", "100001", "--prompts", "1"], "frames 100001: the model has positions for"),
    ],
)
def test_evaluate_names_what_does_not_fit(
    mistake: Callable[..., str], wan_tiny_artifact: Path, arguments: list[str], words: str
) -> None:
    assert words in mistake("evaluate", wan_tiny_artifact, "--against", "wan-tiny", *arguments)


def test_evaluate_refuses_another_model(
    mistake: Callable[..., str], wan_tiny_artifact: Path, other_weights: Path, artifacts: Callable[..., Path]
) -> None:
    message = mistake("evaluate", wan_tiny_artifact, "--against", other_weights)
    assert "its transformer_2 was compiled from other weights than wan-tiny's" in message
    (other_weights / "prompts.txt").write_text("a cat\n")
    arguments = ("--against", "wan-tiny", "--prompt-file", other_weights / "prompts.txt", "--steps", "2")
    other = artifacts("t2v", "rtn")
    message = mistake("evaluate", other, *arguments, "--size", "32x32", "--frames", "9", "--guidance", "3")
    assert "its transformer was compiled from another model than wan-tiny" in message


def test_an_artifact_of_one_expert_is_inspected_without_saying_which(
    command: Command, mistake: Callable[..., str], quick_compile: Callable[..., Path], models: dict, tmp_path: Path
) -> None:
    path = quick_compile(models["t2v"].directory, tmp_path / "one", {"transformer_2": "rtn"}, golden=False)
    status, text, _ = command("inspect", path)
    assert status == 0
    assert "operators of transformer_2" in text
    status, block, _ = command("inspect", path, "--block", "1")
    assert status == 0
    assert block.count("hif4.linear(") == 10
    assert "holds no expert 'transformer'; it holds transformer_2" in mistake(
        "inspect", path, "--expert", "transformer"
    )
    assert "has no block -1" in mistake("inspect", path, "--block", "-1")
    # Sampling needs both; verify says that nothing was recorded.
    arguments = ("--prompt", "a cat", "-o", tmp_path / "clip.mp4")
    size = ("--size", "32x32", "--frames", "5", "--steps", "1", "--guidance", "3")
    assert "was compiled without transformer" in mistake("sample", path, *arguments, *size)
    status, text, _ = command("verify", path)
    assert status == 0
    assert "not recorded" in text


def test_a_disk_that_fails_is_one_sentence(
    mistake: Callable[..., str], wan_tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "clip.mp4"
    assert str(below) in mistake("sample", wan_tiny_artifact, "--prompt", PROMPT, "-o", below)
    monkeypatch.setattr(
        "hif4c.runtime.artifact.Path.is_file", lambda path: (_ for _ in ()).throw(OSError(5, "I/O error", str(path)))
    )
    assert "I/O error" in mistake("verify", wan_tiny_artifact)


def test_an_interrupt_is_not_taken_for_an_error_of_the_input(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hif4c.compiler.locate.describe_model", interrupt)
    status, _, stderr = command("plan", "wan-tiny")
    assert status == 130
    assert "Traceback" not in stderr
