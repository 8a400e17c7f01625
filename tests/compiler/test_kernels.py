"""Kernels for an artifact: which targets, what is written for the CPU, and what happens without a compiler."""

import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hif4c.compiler import kernels as module
from hif4c.compiler.kernels import TARGETS, build_kernels, check_targets, resolve_targets
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import cpu_target, kernel_targets, read_kernel_set, trust_entries, write_kernel_set
from hif4c.runtime.native import build
from hif4c.runtime.transformer import load
from hif4c.runtime.trust import trust_path, trusted_hashes

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)


@pytest.fixture(autouse=True)
def trusts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty-cache"))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["cpu"], ("cpu",)),
        (["cuda-sm90,cpu", "cuda-sm80"], ("cpu", "cuda-sm80", "cuda-sm90")),
        (["all"], TARGETS),
        (["portable"], ()),
        (["portable, hip-gfx942"], ("hip-gfx942",)),
    ],
)
def test_targets_are_resolved_in_one_order(chosen: list[str], expected: tuple[str, ...]):
    assert resolve_targets(chosen) == expected


@pytest.mark.parametrize("name", ["cuda", "sm90", "", "cpu-x86-64-linux"])
def test_an_unknown_target_is_refused(name: str):
    with pytest.raises(Hif4Error, match=f"target {name!r} is not known; choose from cpu, cuda-sm80, .*all, portable"):
        resolve_targets([f"cpu,{name}"])


def test_gpu_targets_need_triton_and_say_so_first(monkeypatch: pytest.MonkeyPatch):
    check_targets(("cpu",))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    check_targets(("cpu",))
    with pytest.raises(Hif4Error, match="target 'all' is not known"):
        check_targets(("all",))
    with pytest.raises(Hif4Error, match="cuda-sm80, hip-gfx942 are built with Triton; install it"):
        check_targets(("cpu", "cuda-sm80", "hip-gfx942"))


def test_gpu_targets_go_to_the_triton_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(target: str, directory: Path, progress: Callable[[str], None]) -> None:
        write_kernel_set(directory, target, {}, [("a", "b", "a.cubin", b"x", {})])
        progress("a.cubin")

    builder = types.SimpleNamespace(build_gpu_kernels=make, list_jobs=lambda target: [1])
    monkeypatch.setitem(__import__("sys").modules, "hif4c.compiler.gpu_kernels", builder)
    events: list[Any] = []
    build_kernels(("cuda-sm80",), tmp_path, lambda *event: events.append(event))
    assert (tmp_path / "cuda-sm80" / "a.cubin").read_bytes() == b"x"
    assert events == [("step", "building kernels for cuda-sm80"), ("total", 1), ("bytes", 1)]


@needs_compiler
def test_an_artifact_holds_the_library_and_is_trusted_where_it_was_made(
    models: dict[str, Any], quick_compile: Callable[..., Path], tmp_path: Path
):
    path = quick_compile(models["t2v"].directory, tmp_path / "made", golden=False)
    artifact = open_artifact(path)
    assert artifact.manifest["targets"] == ["portable", cpu_target()]
    assert kernel_targets(artifact) == [cpu_target()]
    kernels = read_kernel_set(artifact, cpu_target())
    assert kernels is not None
    (library,) = kernels.kernels
    assert library.properties["abi"] == build.ABI
    assert library.properties["instruction_sets"][0] == "portable"
    assert kernels.built_with == {"c++": build.compiler_version()}
    assert (path / "kernels" / cpu_target() / library.file).read_bytes() == build.find_library().read_bytes()
    assert trusted_hashes() == trust_entries(artifact).keys()
    load(path, kernels="bundled")


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_artifact_is_made_and_says_what_to_install(
    models: dict[str, Any], tmp_path: Path, quick_compile: Callable[..., Path]
):
    events: list[Any] = []
    build_kernels(("cpu",), tmp_path / "kernels", lambda *event: events.append(event))
    assert events[0] == ("step", f"building kernels for {cpu_target()}")
    assert "the artifact gets no CPU kernels" in events[1][1]
    assert "install g++ or clang++" in events[1][1]
    assert not (tmp_path / "kernels").exists()
    path = quick_compile(models["t2v"].directory, tmp_path / "made", golden=False)
    assert open_artifact(path).manifest["targets"] == ["portable"]
    assert trusted_hashes() == set()
    load(path, kernels="portable")
    with pytest.raises(Hif4Error, match="has kernels for no target and this machine needs"):
        load(path, kernels="bundled")


@needs_compiler
def test_a_trust_file_that_cannot_be_used_costs_no_artifact(
    models: dict[str, Any], quick_compile: Callable[..., Path], tmp_path: Path
):
    trust_path().parent.mkdir(parents=True)
    trust_path().write_text("garbage")
    trust_path().parent.chmod(0o700)
    path = quick_compile(models["t2v"].directory, tmp_path / "made", golden=False)
    assert cpu_target() in open_artifact(path).manifest["targets"]
    events: list[Any] = []
    module.trust_built_kernels(open_artifact(path), lambda *event: events.append(event))
    assert "not trusted yet" in events[0][1]
    assert "delete it" in events[0][1]


@needs_compiler
def test_a_compiler_that_is_told_to_use_more_than_every_processor_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """-march=native and the like would make a library that ends elsewhere in an illegal instruction."""
    if cpu_target() != "cpu-x86-64-linux":
        pytest.skip("x86-64's options")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"{build.find_compiler()[0]} -mavx2")
    with pytest.raises(Hif4Error, match=r"could not build the native kernels .*build without -m options"):
        build.find_library()
