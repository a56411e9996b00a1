"""Plain data, as YAML gives it, to dataclasses, by the types of their fields.

Every mistake names the key and what would be valid.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from pipeline.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

TYPE_NAMES: dict[Any, str] = {
    tuple: "a list",
    Mapping: "a mapping",
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
}


def parse(text: str, where: str) -> Any:
    """Parse the YAML document ``text``, which comes from ``where``.

    Raises:
        UserError: the text is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from error


def override(tree: dict[str, Any], text: str) -> None:
    """Set one value of ``tree`` as ``text`` says: section.key=value, with a YAML value.

    Raises:
        UserError: the text has another form, or a section that it names is a value.
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


def build(cls: type[T], tree: object, prefix: str, where: str) -> T:
    """Build the dataclass ``cls`` from ``tree``, whose dotted keys begin with ``prefix``.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type.
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
        if is_required(item) and item.name not in values:
            raise UserError(f"{where}: {prefix}{item.name} is missing; it has no default")
    return cls(**values)


def is_required(field: "dataclasses.Field[Any]") -> bool:
    """Whether ``field`` has no default."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Return ``value`` as the annotated type ``hint``.

    YAML reads 1e-3 as text and 1 as an integer; both are welcome as floats.
    """
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[DataclassInstance]", hint), value, f"{key}.", where)
    # int | None is a UnionType, Annotated[int, ...] | None a typing.Union
    if origin in (types.UnionType, typing.Union):
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
    raise UserError(f"{where}: {key} is {value!r}; it must be {TYPE_NAMES[origin or hint]}")
