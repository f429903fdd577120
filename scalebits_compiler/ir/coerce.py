"""Checks written values against declared field types: ops, module entries and pass options."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

_TYPE_NAMES = {int: "int", float: "float", str: "string", bool: "bool", tuple: "list"}


def is_union(hint: object) -> bool:
    """Whether a type hint is `A | B` in either spelling."""
    return get_origin(hint) in (Union, types.UnionType)


def type_text(hint: Any) -> str:
    """A declared type as users read it: `int`, `list of int`, `"rtn" or "gptq"`, `int or none`."""
    if is_union(hint):
        return " or ".join(type_text(option) for option in get_args(hint))
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(
            f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in args
        )
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"list of {type_text(args[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_text, args))}]"
    if hint is None or hint is type(None):
        return "none"
    if hint is Mapping or origin is not None:
        return "dict"
    return _TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)).lower())


def coerce(value: object, hint: Any) -> Any:
    """The value as the declared type wants it: int -> float and list -> tuple convert.

    Nothing else converts: a bool is no int, a string no number. ValueError says what is expected.
    """
    if hint is Any or hint is object:
        return value
    if is_union(hint):
        return _coerce_union(value, hint)
    origin = get_origin(hint)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            return value
    elif origin is tuple:
        return _coerce_tuple(value, hint)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:  # an integer beyond the floats
                raise ValueError(f"expected {type_text(hint)}") from None
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, type(None) if hint is None else (origin or hint)):
        return value
    raise ValueError(f"expected {type_text(hint)}")


def _coerce_union(value: object, hint: Any) -> Any:
    """The first option that takes the value as it is, else the first that converts it."""
    converted: list[Any] = []
    for option in get_args(hint):
        try:
            made = coerce(value, option)
        except ValueError:
            continue
        if type(made) is type(value):
            return made
        converted.append(made)
    if not converted:
        raise ValueError(f"expected {type_text(hint)}")
    return converted[0]


def _coerce_tuple(value: object, hint: Any) -> tuple[Any, ...]:
    args = get_args(hint)
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"expected {type_text(hint)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple([coerce(item, args[0]) for item in value])
    if len(args) != len(value):
        raise ValueError(f"expected {type_text(hint)}")
    return tuple([coerce(item, arg) for item, arg in zip(value, args, strict=True)])
