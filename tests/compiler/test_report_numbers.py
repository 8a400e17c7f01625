"""The report's figures equal those that are computed, in other ways, from the reopened artifact."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler.activation_statistics import COLUMNS, PERCENTILES, group_numbers
from hif4c.compiler.calibration import Calibration, Group
from hif4c.compiler.log_grid import RELATIVE_ERROR
from hif4c.compiler.report import summarize
from hif4c.compiler.report_numbers import artifact_numbers, expert_numbers, to_json
from hif4c.compiler.sketch import ChannelSketch
from hif4c.compiler.weight_statistics import SAMPLED_WEIGHTS, dense_statistics, packed_statistics, row_step
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, quantize
from tests.compiler.conftest import OUTLIERS
from tests.support.forging import forge

RECIPE = """
mask_percentile = 99.9
hadamard = 32
shift = true
keep_high = ["blocks.1.attn1.to_k"]
"""


@pytest.fixture(scope="module")
def compiled(calibrated, quick_compile, tmp_path_factory):
    """Keys of a recipe beside those above -> an artifact."""

    def make(name, more=""):
        folder = tmp_path_factory.mktemp(name)
        (folder / f"{name}.toml").write_text(RECIPE + more)
        recipe = str(folder / f"{name}.toml")
        return quick_compile(calibrated.directory, folder / "out", recipe, calibration=calibrated.path, golden=False)

    return make


@pytest.fixture(scope="module")
def path(compiled):
    """With masks, shifts, rotations and side branches."""
    return compiled("branched", "rank = 4\noutlier_columns = 2\n")


@pytest.fixture(scope="module")
def artifact(path):
    return open_artifact(path)


@pytest.fixture(scope="module")
def numbers(artifact, calibrated):
    with Calibration(calibrated.path) as calibration:
        return artifact_numbers(artifact, calibration)


@pytest.fixture(scope="module")
def stored(path):
    return load_file(path / "transformer" / "weights.safetensors")


def histogram_of(values):
    """Half octaves by numpy: as `Histogram` has them, trimmed."""
    values = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    edges = 2.0 ** (np.arange(-200, 100) / 2)
    counts, _ = np.histogram(values, edges)
    used = counts.nonzero()[0]
    assert counts.sum() + (values == 0).sum() == values.size
    return -200 + used[0], tuple(counts[used[0] : used[-1] + 1].tolist()), int((values == 0).sum())


def shape_of(found):
    return found.lowest, found.counts, found.zeros


def level1(scales):
    """E6M2 / 4 by the format's definition, [N, U] fp64."""
    stored = scales[..., 0].numpy().astype(np.int64)
    return 2.0 ** ((stored >> 2) - 48) * (1 + (stored & 3) / 4) / 4


def check_packed(found, codes, scales, channels):
    values = dequantize(codes, scales, channels, torch.float64).numpy()
    assert shape_of(found.magnitudes) == histogram_of(values)
    units = level1(scales)
    n = np.abs(values) / units.repeat(64, axis=-1)[:, :channels]
    assert found.in_unit == tuple(np.bincount(n.astype(np.int64).ravel(), minlength=29).tolist())
    assert found.unit_scale == (units.min(), units.max())


def test_weights_are_those_of_the_file(numbers, stored):
    (expert,) = numbers.experts
    packed = 0
    for linear in expert.linears:
        whole = stored.get(f"{linear.path}.weight")
        assert (whole is None) == (linear.precision != "high")
        assert linear.weight.rows == linear.out_features
        if whole is None:
            packed += 1
            codes, scales = (stored[f"{linear.path}.weight.{plane}"] for plane in ("codes", "scales"))
            check_packed(linear.weight, codes, scales, linear.in_features)
        else:
            assert shape_of(linear.weight.magnitudes) == histogram_of(whole.double())
            assert linear.weight.in_unit is None
            assert linear.weight.unit_scale is None
    assert packed == 19


def test_bytes_are_those_of_the_files(numbers, artifact, path, calibrated, stored):
    (expert,) = numbers.experts
    assert numbers.files == {
        item.relative_to(path).as_posix(): os.stat(item).st_size
        for item in path.rglob("*")
        if item.is_file() and item.name != "manifest.json"
    }
    assert numbers.total_bytes == sum(numbers.files.values())
    assert [expert.summary] == summarize(artifact)
    original = calibrated.state()
    for linear in expert.linears:
        parts = [name for name in stored if name.startswith(f"{linear.path}.")]
        mine = [name for name in parts if not name.endswith((".mask", ".mask.columns"))]
        assert linear.bytes == sum(stored[name].nbytes for name in mine)
        whole = [original[f"{linear.path}.{name}"] for name in ("weight", "bias")]
        assert linear.bf16_bytes == sum(2 * tensor.numel() for tensor in whole)
        assert tuple(whole[0].shape) == (linear.out_features, linear.in_features)


def test_masks_are_those_of_the_file(numbers, stored, compiled):
    folding = compiled("folding")
    plain = expert_numbers(open_artifact(folding), "transformer", weights=False)
    found = load_file(folding / "transformer" / "weights.safetensors")
    for expert, tensors, columns, kinds in ((numbers.experts[0], stored, 2, {False}), (plain, found, 0, {True, False})):
        masked = [linear for linear in expert.linears if linear.mask is not None]
        assert {linear.mask_folded for linear in masked} == kinds
        for linear in masked:
            if linear.mask_folded:
                assert linear.mask not in tensors
                assert (linear.mask_min, linear.mask_max) == (None, None)
            else:
                mask = tensors[linear.mask]
                assert (mask == 0).sum() == linear.outlier_columns == columns
                assert linear.mask_max == mask.max() > linear.mask_min == mask[mask > 0].min() > 0
    linears = {linear.path: linear for linear in numbers.experts[0].linears}
    high = linears["blocks.1.attn1.to_k"]
    assert (high.precision, high.mask, high.rank, high.block, high.kind) == ("high", None, 0, 1, "attn1.to_k")
    assert linears["proj_out"].block is None
    assert linears["proj_out"].kind == "proj_out"


def test_what_was_decided_and_measured_is_the_manifests(numbers, path):
    (expert,) = numbers.experts
    entry = json.loads((path / "manifest.json").read_text())["experts"]["transformer"]
    assert (expert.recipe, expert.config) == (entry["recipe"], entry["config"])
    assert expert.calibration == entry["calibration"]
    for linear, told in zip(expert.linears, entry["linears"], strict=True):
        assert (linear.path, linear.precision, linear.reason) == (told["path"], told["precision"], told["reason"])
        assert (linear.sqnr, linear.errors) == (told.get("sqnr"), told.get("errors", {}))
        assert (linear.alpha, linear.rank, linear.rounding) == (told.get("alpha"), told["rank"], told["rounding"])
        assert linear.shift == (told["shift"] is not None)
    quantized = [linear for linear in expert.linears if linear.precision == "w4a4"]
    assert all(linear.sqnr > 5 and linear.errors["w4a4"] > 0 for linear in quantized)


def test_activations_are_those_of_the_calibration_file(numbers, calibrated):
    (expert,) = numbers.experts
    file = load_file(calibrated.path)
    assert [group.name for group in expert.groups] == list(calibrated.calibration.groups)
    assert expert.bin_edges == calibrated.calibration.edges
    for group in expert.groups:
        maxima = file[f"transformer/groups/{group.name}/sketch.maximum"]
        tokens = file[f"transformer/groups/{group.name}/sketch.tokens"]
        assert group.tokens == tokens.sum()
        assert group.bin_maxima == tuple(
            float(row.max()) if count else None for row, count in zip(maxima, tokens, strict=True)
        )
        channels = np.sort(maxima.amax(0).numpy())
        assert group.maximum == channels[-1] == max(filter(None, group.bin_maxima))
        assert [channel.maximum for channel in group.worst] == channels[::-1][:5].tolist()
        # Each channel's largest value is one of the counted ones, and all of them are counted.
        assert sum(group.magnitudes.counts) + group.magnitudes.zeros == group.tokens * group.channels
    groups = {group.name: group for group in expert.groups}
    text = groups["blocks.0.attn2.to_k"]
    assert (text.block, {path.split(".")[1] for path in text.readers}) == (None, {"0", "1"})
    for name, planted in OUTLIERS.items():
        found = groups[name]
        assert sorted(channel.index for channel in found.worst[: len(planted)]) == planted
        # 40 times as large before noise: the others' maxima differ by far less.
        assert found.worst[len(planted) - 1].ratio > 10 > found.worst[len(planted)].ratio
        assert found.channel_maxima[planted[0]] == pytest.approx(
            next(channel.ratio for channel in found.worst if channel.index == planted[0])
        )


def calibration_of(x, bins=2):
    """An ExpertCalibration of one group, its tokens x [T, K] dealt to the bins."""
    sketch = ChannelSketch(x.shape[1], bins + 1)  # the last bin stays empty
    for index in range(bins):
        sketch.update(x[index::bins], index)
    return SimpleNamespace(groups={"a": Group(("a", "b"), x.shape[1])}, sketch=lambda name: sketch)


def test_figures_of_a_wide_input_are_those_of_its_values():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 300, generator=generator) * torch.linspace(0.5, 2, 300)
    x[:, 17] *= 50
    x[::7, 40] = 0
    found = group_numbers(calibration_of(x), "a", 3)
    a = x.abs().double().numpy()
    maxima = a.max(0)
    assert found.maximum == a.max()
    assert found.bin_maxima == (a[::2].max(), a[1::2].max(), None)
    ordered = np.sort(a, axis=None)
    for p, value, ratio in zip(PERCENTILES, found.percentiles, found.ratios, strict=True):
        exact = ordered[math.ceil(round(p * 10) * a.size / 1000) - 1]
        # A count of the sketch is exact, so that its rank lies in the bucket that holds the exact answer.
        assert value == pytest.approx(exact, rel=RELATIVE_ERROR)
        assert ratio == found.maximum / value
    median = np.sort(maxima)[149]
    columns = [maxima[i * 300 // 128 : (i + 1) * 300 // 128].max() / median for i in range(128)]
    assert found.median_maximum == median
    assert len(columns) == COLUMNS
    np.testing.assert_allclose(found.channel_maxima, columns, rtol=1e-6)  # an fp32 division
    worst = np.argsort(-maxima)[:5]
    assert [(channel.index, channel.maximum) for channel in found.worst] == [(i, maxima[i]) for i in worst]
    assert found.worst[0].index == 17
    assert found.worst[0].ratio == found.maximum / median
    # A value is counted in the wrong half octave only where it is within 2 % of an edge; so what lies above an edge
    # is between what does with all values 2 % down and 2 % up. (Below 1/1000 of the largest maximum, values of the
    # channel that it is in are counted higher.)
    edges = 2.0 ** ((found.magnitudes.lowest + np.arange(len(found.magnitudes.counts))) / 2)
    above = np.cumsum(found.magnitudes.counts[::-1])[::-1]
    trusted = edges > found.maximum / 1000
    assert trusted.sum() > 15
    for edge, count in zip(edges[trusted], above[trusted], strict=True):
        assert (a * (1 - RELATIVE_ERROR) >= edge).sum() <= count <= (a * (1 + RELATIVE_ERROR) >= edge).sum()
    assert found.magnitudes.zeros == (a == 0).sum() > 0


def test_an_input_of_zeros_has_no_ratios():
    found = group_numbers(calibration_of(torch.zeros(10, 6)), "a", None)
    assert (found.maximum, found.percentiles, found.ratios) == (0.0, (0.0,) * 3, (None,) * 3)
    assert shape_of(found.magnitudes) == (0, (), 60)
    assert found.channel_maxima == ()
    assert {channel.ratio for channel in found.worst} == {None}


@pytest.mark.parametrize("channels", [192, 200])
def test_large_weights_are_sampled_row_by_row(channels):
    generator = torch.Generator().manual_seed(0)
    rows = 3 * (SAMPLED_WEIGHTS // channels) - 1
    weight = torch.randn(rows, channels, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    codes, scales = quantize(weight)
    found = packed_statistics(codes, scales, channels, "planes")
    assert row_step(rows, channels) == 3
    assert found.rows == -(-rows // 3)
    assert found.unit_scale == (level1(scales).min(), level1(scales).max())
    counted = packed_statistics(codes[::3], scales[::3], channels, "planes")
    check_packed(counted, codes[::3], scales[::3], channels)
    assert (found.magnitudes, found.in_unit) == (counted.magnitudes, counted.in_unit)
    dense = dense_statistics(weight.bfloat16(), "weight")
    assert dense.rows == found.rows
    assert shape_of(dense.magnitudes) == histogram_of(weight[::3].bfloat16().double())


def test_without_a_calibration_there_are_no_groups(artifact, calibrated, tmp_path):
    plain = expert_numbers(artifact, "transformer")
    assert (plain.groups, plain.bin_edges) == ((), ())
    events = []
    quick = expert_numbers(artifact, "transformer", None, lambda *event: events.append(event), weights=False)
    assert {linear.weight for linear in quick.linears} == {None}
    assert [linear.bytes for linear in quick.linears] == [linear.bytes for linear in plain.linears]
    assert events == []


def test_an_expert_that_the_calibration_lacks_has_no_groups(artifacts, calibrated):
    """What it has must fit, whether or not the compile used it."""
    artifact = open_artifact(artifacts("t2v", "rtn"))
    with Calibration(calibrated.path) as calibration:
        assert list(calibration.experts) == ["transformer"]
        assert expert_numbers(artifact, "transformer_2", calibration, weights=False).groups == ()
        for collect in (artifact_numbers, lambda *args: expert_numbers(args[0], "transformer", args[1])):
            with pytest.raises(Hif4Error, match="was made from other weights than this transformer"):
                collect(artifact, calibration)
        calibration.experts = {}
        with pytest.raises(Hif4Error, match="transformer was not calibrated"):
            artifact_numbers(artifact, calibration)


def test_a_calibration_serves_every_recipe_of_its_weights(calibrated, quick_compile, tmp_path, numbers):
    rtn = open_artifact(quick_compile(calibrated.directory, tmp_path / "rtn", golden=False))
    with Calibration(calibrated.path) as calibration:
        found = expert_numbers(rtn, "transformer", calibration, weights=False)
    assert found.groups == numbers.experts[0].groups
    assert found.calibration is None
    assert {linear.sqnr for linear in found.linears} == {None}


def test_progress(artifact, calibrated):
    events = []
    with Calibration(calibrated.path) as calibration:
        expert_numbers(artifact, "transformer", calibration, lambda *event: events.append(event))
    assert events == [
        ("step", "reading the weights of transformer"), ("total", 26), *[("bytes", 1)] * 26,
        ("step", "reading the activations of transformer"), ("total", len(calibrated.calibration.groups)),
        *[("bytes", 1)] * len(calibrated.calibration.groups),
    ]  # fmt: skip


def test_json_is_compact_and_rounded(numbers):
    text = to_json({"artifact": numbers, "more": [numbers.experts[0].linears[5]]})
    found = json.loads(text)
    assert len(text) == len(json.dumps(found, separators=(",", ":")))
    (expert,) = found["artifact"]["experts"]
    assert expert["summary"]["ratio"] == pytest.approx(numbers.experts[0].summary.ratio, rel=1e-5)
    assert expert["summary"]["bits_per_weight"] == pytest.approx(numbers.experts[0].summary.bits_per_weight, rel=1e-5)
    assert found["more"] == [expert["linears"][5]]
    linear, group = numbers.experts[0].linears[8], numbers.experts[0].groups[2]
    assert expert["linears"][8]["weight"]["magnitudes"]["counts"] == list(linear.weight.magnitudes.counts)
    assert expert["groups"][2]["channel_maxima"] == [float(f"{value:.6g}") for value in group.channel_maxima]
    # Both experts with 40 blocks: a group has 128 columns here as there.
    assert len(text) / 2 * 40 * 2 < 3_000_000


def test_loras_and_timesteps_are_shown(path, tmp_path):
    loras = [{"file": "a<b>.safetensors", "scale": 0.5, "tensors": 3, "sha256": "0" * 64}]
    errors = [{"timestep": 999.0, "w4a4": 0.25, "w4a16": 0.125}]
    copy = shutil.copytree(path, tmp_path / "copy")

    def change(manifest):
        manifest["experts"]["transformer"].update(loras=loras, step_errors=errors)

    forge(copy, change)
    found = expert_numbers(open_artifact(copy), "transformer", weights=False)
    assert (list(found.loras), list(found.step_errors)) == (loras, errors)


def damaged(path, tmp_path, change):
    """A copy with other tensors."""
    copy = shutil.copytree(path, tmp_path / "copy")
    relative = "transformer/weights.safetensors"
    tensors = load_file(copy / relative)
    change(tensors)
    save_file(tensors, tmp_path / "changed", metadata={"format": "pt"})
    forge(copy, **{relative: (tmp_path / "changed").read_bytes()})
    return open_artifact(copy)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.attn1.to_q.weight.scales", lambda t: t.fill_(0xFF), "to_q.weight.codes: holds NaN or infinite"),
        ("blocks.0.attn1.to_q.weight.codes", lambda t: t[:64].clone(), "does not have the shape"),
        ("blocks.0.attn1.to_q.weight.codes", lambda t: t[:, :32].clone(), "need scales of shape"),
        ("proj_out.weight", lambda t: t.fill_(math.inf), "proj_out.weight: holds NaN or infinite"),
        ("proj_out.weight", lambda t: t[:, :4].clone(), "does not have the shape"),
        ("blocks.0.ffn.net.2.mask", lambda t: t.zero_(), "ffn.net.2.mask is zero everywhere"),
    ],
)
def test_damaged_weights_are_refused(path, tmp_path, name, value, message):
    artifact = damaged(path, tmp_path, lambda tensors: tensors.update({name: value(tensors[name])}))
    with pytest.raises(Hif4Error, match=message):
        expert_numbers(artifact, "transformer")
