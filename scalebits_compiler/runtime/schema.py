"""JSON files as typed records: msgspec checks them, and errors name the file and the field."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from scalebits_compiler.errors import ArtifactError, ScalebitsError

COMPILE_AGAIN = "the artifact is damaged or was edited; compile the model again"

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    text: str,
    where: str,
    *,
    finite: bool = True,
    error: type[ScalebitsError] = ArtifactError,
    help: str = COMPILE_AGAIN,
) -> Any:
    """The value of a JSON text; `where` names the file in errors.

    Raises `error` for what is not JSON, for a name that an object has twice, strings that are no
    Unicode text, and, if `finite`, for NaN and infinite numbers.
    """
    hooks: dict[str, Any] = {"parse_constant": _constant, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_object, **hooks)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as problem:  # UnicodeEncodeError is a ValueError
        raise error(f"{where}: not JSON: {problem}", help=help) from None
    return value


def convert(
    value: Any,
    kind: type[T],
    where: str,
    *,
    error: type[ScalebitsError] = ArtifactError,
    help: str = COMPILE_AGAIN,
) -> T:
    """A JSON value as a record of type `kind`.

    Raises `error`, which names `where` and the path of the field, unless the value has the type.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        message, path = _problem(value, kind)
        field = f"{where}: {path}" if path else where
        raise error(f"{field}: {message}", help=help) from None


Path: TypeAlias = list[str | int | None]
"""Fields and indices; None for the name of an item of an object, which msgspec does not tell."""


def plain(records: Any) -> Any:
    """Records as the values that JSON has: objects, lists, strings and numbers."""
    return msgspec.json.decode(msgspec.json.encode(records))


def _problem(value: Any, kind: Any) -> tuple[str, str]:
    """(message, path) of the first thing that is wrong."""
    message, path = _first_error(value, kind)
    names: list[str | int] = []
    for index, step in enumerate(path):
        if step is None:
            value = _with(value, names, _wrong_item(value, kind, names, path[: index + 1]))
            step = next(iter(_at(value, names)))
        names.append(step)
    text = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return message, text.removeprefix(".")


def _first_error(value: Any, kind: Any) -> tuple[str, Path]:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        steps = re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path)
        found: Path = [name or (None if index == "..." else int(index)) for name, index in steps]
        return message.replace("`", "'"), found
    return "", []


def _wrong_item(value: Any, kind: Any, names: list[str | int], path: Path) -> dict[str, Any]:
    """One item of the object at `names` that is wrong at `path`; found by halving."""
    items = list(_at(value, names).items())
    while len(items) > 1:
        half = items[: len(items) // 2]
        wrong = _first_error(_with(value, names, dict(half)), kind)[1]
        items = half if wrong[: len(path)] == path else items[len(items) // 2 :]
    return dict(items)


def _at(value: Any, names: list[str | int]) -> Any:
    for name in names:
        value = value[name]
    return value


def _with(value: Any, names: list[str | int], inner: Any) -> Any:
    """A copy of the value with other contents at `names`."""
    if not names:
        return inner
    copy = value.copy()
    copy[names[0]] = _with(value[names[0]], names[1:], inner)
    return copy


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return made


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} is too large")
    return number
