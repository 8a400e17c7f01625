"""docs/python-api.md: what a program that uses hif4c may rely on, from the signatures and docstrings in the source.

The source is read, not imported, so that the page is the same on every version of Python.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hif4c.compiler.api_list import PARTS
from hif4c.runtime.errors import Hif4Error

if TYPE_CHECKING:
    import griffe

__all__ = ["api_page", "public_objects"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hif4c."
SECTIONS = {"parameters": "Arguments", "attributes": "Attributes", "raises": "Raises", "returns": "Returns"}
WIDTH = 100
"""A signature that is longer has a line for each parameter."""

HEAD = """# Python API

What a program may rely on; everything else in the package may change without notice. The commands (`hif4c --help`) are
thin layers over it. Shapes are in brackets, with the symbols that a docstring names; errors that are the input's fault
are [`Hif4Error`](#hif4error), whose message is one sentence for people.

This page is made from the docstrings by `python tools/make_docs.py api`.
"""


@dataclass(frozen=True)
class PublicObject:
    """Something of the API.

    Attributes:
        name: as its heading shows it.
        found: its definition in the source.
        imported_from: the module to import it from, "" for an operator.
        described: what has its docstring; usually the definition.
    """

    name: str
    found: griffe.Function | griffe.Class | griffe.Attribute
    imported_from: str
    described: griffe.Function | griffe.Class | griffe.Attribute


def api_page() -> str:
    """The page as Markdown.

    Raises:
        Hif4Error: griffe is not installed.
    """
    lines = [HEAD]
    for title, _, entries in PARTS:
        names = [f"[`{_object(entry).name}`](#{_anchor(_object(entry).name)})" for entry in entries]
        lines.append(f"- [{title}](#{_anchor(title)}): {', '.join(names)}")
    for title, text, entries in PARTS:
        lines += ["", f"## {title}", "", text]
        for entry in entries:
            lines += ["", *_rendered(_object(entry))]
    return "\n".join(lines) + "\n"


def public_objects() -> Iterator[PublicObject]:
    """Everything on the page, in order."""
    return (_object(entry) for _, _, entries in PARTS for entry in entries)


@functools.cache
def _object(entry: str) -> PublicObject:
    """An entry of the list, see `hif4c.compiler.api_list`."""
    path, _, alias = entry.partition(" as ")
    path, _, describing = path.partition(" with ")
    module_name, _, name = path.rpartition(".")
    found = _definition(path)
    described = _definition(describing) if describing else found
    if alias:
        return PublicObject(alias, found, "", described)
    package = module_name.partition(".")[0]
    exports = _module(f"{package}.__init__").exports or []
    return PublicObject(name, found, PACKAGE + (package if name in exports else module_name), described)


def _definition(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return _module(module_name)[name]


@functools.cache
def _module(name: str) -> griffe.Module:
    """A module below the packages, "runtime.transformer"."""
    try:
        import griffe
    except ImportError:
        raise Hif4Error("docs/python-api.md is made with griffe; install it with `pip install griffelib`.") from None
    path = ROOT / (name.replace(".", "/") + ".py")
    return griffe.visit(PACKAGE + name.removesuffix(".__init__"), filepath=path, code=path.read_text(encoding="utf-8"))


def _rendered(item: PublicObject) -> Iterator[str]:
    yield f"### `{item.name}`"
    yield ""
    yield "```python"
    if item.imported_from:
        yield f"from {item.imported_from} import {item.name}"
        yield ""
    yield from _signature(item.name, item.found)
    yield "```"
    yield ""
    yield from _docstring(item.described)
    if item.found.is_class:
        for member in _public_members(item.found):
            yield from _member(item.name, member)


def _public_members(found: Any) -> Iterator[Any]:
    """Methods and properties with a docstring, in order."""
    for name, member in found.members.items():
        method = member.is_function or "property" in member.labels
        if method and not name.startswith("_") and member.docstring is not None:
            yield member


def _member(owner: str, member: Any) -> Iterator[str]:
    yield ""
    yield f"#### `{owner}.{member.name}`"
    yield ""
    yield "```python"
    yield from [f"{member.name}: {member.annotation}"] if member.is_attribute else _signature(member.name, member)
    yield "```"
    yield ""
    yield from _docstring(member)


def _signature(name: str, found: Any) -> list[str]:
    """How it is called; of a dataclass its fields, of an exception its name, of an alias its value."""
    if found.is_attribute:
        return [f"{name} = {found.value}"]
    if not found.is_class:
        return _call(name, found.parameters, f" -> {found.returns}")
    if "__init__" in found.members:
        return _call(name, found["__init__"].parameters, "")
    plain = [f"{field.name}: {field.annotation}{_default(field.value)}" for field in _fields(found)]
    return _wrapped(name, plain, "") if plain else [f"class {name}({', '.join(map(str, found.bases))})"]


def _fields(found: Any) -> list[Any]:
    """The fields of a dataclass, those of its bases in the same module first."""
    bases = [found.module[str(base)] for base in found.bases if str(base) in found.module.members]
    own = [member for member in found.members.values() if member.is_attribute and "property" not in member.labels]
    own = [field for field in own if field.annotation is not None and not field.name.startswith("_")]
    return [*(field for base in bases if base.is_class for field in _fields(base)), *own]


def _call(name: str, parameters: Iterable[Any], returns: str) -> list[str]:
    shown, star = [], False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        star |= kind == "variadic positional"
        if kind == "keyword-only" and not star:
            shown.append("*")
            star = True
        prefix = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        default = "" if prefix else _default(parameter.default)
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        shown.append(f"{prefix}{parameter.name}{annotation}{default}")
    return _wrapped(name, shown, returns)


def _default(value: Any) -> str:
    if value is None:
        return ""
    factory = re.fullmatch(r"field\(default_factory=(\w+)\)", str(value))
    text = f"{factory[1]}()" if factory else str(value)
    return f" = {text}" if "'" not in text or '"' in text else " = " + text.replace("'", '"')


def _wrapped(name: str, parameters: list[str], returns: str) -> list[str]:
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"]


def _docstring(found: Any) -> Iterator[str]:
    """The text, and its sections as lists."""
    sections = [] if found.docstring is None else found.docstring.parse("google", warnings=False)
    first = True
    for section in sections:
        kind = section.kind.value
        if not first:
            yield ""
        first = False
        if kind == "text":
            yield from _text(section.value)
            continue
        items = [(_item_name(item, kind), item.description) for item in section.value]
        yield from _list(SECTIONS[kind], items)
    if found.is_class and not {"attributes", "parameters"} & {section.kind.value for section in sections}:
        described = [(field.name, field.docstring.value) for field in _fields(found) if field.docstring is not None]
        if described:
            yield ""
            yield from _list("Attributes", described)


def _item_name(item: Any, kind: str) -> str:
    if kind in ("raises", "returns"):
        return str(item.annotation or "")
    # "a, b: ..." describes both; griffe takes the second name for a type.
    return f"{item.name} {item.annotation}" if item.name.endswith(",") else str(item.name)


def _list(title: str, items: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"{title}:"
    yield ""
    for name, text in items:
        flat = " ".join(text.split())
        names = ", ".join(f"`{part}`" for part in name.split(", "))
        yield f"- {names}: {flat}" if name else f"- {flat}"


def _text(text: str) -> Iterator[str]:
    """Paragraphs as they are; indented blocks, and lists that follow a line directly, as Markdown wants them."""
    before = ""
    for line in text.splitlines():
        if line.startswith("- ") and before and not before.startswith(("- ", "  ")):
            yield ""
        yield line
        before = line


def _anchor(title: str) -> str:
    """How GitHub names the place of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
