"""kernels.json and its binaries: written, read back, and everything that a changed one could claim."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hif4c.runtime.artifact import canonical_json, open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import (
    KernelFile,
    UntrustedKernels,
    kernel_targets,
    read_kernel_set,
    trust_entries,
    trusted_bytes,
    write_kernel_set,
)
from hif4c.runtime.trust import record_trust
from tests.support.forging import forge

TARGET = "cuda-sm80"
SIDECAR = f"kernels/{TARGET}/kernels.json"
KERNELS = [
    ("linear_int8", "128x128_w8_s3", "linear_int8.128x128.gelu.cubin", b"first binary", {"entry": "f", "shared": 0}),
    ("linear_int8", "128x128_w8_s3", "linear_int8.128x128.cubin", b"second binary", {"constants": {"BM": 128}}),
]


@pytest.fixture(autouse=True)
def trusts_nothing(artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts()  # first, as a compilation records what it built
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def artifact(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy with two GPU kernels."""
    path = shutil.copytree(artifacts(), tmp_path / "artifact")
    folder = path / "kernels" / TARGET
    write_kernel_set(folder, TARGET, {"triton": "3.7.1"}, KERNELS)
    forge(path, **{f"kernels/{TARGET}/{file.name}": file.read_bytes() for file in folder.iterdir()})
    return path


def change(artifact: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change kernels.json and make the manifest agree with it."""
    value = json.loads((artifact / SIDECAR).read_text())
    edit(value)
    forge(artifact, **{SIDECAR: canonical_json(value)})


def refusal(artifact: Path) -> str:
    with pytest.raises(Hif4Error) as error:
        read_kernel_set(open_artifact(artifact), TARGET)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_written_is_read_back(artifact: Path):
    opened = open_artifact(artifact)
    found = read_kernel_set(opened, TARGET)
    assert found is not None
    assert (found.target, found.built_with) == (TARGET, {"triton": "3.7.1"})
    assert found.sha256 == hashlib.sha256((artifact / SIDECAR).read_bytes()).hexdigest()
    expected = [
        KernelFile(name, variant, file, len(data), hashlib.sha256(data).hexdigest(), properties)
        for name, variant, file, data, properties in KERNELS
    ]
    assert list(found.kernels) == expected
    assert TARGET in kernel_targets(opened)
    assert read_kernel_set(opened, "cuda-sm90") is None


def test_equal_kernels_give_equal_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write_kernel_set(tmp_path / name, TARGET, {"triton": "3.7.1"}, iter(KERNELS))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert (tmp_path / "a" / "kernels.json").read_bytes() == canonical_json(
        json.loads((tmp_path / "a" / "kernels.json").read_text())
    )


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        ([KERNELS[0], KERNELS[0]], "two kernels are called"),
        ([("a", "b", "../x.cubin", b"x", {})], "cannot be the file"),
        ([("a", "b", "x.so", b"x", {})], "does not end in .cubin"),
        ([("a", "b", "x.cubin", b"", {})], "cannot have 0 bytes"),
        ([("a b", "b", "x.cubin", b"x", {})], "cannot be the name"),
        ([], "it lists no kernels"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, kernels: list[Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        write_kernel_set(tmp_path / "out", TARGET, {}, kernels)
    assert not (tmp_path / "out").exists()


def set_first(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda sidecar: sidecar["kernels"][0].update({key: value})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda value: value.update(schema=2), "its schema is 2 and this hif4c reads 1; upgrade hif4c"),
        (lambda value: value.pop("built_with"), "does not have the fields"),
        (lambda value: value.update(more=1), "does not have the fields"),
        (lambda value: value.update(target="cuda-sm90"), "its target is .cuda-sm90., but it is kept as cuda-sm80"),
        (lambda value: value.update(built_with={"triton": 3}), "built_with"),
        (lambda value: value.update(kernels=[]), "lists no kernels"),
        (lambda value: value.update(kernels={}), "lists no kernels"),
        (lambda value: value["kernels"].append(1), "a kernel does not have the fields"),
        (lambda value: value["kernels"][0].pop("variant"), "a kernel does not have the fields"),
        (lambda value: value["kernels"].append(value["kernels"][0]), "two kernels share a file"),
        (set_first("file", "../x.cubin"), "../x.cubin. cannot be the file of a kernel"),
        (set_first("file", "/etc/x.cubin"), "/etc/x.cubin. cannot be the file of a kernel"),
        (set_first("file", "deep/x.cubin"), "cannot be the file of a kernel"),
        (set_first("file", "..cubin"), "cannot be the file of a kernel"),
        (set_first("file", "x\n.cubin"), "cannot be the file of a kernel"),
        (set_first("file", 1), "cannot be the file of a kernel"),
        (set_first("file", "x.so"), "does not end in .cubin"),
        (set_first("file", "other.cubin"), "disagrees with the manifest about kernels/cuda-sm80/"),
        (set_first("bytes", 11), "disagrees with the manifest about kernels/cuda-sm80/linear_int8.128x128.gelu.cubin"),
        (set_first("bytes", True), "cannot have true bytes"),
        (set_first("bytes", -1), "cannot have -1 bytes"),
        (set_first("bytes", 1 << 40), "cannot have 1099511627776 bytes"),
        (set_first("sha256", "0" * 64), "disagrees with the manifest"),
        (set_first("sha256", "0" * 63), "cannot be the sha256"),
        (set_first("name", ""), "cannot be the name"),
        (set_first("variant", "a/b"), "cannot be the variant"),
        (set_first("properties", []), "are not an object"),
        (lambda value: value["kernels"].pop(), "disagrees with the manifest about kernels/cuda-sm80/linear_int8.128"),
    ],
)
def test_a_list_that_lies_is_refused(artifact: Path, edit: Callable[[dict[str, Any]], Any], reason: str):
    change(artifact, edit)
    message = refusal(artifact)
    assert "kernels.json: " in message
    assert reason.replace(".cuda-sm90.", '"cuda-sm90"').replace("x.cubin. ", 'x.cubin" ') in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{} ", b"[" * 100_000, b"NaN"])
def test_a_list_that_is_no_list(artifact: Path, content: bytes):
    forge(artifact, **{SIDECAR: content})
    assert "kernels.json: " in refusal(artifact)


def test_a_list_that_is_written_otherwise(artifact: Path):
    """What is trusted is one text: the same values in another order are another file."""
    forge(artifact, **{SIDECAR: (artifact / SIDECAR).read_bytes().replace(b"\n", b"\n ")})
    assert "not canonical JSON" in refusal(artifact)


def test_a_list_that_was_changed_behind_the_manifest(artifact: Path):
    data = (artifact / SIDECAR).read_bytes()
    (artifact / SIDECAR).write_bytes(data.replace(b"128}", b"256}").replace(b"128\n", b"256\n"))
    assert "does not match the manifest" in refusal(artifact)


def test_bytes_are_given_only_when_trusted(artifact: Path):
    opened = open_artifact(artifact)
    kernels = read_kernel_set(opened, TARGET)
    assert kernels is not None
    entries = trust_entries(opened)
    with pytest.raises(UntrustedKernels, match=r"128x128\.gelu\.cubin: is code that is not trusted.*`hif4c trust "):
        trusted_bytes(opened, kernels, kernels.kernels[0])
    for part in ({kernels.kernels[0].sha256}, {kernels.sha256}):  # the list and the binary, both
        record_trust({digest: entries[digest] for digest in part})
        if part != {kernels.sha256}:
            with pytest.raises(UntrustedKernels):
                trusted_bytes(opened, kernels, kernels.kernels[0])
    assert trusted_bytes(opened, kernels, kernels.kernels[0]) == b"first binary"
    with pytest.raises(UntrustedKernels):
        trusted_bytes(opened, kernels, kernels.kernels[1])
    record_trust(entries)
    assert trusted_bytes(opened, kernels, kernels.kernels[1]) == b"second binary"


def test_trusting_records_every_file_with_its_origin(artifact: Path):
    opened = open_artifact(artifact)
    entries = {digest: entry for digest, entry in trust_entries(opened).items() if entry.target == TARGET}
    assert entries.keys() == {
        digest for name, (_, digest) in opened.files.items() if name.startswith(f"kernels/{TARGET}/")
    }
    assert {entry.artifact for entry in entries.values()} == {str(artifact.resolve())}
    assert {entry.file for entry in entries.values()} == {"kernels.json", KERNELS[0][2], KERNELS[1][2]}


@pytest.mark.parametrize("how", ["flip", "shorten", "lengthen", "link", "remove", "directory"])
def test_a_trusted_binary_that_changes_after_opening_is_refused(artifact: Path, tmp_path: Path, how: str):
    opened = open_artifact(artifact)
    kernels = read_kernel_set(opened, TARGET)
    assert kernels is not None
    record_trust(trust_entries(opened))
    path = artifact / "kernels" / TARGET / kernels.kernels[0].file
    if how == "flip":
        path.write_bytes(b"First binary")
    elif how == "shorten":
        path.write_bytes(b"first binar")
    elif how == "lengthen":
        path.write_bytes(b"first binary\0")
    else:
        path.rename(tmp_path / "moved")
        if how == "link":
            path.symlink_to(tmp_path / "moved")
        elif how == "directory":
            path.mkdir()
    with pytest.raises(Hif4Error, match=r"does not match the manifest|cannot be read") as error:
        trusted_bytes(opened, kernels, kernels.kernels[0])
    assert not isinstance(error.value, UntrustedKernels)


def test_a_pipe_in_place_of_a_binary_is_not_waited_for(artifact: Path):
    opened = open_artifact(artifact)
    kernels = read_kernel_set(opened, TARGET)
    assert kernels is not None
    record_trust(trust_entries(opened))
    path = artifact / "kernels" / TARGET / kernels.kernels[0].file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Hif4Error, match="does not match the manifest"):
        trusted_bytes(opened, kernels, kernels.kernels[0])
