"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hif4c.runtime.errors import Hif4Error

__all__ = ["staged_directory"]


@contextlib.contextmanager
def staged_directory(target: Path, doing: str) -> Iterator[Path]:
    """A directory beside the target, to be filled and renamed away; what is left of it is removed at the end.

    Parents of the target that had to be made are removed as well when nothing was put there.

    Args:
        target: the final name; must not exist.
        doing: what the caller does, for errors ("compiling").

    Raises:
        Hif4Error: the target exists, or reading or writing failed.
    """
    if target.exists() or target.is_symlink():
        raise Hif4Error(f"{target}: already exists; choose another name, or remove it first.")
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
    except OSError as error:
        raise Hif4Error(f"{target.parent}: cannot be written ({error.strerror}).") from None
    try:
        yield staging
    except OSError as error:
        where = error.filename or target
        raise Hif4Error(f"{where}: reading or writing failed while {doing} ({error.strerror}).") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if nothing was put there
