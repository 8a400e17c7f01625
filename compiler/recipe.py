"""Recipes: how the linears of the blocks are quantized. Small TOML files that resolve to one frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hif4c.passes.program import Precision
from hif4c.runtime.errors import Hif4Error

__all__ = ["DEFAULT_RECIPE", "Recipe", "builtin_recipes", "load_recipe"]

DEFAULT_RECIPE = "rtn"


@dataclass(frozen=True)
class Recipe:
    """What the plan decides with.

    Attributes:
        name: as shown in tables and recorded in the manifest.
        description: one sentence.
        activations: "hif4" (W4A4) or "bf16" (W4A16: weights only).
        hadamard: width of the block rotation of W4A4 inputs, 0 for none.
        keep_high: globs of module paths of linears that stay in high precision beside the boundaries.
    """

    name: str
    description: str = ""
    activations: str = "hif4"
    hadamard: int = 0
    keep_high: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """Precision of the linears that are quantized."""
        return Precision.W4A4 if self.activations == "hif4" else Precision.W4A16

    def to_dict(self) -> dict[str, Any]:
        """As recorded in the manifest."""
        return {**dataclasses.asdict(self), "keep_high": list(self.keep_high)}


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


def _parse(text: str, name: str, where: str) -> Recipe:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Hif4Error(f"{where} is not valid TOML: {error}.") from None
    known = [item.name for item in dataclasses.fields(Recipe) if item.name != "name"]
    for key in values:
        if key not in known:
            raise Hif4Error(f"{where} has an unknown key {key!r}; known keys: {', '.join(known)}.")
    return _validated(name, values, where)


def _validated(name: str, values: Mapping[str, Any], where: str) -> Recipe:
    activations = values.get("activations", "hif4")
    if activations not in ("hif4", "bf16"):
        raise Hif4Error(f'{where}: activations must be "hif4" or "bf16", not {activations!r}.')
    width = values.get("hadamard", 0)
    if type(width) is not int or (width != 0 and (width & (width - 1) or not 2 <= width <= 1024)):
        raise Hif4Error(f"{where}: hadamard must be 0 or a power of two from 2 to 1024, not {width!r}.")
    if width and activations == "bf16":
        raise Hif4Error(f"{where}: hadamard needs quantized activations, but activations is bf16.")
    keep = values.get("keep_high", [])
    if not isinstance(keep, list) or not all(isinstance(item, str) for item in keep):
        raise Hif4Error(f'{where}: keep_high must be a list of globs such as "blocks.0.*", not {keep!r}.')
    description = values.get("description", "")
    if not isinstance(description, str):
        raise Hif4Error(f"{where}: description must be text.")
    return Recipe(name, description, activations, width, tuple(keep))
