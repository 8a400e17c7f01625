"""The user's trust file: sha256 of the kernels that may run on this machine.

It decides what code runs, so only the user may have written it: the file (0600) and its directory (0700) are refused
when they belong to someone else or others may write to them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hif4c.runtime.errors import Hif4Error

__all__ = ["TrustEntry", "read_trust", "record_trust", "revoke_trust", "trust_path", "trusted_hashes"]

MAX_TRUST_BYTES = 64 << 20
_FIELDS = {"target", "file", "from", "when"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TrustEntry:
    """Where a trusted file was seen: its target, its name, the artifact, and when it was trusted (UTC, ISO 8601)."""

    target: str
    file: str
    artifact: str
    when: str = ""


def trust_path() -> Path:
    """hif4c/trust.json in XDG_CONFIG_HOME, or in ~/.config where that is not an absolute path."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "hif4c" / "trust.json"


def trusted_hashes() -> frozenset[str]:
    """The sha256 of everything that is trusted; none when there is no trust file.

    Raises:
        Hif4Error: the trust file is malformed, belongs to someone else, or others may write to it.
    """
    return frozenset(read_trust())


def read_trust() -> dict[str, TrustEntry]:
    """sha256 -> entry; errors as `trusted_hashes`."""
    path = _usable_path()
    try:
        _check_owned(path.parent)
        with open(path, "rb", opener=_open_cautiously) as file:
            _check_status(path, os.fstat(file.fileno()), stat.S_ISREG)
            data = file.read(MAX_TRUST_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}); {_REPAIR}.") from None
    try:
        if len(data) > MAX_TRUST_BYTES:
            raise ValueError(f"it is larger than {MAX_TRUST_BYTES} bytes")
        return _decode(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise Hif4Error(f"{path}: is not a list of trusted files ({error}); {_REPAIR}.") from None


def record_trust(entries: Mapping[str, TrustEntry]) -> None:
    """Add sha256 -> entry. What is trusted already keeps its entry; another process's entries are not lost.

    Raises:
        Hif4Error: the trust file cannot be used or written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def add(known: dict[str, TrustEntry]) -> None:
        for digest, entry in entries.items():
            known.setdefault(digest, TrustEntry(entry.target, entry.file, entry.artifact, entry.when or now))

    _update(add)


def revoke_trust(hashes: Iterable[str]) -> int:
    """Take hashes away; returns how many were there. Errors as `record_trust`."""
    removed = 0

    def remove(known: dict[str, TrustEntry]) -> None:
        nonlocal removed
        removed = sum(known.pop(digest, None) is not None for digest in hashes)

    _update(remove)
    return removed


def _usable_path() -> Path:
    if os.name != "posix":
        raise Hif4Error("who may write to a file is only known on Linux and macOS, so no kernels are trusted here.")
    return trust_path()


_REPAIR = "delete it and trust again with `hif4c trust OUT`"


def _update(change: Callable[[dict[str, TrustEntry]], None]) -> None:
    path = _usable_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owned(path.parent)
        with _locked(path.parent / "trust.lock"):
            known = read_trust()
            before = dict(known)
            change(known)
            if known != before:
                _write(path, known)
    except OSError as error:
        raise Hif4Error(
            f"{path}: cannot be written ({error.strerror}); set XDG_CONFIG_HOME to a directory of your own."
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes and threads; the lock ends with the descriptor, however the process ends."""
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, known: Mapping[str, TrustEntry]) -> None:
    value = {digest: _encode(entry) for digest, entry in known.items()}
    data = (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()
    descriptor, temporary = tempfile.mkstemp(prefix="trust-", dir=path.parent)  # 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _encode(entry: TrustEntry) -> dict[str, str]:
    fields = asdict(entry)
    fields["from"] = fields.pop("artifact")
    return fields


def _decode(value: Any) -> dict[str, TrustEntry]:
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    entries = {}
    for digest, fields in value.items():
        if not _SHA256.fullmatch(digest):
            raise ValueError("a key is not a sha256")
        if (
            not isinstance(fields, dict)
            or fields.keys() != _FIELDS
            or not all(isinstance(item, str) for item in fields.values())
        ):
            raise ValueError(f"the entry of {digest[:12]} does not have the fields {', '.join(sorted(_FIELDS))}")
        entries[digest] = TrustEntry(fields["target"], fields["file"], fields["from"], fields["when"])
    return entries


def _open_cautiously(path: str, flags: int) -> int:
    """Neither follow a link nor wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _check_owned(directory: Path) -> None:
    status = os.lstat(directory)
    _check_status(directory, status, stat.S_ISDIR)


def _check_status(path: Path, status: os.stat_result, kind: Callable[[int], bool]) -> None:
    if not kind(status.st_mode) or status.st_uid != os.geteuid():
        raise Hif4Error(
            f"{path}: is a link or belongs to another user, so nothing is trusted; make it your own, or "
            "set XDG_CONFIG_HOME to a directory of your own."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Hif4Error(
            f"{path}: other users may write to it, so nothing is trusted; take that away (chmod go-w {path})."
        )
