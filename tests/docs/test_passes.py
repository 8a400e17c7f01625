"""docs/passes.md is what the code makes today."""

import difflib

from hif4c.compiler.pass_docs import passes_page
from hif4c.tools.make_docs import DOCS


def test_the_page_is_made_from_this_code():
    written = (DOCS / "passes.md").read_text(encoding="utf-8")
    made = passes_page()
    difference = difflib.unified_diff(written.splitlines(), made.splitlines(), "docs/passes.md", "made", lineterm="")
    shown = "\n".join(list(difference)[:40])
    assert written == made, f"docs/passes.md is not up to date: run `python tools/make_docs.py passes`.\n{shown}"
