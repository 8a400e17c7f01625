"""docs/python-api.md is what the source says, and what the source says is enough for a user."""

import importlib
import inspect
import re

import pytest
import torch

import hif4c.runtime  # registers the operators
from hif4c.compiler.api_docs import api_page, public_objects
from hif4c.tools.make_docs import DOCS

OBJECTS = {item.name: item for item in public_objects()}


def test_the_page_is_up_to_date():
    there = (DOCS / "python-api.md").read_text(encoding="utf-8")
    assert there == api_page(), "docs/python-api.md is not what the docstrings say; run: python tools/make_docs.py api"


def test_everything_can_be_imported_from_where_the_page_says():
    for name, item in OBJECTS.items():
        if not item.imported_from:
            assert name.startswith("torch.ops.hif4.")
            assert callable(getattr(torch.ops.hif4, name.rpartition(".")[2]))
            continue
        module = importlib.import_module(item.imported_from)
        assert hasattr(module, name)
        assert name in module.__all__, f"{item.imported_from}.{name} is on the page and not in __all__"
    assert set(hif4c.runtime.__all__) <= OBJECTS.keys()


def shown_parameters(name):
    """Of the signature on the page."""
    (block,) = re.findall(rf"^### `{re.escape(name)}`\n\n```python\n(.*?)```", api_page(), re.DOTALL | re.MULTILINE)
    call = block.partition(f"{name}(")[2]
    return re.findall(r"(?:^|[(,]) *\**(\w+):", call.replace("\n", ""))


@pytest.mark.parametrize("name", ["load", "load_pipeline", "quantize", "compile_model", "CompileOptions", "Recipe"])
def test_signatures_are_those_of_the_code(name):
    found = getattr(importlib.import_module(OBJECTS[name].imported_from), name)
    assert shown_parameters(name) == list(inspect.signature(found).parameters)


@pytest.mark.parametrize("name", [name for name in OBJECTS if name.startswith("torch.ops.hif4.")])
def test_signatures_of_operators_are_their_schemas(name):
    schema = getattr(torch.ops.hif4, name.rpartition(".")[2]).default._schema
    assert shown_parameters(name) == [argument.name for argument in schema.arguments]


def described(item):
    """The public object and its methods on the page."""
    yield item.name, item.found, item.described
    if item.found.is_class:
        for member in item.found.members.values():
            if member.is_function and not member.name.startswith("_") and member.docstring is not None:
                yield f"{item.name}.{member.name}", member, member


@pytest.mark.parametrize("item", OBJECTS.values(), ids=OBJECTS)
def test_docstrings_say_what_every_argument_is(item):
    """In the order of the signature, none left out, wherever there is a list of them."""
    for name, found, documented in described(item):
        assert documented.docstring is not None, f"{name} has no docstring"
        if not found.is_function and "__init__" not in found.members:
            continue
        function = found if found.is_function else found["__init__"]
        parameters = [parameter.name for parameter in function.parameters if parameter.name not in ("self", "cls")]
        sections = {section.kind.value: section for section in documented.docstring.parse("google", warnings=False)}
        if "parameters" in sections:
            listed = ", ".join(item.name for item in sections["parameters"].value)  # "a, b: ..." describes both
            assert listed.split(", ") == parameters, name


def test_links_lead_to_headings():
    page = api_page()
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]*)\)", page)
    assert len(links) > len(OBJECTS)
    assert set(links) <= headings
    assert all((DOCS / link).is_file() for link in re.findall(r"\]\(([\w-]+\.md)\)", page))
