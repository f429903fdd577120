"""The key-value cache on a device: buffers that stay where they are, as a captured graph needs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scalebits_compiler.runtime.cache import Cache

LEAST_ROOM = 64


class DeviceCache(Cache):
    """Keys and values [batch, key-value heads, capacity, head dimension] of every attention layer.

    position: `length`, i64[1] on the device. pad: i64[batch] on the device, padding on the left of
    each row, or None. graph: a captured decode step, None before the first, which stays when the
    cache is truncated; ids: its token ids i64[batch, 1], logits: its result.
    """

    def __init__(
        self, batch: int, capacity: int, pad: NDArray[np.int64] | None, device: torch.device
    ) -> None:
        self._length = 0
        self._host_pad = pad
        self.capacity = max(capacity, LEAST_ROOM)
        self.device = device
        self.pad = None if pad is None else torch.from_numpy(pad).to(device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def batch(self) -> int:
        """Rows."""
        return self.ids.shape[0]

    @property
    def host_pad(self) -> NDArray[np.int64] | None:
        """See `Cache`."""
        return self._host_pad

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return self._length

    def store(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's newest keys and values at the positions `slots`; gives its buffers."""
        if layer not in self._layers:
            self._layers[layer] = (
                self._room(keys, self.capacity),
                self._room(values, self.capacity),
            )
        held = self._layers[layer]
        for buffer, new in zip(held, (keys, values), strict=True):
            buffer.index_copy_(2, slots, new)
        return held

    def advance(self, count: int) -> None:
        """All layers have stored `count` more positions."""
        self._go_to(self._length + count)

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` positions. Growing moves the buffers, which ends a captured graph."""
        if capacity <= self.capacity:
            return
        self.graph, capacity = None, max(capacity, 2 * self.capacity)
        for layer, held in self._layers.items():
            grown = (self._room(held[0], capacity), self._room(held[1], capacity))
            for buffer, old in zip(grown, held, strict=True):
                buffer[:, :, : self.length] = old[:, :, : self.length]
            self._layers[layer] = grown
        self.capacity = capacity  # stores trust it: all memory is there now

    def _go_to(self, length: int) -> None:
        self._length = length
        self.position.fill_(length)

    def _room(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        # Zeros: what has no token yet is masked, and must be finite.
        shape = (*like.shape[:2], capacity, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=self.device)
