import dataclasses

import pytest

from hif4c.compiler.compile import resolve_recipes
from hif4c.compiler.recipe import DEFAULT_RECIPE, Recipe, builtin_recipes, load_recipe
from hif4c.passes.program import Precision
from hif4c.runtime.errors import Hif4Error

EXPERTS = ["transformer", "transformer_2"]


def refusal(call, *arguments):
    with pytest.raises(Hif4Error) as caught:
        call(*arguments)
    return str(caught.value)


def test_built_in():
    recipes = builtin_recipes()
    assert DEFAULT_RECIPE in recipes
    found = {name: (recipe.activations, recipe.hadamard) for name, recipe in recipes.items()}
    assert found.items() >= {"rtn": ("hif4", 0), "weight-only": ("bf16", 0), "rotate": ("hif4", 64)}.items()
    for name, recipe in recipes.items():
        assert load_recipe(name) == recipe
        assert recipe.name == name
        assert recipe.description.endswith(".")
    assert recipes["rtn"].precision == Precision.W4A4
    assert recipes["weight-only"].precision == Precision.W4A16


def test_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('description = "Mine."\nhadamard = 128\nkeep_high = ["blocks.0.*"]\n')
    recipe = load_recipe(str(path))
    assert recipe == Recipe("mine", "Mine.", "hif4", 128, ("blocks.0.*",))
    assert recipe.to_dict() == {**dataclasses.asdict(recipe), "keep_high": ["blocks.0.*"]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.hadamard = 0


def test_an_empty_file_is_the_default(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    assert load_recipe(str(tmp_path / "empty.toml")) == Recipe("empty")


def test_unknown_names():
    message = refusal(load_recipe, "wieght-only")
    assert "there is no recipe 'wieght-only'; did you mean weight-only?" in message
    assert all(name in message.split("Built in:")[1] for name in ("rotate", "rtn", "weight-only"))
    message = refusal(load_recipe, "zzz")
    assert "did you mean" not in message
    assert "there is no recipe 'zzz'" in message


def test_a_missing_or_unreadable_file(tmp_path):
    assert f"recipe {tmp_path / 'absent.toml'} cannot be read" in refusal(load_recipe, str(tmp_path / "absent.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal(load_recipe, str(tmp_path / "bytes.toml"))
    assert "cannot be read" in refusal(load_recipe, str(make_directory(tmp_path / "folder.toml")))


def make_directory(path):
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hadamard = ", "is not valid TOML"),
        ("hadamrad = 64", "has an unknown key 'hadamrad'; known keys: description, activations, hadamard, keep_high"),
        ('name = "other"', "has an unknown key 'name'"),
        ('activations = "int8"', 'activations must be "hif4" or "bf16", not \'int8\''),
        ("activations = 4", "not 4"),
        ("hadamard = 3", "hadamard must be 0 or a power of two from 2 to 1024, not 3"),
        ("hadamard = 1", "not 1"),
        ("hadamard = 2048", "not 2048"),
        ("hadamard = -2", "not -2"),
        ("hadamard = true", "not True"),
        ("hadamard = 64.0", "not 64.0"),
        ('activations = "bf16"\nhadamard = 64', "hadamard needs quantized activations"),
        ('keep_high = "blocks.0.*"', "keep_high must be a list of globs"),
        ("keep_high = [1]", "keep_high must be a list of globs"),
        ("description = 1", "description must be text"),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    message = refusal(load_recipe, str(path))
    assert words in message
    assert str(path) in message


def test_one_recipe_an_expert():
    def names(chosen, only=()):
        return {expert: recipe.name for expert, recipe in resolve_recipes(EXPERTS, chosen, list(only)).items()}

    assert names([]) == dict.fromkeys(EXPERTS, "rtn")
    assert names(["rotate"]) == dict.fromkeys(EXPERTS, "rotate")
    assert names(["transformer_2=weight-only"]) == {"transformer": "rtn", "transformer_2": "weight-only"}
    assert names(["transformer=rotate", "weight-only"]) == dict.fromkeys(EXPERTS, "weight-only")  # the last one wins
    assert names(["rotate"], only=["transformer_2"]) == {"transformer_2": "rotate"}


def test_experts_that_the_model_does_not_have():
    assert "no expert 'transformer_3'; it has transformer, transformer_2" in refusal(
        resolve_recipes, EXPERTS, ["transformer_3=rtn"], []
    )
    assert "no expert 'transformer_2'; it has transformer." in refusal(
        resolve_recipes, ["transformer"], [], ["transformer_2"]
    )
    assert "there is no recipe 'nope'" in refusal(resolve_recipes, EXPERTS, ["transformer=nope"], [])
