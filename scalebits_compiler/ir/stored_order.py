"""Channel orders as indices: which natural channel lies at each stored position of an axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scalebits_compiler.ir.ops import parse_dim
from scalebits_compiler.ir.types import Dim, TensorType, Type


def stored_index(dim: Dim, permutation: Callable[[str], np.ndarray]) -> np.ndarray:
    """int64[n]: the natural index of every stored element of an axis, as mixed-radix digits.

    permutation: symbol -> int64[size], the natural index at each stored position of a factor.
    """
    index = np.zeros(1, dtype=np.int64)
    for factor in dim.static():
        inner = permutation(factor.order) if factor.order else np.arange(factor.size)
        index = (index[:, None] * factor.size + inner[None, :]).reshape(-1)
    return index


def stored_order(order: str, permutation: Callable[[str], np.ndarray]) -> np.ndarray:
    """As `stored_index`, of an axis in its text form, such as `2@p.kv*32@p.v`."""
    return stored_index(parse_dim(order), permutation)


def gather_index(x: Type, order: str, permutation: Callable[[str], np.ndarray]) -> np.ndarray:
    """int64[n]: the channel of a value of type x that comes at each position of `order`."""
    assert isinstance(x, TensorType)
    return np.argsort(stored_index(x.dims[-1], permutation))[stored_order(order, permutation)]
