"""Pipelines: text to passes and back, checked before anything runs, watched while they run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, get_type_hints

from scalebits_compiler.errors import (
    ParseError,
    PassError,
    ScalebitsError,
    UsageError,
    memory_error,
)
from scalebits_compiler.ir.coerce import coerce, type_text
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.printer import print_attr, print_attrs
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.table import PASSES, PIPELINES, PassTable, find_pass


@dataclass(frozen=True)
class Option:
    """An option of a pass; the field `avg_bits` is written `avg-bits`. No `default`: required.

    flag: the flag of `scalebitsc compile` that sets it, if there is one.
    """

    name: str
    field: str
    hint: Any
    default: str | None
    help: str
    flag: str | None

    @property
    def type(self) -> str:
        """The type as users read it."""
        return type_text(self.hint)


def pass_options(cls: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass, from its dataclass fields in order; `metadata["help"]` explains."""
    hints = get_type_hints(cls)
    made: list[Option] = []
    for item in fields(cls):
        default = item.default if item.default is not MISSING else MISSING
        if item.default_factory is not MISSING:
            default = item.default_factory()
        text = None if default is MISSING else print_attr(default)
        name = item.name.replace("_", "-")
        about = item.metadata
        made.append(
            Option(
                name,
                item.name,
                hints[item.name],
                text,
                about.get("help", ""),
                about.get("flag"),
            )
        )
    return tuple(made)


def parse_passes(text: str, table: PassTable = PASSES) -> list[Pass]:
    """The passes of `a{x = 1},b`; a named pipeline stands for its text.

    UsageError on wrong syntax, an unknown pass or option, or a value of the wrong type.
    """
    from scalebits_compiler.ir.parser import parse_pipeline

    try:
        steps = parse_pipeline(text)
    except ParseError as error:
        raise UsageError(error.message, error.help, error.notes) from None
    made: list[Pass] = []
    for name, given in steps:
        if name in PIPELINES and name not in table:
            if given:
                raise UsageError(
                    f"'{name}' is a named pipeline and takes no options", help=PIPELINES[name]
                )
            made.extend(parse_passes(PIPELINES[name], table))
        else:
            made.append(_make(find_pass(name, table), given))
    return made


def _make(cls: type[Pass], given: Mapping[str, Any]) -> Pass:
    values = _values(cls, given)
    options = {option.name: option for option in pass_options(cls)}
    missing = [o.name for o in options.values() if o.default is None and o.field not in values]
    if missing:
        raise UsageError(
            f"{cls.name} needs the option '{missing[0]}'",
            help=f"{cls.name}{{{missing[0]} = ...}}, a value of type {options[missing[0]].type}",
        )
    return cls(**values)


def _values(cls: type[Pass], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names in text as values of fields; UsageError for what the pass lacks."""
    options = {option.name: option for option in pass_options(cls)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        option = options.get(name)
        if option is None:
            raise UsageError(f"{cls.name} has no option '{name}'", help=_option_help(name, options))
        try:
            values[option.field] = coerce(value, option.hint)
        except ValueError as error:
            raise UsageError(
                f"option '{name}' of {cls.name}: {error}, got {print_attr(value)}"
            ) from None
    return values


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """`pass.option=value` texts as a mapping for `with_settings`; UsageError for another form.

    The value is written as in a pipeline; a word that is no number or list stands for a string.
    """
    from scalebits_compiler.ir.parser import parse_pipeline

    settings: dict[str, Any] = {}
    for text in texts:
        match = re.fullmatch(r"([\w-]+)\.([\w-]+)\s*=\s*(.+)", text)
        if match is None:
            raise UsageError(
                f"{text!r} is not of the form PASS.OPTION=VALUE",
                help="for example assign-bits.avg-bits=3",
            )
        item, option, value = match.groups()
        for written in (value, f'"{value}"'):
            try:
                ((_, options),) = parse_pipeline(f"{item}{{{option} = {written}}}")
            except (ParseError, ValueError):
                continue
            settings[f"{item}.{option}"] = options[option]
            break
        else:
            raise UsageError(
                f"{text!r}: {value!r} is not a value", help="write it as in a pipeline"
            )
    return settings


def with_settings(passes: Sequence[Pass], settings: Mapping[str, Any]) -> list[Pass]:
    """The passes with options replaced, in every pass that reads a setting.

    A setting is named `pass.option`, or by a flag such as `--loss`, which several passes may read.
    UsageError for a setting that no pass reads or a value of the wrong type.
    """
    passes = list(passes)
    for key, value in settings.items():
        readers = readers_of(passes, key)
        if not readers:
            raise UsageError(
                f"no pass of the pipeline reads {key}", help=_setting_help(passes, key)
            )
        for index, option in readers:
            item = passes[index]
            passes[index] = replace(item, **_values(type(item), {option: value}))
    return passes


def readers_of(passes: Sequence[Pass], key: str) -> list[tuple[int, str]]:
    """(index, option) of the passes that read a setting; the option of `pass.option` may be wrong,
    so that the error is the same as for one in a pipeline.
    """
    name, dot, option = key.partition(".")
    if dot:
        return [(index, option) for index, item in enumerate(passes) if item.name == name]
    return [
        (index, o.name)
        for index, item in enumerate(passes)
        for o in pass_options(type(item))
        if o.flag == key
    ]


def _setting_help(passes: Sequence[Pass], key: str) -> str:
    names = [item.name for item in passes]
    near = get_close_matches(key.partition(".")[0], names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"the passes are {', '.join(names)}"


def _option_help(name: str, options: dict[str, Option]) -> str:
    near = get_close_matches(name.replace("_", "-"), options, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    listed = ", ".join(f"{o.name} ({o.type})" for o in options.values())
    return f"its options are {listed}" if listed else "it has no options"


def print_passes(passes: Iterable[Pass]) -> str:
    """The pipeline as text; options at their default are left out. `parse_passes` reads it."""
    return ",".join(map(_print_pass, passes))


def _print_pass(item: Pass) -> str:
    shown = {
        option.name: getattr(item, option.field)
        for option in pass_options(type(item))
        if print_attr(getattr(item, option.field)) != option.default
    }
    return f"{item.name}{print_attrs(shown).strip()}"


def check_pipeline(
    passes: Sequence[Pass], facts: frozenset[str], table: PassTable = PASSES
) -> frozenset[str]:
    """The facts after the pipeline; PassError at the first pass that they do not suit.

    A pass states what it requires and what it refuses.
    """
    lost: dict[str, str] = {}
    for item in passes:
        for fact in sorted(item.refuses & facts):
            raise PassError(
                f"{item.name} does not work on a module with the fact `{fact}`",
                help="go on from a dump of an earlier stage",
            )
        for fact in sorted(item.requires - facts):
            notes = [f"{lost[fact]} before it takes `{fact}` away"] if fact in lost else []
            givers = [name for name in table if fact in find_pass(name, table).establishes]
            told = f"run {' or '.join(givers)} before it" if givers else "no pass gives that fact"
            raise PassError(f"{item.name} needs the fact `{fact}`", help=told, notes=notes)
        lost.update(dict.fromkeys(item.invalidates, item.name))
        facts = _facts_after(item, facts)
    return facts


def _facts_after(item: Pass, facts: frozenset[str]) -> frozenset[str]:
    return (facts - item.invalidates) | item.establishes


class Observer:
    """Watches a pipeline; all that is not the work of a pass is an observer.

    Observers nest: `before` is called from the first to the last, `start` and `after`, which hand
    over a new module, from the last to the first.
    """

    def start(self, module: Module) -> None:
        """The input, before any pass."""

    def before(self, item: Pass, module: Module) -> None:
        """A pass is about to run."""

    def after(self, item: Pass, before: Module, after: Module) -> None:
        """A pass has run; `after` already states its facts."""

    def failed(self, item: Pass, before: Module, error: Exception) -> list[str]:
        """A pass, or an observer after it, has raised. The lines become notes of the error."""
        return []


def run_pipeline(
    module: Module,
    passes: Sequence[Pass],
    ctx: PassContext,
    observers: Sequence[Observer] = (),
    table: PassTable = PASSES,
) -> Module:
    """The module after all passes.

    PassError before anything runs if a pass would lack a fact; an error of a pass carries notes
    that name the pass and what the observers know (last dump, reproducer).
    """
    check_pipeline(passes, module.facts, table)
    for observer in reversed(observers):
        observer.start(module)
    for item in passes:
        try:
            module = _run_one(module, item, ctx, observers)
        except Exception as error:
            if memory_error(error) is not None:  # no bug of the pass: nothing to reproduce
                raise
            raise _explained(error, item, module, observers) from error
    return module


def _run_one(module: Module, item: Pass, ctx: PassContext, observers: Sequence[Observer]) -> Module:
    for observer in observers:
        observer.before(item, module)
    made = item.run(module, ctx)
    if not isinstance(made, Module):
        raise TypeError(f"run returned a {type(made).__name__}, not a Module")
    made = replace(
        made,
        facts=_facts_after(item, made.facts),
        history=(*module.history, print_passes([item])),
    )
    for observer in reversed(observers):
        observer.after(item, module, made)
    return made


def _explained(
    error: Exception, item: Pass, module: Module, observers: Sequence[Observer]
) -> ScalebitsError:
    """The error with the notes of the observers; a foreign exception becomes a PassError."""
    notes = [f"in pass {print_passes([item])}"]
    for observer in observers:
        notes += observer.failed(item, module, error)
    if isinstance(error, ScalebitsError):
        error.notes = [*error.notes, *notes]
        return error
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is not None:
        code = frame.tb_frame.f_code
        notes.insert(1, f"raised in {code.co_name} at {code.co_filename}:{frame.tb_lineno}")
    message = f"{item.name} crashed: {type(error).__name__}: {error}"
    return PassError(message, notes=notes, help="this is a bug in the pass, not in your input")
