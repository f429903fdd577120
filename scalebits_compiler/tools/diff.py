"""What differs between two modules or artifacts (layer L3). Reads texts and tensors, not torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from scalebits_compiler.artifact.sizes import matrix_summary
from scalebits_compiler.errors import TargetError, UsageError
from scalebits_compiler.ir.attrs import Grid, Resource, Value
from scalebits_compiler.ir.module import Module, Perm, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import OPS
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.printer import print_op, renumbered
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.formats import bits_of, format_of
from scalebits_compiler.numerics.safetensors import StoredTensor
from scalebits_compiler.runtime.artifact import read_manifest
from scalebits_compiler.runtime.manifest import MANIFEST, MODULE_FILE, Manifest

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
NO_LAYER = "outside the layers"


@dataclass(frozen=True)
class Side:
    """One of the two: its module, the tensors beside it by key, its manifest if an artifact."""

    path: Path
    module: Module
    tensors: Mapping[str, StoredTensor]
    manifest: Manifest | None

    def layers(self) -> dict[str, str]:
        """Weight -> its decoder layer in the original model, from the op that reads it."""
        found: dict[str, str] = {}
        for op in self.module.function.ops:
            layer = _LAYER.match(op.loc)
            for symbol in op.symbols():
                found.setdefault(symbol.name, layer.group(1) if layer else NO_LAYER)
        return found


@dataclass(frozen=True)
class Keys:
    """Names that only one side has: `added` only b, `removed` only a; and those that differ."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


@dataclass(frozen=True)
class Comparison:
    """What differs between a and b; pairs are (a, b). Empty parts say that nothing does.

    header: name, source, facts and history, and for artifacts the target. bits: matrix -> what
    `_matrix_bits` tells, its layer, and whether its channels are in another order. totals: layer ->
    code bits and bytes, with the key `all` first. ops: texts without value numbers; `rewired` if
    only the values that ops read differ. notes: what was not compared.
    """

    paths: tuple[str, str]
    header: dict[str, tuple[Any, Any]]
    bits: dict[str, dict[str, Any]]
    totals: dict[str, dict[str, tuple[Any, Any]]]
    permutations: Keys
    weights: Keys
    ops: Keys
    files: Keys
    rewired: bool
    notes: list[str]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        keys = (self.permutations, self.weights, self.ops, self.files)
        return not (self.header or self.bits or self.rewired or any(keys))


def open_side(path: Path, ops: Mapping[str, type[Op]] = OPS) -> Side:
    """Read an IR file or an artifact folder.

    UsageError for a folder without module.sbir; IRError or ArtifactError for damaged contents.
    """
    text, manifest = path, None
    if path.is_dir():
        text = path / MODULE_FILE
        if not text.is_file():
            raise UsageError(
                f"{path} is a folder without {MODULE_FILE}",
                help="give an IR file (.sbir), or a folder that `scalebitsc compile` wrote",
            )
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
    module, source = read_module(text, ops)
    verify(module, source)
    stored = {key: module.resources.stored(key) for key in module.resources}
    tensors = {key: tensor for key, tensor in stored.items() if tensor is not None}
    return Side(path, module, tensors, manifest)


def compare(a: Side, b: Side) -> Comparison:
    """Everything that differs from a to b. Blocks are compared at their stored places."""
    permutations = _keys(a.module.perms, b.module.perms, lambda x, y: _perm_change(a, b, x, y))
    weights = _keys(a.module.weights, b.module.weights, lambda x, y: _weight_change(a, b, x, y))
    ops = _op_change(a.module, b.module)
    return Comparison(
        paths=(str(a.path), str(b.path)),
        header=_header(a, b),
        bits=_bits(a, b, {*permutations.added, *permutations.removed, *permutations.changed}),
        totals=_totals(a, b),
        permutations=permutations,
        weights=weights,
        ops=ops,
        files=_files(a, b),
        rewired=not ops and _graph(a.module) != _graph(b.module),
        notes=list(dict.fromkeys(note for side in (a, b) for note in _unread(side))),
    )


def _keys(a: Mapping[str, Any], b: Mapping[str, Any], change: Any) -> Keys:
    """`change(x, y)` tells how two entries of one name differ, None if they do not."""
    both = {name: change(a[name], b[name]) for name in a if name in b}
    return Keys(
        added=[name for name in b if name not in a],
        removed=[name for name in a if name not in b],
        changed={name: told for name, told in both.items() if told is not None},
    )


def _header(a: Side, b: Side) -> dict[str, tuple[Any, Any]]:
    def told(side: Side) -> dict[str, Any]:
        target = side.manifest.target["kind"] if side.manifest else None
        facts, history = sorted(side.module.facts), list(side.module.history)
        module = side.module
        told = {"name": module.name, "source": module.source, "facts": facts, "history": history}
        return {**told, "target": target}

    left, right = told(a), told(b)
    if a.manifest is None or b.manifest is None:  # a text has no target
        del left["target"]
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def _files(a: Side, b: Side) -> Keys:
    """Files of two artifacts, by their checksums; the module and its tensors are told in full."""
    if a.manifest is None or b.manifest is None:
        return Keys()
    told = {MODULE_FILE, "config.json", *a.module.tensors, *b.module.tensors}
    left, right = (
        {name: record for name, record in side.manifest.files.items() if name not in told}
        for side in (a, b)
        if side.manifest
    )
    return _keys(
        left, right, lambda x, y: None if x.sha256 == y.sha256 else {"bytes": (x.bytes, y.bytes)}
    )


def _unread(side: Side) -> Iterable[str]:
    keys = [v.key for e in _entries(side.module) for v in vars(e).values() if _is_resource(v)]
    missing = [key for key in keys if key not in side.tensors]
    if missing:
        yield f"{side.path}: {len(missing)} tensors are not beside it and were not compared"


def _entries(module: Module) -> list[Perm | Weight]:
    return [*module.perms.values(), *module.weights.values()]


def _is_resource(value: object) -> bool:
    return isinstance(value, Resource)


def _perm_change(a: Side, b: Side, x: Perm, y: Perm) -> dict[str, Any] | None:
    if x.type != y.type:
        return {"type": (str(x.type), str(y.type))}
    left, right = _order(a, x), _order(b, y)
    if left is None or right is None:
        return None
    moved = int((left != right).sum())
    return {"size": len(left), "moved": moved} if moved else None


def _order(side: Side, perm: Perm) -> np.ndarray | None:
    if isinstance(perm.data, Resource):
        stored = side.tensors.get(perm.data.key)
        return None if stored is None else stored.data.astype(np.int64)
    return np.array(perm.data, np.int64)


def _weight_change(a: Side, b: Side, x: Weight, y: Weight) -> dict[str, Any] | None:
    """Field -> (a, b) as text, "other values" where only the contents of a tensor differ."""
    found: dict[str, Any] = {}
    for item in fields(Weight):
        if item.name in ("symbol", "loc", "bits", "hist"):  # the bits have a part of their own
            continue
        left, right = getattr(x, item.name), getattr(y, item.name)
        if isinstance(left, Resource) and isinstance(right, Resource):
            if _tensors_differ(a.tensors.get(left.key), b.tensors.get(right.key)):
                found[item.name] = "other values"
        elif left != right:
            found[item.name] = tuple(None if v is None else str(v) for v in (left, right))
    return found or None


def _tensors_differ(a: StoredTensor | None, b: StoredTensor | None) -> bool:
    if a is None or b is None:
        return False  # a note says that it was not compared
    if (a.dtype, a.data.shape) != (b.dtype, b.data.shape):
        return True
    left, right = (np.ascontiguousarray(t.data).reshape(-1).view(np.uint8) for t in (a, b))
    return not np.array_equal(left, right)


def _grid(side: Side, weight: Weight) -> np.ndarray | None:
    """uint8 [block rows, block columns]; None without bits, or where their tensor is not there."""
    if isinstance(weight.bits, Grid):
        return weight.bits.array()
    stored = None if weight.bits is None else side.tensors.get(weight.bits.key)
    return None if stored is None else stored.data.astype(np.uint8)


def _bits(a: Side, b: Side, orders: set[str]) -> dict[str, dict[str, Any]]:
    """Matrix -> how its widths differ, for the matrices of both sides."""
    layers = {**a.layers(), **b.layers()}
    found: dict[str, dict[str, Any]] = {}
    for x in a.module.quantized():
        y = b.module.weights.get(x.symbol)
        change = None if y is None else _matrix_bits(a, b, x, y)
        if change is not None and y is not None:
            named = {name for d in (*x.type.dims, *y.type.dims) for name in d.orders}
            found[x.symbol] = {
                "layer": layers.get(x.symbol, NO_LAYER),
                **change,
                "order_changed": x.type.dims != y.type.dims or bool(named & orders),
            }
    return found


def _matrix_bits(a: Side, b: Side, x: Weight, y: Weight) -> dict[str, Any] | None:
    """`changed` is a list of (block row, block column, format id in a, in b).

    raised, lowered and changed are None where the blocks are not the same: another block shape, or
    widths on one side only.
    """
    left, right = _grid(a, x), _grid(b, y)
    hists = tuple(_histogram(weight, grid) for weight, grid in ((x, left), (y, right)))
    counts: dict[str, Any] = {"histogram": hists}
    if left is None or right is None or left.shape != right.shape or x.block != y.block:
        if hists[0] == hists[1] and x.block == y.block:
            return None
        return {"raised": None, "lowered": None, "changed": None, **counts}
    places = np.argwhere(left != right)
    if not len(places):
        return None
    steps = bits_of(right) - bits_of(left)
    changed = [(int(r), int(c), int(left[r, c]), int(right[r, c])) for r, c in places]
    raised, lowered = int((steps > 0).sum()), int((steps < 0).sum())
    return {"raised": raised, "lowered": lowered, "changed": changed, **counts}


def _histogram(weight: Weight, grid: np.ndarray | None) -> dict[str, int] | None:
    found = weight.hist if grid is None else Grid.of(grid).histogram()
    return None if found is None else {format_of(number).name: count for number, count in found}


def _totals(a: Side, b: Side) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Layer -> {"code_bits", "effective_bits", "bytes"} of both sides; None where unknown."""
    left, right = _layer_sums(a), _layer_sums(b)
    empty = dict.fromkeys(("code_bits", "effective_bits", "bytes"))
    names = dict.fromkeys((*left, *right))
    return {
        name: {key: (left.get(name, empty)[key], right.get(name, empty)[key]) for key in empty}
        for name in names
    }


def _layer_sums(side: Side) -> dict[str, dict[str, Any]]:
    layers = side.layers()
    sums: dict[str, np.ndarray] = {}
    index = side.module.index_bits()
    for weight in side.module.quantized():
        grid = _grid(side, weight)
        if grid is None:
            return {}
        try:
            told = matrix_summary(weight, grid, index.get(weight.symbol, 0))
        except TargetError:  # blocks that cannot be packed have no size
            return {}
        size = np.prod(told["shape"])
        row = np.array([size, told["code_bits"] * size, told["bytes"]])
        for name in ("all", layers.get(weight.symbol, NO_LAYER)):
            sums[name] = sums.get(name, 0) + row
    return {
        name: {"code_bits": code / size, "effective_bits": 8 * stored / size, "bytes": int(stored)}
        for name, (size, code, stored) in sums.items()
    }


def _graph(module: Module) -> tuple[object, ...]:
    function = renumbered(module.function)
    return (function.args, *map(print_op, function.ops), function.result, function.type)


def _op_change(a: Module, b: Module) -> Keys:
    """Ops of one side only; `changed` is empty: an op has no name to be found by."""
    left, right = (Counter(map(_unnumbered, module.function.ops)) for module in (a, b))
    return Keys(list((right - left).elements()), list((left - right).elements()))


def _unnumbered(op: Op) -> str:
    """An op as text with `%` for every value: an op more must not change all those after it."""
    bare = op.map_operands({value: Value("") for value in op.operands()})
    return print_op(replace(bare, result=Value(""))).removeprefix("% = ")
