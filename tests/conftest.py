"""Fixtures that several folders share. A capture costs seconds, so each is made once a session and copied for use."""

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import WanTransformer3DModel

from hif4c.compiler import compile as compile_module
from hif4c.compiler import experts as experts_module
from hif4c.compiler.capture import capture
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.emit import to_graph
from hif4c.compiler.models import WanConfig
from hif4c.compiler.recipe import load_recipe, resolve_recipes
from hif4c.passes.program import Program
from hif4c.runtime.executor import Executor
from hif4c.runtime.format import quantize
from hif4c.runtime.native import portable_kernels
from tests.support.checkpoints import VARIANTS, small_config, write_diffusers_model

# Kernels that a test run builds and trusts stay in the checkout, and so do those of the processes that it starts.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".cache")
os.environ["XDG_CONFIG_HOME"] = str(Path(__file__).parents[1] / ".cache" / "config")
GOLDEN = Path(__file__).parent / "passes" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts instead of comparing")


@pytest.fixture
def golden_text(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the golden file of that name, and show the lines that differ."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8")
        difference = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "found", lineterm="")
        assert text == expected, "\n".join(difference)

    return check


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk: its pipeline directory and its transformers as diffusers loads them in mixed bf16."""

    directory: Path
    variant: str
    experts: dict[str, WanTransformer3DModel]

    @property
    def config(self) -> WanConfig:
        return WanConfig.from_dict(small_config(self.variant), "config.json")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """One small model a variant, in diffusers' layout."""
    found = {}
    for variant in VARIANTS:
        directory = tmp_path_factory.mktemp("models") / variant
        names = write_diffusers_model(directory, variant)
        experts = {
            name: WanTransformer3DModel.from_pretrained(directory / name, torch_dtype=torch.bfloat16).eval()
            for name in names
        }
        found[variant] = Model(directory, variant, experts)
    return found


class Captures:
    """Captured programs by config, dtype and kind of timestep; each call returns a copy that passes may change."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}

    def __call__(
        self, config: WanConfig, dtype: torch.dtype = torch.bfloat16, expand_timesteps: bool = False
    ) -> Program:
        key = (config, dtype, expand_timesteps)
        if key not in self._programs:
            self._programs[key] = capture(config, dtype, expand_timesteps)
        return self._programs[key].copy()

    def variant(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Program:
        """The program of the small model of a variant."""
        config = WanConfig.from_dict(small_config(variant), "config.json")
        return self(config, dtype, variant == "ti2v")


@pytest.fixture(scope="session")
def captures() -> Captures:
    return Captures()


@pytest.fixture(scope="session")
def quick_compile(captures: Captures) -> Callable[..., Path]:
    """compile_model without its two slow parts: captures are shared, and no fresh process verifies the result.

    Tests of those two parts call compile_model itself.
    """

    @contextmanager
    def shortened() -> Iterator[None]:
        with (
            mock.patch.object(experts_module, "capture", captures),
            mock.patch.object(compile_module, "verify_in_fresh_processes"),
        ):
            yield

    def run(model: Path, output: Path, recipe: str | dict[str, str] = "rtn", **options: Any) -> Path:
        names = [item.name for item in model.iterdir() if item.name in ("transformer", "transformer_2")]
        if not names:  # Wan's layout
            names = ["transformer"] if (model / "config.json").is_file() else ["transformer", "transformer_2"]
        chosen = dict.fromkeys(sorted(names), recipe) if isinstance(recipe, str) else recipe
        recipes = {name: load_recipe(item) for name, item in chosen.items()}
        with shortened():
            events = options.pop("events", lambda event, value: None)
            options = {"components": "none", **options}
            return compile_model(str(model), output, CompileOptions(recipes, **options), events)

    return run


@pytest.fixture(scope="session")
def artifacts(
    models: dict[str, Model], quick_compile: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(variant, recipe) -> a compiled artifact. Shared: copy it before changing it."""
    made: dict[tuple[str, str], Path] = {}

    def artifact(variant: str = "t2v", recipe: str = "rtn") -> Path:
        key = (variant, recipe)
        if key not in made:
            output = tmp_path_factory.mktemp("artifacts") / f"{variant}-{recipe}"
            made[key] = quick_compile(models[variant].directory, output, recipe)
        return made[key]

    return artifact


def bind(program: Program, state: dict[str, torch.Tensor]) -> Executor:
    """A runnable program at any stage: tensors as the artifact would store them, made from a state dict."""
    tensors = {}
    for spec in program.tensors.values():
        if spec.source is None:
            assert spec.value is not None
            tensors[spec.name] = spec.value
        elif spec.plane == "whole":
            tensors[spec.name] = state[spec.source].to(spec.dtype)
        else:
            inverse = None if spec.mask is None else 1.0 / program.masks[spec.mask]
            planes = quantize(state[spec.source].to(spec.packed_from), inverse, spec.hadamard)
            tensors[spec.name] = planes[("codes", "scales").index(spec.plane)]
    return Executor(to_graph(program), tensors, torch.device("cpu"))


@pytest.fixture(scope="session")
def bound() -> Callable[[Program, dict[str, torch.Tensor]], Executor]:
    return bind


@pytest.fixture
def portable() -> Iterator[None]:
    """The portable kernels, whatever an earlier test has chosen for the process: for comparisons to the bit."""
    with portable_kernels():
        yield


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(
    variant: str = "t2v", batch: int = 2, frames: int = 3, height: int = 8, width: int = 6, text: int = 7, seed: int = 1
) -> Sample:
    """Positional inputs of a program in bf16: latents, timestep, text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = frames * (height // 2) * (width // 2)
    video = torch.randn(batch, VARIANTS[variant][0], frames, height, width, generator=generator)
    timestep = torch.rand((batch, tokens) if variant == "ti2v" else (batch,), generator=generator) * 1000
    return video.bfloat16(), timestep, torch.randn(batch, text, 64, generator=generator).bfloat16()


@pytest.fixture(scope="session")
def inputs() -> Callable[..., Sample]:
    return make_inputs


@pytest.fixture(scope="session")
def wan_tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan-tiny with plain rounding, compiled once a session through the whole compiler."""
    path = tmp_path_factory.mktemp("wan-tiny") / "wan-tiny.hif4"
    recipes = resolve_recipes(["transformer", "transformer_2"], ["rtn"], [])
    return compile_model("wan-tiny", path, CompileOptions(recipes), lambda event, value: None)
