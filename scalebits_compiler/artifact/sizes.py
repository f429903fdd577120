"""Honest sizes of a packed module (layer L3)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.roles import dense_matrices, untraced
from scalebits_compiler.numerics.formats import bits_of, format_of
from scalebits_compiler.numerics.layout import BlockLayout


def matrix_summary(weight: Weight, bits: np.ndarray, index_bits: int = 0) -> dict[str, Any]:
    """Shape, block, group, widths and stored size of one matrix; see `summarize` for the terms.

    index_bits: of the index that its readers gather their input by; 0 for none.
    """
    rows, columns = weight.type.static_shape()
    assert weight.block is not None
    assert weight.group is not None
    layout = BlockLayout(rows, columns, *weight.block, weight.group)
    numbers, counts = np.unique(bits, return_counts=True)
    names = [format_of(number).name for number in numbers.tolist()]
    stored = layout.nbytes(bits) + bits.size + index_bits // 8
    return {
        "shape": [rows, columns],
        "block": list(weight.block),
        "group": weight.group,
        "histogram": {name: int(c) for name, c in zip(names, counts, strict=True)},
        "code_bits": _code_bits(bits, rows, columns, weight.block),
        "effective_bits": 8 * stored / (rows * columns),
        "bytes": stored,
        **({"index_bytes": index_bits // 8} if index_bits else {}),
        **({"fixed_bits": weight.fixed_bits} if weight.fixed_bits is not None else {}),
    }


def _code_bits(ids: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> float:
    """Mean bits of a code over the weights (edge blocks count by the weights they hold)."""
    heights = np.diff([*range(0, rows, block[0]), rows])
    widths = np.diff([*range(0, columns, block[1]), columns])
    weights = np.multiply.outer(heights, widths)
    return float((bits_of(ids) * weights).sum() / (rows * columns))


def summarize(module: Module) -> dict[str, Any]:
    """Totals, and each quantized matrix by its symbol.

    weights, code_bits (mean width of the codes) and effective_bits (all stored bits: codes, scales,
    bit table, padding, indices of gathers; per weight) are of the matrices whose
    widths are searched: head and embedding have a width of their own, `fixed_bits` of `matrices`,
    and are in matrix_bytes only.
    dense_bytes: everything that stays unquantized. dense: every matrix that is not quantized, and
    why; not_recognised: calls that are left to torch, and how many; not_traced: why all of the
    model is.
    """
    aten = Counter(op.target for op in module.function.ops if isinstance(op, Aten))
    index = module.index_bits()
    matrices = {
        w.symbol: matrix_summary(w, module.bits(w), index.get(w.symbol, 0))
        for w in module.quantized()
    }
    searched = [matrices[w.symbol] for w in module.searched()]
    weights = sum(math.prod(m["shape"]) for m in searched)
    codes = sum(m["code_bits"] * math.prod(m["shape"]) for m in searched)
    stored = sum(m["bytes"] for m in searched)
    dense = [w for w in module.weights.values() if not w.quantize and w.data is not None]
    return {
        "weights": weights,
        "code_bits": codes / weights,
        "effective_bits": 8 * stored / weights,
        "matrix_bytes": sum(m["bytes"] for m in matrices.values()),
        "dense_bytes": sum(module.resources.byte_size(w.data.key) for w in dense if w.data),
        "matrices": matrices,
        "dense": dense_matrices(module),
        "not_recognised": dict(aten),
        "not_traced": untraced(module),
        "task": module.task,
    }
