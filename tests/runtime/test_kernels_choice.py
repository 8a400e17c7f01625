"""`kernels=` where people meet it: load, load_pipeline, and verify."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hif4c.runtime import Hif4Error, load, load_pipeline
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.kernel_files import UntrustedKernels, cpu_target, trust_entries, write_kernel_set
from hif4c.runtime.native import build, registry
from hif4c.runtime.trust import record_trust, revoke_trust, trust_path
from hif4c.runtime.verify import verify_artifact
from hif4c.tools.cli import app
from tests.support.forging import forge

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
FOLDER = f"kernels/{cpu_target()}"
PROPERTIES = {"abi": build.ABI, "instruction_sets": ["portable"]}


@pytest.fixture(autouse=True)
def choice(artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not chosen kernels yet and trusts nothing; what it had is put back."""
    artifacts()  # first, as a compilation records what it built
    before = registry._registry.active
    registry.disable()
    monkeypatch.setattr(registry, "_registry", registry._Registry())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield
    registry.disable()
    monkeypatch.undo()
    registry._registry.use(before)


@pytest.fixture
def artifact(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(artifacts(), tmp_path / "artifact")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a compiler nor a library that one built earlier."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty-cache"))
    monkeypatch.delenv("CXX", raising=False)


def put(artifact: Path, data: bytes, properties: dict[str, Any] = PROPERTIES, target: str = cpu_target()) -> None:
    """Put a CPU library in place of the artifact's own, with hashes that fit."""
    folder = artifact / "kernels" / target
    shutil.rmtree(artifact / "kernels", ignore_errors=True)
    write_kernel_set(folder, target, {"c++": "test"}, [("library", "all", "hif4_cpu.so", data, properties)])
    files = {f"kernels/{target}/{path.name}": path.read_bytes() for path in folder.iterdir()}

    def only(manifest: dict[str, Any]) -> None:
        for name in [name for name in manifest["files"] if name.startswith("kernels/") and name not in files]:
            del manifest["files"][name]

    forge(artifact, only, **files)


def trust_it(artifact: Path) -> None:
    record_trust(trust_entries(open_artifact(artifact)))


def compiled(directory: Path, source: str, *flags: str) -> bytes:
    """A shared library of one C++ source."""
    (directory / "source.cpp").write_text(source)
    output = directory / "source.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", directory / "source.cpp", "-o", output, *flags], check=True)
    return output.read_bytes()


@pytest.fixture
def telltale(tmp_path: Path) -> tuple[bytes, Path]:
    """A library whose constructor writes a file, and that file."""
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    mark = tmp_path / "mapped"
    source = (
        "#include <fcntl.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void run() { close(open(MARK, O_CREAT | O_WRONLY, 0600)); }\n"
    )
    return compiled(tmp_path, source, f'-DMARK="{mark}"'), mark


@needs_compiler
def test_the_artifacts_library_runs_and_computes_what_one_built_here_does(artifact: Path, inputs: Callable[..., tuple]):
    trust_it(artifact)
    video, timestep, text = inputs()
    outputs = []
    for kernels in ("bundled", "jit"):
        model = load(artifact, kernels=kernels)
        assert registry.is_enabled()
        outputs.append(model(video, timestep, text, return_dict=False)[0])
    assert torch.equal(*outputs)
    assert registry.enable().path != artifact / FOLDER / "hif4_cpu.so"
    load(artifact)  # "auto": bundled comes first
    assert registry._registry.active is not None
    assert registry._registry.active.path == artifact / FOLDER / "hif4_cpu.so"
    load(artifact, kernels="portable")
    assert not registry.is_enabled()


@needs_compiler
@pytest.mark.usefixtures("no_compiler")
def test_a_bundled_library_needs_no_compiler(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    """And where there are no files in memory, a private temporary file serves; nothing of it stays."""
    trust_it(artifact)
    load(artifact, kernels="bundled")
    assert registry.is_enabled()
    registry.disable()
    monkeypatch.setattr(registry, "_registry", registry._Registry())
    scratch = artifact.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(registry.tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(registry, "_sealed", lambda data: (_ for _ in ()).throw(OSError("no such call")))
    load(artifact, kernels="bundled")
    assert registry.is_enabled()
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files in memory are Linux's")
def test_what_is_mapped_cannot_be_written_to():
    with registry._as_file(b"bytes") as path:
        assert path.read_bytes() == b"bytes"
        for mode in ("r+b", "wb"):
            with pytest.raises(PermissionError), path.open(mode) as file:
                file.write(b"other")
        assert path.read_bytes() == b"bytes"
        os.close(int(path.name))


def test_an_untrusted_library_is_never_mapped(
    artifact: Path, telltale: tuple[bytes, Path], no_compiler: None, caplog: pytest.LogCaptureFixture
):
    data, mark = telltale
    put(artifact, data)
    with pytest.raises(UntrustedKernels, match=r"hif4_cpu\.so: is code that is not trusted.*`hif4c trust"):
        load(artifact, kernels="bundled")
    with caplog.at_level(logging.WARNING):
        load(artifact)
        load(artifact)
    assert len(caplog.records) == 1
    assert "hif4c trust" in caplog.text
    assert "install g++" in caplog.text
    assert not registry.is_enabled()
    assert not mark.exists()
    # The proof proves something: trusted, it is mapped, and only then found to be no library of kernels.
    trust_it(artifact)
    with pytest.raises(Hif4Error, match="cannot be used"):
        load(artifact, kernels="bundled")
    assert mark.exists()


@pytest.mark.parametrize("change", ["flip", "truncate", "sidecar", "forged"])
def test_a_library_that_was_altered_after_it_was_trusted_is_never_mapped(
    artifact: Path, telltale: tuple[bytes, Path], change: str
):
    data, mark = telltale
    put(artifact, data)
    trust_it(artifact)
    library, sidecar = artifact / FOLDER / "hif4_cpu.so", artifact / FOLDER / "kernels.json"
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    expected: tuple[type[Hif4Error], str] = (Hif4Error, "was damaged or changed")
    if change == "flip":
        library.write_bytes(flipped)
    elif change == "truncate":
        library.write_bytes(data[:-1])
        expected = (Hif4Error, "the manifest says")
    elif change == "sidecar":
        # Trusted bytes under another description: the pair was never trusted.
        put(artifact, data, {**PROPERTIES, "instruction_sets": ["portable", "avx2"]})
        expected = (UntrustedKernels, "not trusted")
    else:
        put(artifact, flipped)
        expected = (UntrustedKernels, "not trusted")
    assert sidecar.is_file()
    with pytest.raises(expected[0], match=expected[1]):
        load(artifact, kernels="bundled")
    if expected[0] is Hif4Error:  # damage is an error, whatever else could run
        with pytest.raises(Hif4Error, match=expected[1]):
            load(artifact)
    assert not mark.exists()


@needs_compiler
def test_trust_can_be_taken_back(artifact: Path):
    trust_it(artifact)
    load(artifact, kernels="bundled")
    revoke_trust(trust_entries(open_artifact(artifact)))
    with pytest.raises(UntrustedKernels):
        load(artifact, kernels="bundled")


@needs_compiler
def test_a_trust_file_that_others_may_write_trusts_nothing(artifact: Path):
    trust_it(artifact)
    trust_path().chmod(0o666)
    with pytest.raises(UntrustedKernels, match="other users may write to it, so nothing is trusted"):
        load(artifact, kernels="bundled")
    load(artifact)  # "auto" builds its own
    assert registry._registry.active is registry._registry.built


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({**PROPERTIES, "abi": build.ABI + 1}, f"version {build.ABI + 1} of the kernels' interface"),
        ({**PROPERTIES, "instruction_sets": ["avx512vbmi"]}, "built for avx512vbmi, which this processor does not"),
        ({**PROPERTIES, "instruction_sets": ["avx9000"]}, "built for avx9000, which this processor does not have"),
        ({**PROPERTIES, "instruction_sets": []}, "built for no instruction set"),
    ],
)
def test_a_library_that_does_not_fit_is_not_mapped(
    artifact: Path,
    telltale: tuple[bytes, Path],
    properties: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    data, mark = telltale
    put(artifact, data, properties)
    trust_it(artifact)
    monkeypatch.setattr(registry, "_processor_flags", lambda: {"sse2", "avx2"})
    with pytest.raises(Hif4Error, match=reason):
        load(artifact, kernels="bundled")
    with caplog.at_level(logging.WARNING):
        load(artifact)
        load(artifact)
    assert registry._registry.active is registry._registry.built
    assert sum(reason in record.getMessage() for record in caplog.records) == 1
    assert not mark.exists()


def test_the_processors_features_are_those_of_the_kernels_own_test():
    """What /proc/cpuinfo says and what the library finds with cpuid."""
    flags = registry._processor_flags()
    if not flags or COMPILER is None:
        pytest.skip("no /proc/cpuinfo or no compiler")
    names = ["portable", *(name for name, needed in registry._NEEDED.items() if needed <= flags)]
    assert len(names) - 1 == registry.enable().instruction_set


@pytest.mark.parametrize("properties", [{}, {"abi": "1", "instruction_sets": []}, {"abi": 1, "instruction_sets": [1]}])
def test_a_description_without_sense_is_refused(artifact: Path, properties: dict[str, Any]):
    put(artifact, b"\x7fELF", properties)
    trust_it(artifact)
    for kernels in ("auto", "bundled"):
        with pytest.raises(Hif4Error, match=r"kernels\.json does not say what it is"):
            load(artifact, kernels=kernels)


@needs_compiler
def test_a_file_that_is_no_library_and_one_for_another_machine(artifact: Path, caplog: pytest.LogCaptureFixture):
    own = (artifact / FOLDER / "hif4_cpu.so").read_bytes()
    other = own[:18] + b"\xf3\x00" + own[20:]  # e_machine of the ELF header: RISC-V
    newer = own.replace(b"\0GLIBC_2.2.5\0", b"\0GLIBC_9.2.5\0")
    for data in (b"\x7fELF", other, newer):
        put(artifact, data)
        trust_it(artifact)
        with pytest.raises(Hif4Error, match=r"hif4_cpu\.so: cannot be loaded on this machine") as error:
            load(artifact, kernels="bundled")
        assert "/proc/self" not in str(error.value)
        caplog.clear()
        load(artifact)
        assert "cannot be loaded" in caplog.text
        assert registry._registry.active is registry._registry.built


@needs_compiler
def test_kernels_for_another_architecture_are_named(artifact: Path):
    put(artifact, b"\x7fELF", target="cpu-riscv64-linux")
    with pytest.raises(Hif4Error, match=f"has kernels for cpu-riscv64-linux and this machine needs {cpu_target()}"):
        load(artifact, kernels="bundled")
    load(artifact)
    assert registry._registry.active is registry._registry.built


@needs_compiler
def test_equal_libraries_are_loaded_once_and_the_last_choice_wins(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, other = shutil.copytree(artifact, tmp_path / "copy"), shutil.copytree(artifact, tmp_path / "other")
    put(other, (artifact / FOLDER / "hif4_cpu.so").read_bytes() + b"\0")
    for path in (artifact, other):
        trust_it(path)
    mapped: list[Path] = []
    real = registry._map
    monkeypatch.setattr(registry, "_map", lambda data, shown: (mapped.append(shown), real(data, shown))[1])
    for path in (artifact, copy, other, artifact):
        load(path, kernels="bundled")
    assert mapped == [path / FOLDER / "hif4_cpu.so" for path in (artifact, other)]
    assert registry._registry.active.path == artifact / FOLDER / "hif4_cpu.so"


@needs_compiler
def test_choices_in_several_threads_end_in_one(artifact: Path):
    """Registering twice would make torch raise."""
    from concurrent.futures import ThreadPoolExecutor

    trust_it(artifact)
    opened = open_artifact(artifact)
    words = ["bundled", "portable", "jit", "auto"] * 8
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda word: registry.select(word, opened), words))
    registry.select("portable")
    assert not registry.is_enabled()


@needs_compiler
def test_an_artifact_verifies_with_each(artifact: Path):
    trust_it(artifact)
    for kernels in ("bundled", "jit", "portable"):
        for check in verify_artifact(artifact, kernels=kernels):
            assert check.passed
            assert check.replay is not None
            assert check.replay.codes_differ == 0
            assert kernels != "portable" or check.replay.identical
        result = CliRunner().invoke(app, ["verify", str(artifact), "--kernels", kernels])
        assert result.exit_code == 0, result.output


@needs_compiler
def test_golden_outputs_are_the_portable_kernels_whatever_runs(
    models: dict[str, Any], quick_compile: Callable[..., Path], tmp_path: Path
):
    """With native kernels on in the process that compiles."""
    registry.enable()
    path = quick_compile(models["t2v"].directory, tmp_path / "made")
    assert registry.is_enabled()
    for check in verify_artifact(path, kernels="portable"):
        assert check.replay is not None
        assert check.replay.identical


def test_an_unknown_word_is_refused(artifacts: Callable[..., Path]):
    for call in (load, load_pipeline):
        for word in ("quick", "native"):
            with pytest.raises(Hif4Error, match="auto, bundled, jit, portable"):
                call(artifacts(), kernels=word)


def test_a_device_that_is_not_there_is_one_sentence(artifacts: Callable[..., Path]):
    with pytest.raises(Hif4Error, match="device 'tape' cannot be used here"):
        load(artifacts(), device="tape")
