"""Building the native kernels: the compiler, the cache, and what `kernels=` does where there is none."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import build, registry
from hif4c.runtime.native.bindings import Library

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)

SHARED = os.environ["XDG_CACHE_HOME"]  # of the whole test run; a build takes seconds


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no $CXX from outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "hif4c" / "native"


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not chosen kernels yet; what it had is put back."""
    enabled = registry.is_enabled()
    registry.disable()
    monkeypatch.setattr(registry, "_registry", registry._Registry())
    yield
    registry.disable()
    monkeypatch.undo()
    if enabled:
        registry.enable()


def fake_compiler(directory: Path, body: str) -> Path:
    """A compiler in shell: `body` runs with the output's path in $out; it answers --version."""
    script = directory / "fake-c++"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done\n' + body + "\n"
    )
    script.chmod(0o755)
    return script


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@needs_compiler
def test_build_is_private_cached_reproducible_found_without_a_compiler_and_computes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # From a copy: where the sources are must not be seen in the bytes, see below.
    monkeypatch.setattr(build, "_SOURCES", shutil.copytree(build._SOURCES, tmp_path / "elsewhere"))
    previous = os.umask(0)  # the modes must not depend on it
    try:
        library = build.find_library()
    finally:
        os.umask(previous)
    assert library.parent == cache == build.cache_directory()
    for path, mode in ((cache.parent, 0o700), (cache, 0o700), (library, 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [path.name for path in cache.iterdir()] == [library.name]  # nothing left of the build
    codes, scales = Library(library).quantize(torch.ones(2, 64))
    assert codes.shape == (2, 32)
    assert scales[0].tolist() == scales[1].tolist()
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", SHARED)
        assert build.find_library().read_bytes() == library.read_bytes()
    for directory in (tmp_path, Path(__file__).parents[2]):
        assert os.fsencode(directory) not in library.read_bytes()
    # Another compiler must not be run for what is there.
    monkeypatch.setattr(build, "_build", lambda *arguments: pytest.fail("built again"))
    assert build.find_library() == library
    no_compiler(monkeypatch, tmp_path)
    assert build.find_library() == library


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    no_compiler(monkeypatch, tmp_path)
    with pytest.raises(Hif4Error, match=r"install g\+\+ or clang\+\+.*kernels='portable'"):
        build.find_library()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(Hif4Error, match="CXX is 'no-such-compiler -m64'"):
        build.find_library()


def test_a_failing_compiler_is_one_sentence(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = "echo 'x.cpp:1: note' >&2; echo 'x.cpp:2: error: no such thing' >&2; exit 1"
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, body)))
    with pytest.raises(Hif4Error) as error:
        build.find_library()
    assert "x.cpp:2: error: no such thing" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, 'echo junk > "$out"')))
    with pytest.raises(Hif4Error, match=r"hif4_cpu-.*\.so: cannot be loaded"):
        Library(build.find_library())


def test_the_name_tells_compilers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / name, 'echo junk > "$out"')))
        names.add(build.find_library().name)
    assert len(names) == 2


def test_the_name_tells_sources_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "sources"
    shutil.copytree(build._SOURCES, copy)
    monkeypatch.setattr(build, "_SOURCES", copy)
    before = build._sources_hash()
    (copy / "linear_avx512.inl").write_text((copy / "linear_avx512.inl").read_text() + "\n")
    assert build._sources_hash() != before


@pytest.mark.parametrize("level", ["parent", "directory"])
def test_a_cache_that_others_may_write_to_is_refused(cache: Path, level: str):
    cache.mkdir(parents=True)
    cache.parent.chmod(0o700)
    cache.chmod(0o700)
    (cache.parent if level == "parent" else cache).chmod(0o770)
    with pytest.raises(Hif4Error, match="other users may write to it"):
        build._make_private(cache)


def test_a_cache_of_another_user_or_behind_a_link_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir(parents=True, mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Hif4Error, match="is a link or belongs to another user"):
        build._make_private(cache)
    cache.unlink()
    other = os.geteuid() + 1
    monkeypatch.setattr(build.os, "geteuid", lambda: other)
    with pytest.raises(Hif4Error, match="belongs to another user"):
        build._make_private(cache)


def test_a_library_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, 'echo junk > "$out"')))
    library = build.find_library()
    library.chmod(0o722)
    with pytest.raises(Hif4Error, match="other users may write to it"):
        build.find_library()
    no_compiler(monkeypatch, tmp_path)
    monkeypatch.delenv("CXX")
    with pytest.raises(Hif4Error, match="other users may write to it"):
        build.find_library()


def test_builds_at_once_leave_one_whole_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = 'echo half > "$out"; sleep 0.3; echo whole >> "$out"'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, body)))
    found: list[str] = []

    def find() -> None:
        found.append(build.find_library().read_text())

    threads = [threading.Thread(target=find) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["half\nwhole\n"] * 4
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("fresh_registry")
def test_auto_warns_once_and_jit_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    no_compiler(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        registry.select("auto")
        registry.select("auto")
    assert len(caplog.records) == 1
    assert "install g++" in caplog.text
    assert not registry.is_enabled()
    assert not registry.is_available()
    with pytest.raises(Hif4Error, match="install"):
        registry.select("jit")
    with pytest.raises(Hif4Error, match="no artifact to take bundled kernels from"):
        registry.select("bundled")
    registry.select("portable")
    for word in ("fast", "native"):
        with pytest.raises(Hif4Error, match="auto, bundled, jit, portable"):
            registry.select(word)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="readelf tells on Linux")
def test_the_library_needs_only_the_c_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", SHARED)
    text = subprocess.run(["readelf", "-d", build.find_library()], capture_output=True, text=True, check=True).stdout
    needed = [line.partition("[")[2].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    assert all(name.startswith(("libc.so", "ld-linux", "libm.so", "libpthread.so")) for name in needed), needed


def test_a_system_without_a_static_runtime_gets_the_dynamic_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = 'echo "$out" >> "$(dirname "$0")/runs"; test -n "$static" && exit 1; echo junk > "$out"'
    script = fake_compiler(tmp_path, body)
    script.write_text(script.read_text().replace("shift; done", "test $1 = -static-libgcc && static=1; shift; done"))
    monkeypatch.setenv("CXX", str(script))
    assert build.find_library().read_text() == "junk\n"
    links = [name for name in (tmp_path / "runs").read_text().splitlines() if name.endswith("library.so")]
    assert len(links) == (2 if sys.platform == "linux" else 1)


@needs_compiler
def test_another_process_finds_what_this_one_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a library built by the default settings; also, that importing the runtime alone enables nothing."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    library = build.find_library()
    code = (
        "import hif4c.runtime; from hif4c.runtime.native import registry; assert not registry.is_enabled(); "
        "print(registry.enable().path)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == str(library)
