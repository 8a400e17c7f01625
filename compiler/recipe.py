"""Recipes: how the linears of the blocks are quantized. Small TOML files that resolve to one frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hif4c.passes.program import Precision
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.rotation import MAX_WIDTH

__all__ = ["DEFAULT_RECIPE", "Recipe", "builtin_recipes", "load_recipe", "resolve_recipes"]

DEFAULT_RECIPE = "best"
LARGEST = "largest"
SEARCH = "search"
MAX_BRANCH = 1024
"""Rows of a side branch that one key may ask for."""
ROUNDINGS = ("nearest", "search", "gptq")


@dataclass(frozen=True)
class Recipe:
    """What the plan and the passes decide with.

    Attributes:
        name: as shown in tables and recorded in the manifest.
        description: one sentence.
        activations: "hif4" (W4A4) or "bf16" (W4A16: weights only).
        hadamard: width of the block rotation of W4A4 inputs, 0 for none, "largest" for the largest that each takes.
        mask_percentile: percentile of |activation| over tokens that channel masks are made from, taken in the timestep
            bin where it is largest; 100 for the exact maximum, None for no masks. Of a shifted input it is taken over
            the calibration's rows, where above 99.6 it is their maximum.
        shift: take the mean off every input channel where a bias upstream can, and give it back in the bias behind.
        alpha: exponent of the activation statistic in a mask, the weight's is 1 - alpha; "search" finds it per input.
        rounding: of the weights: "nearest", "search" (each unit's scales, by the energy of the input's channels), or
            "gptq" (by the Hessian of the input).
        rank: of the low-rank bf16 branch of every 4-bit linear, 0 for none.
        outlier_columns: input channels of every quantized input that stay in bf16.
        average_bits: budget in bits a weight of the linears that would be quantized, side branches included; the most
            sensitive of them go to bf16 while it lasts.
        bf16_layers: share of the W4A4 linears' multiplications that may have bf16 activations, most sensitive first.
        bf16_steps: share of the denoising steps that may keep all activations in bf16, most sensitive first.
        keep_high: globs of module paths of linears that stay in high precision beside the boundaries.
    """

    name: str
    description: str = ""
    activations: str = "hif4"
    hadamard: int | str = 0
    shift: bool = False
    mask_percentile: float | None = None
    alpha: float | str = 0.5
    rounding: str = "nearest"
    rank: int = 0
    outlier_columns: int = 0
    average_bits: float | None = None
    bf16_layers: float = 0.0
    bf16_steps: float = 0.0
    keep_high: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """Precision of the linears that are quantized."""
        return Precision.W4A4 if self.activations == "hif4" else Precision.W4A16

    @property
    def needs_calibration(self) -> bool:
        """Whether anything in it is decided from activations."""
        masks = self.mask_percentile is not None or self.outlier_columns > 0
        budgets = self.average_bits is not None or self.bf16_layers > 0 or self.bf16_steps > 0
        return masks or budgets or self.shift or self.rounding != "nearest"

    def to_dict(self) -> dict[str, Any]:
        """As recorded in the manifest."""
        return {**dataclasses.asdict(self), "keep_high": list(self.keep_high)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """Read what `to_dict` gave, as untrusted input; raises Hif4Error naming `where`."""
        name = values.get("name")
        if not isinstance(name, str):
            raise Hif4Error(f"{where}: the recipe has no name.")
        # A file leaves out what it does not set, so that keys which need others can be refused without them.
        defaults = {item.name: item.default for item in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if key != "name" and value != defaults.get(key)}
        return _checked(name, given, where)


def builtin_recipes() -> dict[str, Recipe]:
    """Name -> recipe, for those that ship with the project."""
    files = sorted(resources.files("hif4c.compiler").joinpath("recipes").iterdir(), key=lambda item: item.name)
    recipes = [
        _parse(item.read_text(), item.name.removesuffix(".toml"), f"built-in recipe {item.name}")
        for item in files
        if item.name.endswith(".toml")
    ]
    return {recipe.name: recipe for recipe in recipes}


def load_recipe(name: str) -> Recipe:
    """Find a built-in recipe by name, or read a TOML file.

    Raises:
        Hif4Error: no such recipe or file, not TOML, an unknown key, or a value out of range.
    """
    recipes = builtin_recipes()
    if name in recipes:
        return recipes[name]
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise Hif4Error(f"recipe {name} cannot be read: {error}.") from None
        return _parse(text, path.stem, f"recipe {name}")
    close = difflib.get_close_matches(name, recipes, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise Hif4Error(f"there is no recipe {name!r}{hint} Built in: {', '.join(recipes)}; or give a .toml file.")


def resolve_recipes(experts: list[str], chosen: list[str], only: list[str]) -> dict[str, Recipe]:
    """Turn `--recipe` and `--expert` values into one recipe an expert.

    Args:
        experts: those that the model has.
        chosen: "NAME" for all experts, or "EXPERT=NAME"; later ones win.
        only: experts to compile, empty for all.

    Raises:
        Hif4Error: an expert that the model does not have, or an unknown recipe.
    """
    for name in [*only, *(item.split("=", 1)[0] for item in chosen if "=" in item)]:
        if name not in experts:
            raise Hif4Error(f"the model has no expert {name!r}; it has {', '.join(experts)}.")
    names = dict.fromkeys(experts, DEFAULT_RECIPE)
    for item in chosen:
        expert, found, recipe = item.partition("=")
        names.update({expert: recipe} if found else dict.fromkeys(experts, item))
    return {expert: load_recipe(name) for expert, name in names.items() if not only or expert in only}


def _parse(text: str, name: str, where: str) -> Recipe:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Hif4Error(f"{where} is not valid TOML: {error}.") from None
    return _checked(name, values, where)


def _checked(name: str, values: Mapping[str, Any], where: str) -> Recipe:
    known = [item.name for item in dataclasses.fields(Recipe) if item.name != "name"]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise Hif4Error(f"{where} has an unknown key {key!r}{hint} Known keys: {', '.join(known)}.")
    fields: dict[str, Any] = {key: _FIELDS[key](value, f"{where}: {key}") for key, value in values.items()}
    recipe = Recipe(name, **fields)
    if recipe.activations == "bf16":
        unused = ("hadamard", "shift", "mask_percentile", "outlier_columns", "bf16_layers", "bf16_steps")
        for key in unused:
            if getattr(recipe, key):
                raise Hif4Error(f"{where}: {key} needs quantized activations, but activations is bf16.")
    if "alpha" in values and recipe.mask_percentile is None:
        raise Hif4Error(f"{where}: alpha needs a mask; give mask_percentile (100 for the maximum).")
    return recipe


def _choice(*allowed: str) -> Callable[[Any, str], str]:
    def check(value: Any, what: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise Hif4Error(f"{what} must be {' or '.join(repr(item) for item in allowed)}, not {value!r}.")
        return value

    return check


def _number(low: float, high: float, text: str, *, open_low: bool = False) -> Callable[[Any, str], float]:
    def check(value: Any, what: str) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (open_low and value == low):
            raise Hif4Error(f"{what} must be {text}, not {value!r}.")
        return float(value)

    return check


def _count(most: int) -> Callable[[Any, str], int]:
    def check(value: Any, what: str) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise Hif4Error(f"{what} must be a whole number from 0 to {most}, not {value!r}.")
        return value

    return check


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Hif4Error(f"{what} must be text, not {value!r}.")
    return value


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise Hif4Error(f"{what} must be true or false, not {value!r}.")
    return value


def _width(value: Any, what: str) -> int | str:
    if value == LARGEST:
        return LARGEST
    if type(value) is not int or (value != 0 and (value & (value - 1) or not 2 <= value <= MAX_WIDTH)):
        raise Hif4Error(f"{what} must be 0, a power of two from 2 to {MAX_WIDTH}, or {LARGEST!r}, not {value!r}.")
    return value


def _alpha(value: Any, what: str) -> float | str:
    return SEARCH if value == SEARCH else _number(0, 1, f"a number from 0 to 1 or {SEARCH!r}")(value, what)


def _globs(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Hif4Error(f'{what} must be a list of globs such as "blocks.0.*", not {value!r}.')
    return tuple(value)


_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "description": _text,
    "activations": _choice("hif4", "bf16"),
    "hadamard": _width,
    "shift": _flag,
    "mask_percentile": _number(0, 100, "a percentile above 0 and up to 100", open_low=True),
    "alpha": _alpha,
    "rounding": _choice(*ROUNDINGS),
    "rank": _count(MAX_BRANCH),
    "outlier_columns": _count(MAX_BRANCH),
    "average_bits": _number(0, 16, "a number of bits up to 16", open_low=True),
    "bf16_layers": _number(0, 1, "a share from 0 to 1"),
    "bf16_steps": _number(0, 1, "a share from 0 to 1"),
    "keep_high": _globs,
}
