"""A program is traced and transformed again from the manifest: the last stage is what was compiled."""

import shutil
from unittest import mock

import pytest

from hif4c.compiler import inspection
from hif4c.compiler.inspection import graph_at_stage
from hif4c.compiler.pipeline import PASS_NAMES
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import encode
from hif4c.runtime.graph_text import program_lines
from tests.support.forging import forge

EVERYTHING = """
shift = true
mask_percentile = 99.9
alpha = 0.5
hadamard = 64
rank = 2
outlier_columns = 3
keep_high = ["blocks.1.attn1.to_k"]
"""
FOLDED = """
shift = true
mask_percentile = 100
alpha = "search"
hadamard = "largest"
bf16_layers = 0.2
"""


@pytest.fixture(scope="module")
def compiled(calibrated, quick_compile, tmp_path_factory):
    """Text of a recipe -> the small model compiled with it and its calibration."""
    made = {}

    def make(recipe):
        if recipe not in made:
            folder = tmp_path_factory.mktemp("compiled")
            (folder / "mine.toml").write_text(recipe)
            made[recipe] = quick_compile(
                calibrated.directory,
                folder / "out",
                str(folder / "mine.toml"),
                calibration=calibrated.path,
                golden=False,
            )
        return made[recipe]

    return make


@pytest.fixture(autouse=True)
def shared_captures(captures):
    with mock.patch.object(inspection, "capture", captures):
        yield


def last_stage(path, expert="transformer"):
    return encode(graph_at_stage(open_artifact(path), expert, PASS_NAMES[-1]))


@pytest.mark.parametrize("recipe", [EVERYTHING, FOLDED], ids=["columns", "folded"])
def test_the_last_stage_is_the_compiled_program(recipe, compiled):
    path = compiled(recipe)
    text = (path / "transformer" / "graph.json").read_bytes()
    assert last_stage(path) == text
    linears = {linear["path"]: linear for linear in open_artifact(path).expert("transformer").linears}
    found = [linear for linear in linears.values() if linear["precision"] != "high"]
    # The recipe did what this test is about.
    assert sum(linear["shift"] is not None for linear in found) > 10
    if recipe == EVERYTHING:
        assert b".columns" in text
        assert {linear["rank"] for linear in found} == {2}
        assert {linear["outlier_columns"] for linear in found} == {3}
        kept = linears["blocks.1.attn1.to_k"]
        assert (kept["precision"], kept["shift"]) == ("high", "blocks.1.attn1.to_q.shift")
    else:
        assert sum(linear["mask_folded"] for linear in found) > 1
        assert {linear["precision"] for linear in found} == {"w4a4", "w4a16"}
        assert {linear["hadamard"] for linear in found} == {0, 128, 256}


@pytest.mark.parametrize(
    ("variant", "recipe"), [("t2v", "rtn"), ("ti2v", "rtn"), ("t2v", "rotate"), ("t2v", "weight-only")]
)
def test_recipes_without_calibration(variant, recipe, artifacts):
    path = artifacts(variant, recipe)
    assert last_stage(path) == (path / "transformer" / "graph.json").read_bytes()


def test_every_stage_prints(compiled):
    artifact = open_artifact(compiled(EVERYTHING))
    counts = {}
    for stage in PASS_NAMES[PASS_NAMES.index("choose_precision") :]:
        lines = list(program_lines(graph_at_stage(artifact, "transformer", stage), "blocks.0"))
        counts[stage] = [sum(word in line for line in lines) for word in ("aten.linear.default(", "hif4.quantize(")]
    # Ten linears and eight quantized inputs, the text's before the blocks; a branch of rank 2 has another linear.
    assert counts["choose_precision"] == [10, 0]
    assert counts["insert_qdq"][0] == 10
    assert counts["insert_qdq"][1] > counts["share_quantized_inputs"][1]
    assert counts["add_side_branches"][0] == 20
    assert counts["lower_linears"] == [10, 6]


def test_an_unknown_stage_is_refused(compiled):
    with pytest.raises(Hif4Error, match=r"^no pass is called 'fold'; the passes are remove_noops, .*pack_weights"):
        graph_at_stage(open_artifact(compiled(FOLDED)), "transformer", "fold")


@pytest.mark.parametrize(
    "change",
    [
        lambda linears: linears.pop(),
        lambda linears: linears[7].update(path="blocks.9.attn1.to_q"),
        lambda linears: [linear.update(outlier_columns=128) for linear in linears[5:8]],
        lambda linears: linears[7].update(shift="another"),
    ],
)
def test_a_manifest_of_another_program_is_refused(change, compiled, tmp_path):
    path = shutil.copytree(compiled(EVERYTHING), tmp_path / "copy")
    forge(path, lambda manifest: change(manifest["experts"]["transformer"]["linears"]))
    with pytest.raises(Hif4Error, match=r"manifest\.json: its linears (are not those of|do not fit) its config \("):
        graph_at_stage(open_artifact(path), "transformer", PASS_NAMES[-1])
