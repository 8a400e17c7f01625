"""Commands that several processes share under torchrun: one of them speaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hif4c.tools.console import silence

if TYPE_CHECKING:
    from hif4c.compiler.ranks import Ranks

__all__ = ["speaking_ranks"]


@contextmanager
def speaking_ranks(device: str = "cpu") -> Iterator[Ranks]:
    """`start_ranks` for a command: ranks beside the first print nothing, nor an error that the first one prints."""
    from hif4c.compiler.ranks import start_ranks
    from hif4c.runtime.errors import Hif4Error

    with start_ranks(device) as ranks:
        if not ranks.first:
            silence()
        try:
            yield ranks
        except Hif4Error as error:
            if ranks.first or not ranks.have_heard(error):
                raise
            sys.exit(1)
