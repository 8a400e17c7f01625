"""What each pass did to an expert's program, as data for the report's page."""

from __future__ import annotations

import importlib
import inspect

__all__ = ["pass_docstring"]


def pass_docstring(name: str) -> tuple[str, str]:
    """(what it does: its module's docstring, how: the docstring of its function without arguments and errors).

    A pass has the name of its module in `hif4c.passes` and of the function there.
    """
    module = importlib.import_module(f"hif4c.passes.{name}")
    how = inspect.cleandoc(getattr(module, name).__doc__ or "")
    for heading in ("\n\nArgs:", "\n\nRaises:", "\n\nReturns:"):
        how = how.split(heading)[0]
    return inspect.cleandoc(module.__doc__ or ""), how
