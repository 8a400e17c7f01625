"""What differs between two artifacts: every field against changes that were made on purpose."""

import io
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from hif4c.compiler import artifact_diff
from hif4c.compiler.artifact_diff import Change, LinearDifference, compare_artifacts
from hif4c.compiler.artifact_diff_tables import render_difference
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from tests.support.forging import forge

WEIGHTS = "transformer/weights.safetensors"
Q = "blocks.0.attn1.to_q"


@pytest.fixture
def plain(artifacts):
    return artifacts("t2v", "rtn")


@pytest.fixture
def change(plain, tmp_path):
    """A copy whose first expert's tensors and manifest a function has changed, opened."""

    def make(tensors=None, manifest=None, name="changed"):
        path = shutil.copytree(plain, tmp_path / name)
        stored = load_file(path / WEIGHTS)
        if tensors is not None:
            tensors(stored)
            save_file(stored, path / WEIGHTS)
        forge(path, manifest, **{WEIGHTS: (path / WEIGHTS).read_bytes()})
        return open_artifact(path)

    return make


def linears_of(manifest):
    return {linear["path"]: linear for linear in manifest["experts"]["transformer"]["linears"]}


def compare(before, after):
    return {item.expert: item for item in compare_artifacts(open_artifact(before), after)}


def changed(item):
    return {linear.path: linear for linear in item.linears if not linear.same}


def text_of(before, after):
    console = Console(width=250, file=io.StringIO())
    for part in render_difference(before, after, compare_artifacts(before, after)):
        console.print(part)
    return console.file.getvalue()


def test_a_copy_is_the_same_and_is_not_read(plain, change, monkeypatch):
    monkeypatch.setattr(artifact_diff, "_pieces", None)  # equal hashes tell it
    copy = change()
    for item in compare(plain, copy).values():
        assert not changed(item)
        assert (item.settings, item.only, item.tensors, item.programs) == ({}, ((), ()), (), {})
        assert item.same_tensors > 10
    text = text_of(open_artifact(plain), copy)
    assert text.splitlines() == [
        f"{name}: nothing differs (26 linears, weights included)." for name in ("transformer", "transformer_2")
    ]


def test_recipes_that_differ_in_precision_alone(plain, artifacts):
    after = open_artifact(artifacts("t2v", "weight-only"))
    item = compare(plain, after)["transformer"]
    # The weights are quantized alike, so the files are equal; only the activations are not.
    precision = Change("w4a4", "w4a16")
    assert [linear for linear in item.linears if linear.same] == [
        LinearDifference(path) for path in (linear.path for linear in item.linears) if not path.startswith("blocks.")
    ]
    found = changed(item)
    assert len(found) == 20
    assert all(linear == LinearDifference(path, precision=precision) for path, linear in found.items())
    assert item.settings["recipe: name"] == Change("rtn", "weight-only")
    assert item.settings["recipe: activations"] == Change("hif4", "bf16")
    assert item.tensors == ()
    calls = item.programs["main"]
    assert calls["hif4.linear"] == (20, 0)
    assert calls["hif4.linear_w4"] == (0, 20)
    assert "aten.linear.default" not in calls
    text = text_of(open_artifact(plain), after)
    assert "precision w4a4 -> w4a16" in text
    assert "6 of 26 linears are the same" in text
    assert Q not in text  # the same change in all of them is told once


def test_rotated_weights_are_others(plain, artifacts):
    after = open_artifact(artifacts("t2v", "rotate"))
    item = compare(plain, after)["transformer"]
    found = changed(item)
    one, two = (load_file(root / WEIGHTS) for root in (plain, after.root))
    assert len(found) == 20
    for path, linear in found.items():
        halves = [
            torch.stack([stored[f"{path}.weight.codes"] & 15, stored[f"{path}.weight.codes"] >> 4])
            for stored in (one, two)
        ]
        assert linear.rotation is not None
        assert linear.rotation.before == ""
        assert int(linear.rotation.after) >= 64
        assert linear.weight == float((halves[0] != halves[1]).double().mean())
        assert linear.weight > 0.5
        assert (linear.bytes, linear.mask, linear.tensors) == (None, None, ())


def test_single_codes_scales_biases_and_other_tensors(plain, change, monkeypatch):
    def touch(stored):
        stored[f"{Q}.weight.codes"][3, 5] ^= 0x10  # one code of two in the byte
        stored["blocks.0.attn1.to_k.weight.scales"][0, 0, 0] ^= 1
        stored["blocks.0.attn1.to_v.bias"][2] = math.nan
        stored["blocks.1.ffn.net.2.bias"] = stored["blocks.1.ffn.net.2.bias"].float()
        stored["blocks.1.scale_shift_table"][0, 0, 0] += 1
        stored["proj_out.weight"][0, 0] += 1

    monkeypatch.setattr(artifact_diff, "PIECE_BYTES", 1 << 10)  # many pieces, and a last one that is not whole
    after = change(touch)
    item = compare(plain, after)["transformer"]
    stored = load_file(after.root / WEIGHTS)
    codes, weight = stored[f"{Q}.weight.codes"], stored["proj_out.weight"]
    bias = stored["blocks.1.ffn.net.2.bias"]
    before = changed(item)["blocks.1.ffn.net.2"].bytes[0]
    assert changed(item) == {
        Q: LinearDifference(Q, weight=1 / (2 * codes.numel())),
        "blocks.0.attn1.to_k": LinearDifference("blocks.0.attn1.to_k", weight=0.0),
        "blocks.0.attn1.to_v": LinearDifference("blocks.0.attn1.to_v", tensors=("bias",)),
        "blocks.1.ffn.net.2": LinearDifference(
            "blocks.1.ffn.net.2", bytes=(before, before + bias.nbytes // 2), tensors=("bias",)
        ),
        "proj_out": LinearDifference("proj_out", weight=1 / weight.numel()),
    }
    assert item.tensors == ("blocks.1.scale_shift_table",)
    # NaN is compared as its bits: the changed artifact equals its own copy.
    again = change(lambda stored: (touch(stored), stored["rope.freqs_cos"].view(-1)[0].add_(1)), name="again")
    (other,) = [item for item in compare_artifacts(after, again) if item.expert == "transformer"]
    assert not changed(other)
    assert other.tensors == ("rope.freqs_cos",)


def test_masks_are_compared_by_their_values(change):
    def masked(values, **entry):
        def tensors(stored):
            stored[f"{Q}.mask"] = torch.ones(128)
            for channel, value in values.items():
                stored[f"{Q}.mask"][channel] = value

        def manifest(content):
            for name in "qkv":
                linears_of(content)[f"blocks.0.attn1.to_{name}"].update(mask=f"{Q}.mask", alpha=0.5, **entry)

        return tensors, manifest

    first = change(*masked({3: 2.0, 9: 0.0}), name="first")
    second = change(*masked({3: 3.0, 4: 0.5, 9: 0.0}, hadamard=64, sqnr=21.5), name="second")
    columns = change(*masked({3: 2.0, 8: 0.0}), name="columns")

    def between(before, after):
        return changed({item.expert: item for item in compare_artifacts(before, after)}["transformer"])

    found = between(first, second)
    assert found == {
        path: LinearDifference(path, mask_ratio=2.0, rotation=Change("", "64"), sqnr=(None, 21.5))
        for path in (f"blocks.0.attn1.to_{name}" for name in "qkv")
    }
    assert between(first, columns)[Q].mask_ratio == math.inf
    text = text_of(first, second)
    assert "stored mask is another, values up to x2 apart" in text
    assert "none -> 21.5" in text
    assert "other columns" in text_of(first, columns)


def test_masks_that_come_go_and_are_folded(plain, change):
    def manifest(content):
        linears = linears_of(content)
        linears[Q].update(mask="q.mask", alpha=0.25, mask_folded=True, rounding="gptq", shift="q.shift", rank=4)
        linears["blocks.0.attn1.to_k"].update(mask="k.mask", alpha=None, outlier_columns=3)
        linears["blocks.0.attn1.to_v"].update(precision="high")

    after = change(manifest=manifest)
    found = changed(compare(plain, after)["transformer"])
    assert found[Q] == LinearDifference(
        Q, shift=Change("", "yes"), mask=Change("", "0.25 folded"), rounding=Change("nearest", "gptq"),
        branch=Change("", "rank 4"),
    )  # fmt: skip
    assert found["blocks.0.attn1.to_k"].mask == Change("", "ones")
    assert found["blocks.0.attn1.to_k"].branch == Change("", "3 columns")
    assert found["blocks.0.attn1.to_v"].precision == Change("w4a4", "high")
    text = text_of(open_artifact(plain), after)
    assert "none -> 0.25 folded" in text
    assert "w4a4 -> high" in text


def test_what_is_in_one_of_them_only(plain, models, quick_compile, change, tmp_path):
    def manifest(content):
        expert = content["experts"]["transformer"]
        expert["linears"] = [linear for linear in expert["linears"] if linear["path"] != "proj_out"]
        expert["config"]["num_layers"] = 7
        expert["recipe"]["name"] = "[bold red]mine[/]"
        linears_of(content)[Q]["in_features"] = 64

    after = change(manifest=manifest)
    item = compare(plain, after)["transformer"]
    assert item.only == ((Q, "proj_out"), (Q,))
    assert item.settings["config: num_layers"] == Change("2", "7")
    text = text_of(open_artifact(plain), after)
    assert f"2 linears ({Q}, proj_out) only in {plain}, or of another shape there; not compared." in text
    assert f"1 linear ({Q}) only in {after.root}" in text
    assert "[bold red]mine[/]" in text
    second = open_artifact(
        quick_compile(models["t2v"].directory, tmp_path / "one", {"transformer_2": "rtn"}, golden=False)
    )
    assert list(compare(plain, second)) == ["transformer_2"]
    assert f"transformer: only in {plain}, not compared." in text_of(open_artifact(plain), second)
    first = change(manifest=lambda content: (content["experts"].pop("transformer_2"), None), name="first")
    with pytest.raises(Hif4Error, match="have an expert in common"):
        compare_artifacts(first, second)


def test_another_model_is_one_sentence(plain, change):
    def manifest(content):
        for linear in linears_of(content).values():
            linear["out_features"] += 1

    with pytest.raises(Hif4Error, match="its transformer is of another model than that of"):
        compare(plain, change(manifest=manifest))


def test_amounts_are_told_as_they_are_read(plain, change):
    def touch(stored):
        stored["proj_out.weight"][0, 0] += 1

    after = change(touch)
    events = []
    compare_artifacts(open_artifact(plain), after, lambda event, value: events.append((event, value)))
    total = dict(events)["total"]
    masks_and_weights = 2 * sum(tensor.nbytes for tensor in load_file(after.root / WEIGHTS).values())
    assert total == masks_and_weights
    assert sum(value for event, value in events if event == "bytes") == total
