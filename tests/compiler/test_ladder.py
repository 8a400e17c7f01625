"""The ladder: what it measures, what it keeps, what it does not measure twice, and how it is shown."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from hif4c.compiler import compile as compile_module
from hif4c.compiler import experts as experts_module
from hif4c.compiler import ladder as ladder_module
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.ladder import KINDS, Yardstick, ladder_recipes, median_sqnr, run_ladder, vary_recipe
from hif4c.compiler.ladder_rows import CalibrationFile, LadderResult, LadderRow, open_calibration, read_rows
from hif4c.compiler.ladder_table import change, group_rows, ladder_tables, render_markdown, score_of, spread_of
from hif4c.compiler.plots import CALIBRATION_PROMPTS, plot_ladder, plot_sweep, save_figure
from hif4c.compiler.recipe import builtin_recipes, load_recipe
from hif4c.compiler.tiny.world import held_out_prompts
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.sampling import SamplingSettings

RTN, WEIGHT_ONLY, TAIL_AWARE = (load_recipe(name) for name in ("rtn", "weight-only", "tail-aware"))


def yardstick(count: int = 2, steps: int = 4) -> Yardstick:
    pairs = held_out_prompts(count)
    settings = SamplingSettings(32, 32, 9, steps, 5.0, 8, None, 32)
    return Yardstick(tuple(text for text, _ in pairs), tuple(item for _, item in pairs), settings)


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("measured again")


@dataclasses.dataclass
class Climbed:
    """A ladder of two recipes on wan-tiny, measured for real."""

    result: LadderResult
    work: Path
    events: list[tuple[str, Any]]


@pytest.fixture(scope="module")
def climbed(captures: Any, tmp_path_factory: pytest.TempPathFactory) -> Climbed:
    work, events = tmp_path_factory.mktemp("ladder"), []
    with (
        mock.patch.object(experts_module, "capture", captures),
        mock.patch.object(compile_module, "verify_in_fresh_processes"),
    ):
        result = run_ladder(
            "wan-tiny", [RTN, WEIGHT_ONLY], [], yardstick(), work, events=lambda *event: events.append(event)
        )
    return Climbed(result, work, events)


@pytest.fixture
def copied(wan_tiny_artifact: Path) -> Iterator[list[Any]]:
    """In place of a compile, a copy of a finished artifact; yields the options of every call."""
    calls: list[Any] = []

    def compile_model(model: str, output: Path, options: Any, events: Any) -> Path:
        calls.append(options)
        return shutil.copytree(wan_tiny_artifact, output)

    with mock.patch.object(ladder_module, "compile_model", compile_model):
        yield calls


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CalibrationFile]:
    """Stand-ins for calibration files, by path."""
    made: dict[Path, CalibrationFile] = {}

    def make(name: str, seed: int = 0, prompts: int = 16) -> Path:
        path = Path(f"{name}.safetensors")
        made[path] = CalibrationFile(path, name, f"digest of {name}", seed, prompts)
        return path

    monkeypatch.setattr(ladder_module, "open_calibration", lambda path, fingerprints: made[path])
    return make


def test_rows_hold_the_measurements(climbed: Climbed) -> None:
    rtn, weight_only = climbed.result.rows
    assert (rtn.recipe, weight_only.recipe) == ("rtn", "weight-only")
    assert (rtn.model, rtn.prompts, rtn.seed, rtn.calibration) == ("wan-tiny", 2, 0, None)
    assert rtn.values == RTN.to_dict()
    assert rtn.key != weight_only.key
    for row in (rtn, weight_only):
        assert row.bits_per_weight == 4.5
        assert 0.3 * row.bf16_bytes < row.artifact_bytes < 0.35 * row.bf16_bytes
        assert row.compile_seconds > 0
        assert row.sample_seconds > 0
        assert row.scores is not None
        assert row.scores.keys() == (climbed.result.reference.scores or {}).keys()
        low, high = row.spread["latent_snr"]
        assert low <= row.distance["latent_snr"] <= high
        assert row.sqnr == dict.fromkeys(KINDS)  # no calibration, so there are no inputs to measure on
    # Activations in bf16 leave only the weights' error: several dB on every clip.
    assert weight_only.distance["latent_snr"] > rtn.distance["latent_snr"] + 3
    assert weight_only.distance["frame_ssim"] > rtn.distance["frame_ssim"]


def test_progress_adds_up_and_rows_are_announced(climbed: Climbed) -> None:
    totals = [value for event, value in climbed.events if event == "total"]
    assert totals == [3]  # the bf16 model and two recipes
    assert math.fsum(value for event, value in climbed.events if event == "advance") == pytest.approx(3)
    steps = [value for event, value in climbed.events if event == "step"]
    assert steps[0] == "sampling the bf16 model"
    assert steps[1].startswith("1 of 2: rtn: mean 0.")
    assert "left" in steps[1]
    assert steps[2].startswith("2 of 2: weight-only")


def test_artifacts_go_and_rows_stay(climbed: Climbed) -> None:
    assert list((climbed.work / "artifacts").iterdir()) == []
    assert list(read_rows(climbed.work / "rows.jsonl").values()) == climbed.result.rows


def test_nothing_is_measured_twice(climbed: Climbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_module, "compile_model", refuse)
    monkeypatch.setattr(ladder_module, "sample_clips", refuse)
    recipes = [WEIGHT_ONLY, dataclasses.replace(RTN, name="plain", description="by another name")]
    result = run_ladder("wan-tiny", recipes, [], yardstick(), climbed.work)
    assert [row.recipe for row in result.rows] == ["weight-only", "plain"]
    assert [row.key for row in result.rows] == [row.key for row in reversed(climbed.result.rows)]
    assert result.reference == climbed.result.reference
    assert result.rows[1].values["name"] == "plain"


def test_an_interrupted_ladder_goes_on(climbed: Climbed, copied: list[Any], tmp_path: Path) -> None:
    """Killed while it wrote its second row: only that one is measured again."""
    work = shutil.copytree(climbed.work, tmp_path / "work")
    rows = work / "rows.jsonl"
    first, second = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(first + second[:100])
    result = run_ladder("wan-tiny", [RTN, WEIGHT_ONLY], [], yardstick(), work, keep=True)
    assert [options.recipes["transformer"].name for options in copied] == ["weight-only"]
    assert result.rows[0] == climbed.result.rows[0]
    assert result.rows[1].key == climbed.result.rows[1].key
    assert list(read_rows(rows).values()) == result.rows
    (kept,) = (work / "artifacts").iterdir()
    assert open_artifact(kept).experts


def test_a_failing_recipe_leaves_the_rows_before_it(copied: list[Any], tmp_path: Path) -> None:
    measure = ladder_module.sample_clips
    calls = iter([measure, measure, refuse])  # of the bf16 model, of the first recipe, of the second
    with (
        mock.patch.object(ladder_module, "sample_clips", lambda *args, **options: next(calls)(*args, **options)),
        pytest.raises(AssertionError),
    ):
        run_ladder("wan-tiny", [RTN, WEIGHT_ONLY], [], yardstick(1, 1), tmp_path)
    assert [row.recipe for row in read_rows(tmp_path / "rows.jsonl").values()] == ["rtn"]
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_other_prompts_seeds_and_steps_are_other_rows(copied: list[Any], tmp_path: Path) -> None:
    base = yardstick(1, 1)
    others = [dataclasses.replace(base, seed=5), dataclasses.replace(base, prompts=("a red ring",)), yardstick(1, 2)]
    keys = {run_ladder("wan-tiny", [RTN], [], stick, tmp_path).rows[0].key for stick in (base, *others)}
    assert len(keys) == len(copied) == 4
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 4


def test_each_calibration_file_is_a_row(copied: list[Any], files: Callable[..., Path], tmp_path: Path) -> None:
    paths = [files("draw-0", 0), files("draw-1", 1)]
    result = run_ladder("wan-tiny", [RTN, TAIL_AWARE], paths, yardstick(1, 1), tmp_path)
    assert [(row.recipe, row.calibration, row.calibration_seed) for row in result.rows] == [
        ("rtn", None, None), ("tail-aware", "draw-0", 0), ("tail-aware", "draw-1", 1),
    ]  # fmt: skip
    assert result.rows[1].calibration_prompts == 16
    # The recipe that needs none has its linears measured on the first file.
    assert [options.calibration for options in copied] == [paths[0], *paths]
    again = run_ladder("wan-tiny", [RTN, TAIL_AWARE], [*paths, files("draw-2", 2)], yardstick(1, 1), tmp_path)
    assert len(copied) == 4
    assert [row.calibration for row in again.rows] == [None, "draw-0", "draw-1", "draw-2"]


def test_a_small_model_is_calibrated_once(
    copied: list[Any], files: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def calibrate(location: Any, output: Path, options: Any, events: Any) -> None:
        events("total", 7)
        events("bytes", 7)
        made.append(output)
        output.write_bytes(b"")

    monkeypatch.setattr(ladder_module, "run_calibration", calibrate)
    own = CalibrationFile(Path("own"), "own", "digest", 0, 16)
    monkeypatch.setattr(ladder_module, "open_calibration", lambda path, fingerprints: own)
    seen: list[tuple[str, Any]] = []
    for _ in range(2):
        result = run_ladder(
            "wan-tiny", [TAIL_AWARE], [], yardstick(1, 1), tmp_path, events=lambda *event: seen.append(event)
        )
    assert seen[1:3] == [("total", 7), ("advance", 7)]
    assert len(made) == len(copied) == 1
    assert result.rows[0].calibration == "own"
    monkeypatch.setattr(ladder_module, "SMALL_MODEL_BYTES", 1000)
    with pytest.raises(
        Hif4Error, match=r"tail-aware: a calibration is needed; make one with `hif4c calibrate wan-tiny"
    ):
        run_ladder("wan-tiny", [RTN, TAIL_AWARE], [], yardstick(1, 1), tmp_path)


def test_a_calibration_file_describes_itself(calibrated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"transformer": calibrated.calibration.fingerprint}
    found = open_calibration(calibrated.path, right)
    assert (found.label, found.seed, found.prompts) == ("calibration", None, None)
    assert len(found.digest) == 64
    with pytest.raises(Hif4Error, match="other weights"):
        open_calibration(calibrated.path, {"transformer": "0" * 64})
    with pytest.raises(Hif4Error, match="transformer_2 was not calibrated"):
        open_calibration(calibrated.path, {**right, "transformer_2": "0" * 64})
    runs = [{"prompts": ["a", "b"], "seed": 3}]
    original = Calibration.__init__

    def with_runs(self: Calibration, path: Path) -> None:
        original(self, path)
        self.runs = runs

    monkeypatch.setattr(Calibration, "__init__", with_runs)
    found = open_calibration(calibrated.path, right)
    assert (found.seed, found.prompts) == (3, 2)
    runs.append({"clips": ["c.mp4"], "seed": 4})  # merged: no seed of its own
    found = open_calibration(calibrated.path, right)
    assert (found.seed, found.prompts) == (None, 3)


def test_a_file_of_rows_that_is_none(tmp_path: Path) -> None:
    for text in ("{}\n", "rows\n", '{"key": 1}\n'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(Hif4Error, match="line 1 is not a row of this ladder"):
            read_rows(tmp_path / "rows.jsonl")


def test_two_recipes_of_one_name_and_a_bad_directory(tmp_path: Path) -> None:
    other = dataclasses.replace(RTN, hadamard=64)
    with pytest.raises(Hif4Error, match="two different recipes are called 'rtn'"):
        run_ladder("wan-tiny", [RTN, other], [], yardstick(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Hif4Error, match="cannot be made a directory"):
        run_ladder("wan-tiny", [RTN], [], yardstick(), tmp_path / "file")


def test_the_order_of_the_ladder() -> None:
    names = [recipe.name for recipe in ladder_recipes()]
    assert sorted(names) == sorted(builtin_recipes())
    assert names[0] == "rtn"
    assert names.index("smooth-max") < names.index("tail-aware") < names.index("best")


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_recipe_varies_in_one_key(name: str) -> None:
    recipe = builtin_recipes()[name]
    varied = vary_recipe(recipe, "rank", 8)
    assert varied == dataclasses.replace(recipe, name=f"{name} rank=8", rank=8)


def test_a_variation_is_checked() -> None:
    assert vary_recipe(TAIL_AWARE, "mask_percentile", 100).mask_percentile == 100
    with pytest.raises(Hif4Error, match="mask_percentile must be"):
        vary_recipe(TAIL_AWARE, "mask_percentile", 101)
    with pytest.raises(Hif4Error, match="mask_percentile"):
        vary_recipe(TAIL_AWARE, "mask_percentil", 99)


def test_sqnr_is_a_median_by_kind() -> None:
    """Over blocks and experts; what is not recorded does not count."""

    def linears(**sqnr: Any) -> Any:
        entries = [{"path": path.replace("__", "."), "sqnr": value} for path, value in sqnr.items()]
        return mock.Mock(linears=[*entries, {"path": "proj_out"}, {"path": "blocks.0.ffn.net.2"}])

    artifact = mock.Mock(experts={
        "transformer": linears(blocks__0__attn1__to_q=10.0, blocks__0__attn1__to_v=12.0, blocks__1__attn2__to_q=7.0),
        "transformer_2": linears(blocks__11__attn1__to_k=20.0, blocks__0__attn2__to_k=3.0, blocks__0__attn2__to_v=None),
    })  # fmt: skip
    assert median_sqnr(artifact) == {
        "attn1.qkv": 12.0, "attn1.out": None, "attn2.q": 7.0, "attn2.kv": 3.0, "attn2.out": None, "ffn.0": None,
        "ffn.2": None,
    }  # fmt: skip


def test_every_linear_of_a_block_has_a_kind(wan_tiny_artifact: Path) -> None:
    info = open_artifact(wan_tiny_artifact).expert("transformer")
    inside = {item["path"].removeprefix("blocks.3.") for item in info.linears if item["path"].startswith("blocks.3.")}
    assert inside == {path for paths in KINDS.values() for path in paths}


def invented(climbed: Climbed) -> LadderResult:
    """rtn once, tail-aware with three draws of 16 prompts, best with draws of 4 and of 64."""
    rtn = climbed.result.rows[0]
    assert rtn.scores is not None

    def row(recipe: str, draw: int, prompts: int, mean: float, snr: float) -> LadderRow:
        scores = {**(rtn.scores or {}), "mean": mean, "subject_consistency": mean / 2}
        return dataclasses.replace(
            rtn, recipe=recipe, calibration=f"draw-{draw}", calibration_seed=draw, calibration_prompts=prompts,
            scores=scores, distance={**rtn.distance, "latent_snr": snr}, sqnr={**rtn.sqnr, "ffn.2": snr + 1},
        )  # fmt: skip

    rows = [
        rtn, row("tail-aware", 0, 16, 0.80, 11), row("tail-aware", 1, 16, 0.85, 13), row("tail-aware", 2, 16, 0.81, 12),
        row("best", 0, 4, 0.88, 15), row("best", 0, 64, 0.89, 17),
    ]  # fmt: skip
    reference = dataclasses.replace(
        climbed.result.reference, scores={**rtn.scores, "mean": 0.9, "subject_consistency": 0.45}
    )
    return dataclasses.replace(climbed.result, rows=rows, reference=reference)


def test_rows_are_grouped_by_recipe_and_size_of_the_calibration(climbed: Climbed) -> None:
    result = invented(climbed)
    groups = group_rows(result.rows)
    assert {label: len(rows) for label, rows in groups.items()} == {
        "rtn": 1, "tail-aware": 3, "best, 4 prompts": 1, "best, 64 prompts": 1,
    }  # fmt: skip
    spread = spread_of(groups["tail-aware"], score_of("mean"))
    assert spread is not None
    assert (spread.mean, spread.low, spread.high, spread.count) == (pytest.approx(0.82), 0.80, 0.85, 3)
    assert spread_of(result.rows, lambda row: row.sqnr["ffn.2"]) is None  # rtn has none
    assert change(result.rows[1], result.reference.scores, "mean") == pytest.approx(100 * (0.8 / 0.9 - 1))
    assert change(result.rows[1], None, "mean") is None


def test_tables_show_mean_and_range(climbed: Climbed) -> None:
    distances, scores, sqnr = ladder_tables(invented(climbed))
    assert [row[0] for row in distances.rows] == [
        ("bf16",), ("rtn",), ("tail-aware",), ("best, 4 prompts",), ("best, 64 prompts",),
    ]  # fmt: skip
    tail = dict(zip(distances.columns, distances.rows[2], strict=True))
    assert tail["latent SNR"] == ("12.0", "11.0..13.0")
    assert tail["mean score"] == ("0.820", "0.800..0.850")
    assert tail["change %"] == ("-8.9", "-11.1..-5.6")
    assert tail["bits a weight"] == ("4.50",)
    bf16 = dict(zip(distances.columns, distances.rows[0], strict=True))
    assert (bf16["mean score"], bf16["latent SNR"], bf16["bits a weight"]) == (("0.900",), ("",), ("16.00",))
    best = dict(zip(scores.columns, scores.rows[3], strict=True))
    assert best["subject consistency"] == ("0.440",)
    assert best["consistency change %"] == ("-2.2",)
    assert dict(zip(sqnr.columns, sqnr.rows[1], strict=True))["ffn.2"] == ("13.0", "12.0..14.0")


def test_markdown_has_a_line_for_each_recipe(climbed: Climbed) -> None:
    text = render_markdown(invented(climbed))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for start, end in ((0, 7), (7, 14)):
        assert len({line.count("|") for line in lines[start:end]}) == 1
    assert "| tail-aware | 12.0 (11.0..13.0) |" in text
    assert "least and the most over the calibration files" in text
    assert "Seeds 0 to 1, 4 steps, guidance 5." in text
    plain = render_markdown(climbed.result)
    assert "calibration files" not in plain
    assert "output SQNR" not in plain


def test_without_a_scorer_there_are_distances_alone(climbed: Climbed, tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, scores=None) for row in climbed.result.rows]
    reference = dataclasses.replace(climbed.result.reference, scores=None)
    result = dataclasses.replace(climbed.result, rows=rows, reference=reference)
    (table,) = ladder_tables(result)
    assert "mean score" not in table.columns
    assert len(plot_ladder(result).axes) == 1


def test_the_picture_shows_every_recipe(climbed: Climbed, tmp_path: Path) -> None:
    figure = plot_ladder(invented(climbed))
    labels = ["rtn", "tail-aware", "best, 4 prompts", "best, 64 prompts"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == labels
    assert [axis.get_title().split(" (")[0] for axis in figure.axes] == [
        "mean score", "subject consistency", "latent SNR, dB",
    ]  # fmt: skip
    path = tmp_path / "new" / "ladder.png"
    save_figure(figure, path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 1000
    assert 0.005 < (pixels < 250).any(-1).mean() < 0.5
    with pytest.raises(Hif4Error, match="cannot be written"):
        save_figure(figure, tmp_path)


def test_a_sweep_is_a_line_a_recipe(climbed: Climbed) -> None:
    row = climbed.result.rows[0]
    rows = [
        dataclasses.replace(
            row, recipe=f"{name} mask_percentile={value}", values={**row.values, "mask_percentile": value},
            distance={**row.distance, "latent_snr": snr},
        )
        for name, offset in (("tail-aware", 10), ("tail-aware-rotate", 12))
        for value, snr in ((100.0, offset), (99.0, offset + 1), (99.9, offset + 2))
    ]  # fmt: skip
    result = dataclasses.replace(climbed.result, rows=rows)
    axis = plot_sweep(result, "mask_percentile").axes[-1]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["99", "99.9", "100"]
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["tail-aware", "tail-aware-rotate"]
    assert [list(handle.lines[0].get_ydata()) for handle in handles] == [[11, 12, 10], [13, 14, 12]]
    sizes = plot_sweep(invented(climbed), CALIBRATION_PROMPTS).axes[-1]
    assert [text.get_text() for text in sizes.get_xticklabels()] == ["4", "64"]
    assert sizes.get_legend_handles_labels()[1] == ["best"]
    with pytest.raises(Hif4Error, match="no two rows of this ladder differ in rank"):
        plot_sweep(result, "rank")
