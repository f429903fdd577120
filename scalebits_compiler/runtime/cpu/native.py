"""A plan on native kernels: one call of the kernel library runs a whole step (layer L1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.runtime.cache import NativeCache
from scalebits_compiler.runtime.cpu.library import KernelLibrary
from scalebits_compiler.runtime.cpu.lowering import Lowering
from scalebits_compiler.runtime.cpu.native_ops import RULES, NotNative
from scalebits_compiler.runtime.cpu.program import PAST
from scalebits_compiler.runtime.ops import RunCall
from scalebits_compiler.runtime.plan import TORCH, Plan
from scalebits_compiler.runtime.weights import Weights

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
OnStep: TypeAlias = Callable[[str, float], None]

_PROGRAMS = 4
"""Programs that are kept, each for one shape of token ids: with its arrays it can be large."""
_PIECE = 256
"""Positions whose rotations are computed at once."""


class NativeModel:
    """Runs a plan on the kernels of a library. Raises `NotNative` for a plan that it cannot run.

    call: runs the ops that the runtime has not, between steps of the program. shapes: of every
    attention layer the key-value heads, the channels of a key and of a value.
    """

    def __init__(self, plan: Plan, weights: Weights, library: KernelLibrary, call: RunCall) -> None:
        missing = sorted({step.op for step in plan.steps} - RULES.keys() - {TORCH})
        if missing:
            raise NotNative(", ".join(missing))
        self.plan, self.weights, self.library = plan, weights, library
        self._call = call
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self._rotations: dict[tuple[str, float], F32] = {}
        self._positions = 0
        self._programs: dict[tuple[int, int, bool], Lowering] = {}
        self._reserve_positions(1)
        self.lowered(1, 1, last=True)

    def new_cache(self, batch: int, pad: I64 | None, capacity: int) -> NativeCache:
        """An empty cache for `batch` rows."""
        shapes = [self.shapes[layer] for layer in sorted(self.shapes)]
        return NativeCache(shapes, batch, pad, capacity, self.library.threads)

    def run(
        self, tokens: I64, cache: NativeCache, last: bool, on_step: OnStep | None = None
    ) -> F32:
        """Logits f32[batch, positions, vocabulary] of new tokens i64[batch, sequence].

        Fills the cache behind its length, which stays. With `last`, of the last position only.
        on_step: called with each op and its seconds; the program then runs op by op on one thread,
        as handing a single op to threads takes longer than most ops.
        """
        batch, count = tokens.shape
        cache.reserve(cache.length + count)
        self._reserve_positions(cache.length + count)
        lowered = self.lowered(batch, count, last)
        lowered.ids[:] = tokens.reshape(-1, 1)
        lowered.state[:] = cache.state
        lowered.state[PAST] = cache.length
        for symbol, rows in lowered.tables.items():
            rows[:] = self.weights.rows(symbol, lowered.ids[:, 0])
        first, outside = 0, dict[str, Any]()
        for call in lowered.calls:
            self._run_steps(lowered, first, call.at, on_step)
            start = time.perf_counter()
            call.run(self._call, outside, cache.length, cache.pad)
            first = call.at
            if on_step is not None:
                on_step(TORCH, time.perf_counter() - start)
        self._run_steps(lowered, first, len(lowered.program), on_step)
        return lowered.output.reshape(batch, 1 if last else count, -1).copy()

    def _run_steps(self, lowered: Lowering, first: int, end: int, on_step: OnStep | None) -> None:
        """The steps first..end of the program, with `on_step` op by op."""
        if on_step is None:
            if first < end:
                self.library.run(lowered.program, first, end)
            return
        for op, same in groupby(lowered.ops[first:end]):
            last, start = first + len(list(same)), time.perf_counter()
            self.library.run(lowered.program, first, last, threads=1)
            on_step(op, time.perf_counter() - start)
            first = last

    def lowered(self, batch: int, count: int, last: bool) -> Lowering:
        """The program for `batch` x `count` new tokens."""
        key = (batch, count, last)
        found = self._programs.pop(key, None)
        if found is None:
            while len(self._programs) >= _PROGRAMS:
                del self._programs[next(iter(self._programs))]
            found = Lowering(self, batch, count, last)
        self._programs[key] = found  # now the latest
        return found

    def rotations(self, frequency: str, scaling: float) -> F32:
        """f32[positions, 2, d/2]: cos and sin for the positions reserved so far.

        Made in pieces of equal size: numpy may round the last elements of an array differently.
        """
        found = self._rotations.get((frequency, scaling))
        if found is None:
            # In float32, as the model was trained: the angles themselves are rounded.
            frequencies, pieces = self.weights.float32(frequency), []
            for start in range(0, self._positions, _PIECE):
                positions = np.arange(start, start + _PIECE, dtype=np.float32)
                angles = positions[:, None] * frequencies
                pieces.append(np.stack((np.cos(angles), np.sin(angles)), 1) * np.float32(scaling))
            found = self._rotations[frequency, scaling] = np.concatenate(pieces)
        return found

    def _reserve_positions(self, count: int) -> None:
        """Programs point to the rotations, so longer tables of them need new programs."""
        if count > self._positions:
            self._positions = -(-max(count, 2 * self._positions) // _PIECE) * _PIECE
            self._rotations.clear()
            self._programs.clear()
