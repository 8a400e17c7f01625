import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hif4c.runtime import safetensors_stream
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.placed_writer import PlacedWriter
from hif4c.runtime.safetensors_layout import TensorSpec
from tests.runtime.test_safetensors_stream import some_tensors, specs, write

ONE_FILE, SHARDS = {}, {"shard_bytes": 500, "base_name": "model", "metadata": {"hif4c": "x"}}


def contents(directory):
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "streamed").mkdir()
    (tmp_path / "placed").mkdir()
    return tmp_path / "streamed", tmp_path / "placed"


@pytest.mark.parametrize("options", [ONE_FILE, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_any_order_gives_the_bytes_of_the_stream(folders, options, seed):
    streamed, placed = folders
    tensors = some_tensors()
    expected = write(streamed, tensors, **options)
    names = list(tensors)
    if seed is not None:
        random.Random(seed).shuffle(names)
    with PlacedWriter(placed, specs(tensors), **options) as writer:
        writer.create()
        for name in names:
            writer.write(name, tensors[name])
        files = writer.finish()
    assert files == expected
    assert list(files) == list(expected)
    assert contents(placed) == contents(streamed)


def test_a_second_process_and_one_after_a_crash_go_on_in_the_files(folders):
    """Half by one, half by another, some twice, some with other bytes at first: as after a crash in a write."""
    streamed, placed = folders
    tensors = some_tensors()
    expected = write(streamed, tensors, **SHARDS)
    names = list(tensors)
    first, second = (PlacedWriter(placed, specs(tensors), **SHARDS) for _ in range(2))
    first.create()
    second.open()
    for name in names[::2]:
        first.write(name, torch.zeros_like(tensors[name]))
    for name in names[1::2]:
        second.write(name, tensors[name])
    second.sync()
    second.close()
    first.close()
    with PlacedWriter(placed, specs(tensors), **SHARDS) as third:
        third.open()
        for name in names[::2] + names[1:4]:
            third.write(name, tensors[name])
        assert third.finish() == expected
        assert third.finish() == expected  # a crash after this is gone through again
    assert contents(placed) == contents(streamed)


def test_a_tensor_that_is_written_again_counts(folders):
    """In order, so that hashes could be taken as it comes; then one in the middle changes."""
    streamed, placed = folders
    tensors = some_tensors()
    expected = write(streamed, tensors)
    with PlacedWriter(placed, specs(tensors)) as writer:
        writer.create()
        for name, tensor in tensors.items():
            writer.write(name, torch.zeros_like(tensor) if name == "i32" else tensor)
        assert writer.finish() != expected
        writer.write("i32", tensors["i32"])
        assert writer.finish() == expected


def test_other_tensors_are_refused(tmp_path):
    listed = [TensorSpec("a", torch.float32, (2, 3)), TensorSpec("b", torch.float32, (4,))]
    with PlacedWriter(tmp_path, listed) as writer:
        writer.create()
        for name, tensor in (("c", torch.zeros(4)), ("a", torch.zeros(3, 2)), ("b", torch.zeros(4).half())):
            with pytest.raises(ValueError, match="expected"):
                writer.write(name, tensor)
    with pytest.raises(ValueError, match="twice"):
        PlacedWriter(tmp_path, listed * 2)


def test_files_of_other_tensors_are_not_opened(tmp_path):
    listed = [TensorSpec("a", torch.float32, (2, 3)), TensorSpec("b", torch.float32, (4,))]
    with pytest.raises(Hif4Error, match=r"weights\.safetensors: cannot be opened \(No such file"):
        PlacedWriter(tmp_path, listed).open()
    with PlacedWriter(tmp_path, listed) as writer:
        writer.create()
    with PlacedWriter(tmp_path, listed) as writer:
        writer.open()
    renamed = [TensorSpec("a", torch.float32, (2, 3)), TensorSpec("c", torch.float32, (4,))]
    with pytest.raises(Hif4Error, match="begun for other tensors"):
        PlacedWriter(tmp_path, renamed).open()
    os.truncate(tmp_path / "weights.safetensors", os.path.getsize(tmp_path / "weights.safetensors") - 1)
    with pytest.raises(Hif4Error, match="begun for other tensors"):
        PlacedWriter(tmp_path, listed).open()


def test_existing_files_are_not_overwritten(tmp_path):
    """Also not where it is the last of several: what was made before it goes again."""
    tensors = {"a": torch.zeros(4), "b": torch.zeros(4)}
    (tmp_path / "weights-00002-of-00002.safetensors").write_text("precious")
    with pytest.raises(Hif4Error, match=r"weights-00002-of-00002\.safetensors: already exists"):
        PlacedWriter(tmp_path, specs(tensors), shard_bytes=16).create()
    assert contents(tmp_path) == {"weights-00002-of-00002.safetensors": b"precious"}


def test_a_disk_too_small_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream.shutil, "disk_usage", lambda _: SimpleNamespace(total=100, free=15))
    with pytest.raises(Hif4Error, match="bytes are needed and 15 are free"):
        PlacedWriter(tmp_path, [TensorSpec("a", torch.float32, (4,))]).create()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_after_all_is_refused_before_work(tmp_path):
    # A limit on the size of files fails where the space is reserved, as a full disk does.
    script = (
        "import resource, sys, torch\n"
        "from hif4c.runtime.placed_writer import PlacedWriter\n"
        "from hif4c.runtime.safetensors_layout import TensorSpec\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n"
        "    PlacedWriter(sys.argv[1], [TensorSpec(n, torch.uint8, (s,)) for n, s in (('a', 9), ('b', 9000))],\n"
        "                 shard_bytes=1000).create()\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert found.stdout.startswith("Hif4Error"), found
    assert "weights-00002-of-00002.safetensors: writing failed (File too large) with 9009 bytes" in found.stdout
    assert os.listdir(tmp_path) == []
