"""Plain data, as YAML gives it, into dataclasses, by their annotations; every mistake names the key
and what would be valid.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from pipeline.errors import UserError


def parse(text: str, where: str) -> Any:
    """The YAML document ``text``, which comes from ``where``. Raises UserError: it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}"
        ) from error


def override(tree: dict[str, Any], text: str) -> None:
    """Set one value of ``tree`` as ``text``, section.key=value with a YAML value, says. Raises
    UserError: it says nothing of the kind.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"override {text!r}: must look like section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {text!r}: {section} is a value, not a section")
    tree[last] = parse(value, f"override {text!r}")


def build(cls: Any, tree: Any, prefix: str, where: str) -> Any:
    """Dataclass ``cls`` from ``tree``, whose dotted keys begin with ``prefix``. Raises UserError:
    unknown, missing or wrong values.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.')} must be a section of keys, found {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = (
                f"did you mean {prefix}{close[0]}?" if close else f"valid keys: {', '.join(hints)}"
            )
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        values[key] = _convert(hints[key], value, f"{prefix}{key}", where)
    for item in dataclasses.fields(cls):
        required = (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        )
        if required and item.name not in values:
            raise UserError(f"{where}: {prefix}{item.name} is missing; it has no default")
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """``value`` as the annotated type ``hint``; YAML reads 1e-3 as text and 1 as an integer, both
    are welcome as floats.
    """
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.", where)
    if origin is types.UnionType:
        return None if value is None else _convert(choices[0], value, key, where)
    if origin is Literal:
        if value in choices:
            return value
        raise UserError(f"{where}: {key} is {value!r}; valid: {', '.join(map(str, choices))}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(choices[0], item, key, where) for item in value)
    if origin is Mapping and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    names = {
        tuple: "a list",
        Mapping: "a mapping",
        float: "a number",
        int: "a whole number",
        str: "text",
        bool: "true or false",
    }
    raise UserError(f"{where}: {key} is {value!r}; it must be {names[origin or hint]}")
