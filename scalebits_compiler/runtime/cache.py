"""The key-value cache: what attention layers have seen of every row of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
_LEAST_ROOM = 64


class KVCache:
    """Keys and values [batch, key-value heads, position, head dimension] of every attention layer.

    length: positions held, padding included. pad: i64[batch], padding positions on the left of each
    row, or None. The arrays grow by doubling; `capacity` positions fit without a copy.
    """

    def __init__(self, pad: NDArray[np.int64] | None = None, capacity: int = 0) -> None:
        self.length = 0
        self.pad = pad
        self._capacity = capacity
        self._layers: dict[int, tuple[F32, F32]] = {}

    def extend(self, layer: int, keys: F32, values: F32) -> tuple[F32, F32]:
        """Store the newest positions of a layer; gives views of all of its keys and values."""
        end = self.length + keys.shape[2]
        held = self._layers.get(layer)
        if held is None or held[0].shape[2] < end:
            held = self._grow(held, end, keys, values)
            self._layers[layer] = held
        held[0][:, :, self.length : end] = keys
        held[1][:, :, self.length : end] = values
        return held[0][:, :, :end], held[1][:, :, :end]

    def advance(self, count: int) -> None:
        """All layers have stored `count` more positions."""
        self.length += count

    def _grow(
        self, held: tuple[F32, F32] | None, end: int, keys: F32, values: F32
    ) -> tuple[F32, F32]:
        room = max(end, self._capacity, 2 * self.length, _LEAST_ROOM)
        grown = tuple(
            np.empty((*new.shape[:2], room, new.shape[3]), np.float32) for new in (keys, values)
        )
        for array, old in zip(grown, held or (), strict=False):
            array[:, :, : self.length] = old[:, :, : self.length]
        return grown[0], grown[1]
