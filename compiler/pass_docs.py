"""docs/passes.md: what each pass does and why, from its docstrings."""

from __future__ import annotations

from hif4c.compiler.pipeline import PASS_NAMES
from hif4c.compiler.report_passes import pass_docstring

__all__ = ["passes_page"]


def passes_page() -> str:
    """The page as Markdown."""
    parts = ["# The passes\n"]
    for number, name in enumerate(PASS_NAMES, 1):
        what, _ = pass_docstring(name)
        parts.append(f"## {number}. {name}\n\n{what}\n")
    return "\n".join(parts)
