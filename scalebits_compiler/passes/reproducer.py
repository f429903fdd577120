"""A small bundle that replays a failing pass, with made-up tensors in place of the user's."""

from __future__ import annotations

import traceback
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalebits_compiler.errors import ScalebitsError, UsageError, VerifyError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import TEXTS, Module, Weight
from scalebits_compiler.ir.ops import Embedding
from scalebits_compiler.ir.resources import ResourceStore, torch_dtype
from scalebits_compiler.ir.save import replacing, save_module
from scalebits_compiler.passes.base import Pass
from scalebits_compiler.passes.pipeline import Observer, print_passes

if TYPE_CHECKING:
    import torch

MODULE, PIPELINE, ERROR = "module.sbir", "pipeline.txt", "error.txt"
_SCORES = ("row_scores", "column_scores", "move_scores")
# Where a failing pass leaves its bundle when no dump folder is given.
REPRODUCER = Path("scalebits-reproducer")
_TENSOR_FIELDS = (*_SCORES, "codes", "scales")


class Reproducer(Observer):
    """Leaves a bundle when a pass fails: the module before it, the pass, made-up tensors.

    With `always` every failure leaves one; else only those that are no plain message to the user
    (a crash, or a module that became invalid). `flags` go into the command, e.g. ` --plugin f.py`.
    """

    def __init__(self, folder: Path, always: bool = False, flags: str = "") -> None:
        self.folder = folder
        self.always = always
        self.flags = flags

    def failed(self, item: Pass, before: Module, error: Exception) -> list[str]:
        """Write the bundle and give the command that replays it."""
        plain = isinstance(error, ScalebitsError) and not isinstance(error, VerifyError)
        if plain and not self.always:
            return []
        try:
            write_bundle(self.folder, before, item, error)
        except Exception as problem:  # whatever it is, it must not hide the error at hand
            return [f"no reproducer could be written to {self.folder}: {problem}"]
        return [
            f"a reproducer with made-up tensors: scalebitsc opt{self.flags}"
            f" --reproduce {self.folder}"
        ]


def write_bundle(folder: Path, module: Module, item: Pass, error: Exception) -> None:
    """Write `module.sbir` with its tensors, `pipeline.txt` and `error.txt` (the traceback)."""
    folder.mkdir(parents=True, exist_ok=True)
    bare = replace(module, resources=synthetic(module), tensors=())
    save_module(bare, folder / MODULE)
    with replacing(folder / PIPELINE) as file:
        file.write(f"{print_passes([item])}\n".encode())
    with replacing(folder / ERROR) as file:
        file.write("".join(traceback.format_exception(error)).encode())


def read_pipeline(folder: Path) -> str:
    """The pipeline of a bundle; UsageError if the folder is none."""
    try:
        return (folder / PIPELINE).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{folder} is no reproducer: {error}", help=f"it holds {MODULE}, {PIPELINE}, {ERROR}"
        ) from None


def synthetic(module: Module) -> ResourceStore:
    """Tensors of the same keys, shapes and types that the module verifies with, none copied."""
    made: dict[str, torch.Tensor] = {}
    for perm in module.perms.values():
        if isinstance(perm.data, Resource) and perm.data.key in module.resources:
            made[perm.data.key] = _permutation(module.resources, perm.data.key)
    for weight in module.weights.values():
        for key, rule in _rules(weight):
            if key in module.resources:
                made[key] = _tensor(module.resources, key, rule, weight)
    for text in (getattr(module, name) for name in TEXTS):
        if text is not None and text.key in module.resources:
            made[text.key] = _tokens(module, text.key)
    return ResourceStore(made)


def _tokens(module: Module, key: str) -> torch.Tensor:
    """Made-up token windows of the same shape, within the module's vocabulary."""
    import torch

    sizes = [
        module.weight(op.table).type.static_shape()[0]
        for op in module.function.ops
        if isinstance(op, Embedding)
    ]
    ids = _generator(key).integers(0, min(sizes, default=2), module.resources.shape(key))
    return torch.from_numpy(ids).to(torch_dtype(module.resources.dtype(key)))


def _rules(weight: Weight) -> list[tuple[str, str]]:
    """(key, how to make it up) for every tensor of a weight."""
    rules: list[tuple[str, str]] = []
    if weight.data is not None:
        rules.append((weight.data.key, "zeros" if weight.type.is_packed else "data"))
    if isinstance(weight.bits, Resource):
        rules.append((weight.bits.key, "bits"))
    for name in _TENSOR_FIELDS:
        resource = getattr(weight, name)
        if resource is not None:
            rules.append((resource.key, "positive"))
    return rules


def _generator(key: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(key.encode()))


def _permutation(store: ResourceStore, key: str) -> torch.Tensor:
    import torch

    order = _generator(key).permutation(store.shape(key)[0])
    return torch.from_numpy(order).to(torch_dtype(store.dtype(key)))


def _tensor(store: ResourceStore, key: str, rule: str, weight: Weight) -> torch.Tensor:
    import torch

    shape, dtype, random = store.shape(key), torch_dtype(store.dtype(key)), _generator(key)
    if rule == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if rule == "bits":  # as many blocks of every width as the text says, in rising order
        hist = weight.hist or ((4, int(np.prod(shape))),)
        widths = np.repeat([bits for bits, _ in hist], [count for _, count in hist])
        return torch.from_numpy(widths.reshape(shape)).to(dtype)
    if not dtype.is_floating_point:  # 0 and 1 are codes of every width and ids of any vocabulary
        return torch.from_numpy(random.integers(0, 2, shape)).to(dtype)
    if rule == "positive" or len(shape) < 2:  # scores and scales; gains and frequencies
        # Eighths: a stored scale has three bits of mantissa.
        return torch.from_numpy(random.integers(4, 13, shape) / 8).to(dtype)
    return torch.from_numpy(random.normal(0.0, shape[-1] ** -0.5, shape)).to(dtype)
