"""Calibration sees what the linears of the eager model see, in one pass over weights of which few are in memory."""

import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import calibrate as module
from hif4c.compiler.calibrate import CheckpointStore, calibrate, find_groups, plan_program, timestep_edges
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.calibration_writer import MAX_ROWS, merge_calibrations
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import locate_model
from hif4c.compiler.log_grid import RELATIVE_ERROR
from hif4c.compiler.models import WanConfig
from hif4c.compiler.ranks import PeerError
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import small_config, write_diffusers_model
from tests.support.forked_ranks import in_ranks

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Sizes and timesteps of the calls; two share a bin, one lies on an edge, one bin stays empty.
SIZES = [(2, 3, 8, 6, 7), (1, 1, 4, 10, 12), (1, 2, 4, 4, 7), (2, 1, 6, 4, 7)]
TIMESTEPS = {"transformer": (1000.0, 990.0, 968.75, 880.0), "transformer_2": (874.0, 660.0, 200.0, 0.0)}
BINS = {"transformer": (3, 3, 3, 0), "transformer_2": (3, 3, 0, 0)}
LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj",
           "ffn.net.2")  # fmt: skip


@pytest.fixture(autouse=True)
def shared_captures(captures, monkeypatch):
    monkeypatch.setattr(module, "capture", captures)


def make_calls(inputs, experts=("transformer", "transformer_2"), sizes=SIZES):
    """Calls of several sizes for every expert."""
    made = {}
    for expert in experts:
        made[expert] = []
        for index, (size, timestep) in enumerate(zip(sizes, TIMESTEPS[expert], strict=False)):
            video, _, text = inputs("t2v", *size, seed=100 * len(expert) + index)
            made[expert].append(Call(video, torch.full((size[0],), timestep), text))
    return made


@pytest.fixture(scope="module")
def calls(inputs):
    return make_calls(inputs)


@pytest.fixture(scope="module")
def calibrated(models, calls, captures, tmp_path_factory):
    """A calibration of the small text-to-video model."""
    path = tmp_path_factory.mktemp("calibration") / "calib.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "capture", captures)
        calibrate(locate_model(str(models["t2v"].directory)), calls, path, [{"seed": 0}], seed=3)
    return path


@pytest.fixture
def broken(models, tmp_path):
    """Change a tensor of an expert in a copy of the small model."""

    def change(name, edit, expert="transformer_2"):
        directory = shutil.copytree(models["t2v"].directory, tmp_path / "broken")
        tensors = load_file(directory / expert / WEIGHTS)
        edit(tensors[name])
        save_file(tensors, directory / expert / WEIGHTS, metadata={"format": "pt"})
        return locate_model(str(directory))

    return change


def watch_eager(model, calls):
    """What every linear of the eager model reads in every call, and the outputs."""
    seen, outputs = {}, []
    handles = [
        linear.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
        for path, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear)
    ]
    with torch.no_grad():
        outputs = [model(*call.inputs, return_dict=False)[0] for call in calls]
    for handle in handles:
        handle.remove()
    return seen, outputs


@pytest.mark.parametrize("expert", TIMESTEPS)
def test_it_records_what_the_eager_model_computes(expert, calibrated, models, calls):
    seen, outputs = watch_eager(models["t2v"].experts[expert], calls[expert])
    with Calibration(calibrated) as calibration:
        recorded = calibration.expert(expert)
        # A group is one tensor: its readers are the linears that were given that very object in each call.
        readers = {}
        for path, values in seen.items():
            if path.startswith("blocks."):
                readers.setdefault(tuple(map(id, values)), []).append(path)
        assert [list(group.readers) for group in recorded.groups.values()] == list(readers.values())
        assert len(recorded.groups) == 2 * 6 + 1  # q, k and v share one in a block; all blocks share the text

        for name, group in recorded.groups.items():
            parts = [value.flatten(0, -2) for value in seen[name]]
            sketch, whole = recorded.sketch(name), torch.cat(parts).abs().float()
            assert group.channels == whole.shape[1]
            expected = [sum(len(p) for p, b in zip(parts, BINS[expert], strict=True) if b == bin) for bin in range(4)]
            assert sketch.count().tolist() == expected
            assert torch.equal(sketch.maximum(), whole.amax(0))
            for bin in sorted(set(BINS[expert])):
                inside = torch.cat([p for p, b in zip(parts, BINS[expert], strict=True) if b == bin]).abs().float()
                assert torch.equal(sketch.maximum([bin]), inside.amax(0))
            for p in (50, 90, 99, 99.9):
                rank = max(1, -(-len(whole) * p // 100))
                exact = whole.sort(0).values[int(rank) - 1]
                kept = exact > whole.amax(0) / 1000
                error = (sketch.percentile(p) - exact).abs() / exact
                assert error[kept].max() <= RELATIVE_ERROR < 0.02
                assert kept.float().mean() > 0.95
            rows = {tuple(row) for row in torch.cat(parts).tolist()}
            assert all(tuple(row) in rows for row in recorded.rows(name).tolist())

        for (call, sample), expected, given in zip(recorded.calls(), outputs, calls[expert], strict=True):
            assert torch.equal(sample, expected)
            assert all(torch.equal(*pair) for pair in zip(call.inputs, given.inputs, strict=True))
        assert recorded.edges == timestep_edges(locate_model(str(models["t2v"].directory)), expert)


def test_rows_come_from_all_calls(calibrated, models, calls):
    seen, _ = watch_eager(models["t2v"].experts["transformer"], calls["transformer"])
    rows = Calibration(calibrated).expert("transformer").rows("blocks.1.ffn.net.2")
    parts = [value.flatten(0, -2) for value in seen["blocks.1.ffn.net.2"]]
    found = [sum(bool((part == row).all(1).any()) for row in rows) for part in parts]
    # Up to a quarter of 256 rows from each of four calls, and all of a call that has fewer.
    assert found == [min(len(part), MAX_ROWS // 4) for part in parts] == [64, 10, 8, 12]
    assert len(rows) == sum(found)


def test_the_fingerprint_is_the_checkpoints(calibrated, models):
    location = locate_model(str(models["t2v"].directory))
    with Calibration(calibrated) as calibration:
        for name, folder in location.experts.items():
            with Checkpoint(folder) as checkpoint:
                calibration.check(name, checkpoint.fingerprint())
        assert calibration.model == models["t2v"].directory.name


def test_equal_calibrations_are_equal_bytes(calibrated, models, calls, tmp_path):
    location = locate_model(str(models["t2v"].directory))
    calibrate(location, calls, tmp_path / "again", [{"seed": 0}], seed=3)
    assert (tmp_path / "again").read_bytes() == calibrated.read_bytes()
    calibrate(location, calls, tmp_path / "other", [{"seed": 0}], seed=4)
    with Calibration(calibrated) as first, Calibration(tmp_path / "other") as other:
        group = "blocks.0.attn1.to_q"
        assert not torch.equal(first.expert("transformer").rows(group), other.expert("transformer").rows(group))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["again", "other"]


def test_ranks_write_the_bytes_of_one(models, calls, captures, tmp_path):
    """Four calls over one, two and five ranks, of which the last has none. One thread each, for equal bits."""
    location = locate_model(str(models["t2v"].directory))
    captures.variant("t2v")  # once, not in every rank

    def work(ranks):
        read = []
        events = lambda event, value: read.append(value) if event == "bytes" else None  # noqa: E731
        calibrate(location, calls, tmp_path / str(ranks.count), [{"seed": 0}], seed=3, ranks=ranks, events=events)
        return sum(read)

    (total,) = in_ranks(1, work)
    assert in_ranks(2, work) == [total, total]
    assert in_ranks(5, work) == [total, total, total, total, 0]  # and reads nothing
    whole = (tmp_path / "1").read_bytes()
    assert (tmp_path / "2").read_bytes() == whole
    assert (tmp_path / "5").read_bytes() == whole
    assert sorted(item.name for item in tmp_path.iterdir()) == ["1", "2", "5"]


def test_what_fails_on_one_rank_ends_all(models, calls, captures, tmp_path):
    """The second of three calls is rank 1's alone."""
    location = locate_model(str(models["t2v"].directory))
    captures.variant("t2v")
    bad = calls["transformer_2"][1]
    bad = Call(bad.hidden_states * float("nan"), bad.timestep, bad.encoder_hidden_states)
    given = {**calls, "transformer_2": [calls["transformer_2"][0], bad, calls["transformer_2"][2]]}
    first, second = in_ranks(2, lambda ranks: calibrate(location, given, tmp_path / "c", [], ranks=ranks))
    words = "transformer_2, input of blocks.0.attn1.to_q: NaN or infinite values in 128 of 128 channels, first in 0"
    assert isinstance(first, PeerError)
    assert str(first).startswith(f"rank 1 failed: {words}")
    assert str(second).startswith(words)
    assert list(tmp_path.iterdir()) == []


def test_merged_parts_are_the_whole(calibrated, models, calls, tmp_path):
    location = locate_model(str(models["t2v"].directory))
    for part in range(2):
        half = {name: made[2 * part : 2 * part + 2] for name, made in calls.items()}
        calibrate(location, half, tmp_path / str(part), [{"seed": part}])
    merge_calibrations([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    with Calibration(calibrated) as whole, Calibration(tmp_path / "merged") as merged:
        assert merged.runs == [{"seed": 0}, {"seed": 1}]
        for name, expert in merged.experts.items():
            for group in expert.groups:
                ours, expected = (item.sketch(group).to_tensors() for item in (expert, whole.expert(name)))
                assert all(torch.equal(ours[key], expected[key]) for key in expected)
            samples = [sample for _, sample in whole.expert(name).calls()]
            assert all(torch.equal(a, b) for (_, a), b in zip(expert.calls(), samples, strict=True))


def test_a_timestep_for_every_token(models, inputs, tmp_path):
    """Wan2.2-TI2V-5B: first-frame tokens have timestep 0; the call belongs to the others' bin."""
    video, timestep, text = inputs("ti2v", 1, 2, 4, 6, 5)
    timestep = torch.full_like(timestep, 600.0)
    timestep[:, : timestep.shape[1] // 2] = 0
    call = Call(video, timestep, text)
    calibrate(locate_model(str(models["ti2v"].directory)), {"transformer": [call]}, tmp_path / "c", [])
    seen, (output,) = watch_eager(models["ti2v"].experts["transformer"], [call])
    with Calibration(tmp_path / "c") as calibration:
        expert = calibration.expert("transformer")
        assert expert.edges == (0, 250, 500, 750, 1000)
        ((found, sample),) = expert.calls()
        assert torch.equal(sample, output)
        assert torch.equal(found.timestep, timestep)
        for name in expert.groups:
            sketch = expert.sketch(name)
            assert sketch.count().tolist() == [0, 0, seen[name][0].flatten(0, -2).shape[0], 0]
            assert torch.equal(sketch.maximum(), seen[name][0].flatten(0, -2).abs().amax(0).float())


def test_events_say_what_is_done_and_count_all_bytes(models, inputs, tmp_path):
    location = locate_model(str(models["t2v"].directory))
    log = []
    calibrate(
        location, make_calls(inputs, sizes=SIZES[1:2]), tmp_path / "c", [], events=lambda *event: log.append(event)
    )
    steps = [value for event, value in log if event == "step"]
    # The experts have one config, so they have one captured program.
    assert steps == [
        "capturing transformer",
        "calibrating transformer on 1 calls",
        "calibrating transformer_2 on 1 calls",
    ]
    totals = [value for event, value in log if event == "total"]
    assert sum(value for event, value in log if event == "bytes") == sum(totals) > 0


def test_edges_follow_the_experts(models):
    location = locate_model(str(models["t2v"].directory))
    assert timestep_edges(location, "transformer") == (875.0, 906.25, 937.5, 968.75, 1000.0)
    assert timestep_edges(location, "transformer_2", 2) == (0.0, 437.5, 875.0)


# --------------------------------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(("name", "value"), [("blocks.1.attn2.to_v.weight", "nan"), ("proj_out.bias", "inf")])
def test_weights_that_are_not_finite(broken, calls, tmp_path, name, value):
    location = broken(name, lambda tensor: tensor.view(-1)[3:4].fill_(float(value)))
    output = tmp_path / "out" / "c"
    output.parent.mkdir()
    output.write_bytes(b"older")
    with pytest.raises(Hif4Error, match=rf"transformer_2/.*: tensor {name} holds NaN or infinite values"):
        calibrate(location, calls, output, [])
    # The first expert was finished: nothing of it is left, and an older file stays as it was.
    assert list(output.parent.iterdir()) == [output]
    assert output.read_bytes() == b"older"


def test_inputs_that_are_not_finite(broken, calls, tmp_path):
    """One channel of the feed-forward's hidden layer overflows bf16: its second linear would read infinity."""
    location = broken("blocks.0.ffn.net.0.proj.weight", lambda tensor: tensor[5].sign_().mul_(3e38), "transformer")
    folder = tmp_path / "out"
    folder.mkdir()
    words = (
        r"transformer, input of blocks\.0\.ffn\.net\.2: NaN or infinite values in 1 of 256 channels, first in 5; check"
    )
    with pytest.raises(Hif4Error, match=words):
        calibrate(location, calls, folder / "c", [])
    assert list(folder.iterdir()) == []


def test_latents_that_are_not_finite(models, calls, tmp_path):
    bad = calls["transformer"][2]
    bad = Call(bad.hidden_states * float("nan"), bad.timestep, bad.encoder_hidden_states)
    with pytest.raises(Hif4Error, match=r"input of blocks\.0\.attn1\.to_q: NaN or infinite values in 128 of 128"):
        calibrate(
            locate_model(str(models["t2v"].directory)),
            {**calls, "transformer": [*calls["transformer"][:2], bad]},
            tmp_path / "c",
            [],
        )
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_finite(broken, calls, tmp_path):
    location = broken("proj_out.weight", lambda tensor: tensor.sign_().mul_(3e38), "transformer")
    with pytest.raises(Hif4Error, match="transformer: its output on the calibration calls is not finite"):
        calibrate(location, calls, tmp_path / "c", [])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("missing", [{}, {"transformer_2": []}])
def test_an_expert_without_calls(models, calls, tmp_path, missing):
    some = {"transformer": calls["transformer"], **missing}
    with pytest.raises(Hif4Error, match="transformer_2: no calibration call reached it; use more steps"):
        calibrate(locate_model(str(models["t2v"].directory)), some, tmp_path / "c", [])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_the_config(models, calls, tmp_path):
    directory = shutil.copytree(models["t2v"].directory, tmp_path / "model")
    path = directory / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors["proj_out.bias"] = torch.zeros(3).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Hif4Error, match=r"has other shapes for 1 tensor \(proj_out\.bias .* use the weights of this"):
        calibrate(locate_model(str(directory)), calls, tmp_path / "c", [])
    assert list(tmp_path.iterdir()) == [directory]


# -------------------------------------------------------------------------------------------------------------- memory


class CountingStore(CheckpointStore):
    """Remembers how many bytes of weights were alive at most."""

    peak = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._given = {}

    def load(self, name):
        tensor = super().load(name)
        if self._specs[name].source is not None:  # tables are the program's own
            self._given[name] = weakref.ref(tensor)
        alive = [item for item in (given() for given in self._given.values()) if item is not None]
        CountingStore.peak = max(CountingStore.peak, sum(item.nbytes for item in alive))
        return tensor


def test_few_weights_are_alive_at_a_time(models, inputs, tmp_path, monkeypatch):
    """At most the widest linear of a block and some that are small: biases, norms, modulation."""
    monkeypatch.setattr(module, "CheckpointStore", CountingStore)
    monkeypatch.setattr(CountingStore, "peak", 0)
    location = locate_model(str(models["t2v"].directory))
    calibrate(location, make_calls(inputs, sizes=SIZES[1:2]), tmp_path / "c", [])
    widest = 2 * 6 * 128 * 128  # time_proj, bf16
    with Checkpoint(location.experts["transformer"]) as checkpoint:
        assert checkpoint.total_bytes > 5 * widest
    assert widest <= CountingStore.peak < 1.25 * widest


PEAK = """
import sys
from pathlib import Path
import torch
from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.locate import locate_model

torch.set_num_threads(1)
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
sizes = []
def events(event, value):
    if event == "bytes" or (event == "step" and value.startswith("calibrating")):
        sizes.append(resident())
video = torch.randn(1, 16, 1, 4, 4).bfloat16()
call = Call(video, torch.tensor([500.0]), torch.randn(1, 4, 64).bfloat16())
calibrate(locate_model(sys.argv[1]), {"transformer": [call]}, Path(sys.argv[2]), [], events=events)
print(max(sizes) - sizes[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_resident_memory_does_not_grow_with_the_blocks(tmp_path):
    """From the first weight on, 4 and 8 layers of 33 MB differ by less than one of them: none of them stays."""
    peaks = []
    for layers in (4, 8):
        directory = tmp_path / str(layers)
        # dim 1024: 8 attention linears of 2 MB and two of the feed-forward with 8 MB.
        write_diffusers_model(directory, experts=1, num_layers=layers, num_attention_heads=32, ffn_dim=4096)
        arguments = [sys.executable, "-P", "-c", PEAK, str(directory), str(tmp_path / "c")]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout))
        shutil.rmtree(directory)
    assert peaks[1] - peaks[0] < 33e6, peaks


def test_groups_of_a_plan(captures):
    """Inputs that two linears share are one group; boundary linears are in none."""
    program = captures.variant("t2v")
    groups = find_groups(plan_program(program, WanConfig.from_dict(small_config(), "config.json")))
    paths = [path for group in groups for path in group.readers]
    assert len(paths) == len(set(paths)) == 20
    assert {path.split(".", 2)[2] for path in paths} == {*LINEARS, "attn2.to_k", "attn2.to_v"}
    text = next(group for group in groups if group.name == "blocks.0.attn2.to_k")
    assert text.readers == tuple(f"blocks.{block}.attn2.{name}" for block in (0, 1) for name in ("to_k", "to_v"))
    assert {group.channels for group in groups if group.name.endswith("ffn.net.2")} == {256}
