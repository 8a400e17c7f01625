"""Build the CPU kernels from the C++ sources of this package, once a machine, into the user's cache directory.

The library is code that will run, so nobody but the user may have written it: the directories are private (0700) and
refused when they belong to someone else or others may write to them, and so is a library found there. Its name holds a
hash of the sources, flags, compiler and machine; it appears under that name in one step, complete, so any number of
processes may build at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hif4c.runtime.errors import Hif4Error

__all__ = ["ABI", "FLAGS", "cache_directory", "compiler_version", "find_compiler", "find_library"]

log = logging.getLogger(__name__)

ABI = 2
"""Of the library's C interface: raised whenever an exported function changes, so that an artifact's older library is
not called with arguments that it does not have."""

# The architecture's first processor: each function states what it needs beyond, and is called where that is there.
_BASELINE = {"x86_64": ("-march=x86-64",), "amd64": ("-march=x86-64",)}.get(platform.machine().lower(), ())
# No contraction: a * b + c must round twice where it is written so, or codes would depend on the compiler.
# Stripped, and nothing in it tells where or when it was built: equal sources and compilers give equal bytes.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread",
    "-w", "-s", *_BASELINE,
)  # fmt: skip
# The library travels in artifacts: with its own copy of the C++ runtime it needs no more than a C library.
_STATIC = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections")

_SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 600.0  # seconds; a build takes a few
_HINT = "or use kernels='portable'"


def find_library() -> Path:
    """The library for this machine: from the cache, built first when it is not there.

    Without a compiler, a library that some compiler built here earlier from the same sources serves as well.
    Raises Hif4Error when there is neither, when the build fails, or when the cache directory is not private.
    """
    if os.name != "posix":
        raise Hif4Error("native kernels are built on Linux and macOS only; use kernels='portable'.")
    stem = f"hif4_cpu-{_sources_hash()}-{sys.platform}-{platform.machine()}"
    try:
        compiler = find_compiler()
    except Hif4Error:
        if earlier := _earlier(stem):
            return earlier
        raise
    directory = _make_private(cache_directory())
    library = directory / f"{stem}-{_compiler_hash(compiler)}.so"
    if not library.is_symlink() and not library.exists():
        _build(compiler, library)
    _check_owned(library)
    return library


def cache_directory() -> Path:
    """Where libraries are kept: hif4c/native in XDG_CACHE_HOME, or in ~/.cache where that is not an absolute path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hif4c" / "native"


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++ on the path.

    Raises Hif4Error that says what to install.
    """
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise Hif4Error(f"CXX is {chosen!r}, which cannot be run; set it to a C++ compiler or unset it, {_HINT}.")
        return command
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise Hif4Error(
        "native kernels need a C++ compiler and none was found; "
        f"install g++ or clang++ (for example `apt-get install g++`), {_HINT}."
    )


def _sources_hash() -> str:
    digest = hashlib.sha256(" ".join((*FLAGS, *_STATIC)).encode())
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h", ".inl"):
            data = path.read_bytes()
            digest.update(f"\n{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def _compiler_hash(compiler: list[str]) -> str:
    result = _run([*compiler, "--version"], Path.cwd())
    return hashlib.sha256(f"{shlex.join(compiler)}\n{result.stdout}".encode()).hexdigest()[:16]


def compiler_version() -> str:
    """First line of what the C++ compiler says of itself; "unknown" without one."""
    try:
        lines = _run([*find_compiler(), "--version"], Path.cwd()).stdout.splitlines()
    except Hif4Error:
        return "unknown"
    return lines[0].strip() if lines else "unknown"


def _build(compiler: list[str], library: Path) -> None:
    log.info("building the CPU kernels with %s into %s", shlex.join(compiler), library)
    try:
        scratch = Path(tempfile.mkdtemp(prefix="build-", dir=library.parent))
    except OSError as error:
        raise Hif4Error(f"{library.parent}: cannot be written to ({error.strerror}); {_SET_CACHE}, {_HINT}.") from None
    try:
        result = _compile(compiler, scratch)
        if result.returncode != 0 or not (scratch / "library.so").is_file():
            raise Hif4Error(
                f"{shlex.join(compiler)} could not build the native kernels ({_first_error(result)}); "
                f"set CXX to another C++ compiler (g++ 9 or clang++ 9 at least), {_HINT}."
            )
        (scratch / "library.so").chmod(0o700)
        os.replace(scratch / "library.so", library)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compile(compiler: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Make library.so in `scratch`, a source on each processor; returns the last command, or the first that failed."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [str(scratch / f"{path.stem}.o") for path in sources]
    commands = [[*compiler, *FLAGS, "-c", str(path), "-o", made] for path, made in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(lambda command: _run(command, scratch), commands):
            if result.returncode != 0:
                return result
    link = [*compiler, *FLAGS, *objects, "-o", str(scratch / "library.so")]
    if sys.platform == "linux":
        result = _run([*link, *_STATIC], scratch)
        if result.returncode == 0:
            return result
        log.info("%s has no static C++ runtime; linking with the system's", shlex.join(compiler))
    return _run(link, scratch)


def _run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Hif4Error(f"{command[0]} cannot be run ({error}); set CXX to another C++ compiler, {_HINT}.") from None


def _first_error(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {result.returncode}"])[0][:300]


_SET_CACHE = "set XDG_CACHE_HOME to a directory of your own"


def _make_private(directory: Path) -> Path:
    """Make the directory and its parent hif4c, readable by the user alone, and check whose they are."""
    for path in (directory.parent, directory):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Hif4Error(f"{path}: cannot be made ({error.strerror}); {_SET_CACHE}, {_HINT}.") from None
        _check_owned(path)
    return directory


def _check_owned(path: Path) -> None:
    """Raise Hif4Error unless `path`, not followed if it is a link, belongs to the user and nobody else may write it."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid():
        raise Hif4Error(f"{path}: is a link or belongs to another user; {_SET_CACHE}, {_HINT}.")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Hif4Error(f"{path}: other users may write to it; take that away (chmod go-w), {_HINT}.")


def _earlier(stem: str) -> Path | None:
    """The newest library of these sources in the cache, whatever compiler made it."""
    directory = cache_directory()
    found = [path for path in directory.glob(f"{stem}-*.so") if path.is_file()] if directory.is_dir() else []
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    for path in (directory.parent, directory, newest):
        _check_owned(path)
    return newest
