"""Module -> file: the text, and beside it a safetensors file with the tensors it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from scalebits_compiler.errors import IRError, memory_error
from scalebits_compiler.files import complete_file, remove_parts
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import TEXTS, Module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.resources import ResourceStore, tensor_entry, tensor_files
from scalebits_compiler.numerics import safetensors


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is complete, or not at all.

    IRError if it cannot be written. What killed processes left of it is removed.
    """
    try:
        remove_parts(path.parent, path.name)
        with complete_file(path) as file:
            yield file
    except OSError as error:
        if memory_error(error) is not None:
            raise
        raise IRError(f"cannot write {path}: {error.strerror or error}") from error


def resource_keys(module: Module) -> list[str]:
    """The keys of all tensors that header, permutations and weights name, in that order."""
    texts = (getattr(module, name) for name in TEXTS)
    keys: dict[str, None] = {text.key: None for text in texts if text is not None}
    for entry in (*module.perms.values(), *module.weights.values()):
        for item in fields(entry):
            value = getattr(entry, item.name)
            if isinstance(value, Resource):
                keys[value.key] = None
    return list(keys)


def write_tensors(path: Path, store: ResourceStore, keys: Iterable[str]) -> None:
    """A safetensors file of some tensors, in the order of their keys."""
    entries = [(key, tensor_entry(key, partial(store.torch, key))) for key in sorted(keys)]
    with replacing(path) as file:
        safetensors.write_tensors(file, entries, alignment=8)


def write_text(path: Path, module: Module, tensors: tuple[str, ...]) -> None:
    """The text of a module whose tensors are in the named files beside it."""
    with replacing(path) as file:
        file.write(print_module(replace(module, tensors=tensors)).encode())


def save_module(module: Module, path: Path) -> None:
    """Write `path` and beside it a file with the tensors that no file of the header holds there.

    A text without its tensors stays one. IRError if a file cannot be written.
    """
    there = tensor_files(module.tensors, path.parent)
    own = path.with_suffix(".safetensors")
    present = [key for key in resource_keys(module) if key in module.resources]
    new = module.resources.missing_from(ResourceStore.from_files(there), present)
    if new and own in there:  # the file is about to be replaced, so it is written whole
        there.remove(own)
        new = module.resources.missing_from(ResourceStore.from_files(there), present)
    kept = tuple(file.name for file in there)
    if new:
        write_tensors(own, module.resources, new)
        kept = (*kept, own.name)
    missing = tuple(name for name in module.tensors if name not in kept and not present)
    write_text(path, module, (*missing, *kept))
