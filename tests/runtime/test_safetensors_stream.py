import hashlib
import json
import os
import struct
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.runtime import safetensors_stream
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    floats = {
        f"float.{i}": torch.randn(6, 10, generator=generator).to(dtype)
        for i, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32, torch.float64))
    }
    return {
        "codes": torch.randint(0, 256, (3, 5), dtype=torch.uint8, generator=generator),  # misaligns all that follow
        **floats,
        "i8": torch.arange(-3, 4, dtype=torch.int8),
        "i32": torch.arange(5, dtype=torch.int32),
        "i64": torch.arange(5, dtype=torch.int64) - 2**40,
        "flags": torch.tensor([True, False, True]),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "strided": torch.randn(4, 6, generator=generator)[:, ::2],
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "Größe": torch.ones(2),
    }


def specs(tensors):
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(directory, tensors, **options):
    return write_as(directory, specs(tensors), tensors, **options)


def write_as(directory, listed, tensors, **options):
    with StreamingWriter(directory, listed, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.files


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def test_one_file_is_read_by_the_reference_implementation_and_by_us(tmp_path):
    tensors = some_tensors()
    files = write(tmp_path, tensors)
    assert list(files) == ["weights.safetensors"] == os.listdir(tmp_path)
    path = tmp_path / "weights.safetensors"
    assert_same(load_file(path), tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TensorFile(path) as file:
            assert file.names == list(tensors)
            assert_same({name: file.read(name) for name in file.names}, tensors)
            # Most offsets here are odd; not every processor forgives an unaligned load.
            assert all(file.read(name).data_ptr() % file.info(name)[0].itemsize == 0 for name in file.names)


def test_header_is_padded_and_keeps_the_given_order(tmp_path):
    write(tmp_path, {"b": torch.ones(1), "a": torch.zeros(3)}, metadata={"hif4c": "x"})
    data = (tmp_path / "weights.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    assert list(json.loads(data[8 : 8 + length])) == ["__metadata__", "b", "a"]


def test_files_record_size_and_sha256(tmp_path):
    files = write(tmp_path, some_tensors(), shard_bytes=500, fsync=True)
    assert len(files) > 3
    assert set(files) == set(os.listdir(tmp_path))
    for name, (size, sha256) in files.items():
        data = (tmp_path / name).read_bytes()
        assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_shards_are_those_of_the_hub(tmp_path):
    tensors = some_tensors()
    files = write(tmp_path, tensors, shard_bytes=500, base_name="model")
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    found = {}
    for shard in shards:
        content = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in content.values()) <= 500 or len(content) == 1
        assert all(index["weight_map"][name] == shard for name in content)
        found |= content
    assert_same(found, tensors)


def test_bytes_are_the_same_in_every_process(tmp_path):
    script = (
        "import sys, torch\n"
        "from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec\n"
        "names = list({'b', 'a', 'd', 'c'}); names.sort()\n"
        "with StreamingWriter(sys.argv[1], [TensorSpec(n, torch.float32, (3,)) for n in names]) as w:\n"
        "    for n in names: w.write(n, torch.arange(3.0))\n"
        "print(w.files)\n"
    )
    outputs = set()
    for seed in "12":
        (tmp_path / seed).mkdir()
        run = [sys.executable, "-c", script, tmp_path / seed]
        outputs.add(subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True).stdout)
    assert len(outputs) == 1
    assert b"weights.safetensors" in outputs.pop()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.zeros(2, 3)), ("a", torch.zeros(3, 2)), ("a", torch.zeros(2, 3, dtype=torch.float16))],
)
def test_the_wrong_tensor_is_refused_and_nothing_stays(tmp_path, name, tensor):
    listed = {"x": torch.zeros(4), "a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    written = {"x": listed["x"], name: tensor}
    with pytest.raises(ValueError, match="expected TensorSpec"):
        write_as(tmp_path, specs(listed), written)
    assert os.listdir(tmp_path) == []


def test_closing_early_and_writing_late_are_refused(tmp_path):
    listed = {"a": torch.zeros(2), "b": torch.zeros(2)}
    writer = StreamingWriter(tmp_path, specs(listed), shard_bytes=8)
    writer.write("a", listed["a"])
    assert os.listdir(tmp_path) == ["weights-00001-of-00002.safetensors"]
    with pytest.raises(ValueError, match="before tensor b"):
        writer.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="after the last"):
        writer.write("b", listed["b"])
    with pytest.raises(ValueError, match="before tensor a"), StreamingWriter(tmp_path, specs(listed)):
        pass


@pytest.mark.parametrize(
    ("listed", "options"),
    [
        ([TensorSpec("a", torch.float32, (1,))] * 2, {}),
        ([TensorSpec("__metadata__", torch.float32, (1,))], {}),
        ([TensorSpec("a", torch.complex64, (1,))], {}),
        ([], {}),
        ([TensorSpec("a", torch.float32, (1,))], {"metadata": {"a": "1", "b": "2"}}),
    ],
)
def test_impossible_lists_are_refused(tmp_path, listed, options):
    with pytest.raises(ValueError, match=r"twice|not a tensor name|no safetensors dtype|no tensors|one metadata key"):
        StreamingWriter(tmp_path, listed, **options)


def test_existing_files_are_not_overwritten(tmp_path):
    (tmp_path / "weights.safetensors").write_text("precious")
    with pytest.raises(Hif4Error, match=r"weights\.safetensors: already exists"):
        write(tmp_path, some_tensors())
    assert (tmp_path / "weights.safetensors").read_text() == "precious"


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(Hif4Error, match=r"nowhere: cannot write there \(No such file"):
        write(tmp_path / "nowhere", some_tensors())


def test_a_disk_too_small_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream.shutil, "disk_usage", lambda _: SimpleNamespace(total=100, free=15))
    with pytest.raises(Hif4Error, match="16 bytes are needed and 15 are free"):
        StreamingWriter(tmp_path, [TensorSpec("a", torch.float32, (4,))])


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path):
    # A limit on the size of files fails in the middle of a write, as a full disk does.
    script = (
        "import resource, sys, torch\n"
        "from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "big = [TensorSpec(n, torch.uint8, (4000,)) for n in 'abc']\n"
        "try:\n"
        "    with StreamingWriter(sys.argv[1], big) as writer:\n"
        "        for spec in big: writer.write(spec.name, torch.zeros(4000, dtype=torch.uint8))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert found.stdout.startswith("Hif4Error"), found
    assert "weights.safetensors: writing failed (File too large) with 8000 bytes" in found.stdout
    assert os.listdir(tmp_path) == []


def test_views_are_not_copies_and_outlive_the_file(tmp_path):
    save_file({"a": torch.arange(1024.0)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    first, second = file.read("a"), file.read("a")
    assert first.data_ptr() == second.data_ptr()
    before = (tmp_path / "x.safetensors").read_bytes()
    first[0] = 7.0
    assert (tmp_path / "x.safetensors").read_bytes() == before
    file.release("a")
    assert second[0] == 0.0  # a released private page is read from the file again
    file.close()
    assert torch.equal(second, torch.arange(1024.0))


def test_advice_to_the_system_changes_nothing(tmp_path):
    """Read ahead, released, forgotten by the cache, also when the file has gone."""
    save_file({"a": torch.arange(1 << 20).float(), "empty": torch.empty(0)}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        for name in ("a", "empty"):
            file.prefetch(name)
            file.read(name).sum()
            file.release(name)
            file.forget(name)
        assert torch.equal(file.read("a"), torch.arange(1 << 20).float())
        (tmp_path / "x.safetensors").unlink()
        file.prefetch("a")
        file.forget("a")
        assert torch.equal(file.read("a"), torch.arange(1 << 20).float())
        assert file.nbytes("a") == 4 << 20


def test_info_and_unknown_names(tmp_path):
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.info("a") == (torch.bfloat16, (2, 3))
        with pytest.raises(Hif4Error, match=r"x\.safetensors: holds no tensor named 'b'"):
            file.read("b")


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "no bytes at all": (b"", "is truncated: 0 bytes"),
    "half a length": (b"\0\0\0", "is truncated: 3 bytes"),
    "length of a pickle": (b"\x80\x02}q\0X\x05\0" * 4, "not a safetensors file"),
    "header cut off": (raw(b"{}", length=100), "98 bytes of its header are missing"),
    "not JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "nested too deep": (raw(b"[" * 200_000), "not valid JSON"),
    "not an object": (raw([1]), "not a JSON object"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "same key twice": (raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"1234"), "'a' twice"),
    "entry without shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"), "without exactly dtype"),
    "unknown dtype": (raw({"a": entry(0, 4, "F4")}, b"1234"), "'F4', which is none of"),
    "dtype not a string": (raw({"a": entry(0, 4, ["F32"])}, b"1234"), "which is none of"),
    "negative size": (raw({"a": entry(0, 4, shape=[-1])}, b"1234"), "invalid shape"),
    "size not whole": (raw({"a": entry(0, 4, shape=[1.0])}, b"1234"), "invalid shape"),
    "size a boolean": (raw({"a": entry(0, 4, shape=[True])}, b"1234"), "invalid shape"),
    "empty, overflowing": (raw({"a": entry(0, 0, shape=[0, 2**62, 2**62])}), "invalid shape"),
    "too many dimensions": (raw({"a": entry(0, 4, shape=[1] * 99)}, b"1234"), "invalid shape"),
    "offsets reversed": (raw({"a": {**entry(0, 4), "data_offsets": [4, 0]}}, b"1234"), "invalid data_offsets"),
    "three offsets": (raw({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, b"1234"), "invalid data_offsets"),
    "size disagrees": (raw({"a": entry(0, 4, shape=[2])}, b"1234"), "need 8 bytes"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12), "overlap with 'b'"),
    "hole": (raw({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12), "leave a hole before 'b'"),
    "hole at the start": (raw({"b": entry(8, 12)}, b"0" * 12), "leave a hole before 'b'"),
    "data cut off": (raw({"a": entry(0, 4), "b": entry(4, 12)}, b"0" * 9), "is truncated: 3 bytes are missing"),
    "bytes left over": (raw({"a": entry(0, 4)}, b"0" * 9), "5 bytes after its last tensor"),
    "long name": (raw({"a" * 2000: entry(0, 4)}, b"1234"), "name of 2000 characters"),
    "terminal codes in a name": (raw({"\x1b[2Ja": entry(0, 4)}, b"1234"), "unprintable"),
    "no name": (raw({"": entry(0, 4)}, b"1234"), "name of 0 characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_files_are_refused_in_one_line(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(Hif4Error) as caught:
        TensorFile(tmp_path / "bad.safetensors")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'bad.safetensors'}: ")
    assert message in text
    assert text.isprintable()
    assert len(text) < 500 + len(str(tmp_path))


def test_a_good_file_built_by_the_same_hand_is_accepted(tmp_path):
    content = raw({"a": entry(0, 4), "e": entry(4, 4), "b": entry(4, 12), "__metadata__": {"k": "v"}}, b"\0" * 12)
    (tmp_path / "good.safetensors").write_bytes(content)
    with TensorFile(tmp_path / "good.safetensors") as file:
        assert [tuple(file.read(name).shape) for name in ("a", "b", "e")] == [(1,), (2,), (0,)]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(Hif4Error, match=r"none\.safetensors: cannot be read \(No such file"):
        TensorFile(tmp_path / "none.safetensors")
