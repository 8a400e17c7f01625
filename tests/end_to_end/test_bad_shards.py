"""Damage in one of many shards: what headers show is refused before any work, the rest when its tensor is read."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import experts as experts_module
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.recipe import load_recipe
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import write_diffusers_model

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """The folder of the only expert, several shards."""
    write_diffusers_model(tmp_path / "model", "t2v", experts=1, shards=True)
    return tmp_path / "model" / "transformer"


@pytest.fixture
def refused(captures, monkeypatch, tmp_path):
    """Compile what must be refused; returns the sentence, and the events until then. Nothing is left behind."""
    monkeypatch.setattr(experts_module, "capture", captures)
    results = tmp_path / "results"
    results.mkdir()

    def run(folder):
        events = []
        options = CompileOptions({"transformer": load_recipe("rtn")}, components="none", targets=())
        with pytest.raises(Hif4Error) as caught:
            compile_model(str(folder.parent), results / "out", options, lambda *event: events.append(event))
        assert list(results.iterdir()) == []
        assert "\n" not in str(caught.value)
        return str(caught.value), events

    return run


def last_shard(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return shards[-1]


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(folder, change):
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


def remove(folder):
    last_shard(folder).unlink()
    return "missing, though"


def truncate(folder):
    path = last_shard(folder)
    os.truncate(path, path.stat().st_size - 1)
    return "is truncated: 1 bytes are missing"


def empty(folder):
    last_shard(folder).write_bytes(b"")
    return "is truncated: 0 bytes"


def overwrite_with_another(folder):
    last_shard(folder).write_bytes(min(folder.glob("*.safetensors")).read_bytes())
    return "lacks"


def forget_in_index(folder):
    name = last_shard(folder).name
    edit_index(folder, lambda places: [places.pop(key) for key in [*places] if places[key] == name])
    return "lacks 1"  # so many tensors of the last block and behind it; the file itself is nobody's


def quantize_one(folder):
    def change(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name].to(torch.int8)

    edit(last_shard(folder), change)
    return "where only F32, BF16, F16 can be compiled"


@pytest.mark.parametrize(
    "damage", [remove, truncate, empty, overwrite_with_another, forget_in_index, quantize_one], ids=lambda f: f.__name__
)
def test_what_headers_show_is_refused_before_any_work(folder, refused, damage):
    words = damage(folder)
    message, events = refused(folder)
    assert words in message
    assert str(folder) in message
    assert events == []


def test_a_nan_in_the_middle_of_a_shard_is_found_when_it_is_packed(folder, refused):
    """Nothing but reading all of it shows it: everything before is done by then, and of no use."""
    path = last_shard(folder)
    named = []

    def change(tensors):
        name = max(tensors, key=lambda key: tensors[key].numel())
        tensors[name].view(-1)[tensors[name].numel() // 2] = torch.nan
        named.append(name)

    edit(path, change)
    message, events = refused(folder)
    assert message == f"{path}: tensor {named[0]} holds NaN or infinite values; fetch the file again."
    assert ("step", "packing transformer") in events
    assert "recording golden outputs" not in [value for name, value in events if name == "step"]
