import dataclasses
import json

import pytest

from hif4c.compiler.recipe import DEFAULT_RECIPE, Recipe, builtin_recipes, load_recipe, resolve_recipes
from hif4c.passes.program import Precision
from hif4c.runtime.errors import Hif4Error

EXPERTS = ["transformer", "transformer_2"]
CALIBRATED = {"best", "gptq", "smooth-max", "svd", "tail-aware", "tail-aware-rotate"}
"""Built-in recipes that need a calibration."""


EVERY_KEY = """
description = "Mine."
activations = "hif4"
hadamard = 128
shift = true
mask_percentile = 99.9
alpha = 0.25
rounding = "gptq"
rank = 16
outlier_columns = 4
average_bits = 5.5
bf16_layers = 0.1
bf16_steps = 0.2
keep_high = ["blocks.0.*", "*.to_q"]
"""


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
        assert Recipe.from_dict(recipe.to_dict(), "manifest.json") == recipe
    assert {name for name, recipe in recipes.items() if recipe.needs_calibration} == CALIBRATED
    assert recipes["rtn"].precision == Precision.W4A4
    assert recipes["weight-only"].precision == Precision.W4A16


def test_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(EVERY_KEY)
    recipe = load_recipe(str(path))
    assert recipe == Recipe(
        "mine", "Mine.", "hif4", 128, True, 99.9, 0.25, "gptq", 16, 4, 5.5, 0.1, 0.2, ("blocks.0.*", "*.to_q")
    )
    assert all(
        getattr(recipe, item.name) != item.default for item in dataclasses.fields(recipe) if item.name != "activations"
    )
    assert recipe.to_dict() == {**dataclasses.asdict(recipe), "keep_high": ["blocks.0.*", "*.to_q"]}
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


KEYS = (
    "description, activations, hadamard, shift, mask_percentile, alpha, rounding, rank, outlier_columns, average_bits, "
    "bf16_layers, bf16_steps, keep_high."
)
WIDTH = "hadamard must be 0, a power of two from 2 to 1024, or 'largest', not"
PERCENTILE = "mask_percentile must be a percentile above 0 and up to 100, not"
ALPHA = "alpha must be a number from 0 to 1 or 'search', not"
BITS = "average_bits must be a number of bits up to 16, not"
LAYERS, STEPS = (f"{key} must be a share from 0 to 1, not" for key in ("bf16_layers", "bf16_steps"))
RANK, COLUMNS = (f"{key} must be a whole number from 0 to 1024, not" for key in ("rank", "outlier_columns"))
ROUNDING = "rounding must be 'nearest' or 'search' or 'gptq', not"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hadamard = ", "is not valid TOML"),
        ("hadamrad = 64", f"has an unknown key 'hadamrad'; did you mean hadamard? Known keys: {KEYS}"),
        ("percentile = 64", "did you mean mask_percentile? Known keys"),
        ("zzz = 64", f"has an unknown key 'zzz'. Known keys: {KEYS}"),
        ('name = "other"', "has an unknown key 'name'"),
        ("description = 1", "description must be text, not 1"),
        ('activations = "int8"', "activations must be 'hif4' or 'bf16', not 'int8'"),
        ("activations = 4", "activations must be 'hif4' or 'bf16', not 4"),
        ("hadamard = 3", f"{WIDTH} 3"),
        ("hadamard = 1", f"{WIDTH} 1"),
        ("hadamard = 2048", f"{WIDTH} 2048"),
        ("hadamard = -2", f"{WIDTH} -2"),
        ("hadamard = true", f"{WIDTH} True"),
        ("hadamard = 64.0", f"{WIDTH} 64.0"),
        ('hadamard = "widest"', f"{WIDTH} 'widest'"),
        ("shift = 1", "shift must be true or false, not 1"),
        ("mask_percentile = 0", f"{PERCENTILE} 0"),
        ("mask_percentile = 100.5", f"{PERCENTILE} 100.5"),
        ("mask_percentile = -1", f"{PERCENTILE} -1"),
        ("mask_percentile = nan", f"{PERCENTILE} nan"),
        ("mask_percentile = true", f"{PERCENTILE} True"),
        ('mask_percentile = "99"', f"{PERCENTILE} '99'"),
        ("mask_percentile = 99\nalpha = 1.5", f"{ALPHA} 1.5"),
        ("mask_percentile = 99\nalpha = -0.1", f"{ALPHA} -0.1"),
        ('mask_percentile = 99\nalpha = "find"', f"{ALPHA} 'find'"),
        ('rounding = "floor"', f"{ROUNDING} 'floor'"),
        ("rounding = true", f"{ROUNDING} True"),
        ("rank = -1", f"{RANK} -1"),
        ("rank = 1025", f"{RANK} 1025"),
        ("rank = 16.0", f"{RANK} 16.0"),
        ("rank = true", f"{RANK} True"),
        ("outlier_columns = -1", f"{COLUMNS} -1"),
        ("outlier_columns = 1025", f"{COLUMNS} 1025"),
        ("average_bits = 0", f"{BITS} 0"),
        ("average_bits = 17", f"{BITS} 17"),
        ("average_bits = inf", f"{BITS} inf"),
        ("bf16_layers = 1.01", f"{LAYERS} 1.01"),
        ("bf16_layers = -0.01", f"{LAYERS} -0.01"),
        ("bf16_steps = 15", f"{STEPS} 15"),
        ('bf16_steps = "all"', f"{STEPS} 'all'"),
        ('keep_high = "blocks.0.*"', "keep_high must be a list of globs"),
        ("keep_high = [1]", "keep_high must be a list of globs"),
        # What needs something else.
        ("alpha = 0.5", "alpha needs a mask; give mask_percentile (100 for the maximum)"),
        ('alpha = "search"', "alpha needs a mask"),
        ('activations = "bf16"\nhadamard = 64', "hadamard needs quantized activations, but activations is bf16"),
        ('activations = "bf16"\nhadamard = "largest"', "hadamard needs quantized activations"),
        ('activations = "bf16"\nshift = true', "shift needs quantized activations"),
        ('activations = "bf16"\nmask_percentile = 99.9', "mask_percentile needs quantized activations"),
        ('activations = "bf16"\noutlier_columns = 1', "outlier_columns needs quantized activations"),
        ('activations = "bf16"\nbf16_layers = 0.1', "bf16_layers needs quantized activations"),
        ('activations = "bf16"\nbf16_steps = 0.1', "bf16_steps needs quantized activations"),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    message = refusal(load_recipe, str(path))
    assert words in message
    assert str(path) in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mask_percentile = 100", {"mask_percentile": 100.0}),
        ("mask_percentile = 0.001", {"mask_percentile": 0.001}),
        ("mask_percentile = 99\nalpha = 0", {"mask_percentile": 99.0, "alpha": 0.0}),
        ("mask_percentile = 99\nalpha = 1", {"mask_percentile": 99.0, "alpha": 1.0}),
        ('mask_percentile = 99\nalpha = "search"', {"mask_percentile": 99.0, "alpha": "search"}),
        ("hadamard = 1024", {"hadamard": 1024}),
        ('hadamard = "largest"', {"hadamard": "largest"}),
        ("rank = 1024\noutlier_columns = 1024", {"rank": 1024, "outlier_columns": 1024}),
        ("average_bits = 16\nbf16_layers = 1\nbf16_steps = 0", {"average_bits": 16.0, "bf16_layers": 1.0}),
        ('activations = "bf16"\nrank = 2\nrounding = "gptq"', {"activations": "bf16", "rank": 2, "rounding": "gptq"}),
        ('activations = "bf16"\nhadamard = 0\nshift = false', {"activations": "bf16"}),
    ],
)
def test_edges_of_the_ranges(tmp_path, text, found):
    (tmp_path / "edge.toml").write_text(text)
    recipe = load_recipe(str(tmp_path / "edge.toml"))
    assert recipe == Recipe("edge", **found)
    assert Recipe.from_dict(recipe.to_dict(), "manifest.json") == recipe


@pytest.mark.parametrize(
    "values",
    [
        {"mask_percentile": 99.9}, {"outlier_columns": 1}, {"average_bits": 5.0}, {"bf16_layers": 0.1},
        {"bf16_steps": 0.1}, {"shift": True}, {"rounding": "search"}, {"rounding": "gptq"},
        {"activations": "bf16", "rounding": "gptq"},
    ],
)  # fmt: skip
def test_what_needs_a_calibration(values):
    assert Recipe("needy", **values).needs_calibration


@pytest.mark.parametrize("values", [{}, {"rank": 4}, {"hadamard": "largest"}, {"keep_high": ("a",)}, {"alpha": 0.1}])
def test_what_needs_none(values):
    assert not Recipe("free", **values).needs_calibration


def test_what_a_manifest_holds_is_read_back(tmp_path):
    """As JSON, with every key; as untrusted input."""
    (tmp_path / "mine.toml").write_text(EVERY_KEY)
    for recipe in (load_recipe(str(tmp_path / "mine.toml")), Recipe("plain")):
        values = json.loads(json.dumps(recipe.to_dict()))
        assert values.keys() == {item.name for item in dataclasses.fields(Recipe)}
        assert Recipe.from_dict(values, "manifest.json") == recipe
    assert refusal(Recipe.from_dict, {"rank": 1}, "manifest.json") == "manifest.json: the recipe has no name."
    for change, words in (
        ({"rank": "all"}, "manifest.json: rank must be"),
        ({"mask_percentile": None}, "manifest.json: alpha needs a mask"),
        ({"secret": 1}, "manifest.json has an unknown key 'secret'"),
        ({"keep_high": "blocks"}, "manifest.json: keep_high must be a list"),
    ):
        assert words in refusal(Recipe.from_dict, {**values, "alpha": 0.25, **change}, "manifest.json")


def test_one_recipe_an_expert():
    def names(chosen, only=()):
        return {expert: recipe.name for expert, recipe in resolve_recipes(EXPERTS, chosen, list(only)).items()}

    assert names([]) == dict.fromkeys(EXPERTS, "best")
    assert names(["rotate"]) == dict.fromkeys(EXPERTS, "rotate")
    assert names(["transformer_2=weight-only"]) == {"transformer": "best", "transformer_2": "weight-only"}
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
