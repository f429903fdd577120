"""Module -> file: the text, and beside it a safetensors file with the tensors it names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import BinaryIO

from scalebits_compiler.errors import IRError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import TEXTS, Module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.resources import ResourceStore


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is complete, or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise IRError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


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
    """A safetensors file, tensor by tensor: no more than one is in memory beside the store."""
    import torch

    wanted = sorted(keys)
    header: dict[str, object] = {}
    offset = 0
    for key in wanted:
        size = store.byte_size(key)
        span = [offset, offset + size]
        header[key] = {"dtype": store.dtype(key), "shape": store.shape(key), "data_offsets": span}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in wanted:
            tensor = store.torch(key).detach().cpu().contiguous().reshape(-1)
            file.write(tensor.view(torch.uint8).numpy().data)


def write_text(path: Path, module: Module, tensors: tuple[str, ...]) -> None:
    """The text of a module whose tensors are in the named files beside it."""
    with replacing(path) as file:
        file.write(print_module(replace(module, tensors=tensors)).encode())


def save_module(module: Module, path: Path) -> None:
    """Write `path` and beside it a file with the tensors that no file of the header holds there.

    A text without its tensors stays one. IRError if a file cannot be written.
    """
    kept = tuple(name for name in module.tensors if (path.parent / name).exists())
    there = ResourceStore.from_files(path.parent / name for name in kept)
    own = path.with_suffix(".safetensors").name
    present = [key for key in resource_keys(module) if key in module.resources]
    new = module.resources.missing_from(there, present)
    if new and own in kept:  # the file is about to be replaced, so it is written whole
        kept = tuple(name for name in kept if name != own)
        there = ResourceStore.from_files(path.parent / name for name in kept)
        new = module.resources.missing_from(there, present)
    if new:
        write_tensors(path.with_suffix(".safetensors"), module.resources, new)
        kept = (*kept, own)
    missing = tuple(name for name in module.tensors if name not in kept and not present)
    write_text(path, module, (*missing, *kept))
