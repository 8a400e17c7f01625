"""The calibration file: what is read is what was written; nothing in a file is believed; files of one model merge."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler.calibration import KEY, Calibration, Group
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.calibration_writer import MAX_ROWS, CalibrationWriter, check_calibration_path, merge_calibrations
from hif4c.compiler.sketch import ChannelSketch
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import TensorFile

GROUPS = (Group(("blocks.0.attn1.to_q", "blocks.0.attn1.to_k"), 8), Group(("blocks.0.ffn.net.2",), 12))
EDGES = (0.0, 500.0, 1000.0)
EXPERTS = ("transformer", "transformer_2")
RUN = {"source": "trajectory", "prompts": ["a ring", "ein Würfel"], "seed": 3}


def tokens(seed, group, calls):
    """Tokens [calls, 5, K] and the bin of each call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(calls, 5, GROUPS[group].channels, generator=generator).bfloat16()
    return x, [(seed + call) % 2 for call in range(calls)]


def make_call(seed, index):
    """Odd calls share the text of the unconditional pass."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    text = torch.zeros(2, 3, 4) if index % 2 else torch.randn(2, 3, 4, generator=generator)
    video, sample = torch.randn(2, 2, 4, 3, 2, 2, generator=generator).bfloat16()
    return Call(video, torch.full((2,), 10.0 * index + 1), text.bfloat16()), sample


def write(path, seeds=(0,), calls=4, *, fingerprint="f", edges=EDGES, groups=GROUPS, experts=EXPERTS):
    """A file of made-up tokens and calls; with several seeds, as one calibration over the calls of all."""
    with CalibrationWriter(path) as writer:
        for number, name in enumerate(experts):
            for index, group in enumerate(groups):
                sketch, rows = ChannelSketch(group.channels, len(edges) - 1), []
                for seed in seeds:
                    x, bins = tokens(10 * seed + number, index, calls)
                    for value, place in zip(x, bins, strict=True):
                        sketch.update(value, place)
                    rows.append(x.flatten(0, 1))
                writer.add_group(name, group, sketch, torch.cat(rows))
            recorded = [make_call(seed, index) for seed in seeds for index in range(calls)]
            writer.add_expert(name, f"{fingerprint}{number}", edges, recorded)
        writer.finish("some-model", [{**RUN, "seed": seed} for seed in seeds])
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "calib.safetensors")


def read_all(path):
    """Everything that can be read of a file."""
    with Calibration(path) as calibration:
        calibration.check("transformer", "f0")
        for expert in calibration.experts.values():
            for group in expert.groups:
                expert.sketch(group).percentile(99)
                expert.rows(group)
            for call, _ in expert.calls():
                assert call.noise_level < 2000


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_read_is_what_was_written(path):
    with Calibration(path) as calibration:
        assert calibration.model == "some-model"
        assert calibration.runs == [{**RUN, "seed": 0}]
        assert list(calibration.experts) == list(EXPERTS)
        for number, name in enumerate(EXPERTS):
            calibration.check(name, f"f{number}")
            expert = calibration.expert(name)
            assert (expert.fingerprint, expert.edges, expert.call_count) == (f"f{number}", EDGES, 4)
            assert list(expert.groups.values()) == list(GROUPS)
            for index, group in enumerate(GROUPS):
                x, bins = tokens(number, index, 4)
                sketch = expert.sketch(group.name)
                assert sketch.count().tolist() == [5 * bins.count(0), 5 * bins.count(1)]
                assert torch.equal(sketch.maximum(), x.abs().amax((0, 1)).float())
                assert torch.equal(sketch.maximum([1]), x[bins.index(1) :: 2].abs().amax((0, 1)).float())
                assert torch.equal(expert.rows(group.name), x.flatten(0, 1))
            for index, (call, sample) in enumerate(expert.calls()):
                expected, output = make_call(0, index)
                assert all(torch.equal(*pair) for pair in zip(call.inputs, expected.inputs, strict=True))
                assert torch.equal(sample, output)
                assert call.noise_level == 10 * index + 1


def test_shared_texts_are_stored_once(path):
    with TensorFile(path) as file:
        # Of four calls, two have the empty prompt.
        assert sum(name.startswith("transformer/texts/") for name in file.names) == 3


def test_texts_of_equal_bytes_and_other_shapes_are_different(tmp_path):
    shapes = [(1, 6, 4), (1, 3, 8), (1, 6, 4)]
    with CalibrationWriter(tmp_path / "c") as writer:
        sketch = ChannelSketch(8, 2)
        sketch.update(torch.ones(1, 8), 0)
        writer.add_group("transformer", GROUPS[0], sketch, torch.ones(1, 8).bfloat16())
        video = torch.zeros(1, 2, 1, 2, 2).bfloat16()
        calls = [(Call(video, torch.zeros(1), torch.zeros(shape).bfloat16()), video) for shape in shapes]
        writer.add_expert("transformer", "f", EDGES, calls)
        writer.finish("m", [])
    expert = Calibration(tmp_path / "c").expert("transformer")
    assert [tuple(call.encoder_hidden_states.shape) for call, _ in expert.calls()] == shapes
    assert expert.texts == (0, 1, 0)


def test_equal_contents_give_equal_bytes(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with Calibration(first) as one, Calibration(write(tmp_path / "c", [1])) as other:
        assert one.digest() != other.digest()


def test_rows_are_thinned_evenly(tmp_path):
    path = write(tmp_path / "c", calls=100)
    with Calibration(path) as calibration:
        rows = calibration.expert("transformer").rows(GROUPS[0].name)
    x = tokens(0, 0, 100)[0].flatten(0, 1)
    assert len(x) > MAX_ROWS == len(rows)
    places = [int((x == row).all(1).nonzero()[0]) for row in rows]
    steps = torch.tensor(places).diff()
    assert places[0] == 0
    assert set(steps.tolist()) == {1, 2}  # 500 rows over 256
    assert places[-1] >= len(x) - 2


def test_another_models_file_is_refused(path):
    with Calibration(path) as calibration:
        with pytest.raises(Hif4Error, match=r"other weights than this transformer_2 \(of some-model\)"):
            calibration.check("transformer_2", "f0")
        with pytest.raises(Hif4Error, match=r"transformer_3 was not calibrated, only transformer, transformer_2"):
            calibration.check("transformer_3", "f0")


# ----------------------------------------------------------------------------------------------------------- merging


def test_merged_histograms_are_those_of_one_calibration_over_all_calls(tmp_path):
    parts = [write(tmp_path / f"part{seed}", [seed]) for seed in (0, 1, 2)]
    merge_calibrations(parts, tmp_path / "merged")
    write(tmp_path / "whole", (0, 1, 2))
    with Calibration(tmp_path / "merged") as merged, Calibration(tmp_path / "whole") as whole:
        assert [run["seed"] for run in merged.runs] == [0, 1, 2]
        for name, expert in merged.experts.items():
            other = whole.expert(name)
            assert (expert.call_count, expert.groups) == (12, other.groups)
            for group in expert.groups:
                assert same_tensors(expert.sketch(group).to_tensors(), other.sketch(group).to_tensors())
            for (call, sample), (expected, output) in zip(expert.calls(), other.calls(), strict=True):
                assert all(torch.equal(*pair) for pair in zip(call.inputs, expected.inputs, strict=True))
                assert torch.equal(sample, output)
    # Nothing but the histograms, tokens and calls that one calibration would have.
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_merged_rows_are_thinned_and_come_from_all_files(tmp_path):
    parts = [write(tmp_path / f"part{seed}", [seed], calls=40) for seed in (0, 1)]
    merge_calibrations(parts, tmp_path / "merged")
    rows = Calibration(tmp_path / "merged").expert("transformer").rows(GROUPS[1].name)
    assert len(rows) == MAX_ROWS
    for seed in (0, 1):
        x = tokens(10 * seed, 1, 40)[0].flatten(0, 1)
        assert sum(bool((x == row).all(1).any()) for row in rows) == MAX_ROWS // 2


def test_merging_onto_one_of_the_files(tmp_path):
    parts = [write(tmp_path / f"part{seed}", [seed]) for seed in (0, 1)]
    merge_calibrations(parts, parts[0])
    write(tmp_path / "whole", (0, 1))
    assert parts[0].read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "g"}, "was made from other weights than"),
        ({"edges": (0.0, 400.0, 1000.0)}, "has other timestep bins or groups"),
        ({"edges": (0.0, 400.0, 500.0, 1000.0)}, "has other timestep bins or groups"),
        ({"groups": GROUPS[:1]}, "has other timestep bins or groups"),
        ({"groups": (GROUPS[0], Group(("blocks.0.ffn.net.3",), 12))}, "has other timestep bins or groups"),
        ({"experts": EXPERTS[:1]}, "has other experts than"),
    ],
)
def test_files_that_do_not_merge(tmp_path, changes, words):
    write(tmp_path / "a")
    write(tmp_path / "b", [1], **changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Hif4Error, match=f"b: {words}"):
        merge_calibrations([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_given_twice_does_not_count_twice(path, tmp_path):
    with pytest.raises(Hif4Error, match="given twice"):
        merge_calibrations([path, tmp_path / "x" / ".." / path.name], tmp_path / "c")


def test_too_many_tokens_to_merge(tmp_path):
    big = write(tmp_path / "a", experts=EXPERTS[:1], groups=GROUPS[:1])
    tensors, header = contents(big)
    sketch = "transformer/groups/blocks.0.attn1.to_q/sketch."
    tensors[sketch + "tokens"] += 2_000_000_000
    tensors[sketch + "zeros"] += 2_000_000_000
    with pytest.raises(Hif4Error, match="tokens are out of range"):  # both bins together
        merge_calibrations([big, rewrite(tmp_path / "b", tensors, header)], tmp_path / "c")
    tensors[sketch + "tokens"][1] -= 2_000_000_000
    tensors[sketch + "zeros"][1] -= 2_000_000_000
    for name in ("b", "d"):
        rewrite(tmp_path / name, tensors, header)
    with pytest.raises(Hif4Error, match=r"d: transformer, blocks\.0\.attn1\.to_q cannot be merged: .* 2147483647"):
        merge_calibrations([tmp_path / "b", tmp_path / "d"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


# ----------------------------------------------------------------------------------------------- what is left behind


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "calib"
    path.write_bytes(b"older")
    with CalibrationWriter(path) as writer:
        sketch = ChannelSketch(8, 2)
        sketch.update(torch.ones(1, 8), 0)
        writer.add_group("transformer", GROUPS[0], sketch, torch.ones(1, 8).bfloat16())
        assert path.read_bytes() == b"older"
    # Left without `finish`: nothing of it stays, and the older file does.
    assert [item.name for item in tmp_path.iterdir()] == ["calib"]
    assert path.read_bytes() == b"older"
    write(path)
    assert [item.name for item in tmp_path.iterdir()] == ["calib"]
    read_all(path)


def test_a_failed_merge_leaves_the_output_as_it_was(tmp_path):
    good, bad = write(tmp_path / "a"), write(tmp_path / "b", [1])
    tensors, header = contents(bad)
    tensors["transformer_2/groups/blocks.0.ffn.net.2/sketch.counts"][0] += 1
    rewrite(bad, tensors, header)
    (tmp_path / "c").write_bytes(b"older")
    with pytest.raises(Hif4Error, match="do not add up"):
        merge_calibrations([good, bad], tmp_path / "c")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "c").read_bytes() == b"older"


def test_a_path_is_checked_before_the_work(tmp_path):
    check_calibration_path(tmp_path / "new" / "folder" / "calib")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(Hif4Error, match=r"folder: the calibration cannot be written there \(is a directory\)"):
        check_calibration_path(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(Hif4Error, match=r"file/calib: the calibration cannot be written there"):
        check_calibration_path(tmp_path / "file" / "calib")
    with pytest.raises(Hif4Error, match=r"the calibration cannot be written there \(File name too long\)"):
        check_calibration_path(tmp_path / ("x" * 300) / "calib")


# ------------------------------------------------------------------------------------------------- nothing is believed


def contents(path):
    """The tensors and the header, to be changed."""
    with TensorFile(path) as file:
        return load_file(path), json.loads(file.metadata[KEY])


def rewrite(path, tensors, header):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={KEY: text})
    return path


def refusal(path):
    with pytest.raises(Hif4Error) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def entry(header):
    return header["experts"]["transformer"]


HEADERS = {
    "another version": (lambda h: h.update(version=2), "has version 2, this hif4c reads 1"),
    "no version": (lambda h: h.pop("version"), "header is damaged ('version')"),
    "a model that is no text": (lambda h: h.update(model=3), "is not of type str"),
    "runs that are no list": (lambda h: h.update(runs={}), "is not of type list"),
    "a run that is no object": (lambda h: h.update(runs=[1]), "is not of type dict"),
    "no expert": (lambda h: h.update(experts={}), "no expert"),
    "experts that are a list": (lambda h: h.update(experts=[1]), "is not of type dict"),
    "an expert that is null": (lambda h: h["experts"].update(transformer=None), "header is damaged"),
    "an expert named as a path": (lambda h: h["experts"].update({"../x": entry(h)}), "'../x' is not one of"),
    "no fingerprint": (lambda h: entry(h).pop("fingerprint"), "'fingerprint'"),
    "a fingerprint that is a number": (lambda h: entry(h).update(fingerprint=1), "is not of type str"),
    "one edge": (lambda h: entry(h).update(edges=[0.0]), "not ascending"),
    "edges that fall": (lambda h: entry(h).update(edges=[0, 500, 400]), "not ascending"),
    "an edge that is NaN": (lambda h: entry(h).update(edges=[0, float("nan"), 1000]), "not ascending"),
    "an edge that is infinite": (lambda h: entry(h).update(edges=[0, 500, float("inf")]), "not ascending"),
    "an edge beyond fp64": (lambda h: entry(h).update(edges=[0, 500, 10**400]), "too large"),
    "edges in words": (lambda h: entry(h).update(edges=["0", "500", "1000"]), "is not of type int or float"),
    "other bins than the sketches": (lambda h: entry(h).update(edges=[0, 1, 2, 3]), "8 channels and 2 timestep bins"),
    "no group": (lambda h: entry(h).update(groups=[]), "not disjoint sets"),
    "a group without readers": (lambda h: entry(h)["groups"][0].update(readers=[]), "not disjoint sets"),
    "a reader twice": (lambda h: entry(h)["groups"][1]["readers"].append("blocks.0.attn1.to_k"), "not disjoint sets"),
    "readers that are a text": (lambda h: entry(h)["groups"][0].update(readers="ab"), "is not of type list"),
    "a reader that is a list": (lambda h: entry(h)["groups"][0].update(readers=[["a"]]), "is not of type str"),
    "a group that is a text": (lambda h: entry(h).update(groups=["ab"]), "header is damaged"),
    "another width": (lambda h: entry(h)["groups"][0].update(channels=16), "rows is torch.bfloat16 [20, 8]"),
    "a huge width": (lambda h: entry(h)["groups"][0].update(channels=1e999), "is not of type int"),
    "a width that is true": (lambda h: entry(h)["groups"][0].update(channels=True), "is not of type int"),
    "a group that is not there": (
        lambda h: entry(h)["groups"].append({"readers": ["x"], "channels": 8}),
        "tensor transformer/groups/x/rows is missing",
    ),
    "a billion calls": (lambda h: entry(h).update(calls=10**9), "tensor transformer/calls/4/hidden_states is missing"),
    "no call": (lambda h: entry(h).update(calls=0), "0 calls"),
    "calls below zero": (lambda h: entry(h).update(calls=-1), "-1 calls"),
    "calls in words": (lambda h: entry(h).update(calls="4"), "is not of type int"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header(name, path, tmp_path):
    change, words = HEADERS[name]
    tensors, header = contents(path)
    change(header)
    assert words in refusal(rewrite(tmp_path / "forged", tensors, header))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, '{"version":1e999}', "9" * 5000])
def test_a_header_that_is_no_object(text, path, tmp_path):
    refusal(rewrite(tmp_path / "forged", contents(path)[0], text))


CALL, ROWS = "transformer/calls/1/", "transformer/groups/blocks.0.attn1.to_q/rows"
TENSORS = {
    "rows of another dtype": (ROWS, lambda x: x.float(), "torch.float32 [20, 8]"),
    "rows in three dimensions": (ROWS, lambda x: x[None], "[1, 20, 8]"),
    "no row": (ROWS, lambda x: x[:0], "[0, 8]"),
    "a row that is NaN": (ROWS, lambda x: x * float("nan"), "NaN or infinite"),
    "no rows": (ROWS, None, "rows is missing"),
    "latents of another dtype": (CALL + "hidden_states", lambda x: x.float(), "torch.float32"),
    "latents in four dimensions": (CALL + "hidden_states", lambda x: x[0], "hidden_states is torch.bfloat16 [4, 3"),
    "no latents": (CALL + "hidden_states", None, "hidden_states is missing"),
    "infinite latents": (CALL + "hidden_states", lambda x: x / 0, "NaN or infinite"),
    "an output of another size": (CALL + "sample", lambda x: x[:, :, 1:], "sample is"),
    "no output": (CALL + "sample", None, "sample is missing"),
    "an output that is NaN": (CALL + "sample", lambda x: x * float("nan"), "NaN or infinite"),
    "timesteps of another batch": (CALL + "timestep", lambda x: x[:1], "timestep is torch.float32 [1]"),
    "timesteps that are whole": (CALL + "timestep", lambda x: x.long(), "timestep is torch.int64"),
    "a timestep that is NaN": (CALL + "timestep", lambda x: x * float("nan"), "NaN or infinite"),
    "no timestep": (CALL + "timestep", None, "timestep is missing"),
    "a text that is not there": (CALL + "text", lambda x: x + 100, "tensor transformer/texts/101 is missing"),
    "a text below zero": (CALL + "text", lambda x: x - 2, "tensor transformer/texts/-1 is missing"),
    "two texts": (CALL + "text", lambda x: torch.stack([x, x]), "text is torch.int64 [2]"),
    "a text that is a fraction": (CALL + "text", lambda x: x.float(), "text is torch.float32"),
    "no text": (CALL + "text", None, "text is missing"),
    "a text of another batch": ("transformer/texts/1", lambda x: x[:1], "texts/1 is torch.bfloat16 [1, 3, 4]"),
    "a text that is infinite": ("transformer/texts/1", lambda x: x + float("inf"), "NaN or infinite"),
    "no histogram": ("transformer/groups/blocks.0.attn1.to_q/sketch.counts", None, "a sketch has the tensors"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_forged_tensor(name, path, tmp_path):
    key, change, words = TENSORS[name]
    tensors, header = contents(path)
    tensor = tensors.pop(key)
    if change is not None:
        tensors[key] = change(tensor)
    assert words in refusal(rewrite(tmp_path / "forged", tensors, header))


def test_a_sketch_of_another_group(path, tmp_path):
    tensors, header = contents(path)
    for key in [key for key in tensors if "to_q/sketch." in key]:
        tensors[key] = tensors[key.replace("attn1.to_q", "ffn.net.2")].clone()
    assert "has a sketch of 12 channels" in refusal(rewrite(tmp_path / "forged", tensors, header))


def test_a_sketch_without_tokens(path, tmp_path):
    tensors, header = contents(path)
    for key, value in ChannelSketch(8, 2).to_tensors().items():
        tensors[f"transformer/groups/blocks.0.attn1.to_q/sketch.{key}"] = value
    assert "without a token" in refusal(rewrite(tmp_path / "forged", tensors, header))


def test_other_files(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    assert "is not a calibration file" in refusal(tmp_path / "weights.safetensors")
    (tmp_path / "empty").touch()
    assert "is truncated" in refusal(tmp_path / "empty")
    assert "cannot be read" in refusal(tmp_path / "nothing")
    assert "cannot be read" in refusal(tmp_path)


def test_truncated_files(path, tmp_path):
    data = path.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    for size in (1, 8, 100, 8 + header, len(data) - 1):
        (tmp_path / "short").write_bytes(data[:size])
        refusal(tmp_path / "short")


def test_flipped_bits_never_end_in_another_exception(path, tmp_path):
    """Values may be other values; what does not fit together is one sentence."""
    data = path.read_bytes()
    chance = random.Random(0)
    (header,) = struct.unpack("<Q", data[:8])
    refused = 0
    for number in range(300):
        flipped = bytearray(data)
        # Half of them in the header, which is a small part of the file.
        place = chance.randrange(8 + header if number % 2 else len(data))
        flipped[place] ^= 1 << chance.randrange(8)
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            read_all(tmp_path / "flipped")
        except Hif4Error:
            refused += 1
    assert refused > 100
