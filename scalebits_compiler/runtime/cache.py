"""The key-value cache: what attention layers have seen of every row of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.cpu.program import (
    CAPACITY,
    KEY_BLOCK,
    PADS,
    SCORE_ROWS,
    SCORES,
    VALUE_PAD,
)

if TYPE_CHECKING:
    from scalebits_compiler.runtime.session import Session

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
_LEAST_ROOM = 64


def check_truncation(length: int, held: int, pad: I64 | None) -> None:
    """Raise `UsageError` unless a cache of `held` positions can go back to `length`.

    Each row keeps a token behind its padding.
    """
    least = 1 if pad is None else 1 + int(pad.max())
    if not least <= length <= held:
        raise UsageError(
            f"a cache of {held} positions cannot go back to {length}",
            help=f"keep {least} to {held} of them",
        )


class Cache(ABC):
    """What the caches of all sessions have in common.

    session: the one that made it and alone can go on with it, None for a cache of no session.
    """

    session: Session | None = None

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions held, padding included."""

    @property
    @abstractmethod
    def host_pad(self) -> I64 | None:
        """i64[batch]: padding positions on the left of each row, None without padding."""

    def truncate(self, length: int) -> None:
        """Forget all behind the first `length` positions, to go on differently from there.

        Raises `UsageError` for a length that the cache cannot go back to.
        """
        with nullcontext() if self.session is None else self.session.calls.hold():
            check_truncation(length, self.length, self.host_pad)
            self._go_to(length)

    @abstractmethod
    def _go_to(self, length: int) -> None:
        """Go on behind the first `length` positions, which it has."""


class HostCache(Cache):
    """A cache in this process' own memory."""

    def __init__(self, batch: int, pad: I64 | None) -> None:
        self._batch, self._length = batch, 0
        self.pad = pad

    @property
    def batch(self) -> int:
        """Rows."""
        return self._batch

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return self._length

    @property
    def host_pad(self) -> I64 | None:
        """See `Cache`."""
        return self.pad

    def advance(self, count: int) -> None:
        """All layers have stored `count` more positions."""
        self._length += count

    def _go_to(self, length: int) -> None:
        self._length = length


class NativeCache(HostCache):
    """Keys and values as the native kernels read them; `codegen/tvm/attention.py` has the layout.

    A row holds its own text from position 0, without padding. shapes: of every layer the key-value
    heads, the channels of a key and of a value. state: what a program needs to know, see
    `program.PADS`.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        batch: int,
        pad: NDArray[np.int64] | None,
        capacity: int,
        threads: int,
    ) -> None:
        super().__init__(batch, pad)
        self.state = np.zeros(PADS + batch + 2 * len(shapes), np.int64)
        if pad is not None:
            self.state[PADS : PADS + batch] = pad
        self._shapes, self._threads = shapes, threads
        self._capacity = 0
        self._arrays: list[F32] = []
        self.reserve(max(capacity, 1))

    def reserve(self, end: int) -> None:
        """Make room for `end` positions, at least twice as many as before if there is not."""
        if end <= self._capacity:
            return
        room = max(end, 2 * self._capacity, _LEAST_ROOM)
        room = -(-room // KEY_BLOCK) * KEY_BLOCK
        grown: list[F32] = []
        for groups, d, e in self._shapes:
            blocks, channels = room // KEY_BLOCK, -(-e // VALUE_PAD) * VALUE_PAD
            grown.append(np.zeros((self._batch, groups, blocks, d, KEY_BLOCK), np.float32))
            grown.append(np.zeros((self._batch, groups, room, channels), np.float32))
        for array, old in zip(grown, self._arrays, strict=False):
            array[:, :, : old.shape[2]] = old
        scores = np.zeros((self._threads, SCORE_ROWS, room), np.float32)
        # Kernels trust the state: nothing of it changes before all memory is there.
        self._arrays, self._scores, self._capacity = grown, scores, room
        self.state[CAPACITY], self.state[SCORES] = room, self._scores.ctypes.data
        self.state[PADS + self._batch :] = [array.ctypes.data for array in grown]


class KVCache(HostCache):
    """Keys and values [batch, key-value heads, position, head dimension] of every attention layer.

    pad: i64[batch], padding positions on the left of each row, or None. The arrays grow by
    doubling; `capacity` positions fit without a copy.
    """

    def __init__(self, batch: int, pad: NDArray[np.int64] | None = None, capacity: int = 0) -> None:
        super().__init__(batch, pad)
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


@dataclass(eq=False)
class Replay(Cache):
    """In place of a key-value cache: all ids so far, i64[batch, length]; a step runs them all."""

    ids: I64
    pad: I64 | None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.ids.shape[1]

    @property
    def host_pad(self) -> I64 | None:
        """See `Cache`."""
        return self.pad

    def _go_to(self, length: int) -> None:
        self.ids = self.ids[:, :length]
