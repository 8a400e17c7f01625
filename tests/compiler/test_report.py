"""The report is computed from the files and the manifest of an artifact."""

import json
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file

from hif4c.compiler.report import Resolved, render_report, summarize
from hif4c.runtime.artifact import open_artifact
from tests.support.forging import forge


@pytest.fixture(scope="module")
def branched(models, quick_compile, tmp_path_factory):
    """With a low-rank branch, which needs no calibration."""
    folder = tmp_path_factory.mktemp("branched")
    (folder / "branched.toml").write_text("rank = 4\nhadamard = 32\n")
    return quick_compile(models["ti2v"].directory, folder / "out", str(folder / "branched.toml"), golden=False)


@pytest.fixture
def resolved(branched, tmp_path):
    """The same with a manifest that tells of masks, shifts and more."""
    path = shutil.copytree(branched, tmp_path / "resolved")

    def change(manifest):
        linears = {linear["path"]: linear for linear in manifest["experts"]["transformer"]["linears"]}
        q, k, v = (linears[f"blocks.0.attn1.to_{name}"] for name in "qkv")
        for linear in (q, k, v):
            linear.update(mask="q.mask", alpha=0.25, shift="q.shift", outlier_columns=3)
        k.update(precision="high", mask=None, rank=0)
        q.update(sqnr=21.0)
        v.update(sqnr=30.0)
        linears["blocks.1.attn2.to_q"].update(mask="norm.mask", alpha=0.75, mask_folded=True, sqnr=11.25, rank=9)
        linears["blocks.1.ffn.net.2"].update(mask="ffn.mask", alpha=None, outlier_columns=5, rounding="gptq", sqnr=None)

    forge(path, change)
    return path


def text_of(table):
    console = Console(width=180, color_system=None, force_terminal=False, _environ={})
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row(table, first):
    """The cells of a printed row."""
    return next(line.split() for line in text_of(table).splitlines() if line.split()[:1] == [first])


def test_the_side_branch_counts_as_the_weights(branched):
    (found,) = summarize(open_artifact(branched))
    stored = load_file(branched / "transformer" / "weights.safetensors")
    branches = sum(value.nbytes for name, value in stored.items() if name.endswith((".down", ".up")))
    linears = [linear for linear in open_artifact(branched).expert("transformer").linears if linear["rank"]]
    assert found.branch_bytes == branches == sum(2 * 4 * (x["in_features"] + x["out_features"]) for x in linears)
    assert found.bits_per_weight == 4.5 + 8 * branches / found.quantized_weights
    everything = sum(value.nbytes for value in stored.values())
    assert found.plane_bytes + found.branch_bytes + found.other_bytes == everything
    entry = json.loads((branched / "report.json").read_text())["experts"]["transformer"]
    assert entry["branch_bytes"] == branches
    assert entry["bits_per_quantized_weight"] == found.bits_per_weight
    assert entry["resolved"] == {
        "shifts": 0, "masks": 0, "folded": 0, "alphas": [], "rotations": [32], "roundings": {"nearest": 20}, "rank": 4,
        "outlier_columns": 0, "sqnr_median": None, "sqnr_min": None,
    }  # fmt: skip


def test_branches_and_masks_are_no_parameters_of_the_original(branched, artifacts):
    (found,), (plain,) = (summarize(open_artifact(path)) for path in (branched, artifacts("ti2v", "rtn")))
    assert found.bf16_bytes == plain.bf16_bytes


def test_what_a_recipe_became(resolved):
    """Inputs are counted once, whatever number of linears reads them."""
    (found,) = summarize(open_artifact(resolved))
    assert found.resolved == Resolved(
        shifts=1, masks=3, folded=1, alphas=(0.25, 0.75), rotations=(32,), roundings={"gptq": 1, "nearest": 18}, rank=9,
        outlier_columns=5, sqnr_median=21.0, sqnr_min=11.25,
    )  # fmt: skip
    overview, table, _ = render_report(open_artifact(resolved))
    assert row(overview, "transformer")[2:4] == ["19", "7"]
    assert row(table, "transformer")[1:] == (
        ["1", "3", "1", "0.25", "to", "0.75", "32", "1", "gptq,", "18", "nearest", "9", "5", "21.0", "11.2"]
    )


def test_the_table_of_linears(resolved):
    table = render_report(open_artifact(resolved))[2]
    reason = ["block", "linear,", "recipe", "branched"]
    shape = ["128", "x", "128"]
    assert row(table, "linear") == (
        ["linear", "shape", "is", "shift", "mask", "rotation", "rounding", "branch", "SQNR", "reason"]
    )
    assert row(table, "blocks.0.attn1.to_q") == [
        "blocks.0.attn1.to_q", *shape, "w4a4", "yes", "0.25", "32", "nearest", "rank", "4,", "3", "columns", "21.0",
        *reason,
    ]  # fmt: skip
    assert row(table, "blocks.0.attn1.to_k") == ["blocks.0.attn1.to_k", *shape, "high", "yes", *reason]
    assert row(table, "blocks.1.attn2.to_q")[5:8] == ["0.75", "folded", "32"]
    assert row(table, "blocks.1.ffn.net.2")[5:11] == ["ones", "32", "gptq", "rank", "4,", "5"]


def test_columns_that_no_linear_needs_are_left_out(artifacts):
    """So that with plain rounding there is room for the reasons."""
    *_, table = render_report(open_artifact(artifacts("ti2v", "rtn")))
    assert row(table, "linear") == ["linear", "shape", "is", "rounding", "reason"]
