"""The reference page of recipes, made from the dataclasses in ``pipeline.recipe.schema``.

python -m pipeline.recipe.page > docs/recipe.md
"""

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pipeline.recipe.checks import ranges
from pipeline.recipe.parse import TYPE_NAMES, is_required
from pipeline.recipe.ranges import NameIn, Range
from pipeline.recipe.schema import MethodName, MetricName, Recipe

WIDTH = 100
INTRODUCTION = """\
<!-- Made by `python -m pipeline.recipe.page > docs/recipe.md`; a test compares the two. -->
# Every key of a recipe

A run is one YAML file: the keys of the first section stand at its top level, those of the other
sections below the section's name. `coda train RECIPE section.key=value` overrides a key for one
run, and `coda recipes` lists the files that come with the package. An unknown key or a value out
of its range is an error that names what is valid.
"""

GROWING = {
    MetricName: "names of [metrics](interpretability.md)",
    MethodName: "names of [methods](interpretability.md)",
}
"""Names that are described elsewhere, so that a new one does not change the page."""


def page() -> str:
    """Return the page as Markdown text."""
    return "\n".join([INTRODUCTION, *_section(Recipe, "")])


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring right under each field of the dataclass ``cls``, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(below, ast.Expr):
            continue
        if isinstance(statement.target, ast.Name) and isinstance(below.value, ast.Constant):
            texts[statement.target.id] = inspect.cleandoc(str(below.value.value))
    return texts


def _section(cls: type, prefix: str) -> Iterator[str]:
    """Lines of the section of the dataclass ``cls``, whose keys begin with ``prefix``.

    The sections of the dataclasses in it follow.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    plain, texts = typing.get_type_hints(cls), field_docstrings(cls)
    yield f"## `{prefix.rstrip('.')}`" if prefix else "## Top level"
    yield ""
    yield from textwrap.wrap(" ".join(inspect.cleandoc(cls.__doc__ or "").split()), WIDTH)
    yield ""
    inner = {}
    for field in dataclasses.fields(cls):
        section = next(filter(dataclasses.is_dataclass, _members(plain[field.name])), None)
        if section is not None:
            inner[field.name] = section
            values = f"a section, see [`{prefix}{field.name}`](#{_anchor(prefix + field.name)})"
        else:
            values = _values(plain[field.name], list(ranges(hints[field.name])))
        default = "required" if is_required(field) else _default(field)
        yield from _wrapped(f"- **`{field.name}`** ({values}; {default})<br>", "  ")
        yield from _wrapped("  " + " ".join(texts[field.name].split()), "  ")
    yield ""
    for name, section in inner.items():
        yield from _section(typing.cast(type, section), f"{prefix}{name}.")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _members(hint: Any) -> tuple[Any, ...]:
    """The types in a union; any other type alone."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _values(hint: Any, valid: Sequence[Range] = ()) -> str:
    """Say in words which values the annotation ``hint`` and the ranges ``valid`` allow."""
    texts = [each.text for each in valid]
    if any(isinstance(each, NameIn) for each in valid):
        return "; ".join(texts)
    return "; ".join([_kind(hint), *texts])


def _kind(hint: Any) -> str:
    """Say in words of which type the values of ``hint`` are, or which few they are."""
    first, *others = _members(hint)
    origin, choices = typing.get_origin(first), typing.get_args(first)
    if first in GROWING:
        text = GROWING[first]
    elif origin is Literal:
        text = ", ".join(f"`{choice}`" for choice in choices)
    elif origin is tuple:
        text = f"a list of {_kind(choices[0])}"
    else:
        text = TYPE_NAMES[origin or first]
    return f"{text} or null" if others else text


def _default(field: "dataclasses.Field[Any]") -> str:
    """Say in words, and as it would stand in YAML, what ``field`` holds unless it is set."""
    if field.default_factory is not dataclasses.MISSING:
        return "default: empty"
    return f"default `{json.dumps(field.default)}`".replace('"', "")


def _anchor(key: str) -> str:
    """Return the anchor that GitHub gives the heading of a section."""
    return key.replace(".", "")


if __name__ == "__main__":
    sys.stdout.write(page())
