"""Recorded calls: which are kept, whoever makes them, and what their files give back."""

import pytest
import torch

from hif4c.compiler.calibration_calls import Call, LowestCalls, StoredCalls, derive_seed
from hif4c.runtime.errors import Hif4Error


class GatheringRanks:
    """Stands for ranks whose `all_gather` finds what was put there."""

    def __init__(self, values):
        self.values = values

    def all_gather(self, value):
        assert value in self.values
        return self.values


def make_call(number):
    value = torch.tensor([float(number)])
    return Call(value, value, value)


def feed(calls, batch, count):
    """Call the module `count` times; the value of each call tells its place."""
    calls.begin(batch)
    for number in range(count):
        value = torch.tensor([float(10 * batch + number)])
        calls.hook(None, (value,), {"timestep": value, "encoder_hidden_states": value})


def test_every_call_has_the_same_chance_to_be_kept(tmp_path, monkeypatch):
    """Of twelve calls three, by 400 seeds: 100 times each, give or take five standard deviations (8.7)."""
    monkeypatch.setattr(StoredCalls, "write", lambda *arguments: None)
    monkeypatch.setattr(StoredCalls, "remove", lambda *arguments: None)
    counts = torch.zeros(12)
    for seed in range(400):
        calls = LowestCalls(tmp_path, "transformer", 3, seed)
        feed(calls, 0, 12)
        chosen = calls.chosen()
        assert len(chosen) == 3
        for _, number in chosen.places:
            counts[number] += 1
    assert (counts - 100).abs().max() < 44


def test_the_choice_does_not_depend_on_who_makes_the_calls_and_when(tmp_path):
    """Five batches in order by one, in any order by two: the same calls, in the order of their places."""
    alone = LowestCalls(tmp_path, "transformer", 4, 7)
    for batch in range(5):
        feed(alone, batch, 3)
    expected = alone.chosen()
    values = [call.hidden_states.item() for call in expected]
    assert values == sorted(values)
    assert values == [10 * batch + number for batch, number in expected.places]
    assert len(list(tmp_path.iterdir())) == 4

    shared = tmp_path / "shared"
    shared.mkdir()
    pair = [LowestCalls(shared, "transformer", 4, 7) for _ in range(2)]
    for rank, batch in ((1, 3), (0, 4), (0, 2), (1, 1), (0, 0)):
        feed(pair[rank], batch, 3)
    ranks = GatheringRanks([list(item._kept) for item in pair])
    found = [item.chosen(ranks) for item in pair]
    assert found[0].places == found[1].places == expected.places
    assert [call.hidden_states.item() for call in found[1]] == values
    assert len(list(shared.iterdir())) == 4

    other = LowestCalls(tmp_path / "shared", "transformer_2", 4, 7)
    for batch in range(5):
        feed(other, batch, 3)
    assert other.chosen().places != expected.places  # each expert has its own choice


def test_recorded_latents_are_copies(tmp_path):
    calls = LowestCalls(tmp_path, "transformer", 1, 0)
    value = torch.zeros(2)
    calls.hook(None, (value, value, value), {})
    value += 1
    assert calls.chosen()[0].hidden_states.sum() == 0


def test_stored_calls_are_a_sequence(tmp_path):
    places = [(1, 0), (0, 10), (0, 9)]
    calls = StoredCalls(tmp_path, "transformer", places)
    for number, place in enumerate(places):
        calls.write(place, make_call(number))
    assert calls.places == [(0, 9), (0, 10), (1, 0)]
    assert [call.timestep.item() for call in calls] == [2, 1, 0]
    assert calls[-1].timestep.item() == 0
    assert [call.timestep.item() for call in calls[1:]] == [1, 0]
    with pytest.raises(IndexError):
        calls[3]
    first = calls[0]
    calls.release(0)
    assert first.hidden_states.item() == 2  # read again
    calls.remove((0, 9))
    with pytest.raises(Hif4Error, match=r"transformer-0-9\.safetensors: cannot be read"):
        StoredCalls(tmp_path, "transformer", places)[0]


def test_seeds_are_independent_and_fit_torch():
    seeds = {derive_seed(seed, name, number) for seed in (0, 1) for name in ("a", "b") for number in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_the_noise_level_is_the_largest_timestep():
    call = Call(torch.zeros(1), torch.tensor([[0, 600, 600]]), torch.zeros(1))
    assert call.noise_level == 600
    assert call.inputs[1].dtype == torch.float32
