from dataclasses import replace

import pytest
import torch

from hif4c.compiler import choose as choose_module
from hif4c.compiler.choose import choose, largest_percentile
from hif4c.compiler.masks import MaskChoice, channel_mask, choose_mask
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.sketch import ChannelSketch
from hif4c.passes.program import Precision
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.rotation import block_hadamard
from tests.compiler.conftest import OUTLIERS

QKV = [f"blocks.0.attn1.to_{name}" for name in "qkv"]
TEXT = [f"blocks.{block}.attn2.to_{name}" for block in (0, 1) for name in "kv"]
MASKS = Recipe("masks", mask_percentile=90.0, alpha=0.25)


def refusal(call, *arguments) -> str:
    with pytest.raises(Hif4Error) as caught:
        call(*arguments)
    return str(caught.value)


def largest_weight(model, readers) -> torch.Tensor:
    return torch.stack([model.weight(path).float().abs().amax(0) for path in readers]).amax(0)


def round_trip(x: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(x.float()), x.shape[1], torch.float64)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


def test_readers_of_one_input_share_its_mask(calibrated):
    choices = calibrated.choose(MASKS)
    groups = calibrated.calibration.groups
    assert {path: choices.mask_of[path] for path in (*QKV, *TEXT)} == {
        **dict.fromkeys(QKV, f"{QKV[0]}.mask"),
        **dict.fromkeys(TEXT, f"{TEXT[0]}.mask"),
    }
    assert choices.masks.keys() == {f"{name}.mask" for name in groups}
    for name, group in groups.items():
        activation = largest_percentile(calibrated.calibration.sketch(name), 90.0)
        expected, _ = channel_mask(activation, largest_weight(calibrated, group.readers), 0.25)
        assert torch.equal(choices.masks[f"{name}.mask"], expected)
        assert choices.alphas[f"{name}.mask"] == 0.25
    # The percentile is not the maximum, so that the test can tell.
    maximum = calibrated.calibration.sketch(QKV[0]).maximum()
    assert not torch.equal(
        choices.masks[f"{QKV[0]}.mask"], channel_mask(maximum, largest_weight(calibrated, QKV), 0.25)[0]
    )
    assert choices.notes == [f"{len(groups)} masks with alpha 0.25, 0 inputs without"]


@pytest.mark.parametrize("masks", [{}, {"mask_percentile": 100.0}, {"mask_percentile": 100.0, "alpha": 1.0}])
@pytest.mark.parametrize("count", [1, 2])
def test_outlier_columns_are_the_zeros_of_the_mask(calibrated, masks, count):
    """Where alpha is 1, the masked input is flat and the outlier is in the weight: it is found all the same."""
    choices = calibrated.choose(Recipe("columns", outlier_columns=count, **masks))
    plain = calibrated.choose(Recipe("plain", **masks)).masks if masks else {}
    for name in calibrated.calibration.groups:
        mask = choices.masks[f"{name}.mask"]
        zeros = (mask == 0).nonzero().flatten().tolist()
        assert len(zeros) == count
        if name in OUTLIERS:
            planted = OUTLIERS[name]
            assert set(zeros) >= set(planted) if count >= len(planted) else set(zeros) < set(planted)
        # Where there is a mask it moves a channel's size between input and weight, so that their product counts.
        size = calibrated.calibration.sketch(name).maximum()
        size = size * largest_weight(calibrated, calibrated.calibration.groups[name].readers) if masks else size
        assert zeros == size.topk(count).indices.sort().values.tolist()
        expected = plain.get(f"{name}.mask", torch.ones(len(mask)))
        assert torch.equal(mask[mask != 0], expected[mask != 0])
        assert choices.alphas[f"{name}.mask"] == masks.get("alpha", 0.5 if masks else None)


def test_search_with_outlier_columns_finds_what_suits_the_rest(calibrated):
    """Without its massive channel an input is like the others, and searched as that."""
    path = "blocks.0.attn2.to_q"
    search = Recipe("search", mask_percentile=100.0, alpha="search")
    alone = calibrated.choose(search)
    beside = calibrated.choose(replace(search, outlier_columns=1))
    assert alone.alphas[f"{path}.mask"] >= 0.5
    assert (beside.masks[f"{path}.mask"] == 0).nonzero().flatten().tolist() == [5]
    assert beside.errors[path]["w4a4"] < alone.errors[path]["w4a4"]
    # What the search was given is what is left of the input.
    kept = torch.ones(128).index_fill(0, torch.tensor([5]), 0.0)
    rows, weight = calibrated.rows(path) * kept, calibrated.weight(path).float() * kept
    maximum, largest = calibrated.calibration.sketch(path).maximum(), largest_weight(calibrated, [path])
    choice = choose_mask(rows, [weight], maximum, largest, 0)
    assert beside.alphas[f"{path}.mask"] == choice.alpha
    expected = kept if choice.mask is None else choice.mask * kept
    assert torch.equal(beside.masks[f"{path}.mask"], expected)


def test_search_notes_inputs_without_a_mask(calibrated, monkeypatch):
    def never(rows, weights, activation, weight, width):
        return MaskChoice(None, 0, None) if len(weight) == 256 else MaskChoice(torch.ones(len(weight)), 3, 0.7)

    monkeypatch.setattr(choose_module, "choose_mask", never)
    choices = calibrated.choose(Recipe("search", mask_percentile=99.9, alpha="search"))
    assert choices.notes == [
        "33 channels of 11 inputs have dead statistics, floored",
        "11 masks with alpha 0.7, 2 inputs without",
    ]
    assert choices.alphas["blocks.0.ffn.net.2.mask"] is None
    assert "blocks.0.ffn.net.2" not in choices.mask_of
    assert choices.errors["blocks.0.ffn.net.2"]["w4a4"] > 0


def test_shifts_are_means_where_something_can_take_them(calibrated):
    choices = calibrated.choose(Recipe("shift", shift=True, keep_high=("blocks.0.attn1.to_k",)))
    expected = {
        name for name in calibrated.calibration.groups if not name.endswith(("ffn.net.2", "attn2.to_k", "attn2.to_v"))
    }
    assert choices.shifts.keys() == {f"{name}.shift" for name in expected}
    for name in expected:
        assert torch.equal(choices.shifts[f"{name}.shift"], calibrated.rows(name).mean(0))
    # A linear in high precision reads the same shifted input.
    assert {choices.shift_of[path] for path in QKV} == {f"{QKV[0]}.shift"}
    assert choices.masks == choices.mask_of == {}
    assert choices.notes == [f"{len(expected)} inputs can be shifted by their channels' means"]


def test_masks_of_shifted_inputs_are_made_from_shifted_rows(calibrated):
    """By nearest rank among the rows: 99 % of 216 rows is the 214th."""
    name = "blocks.0.attn1.to_out.0"
    choices = calibrated.choose(Recipe("both", shift=True, mask_percentile=99.0))
    rows = calibrated.rows(name)
    assert len(rows) == 216
    activation = (rows - rows.mean(0)).abs().sort(0).values[213]
    expected, _ = channel_mask(activation, largest_weight(calibrated, [name]), 0.5)
    assert torch.equal(choices.masks[f"{name}.mask"], expected)


def test_errors_are_those_of_the_outputs(calibrated):
    """Against float64; what differs are fp32 products, some 1e-6 of an error of 1e-2."""
    recipe = Recipe("all", shift=True, mask_percentile=100.0, outlier_columns=1, hadamard=64)
    choices = calibrated.choose(recipe)
    assert choices.errors.keys() == {path for group in calibrated.calibration.groups.values() for path in group.readers}
    for path in ("blocks.0.attn2.to_q", "blocks.1.attn2.to_v", "blocks.0.ffn.net.2"):
        rows, weight = calibrated.rows(path), calibrated.weight(path).float()
        if path in choices.shift_of:
            rows = rows - choices.shifts[choices.shift_of[path]]
        mask = choices.masks[choices.mask_of[path]]
        inverse = torch.where(mask == 0, 0, 1 / mask)
        exact = rows.double() @ weight.double().T
        x, w = (round_trip(block_hadamard(value * factor, 64)) for value, factor in ((rows, mask), (weight, inverse)))
        both = x @ w.T + (rows * (mask == 0)).double() @ weight.double().T
        found = choices.errors[path]
        assert found["w4a4"] == pytest.approx(error(both, exact), rel=1e-3)
        assert found["w4a16"] == pytest.approx(error(rows.double() @ round_trip(weight).T, exact), rel=1e-3)
        assert min(found.values()) > 1e-3


def test_high_precision_linears_do_not_count(calibrated):
    """Neither their weights in the mask, nor as readers of it; an input that only they read is left out."""
    choices = calibrated.choose(replace(MASKS, keep_high=(QKV[0], "*.ffn.net.2")))
    assert choices.errors.keys() == choices.mask_of.keys()
    assert {*QKV} & choices.mask_of.keys() == {*QKV[1:]}
    activation = largest_percentile(calibrated.calibration.sketch(QKV[0]), 90.0)
    expected, _ = channel_mask(activation, largest_weight(calibrated, QKV[1:]), 0.25)
    assert torch.equal(choices.masks[f"{QKV[0]}.mask"], expected)
    assert len(choices.masks) == 11


def test_without_need_nothing_is_read(calibrated):
    plan = make_plan(calibrated.config, Recipe("rtn"))
    assert choose(plan, Recipe("rtn"), None, None).plan is plan
    assert "recipe masks needs a calibration" in refusal(choose, plan, MASKS, None, None)


# Budgets.


def bits(choices, recipe: Recipe) -> float:
    """Counted from the shapes of what is stored, for the linears that the recipe would quantize."""
    total = weights = 0
    for linear in choices.plan.linears:
        if not linear.decision.reason.startswith("boundary"):
            n, k = linear.out_features, linear.in_features
            weights += n * k
            if linear.decision.precision == Precision.HIGH:
                assert (linear.decision.rank, linear.decision.rounding) == (0, "nearest")
                assert linear.bytes_after == linear.bytes_before == 2 * (n * k + n)
                total += 16 * n * k
                continue
            mask = choices.masks.get(choices.mask_of.get(linear.decision.path))
            columns = 0
            if mask is not None and linear.decision.precision == Precision.W4A4:
                columns = int((mask == 0).sum())
            assert columns == (recipe.outlier_columns if linear.decision.precision == Precision.W4A4 else 0)
            stored = 4.5 * n * k + 16 * (linear.decision.rank * k + (linear.decision.rank + columns) * n)
            assert linear.bytes_after == stored / 8 + 2 * n
            total += stored
    return total / weights


@pytest.mark.parametrize("more", [{}, {"rank": 4}, {"outlier_columns": 4}, {"rank": 2, "outlier_columns": 1}])
def test_average_bits_are_kept_and_used(calibrated, more):
    """A budget for a quarter of the weights in bf16; a linear in bf16 gives its side branch back."""
    recipe = Recipe("budget", **more)
    smallest = bits(calibrated.choose(replace(recipe, rounding="search")), recipe)
    budget = smallest + (16 - smallest) / 4
    choices = calibrated.choose(replace(recipe, average_bits=budget))
    found = bits(choices, recipe)
    # Less than the smallest linear, one of 20 x 128 x 128, is left.
    shares = [linear.in_features * linear.out_features for linear in choices.plan.linears if linear.decision.quantized]
    total = 16 * 128 * 128 + 4 * 128 * 256
    assert budget - (16 - 4.5) * min(shares) / total < found <= budget
    high = {item.path: item for item in choices.plan.decisions if "most sensitive" in item.reason}
    assert high
    assert all(item.precision == Precision.HIGH for item in high.values())
    # The most sensitive of the small ones went first.
    small = {
        linear.decision.path: choices.errors[linear.decision.path]["w4a4"]
        for linear in choices.plan.linears
        if linear.decision.path in choices.errors and linear.in_features * linear.out_features == 128 * 128
    }
    assert min(small[path] for path in high if path in small) >= max(small[path] for path in small if path not in high)


@pytest.mark.parametrize("more", [{}, {"rank": 4}, {"outlier_columns": 4}])
def test_what_a_linear_in_bf16_gives_back_is_counted(calibrated, more):
    """A budget for one of the small linears: 16 bits a weight less its planes and its side branch."""
    recipe = Recipe("one", rounding="search", **more)
    small = 128 * 128
    branch = 16 * (more.get("rank", 0) * 256 + more.get("outlier_columns", 0) * 128)
    cost = (16 - 4.5) * small - branch
    budget = bits(calibrated.choose(recipe), recipe) + cost / (16 * small + 4 * 128 * 256)
    high = {}
    for change in (1e-6, -1e-6):
        choices = calibrated.choose(replace(recipe, average_bits=budget + change))
        high[change] = [item.path for item in choices.plan.decisions if "most sensitive" in item.reason]
    assert len(high[1e-6]) == 1
    assert high[-1e-6] == []


def test_average_bits_at_the_least_change_nothing(calibrated):
    recipe = Recipe("budget", average_bits=4.5)
    choices = calibrated.choose(recipe)
    assert bits(choices, recipe) == 4.5
    assert {item.precision for item in choices.plan.decisions if item.path in choices.errors} == {Precision.W4A4}


@pytest.mark.parametrize(("more", "least"), [({}, 4.5), ({"rank": 4}, 5.42), ({"outlier_columns": 4}, 4.96)])
def test_a_budget_below_what_four_bits_take(calibrated, more, least):
    """Known from the shapes, so that it is said before anything is calibrated.

    rank 4: of 16 linears 128 x 128 and 4 of 128 x 256, 16 * 4 (16 * 256 + 4 * 384) / 393216 = 0.92 bits more.
    4 columns: 16 * 4 (18 * 128 + 2 * 256) / 393216 = 0.46 bits more.
    """
    recipe = Recipe("budget", average_bits=least - 0.1, **more)
    message = refusal(make_plan, calibrated.config, recipe)
    assert f"average_bits {least - 0.1:g} is less than the {least:.2f} bits" in message


def test_weight_only_linears_are_ranked_by_their_own_error(calibrated):
    choices = calibrated.choose(Recipe("weights", activations="bf16", average_bits=5.0))
    assert all(entry.keys() == {"w4a16"} for entry in choices.errors.values())
    assert choices.masks == choices.shifts == {}
    high = [item.path for item in choices.plan.decisions if "most sensitive" in item.reason]
    assert len(high) == 1
    small = [path for path in choices.errors if "ffn" not in path]
    assert choices.errors[high[0]]["w4a16"] == max(choices.errors[path]["w4a16"] for path in small)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_multiplications_with_bf16_activations(calibrated, share):
    recipe = Recipe("layers", bf16_layers=share, mask_percentile=100.0, outlier_columns=1, rank=2)
    choices = calibrated.choose(recipe)
    bits(choices, recipe)  # what they take is counted without outlier columns
    # 216 tokens of video, 42 of text.
    work, gain = {}, {}
    for linear in choices.plan.linears:
        path = linear.decision.path
        if path in choices.errors:
            work[path] = linear.in_features * linear.out_features * (42 if path in TEXT else 216)
            gain[path] = (choices.errors[path]["w4a4"] - choices.errors[path]["w4a16"]) / work[path]
    relaxed = {item.path for item in choices.plan.decisions if item.precision == Precision.W4A16}
    spent = sum(work[path] for path in relaxed)
    assert spent <= share * sum(work.values())
    left = share * sum(work.values()) - spent
    # attn2.to_q is worse in bf16: its massive channel is then rounded with the weight, not beside it.
    assert all(work[path] > left or gain[path] <= 0 for path in work.keys() - relaxed)
    assert min(gain[path] for path in relaxed) > 0 > min(gain.values())
    first = max(gain, key=gain.__getitem__)
    assert first in relaxed
    kept = {
        path: value for path, value in gain.items() if path not in relaxed and path not in TEXT and "ffn" not in path
    }
    taken = [gain[path] for path in relaxed if path not in TEXT and "ffn" not in path]
    assert min(taken) >= max(kept.values())
    assert all(item.rank == 2 for item in choices.plan.decisions if item.path in relaxed)


def test_bf16_activations_that_gain_nothing_are_not_bought(calibrated, monkeypatch):
    monkeypatch.setattr(choose_module, "relative_error", lambda found, expected: 0.25)
    choices = calibrated.choose(Recipe("layers", bf16_layers=1.0))
    assert {item.precision for item in choices.plan.decisions if item.path in choices.errors} == {Precision.W4A4}


# Calibrations of something else.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda groups: groups[1:], "lacks blocks.0.attn1.to_q;"),
        (lambda groups: [replace(groups[0], readers=(*QKV, "blocks.9.x"))], "has blocks.9.x, which the model has not;"),
        (lambda groups: [replace(groups[0], channels=256)], "has another input for blocks.0.attn1.to_q than the model"),
        (lambda groups: [groups[0], groups[0]], "has another input for blocks.0.attn1.to_q than the model"),
    ],
)
def test_a_calibration_that_does_not_fit_the_plan(calibrated, change, words):
    groups = change(list(calibrated.calibration.groups.values()))
    other = replace(calibrated.calibration, groups={str(index): group for index, group in enumerate(groups)})
    message = refusal(choose, make_plan(calibrated.config, MASKS), MASKS, other, calibrated.checkpoint)
    assert message.startswith("the calibration of transformer ")
    assert words in message
    assert message.endswith("calibrate this model again.")


def test_the_percentile_of_the_noise_level_where_it_is_largest():
    """A few tokens of one timestep bin with large values count, though over all bins they would be beyond the tail."""
    generator = torch.Generator().manual_seed(0)
    sketch = ChannelSketch(3, 3)
    many, few = torch.randn(2000, 3, generator=generator), 10 * torch.randn(20, 3, generator=generator)
    sketch.update(many, 0)
    sketch.update(few, 2)  # bin 1 stays empty
    found = largest_percentile(sketch, 90.0)
    assert torch.equal(found, sketch.percentile(90.0, [2]))
    assert (found > 2 * sketch.percentile(90.0)).all()
    assert torch.equal(largest_percentile(sketch, 100.0), sketch.maximum())
