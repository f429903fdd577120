"""Attention over a key-value cache, and the steps that fill the cache.

A row of the batch keeps position p of its own text at place p of its cache: padding is not stored.
Keys lie in blocks [d][KEY_BLOCK positions], so that a vector holds one channel of 16 positions;
values lie as [position][channels], padded to a multiple of VALUE_PAD channels.

A query visits the blocks of keys in order from position 0 and every lane belongs to fixed
positions; what it does not see counts as exactly 0. So its result does not depend on how many
queries are computed at once, on the batch, or on padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

from scalebits_compiler.codegen.tvm.calling_convention import (
    MANY,
    Arguments,
    Expr,
    T,
    buffer_at,
    kernel,
)
from scalebits_compiler.codegen.tvm.emit import (
    Slots,
    ceildiv,
    fma,
    i64,
    loop,
    opaque,
    splat,
    vload,
    vstore,
)
from scalebits_compiler.codegen.tvm.spec import OpSpec
from scalebits_compiler.codegen.tvm.vectors import each_vector, exp, reduce_lanes, tanh
from scalebits_compiler.numerics.layout import LANES
from scalebits_compiler.runtime.cpu.program import (
    CAPACITY,
    KEY_BLOCK,
    PADS,
    PAST,
    SCORE_ROWS,
    SCORES,
    VALUE_PAD,
)

_HALVES = KEY_BLOCK // LANES
_CHUNK = VALUE_PAD // LANES


class _Place:
    """Where a step stands: the state of the cache, and the tokens [batch, count]."""

    def __init__(self, args: Arguments) -> None:
        self.state = args.buffer("state", (MANY,), "int64")
        self.count = args.int("count")
        self.capacity = opaque(self.state[CAPACITY])

    def first(self, row: Expr) -> Expr:
        """Position in its own text of the first new token of a row of the batch."""
        return self.state[PAST] - self.state[PADS + row]

    def token(self, token: Expr) -> tuple[Expr, Expr]:
        """(row of the batch, position in its text) of new token number `token`."""
        row = opaque(T.floordiv(token, self.count))
        return row, opaque(self.first(row) + token - row * self.count)


def build_positions(spec: OpSpec) -> Any:
    """y i64[tokens]: the position of every token in its text, 0 for padding. Items are tokens."""
    with kernel(spec.key, spec.kind) as (builder, args):
        place, y = _Place(args), args.buffer("y", (MANY,), "int64")
        with loop(args.lo, args.hi) as token:
            _, position = place.token(token)
            T.buffer_store(y, T.max(position, i64(0)), [token])
    return builder.get()


def build_store_keys(spec: OpSpec) -> Any:
    """Put keys x f32[tokens, groups * d] into the cache. Items are tokens."""
    with kernel(spec.key, spec.kind) as (builder, args):
        place, groups, d = _Place(args), args.int("groups"), args.int("d")
        x = args.buffer("x", (MANY, groups, d), "float32")
        blocks = opaque(T.floordiv(place.capacity, i64(KEY_BLOCK)))
        cache = _cache(args, "keys", (groups, blocks, d, i64(KEY_BLOCK)))
        with loop(args.lo, args.hi) as token:
            row, position = place.token(token)
            block = opaque(T.floordiv(position, i64(KEY_BLOCK)))
            slot = T.bind(position - block * KEY_BLOCK)
            with T.If(position >= 0), T.Then(), T.serial(0, groups) as g, T.serial(0, d) as channel:
                T.buffer_store(cache, x[token, g, channel], [row, g, block, channel, slot])
    return builder.get()


def build_store_values(spec: OpSpec) -> Any:
    """Put values x f32[tokens, groups * d] into the cache. Items are tokens."""
    with kernel(spec.key, spec.kind) as (builder, args):
        place, groups, d = _Place(args), args.int("groups"), args.int("d")
        x = args.buffer("x", (MANY, groups, d), "float32")
        cache = _cache(args, "values", (groups, place.capacity, _padded(d)))
        spill = Slots.alloc(1, "float32")
        with loop(args.lo, args.hi) as token:
            row, position = place.token(token)
            with T.If(position >= 0), T.Then(), T.serial(0, groups) as g:
                each_vector(
                    d,
                    spill,
                    lambda lanes, col: lanes.store(
                        cache, lanes.load(x, [token, g, col]), [row, g, position, col]
                    ),
                )
    return builder.get()


def _cache(args: Arguments, name: str, shape: tuple[Expr, ...]) -> Expr:
    """A cache array [batch, *shape]; the argument points to where its address is."""
    address = args.buffer(name, (MANY,), "int64")[0]
    return buffer_at(address, f"{name}_cache", (MANY, *shape), "float32")


def _padded(d: Expr) -> Expr:
    return opaque(ceildiv(d, VALUE_PAD) * VALUE_PAD)


def build_attention(spec: OpSpec) -> Any:
    """y f32[tokens, heads * e] of queries q f32[tokens, heads * d] and the cache.

    Query head h reads key-value head h // (heads / groups). Without `causal` a query sees all new
    tokens too. Queries that share keys are numbered
    token by token, SCORE_ROWS of them are one item, those left over take their turn one by one.
    """
    with kernel(spec.key, spec.kind) as (builder, args):
        attention = _Attention(args, 2 if spec.wide else 1)
        tiles = opaque(ceildiv(attention.rows, SCORE_ROWS))
        with loop(args.lo, args.hi) as item:
            pair = opaque(T.floordiv(item, tiles))
            first = opaque((item - pair * tiles) * SCORE_ROWS)
            row = opaque(T.floordiv(pair, attention.groups))
            where = (row, opaque(pair - row * attention.groups))
            left = opaque(attention.rows - first)
            with T.If(left >= SCORE_ROWS):
                with T.Then():
                    attention.tile(where, first, SCORE_ROWS)
                with T.Else(), loop(first, first + left) as query:
                    attention.tile(where, query, 1)
    return builder.get()


@dataclass
class _Query:
    """One query: its token, head, and the positions first..last that it sees."""

    slot: int
    token: Expr
    head: Expr
    first: Expr
    last: Expr

    def sees(self, start: Expr) -> Expr:
        """Which of the 16 positions from `start` on it sees."""
        position = T.ramp(start, i64(1), LANES)
        return T.And(position >= splat(self.first), position <= splat(self.last))


class _Attention:
    """The arguments and the three passes: scores and their maximum, weights, weighted values.

    at_once: vectors of a block that are accumulated side by side; what fits into registers.
    """

    def __init__(self, args: Arguments, at_once: int) -> None:
        self.place, self.at_once = _Place(args), at_once
        heads, self.groups = args.int("heads"), args.int("groups")
        self.d, self.e = args.int("d"), args.int("e")
        self.share = opaque(T.floordiv(heads, self.groups))
        self.rows = opaque(self.place.count * self.share)
        self.window, self.causal = args.int("window"), args.int("causal")
        self.scale, self.softcap = args.float("scale"), args.float("softcap")
        capacity = self.place.capacity
        blocks = opaque(T.floordiv(capacity, i64(KEY_BLOCK)))
        self.slopes = args.buffer("slopes", (heads,), "float32")
        self.q = args.buffer("q", (MANY, heads, self.d), "float32")
        self.y = args.buffer("y", (MANY, heads, self.e), "float32")
        keys, values = (self.groups, blocks, self.d), (self.groups, capacity, _padded(self.e))
        self.keys = _cache(args, "keys", (*keys, i64(KEY_BLOCK)))
        self.values = _cache(args, "values", values)
        scores = self.place.state[SCORES] + args.thread * capacity * (4 * SCORE_ROWS)
        self.scores = buffer_at(scores, "scores", (i64(SCORE_ROWS), capacity), "float32")
        width = SCORE_ROWS * max(_HALVES, _CHUNK)
        self.sums = Slots.alloc(width, "float32")
        self.largest, self.total = (Slots.alloc(SCORE_ROWS, "float32") for _ in range(2))
        self.one, self.spill = Slots.alloc(1, "float32"), Slots.alloc(1, "float32")

    def tile(self, where: tuple[Expr, Expr], first: Expr, count: int) -> None:
        """Emit the code for `count` queries from number `first` on; where: (batch row, group)."""
        queries = [self._query(where, first + nth, nth) for nth in range(count)]
        start = opaque(T.floordiv(queries[0].first, i64(KEY_BLOCK)))
        stop = opaque(T.floordiv(queries[-1].last + KEY_BLOCK, i64(KEY_BLOCK)))
        for query in queries:
            self.largest[query.slot] = splat(T.float32(-3.4028234663852886e38))
            self.total[query.slot] = splat(T.float32(0))
        with loop(start, stop) as block:
            for half in range(0, _HALVES, self.at_once):
                self._score(queries, where, block, range(half, half + self.at_once))
        top = [self._over_lanes(self.largest, query.slot, _larger) for query in queries]
        with loop(start, stop) as block:
            for half in range(_HALVES):
                at = T.bind(block * KEY_BLOCK + half * LANES)
                for query, most in zip(queries, top, strict=True):
                    self._weigh(query, at, most)
        total = [self._over_lanes(self.total, query.slot, add) for query in queries]
        zero, one = T.float32(0), T.float32(1)
        inverse = [T.bind(T.Select(value == zero, zero, one / value)) for value in total]
        self._mix(queries, where, (T.bind(start * KEY_BLOCK), queries[-1].last + 1), inverse)

    def _query(self, where: tuple[Expr, Expr], number: Expr, slot: int) -> _Query:
        row, group = where
        nth = opaque(T.floordiv(number, self.share))
        seen = T.Select(self.causal != 0, nth, self.place.count - 1)
        last = opaque(self.place.first(row) + seen)
        head = opaque(group * self.share + number - nth * self.share)
        start = T.max(last - self.window + 1, i64(0))
        first = opaque(T.Select(self.window > 0, start, i64(0)))
        return _Query(slot, opaque(row * self.place.count + nth), head, first, last)

    def _over_lanes(self, slots: Slots, slot: int, combine: Any) -> Expr:
        self.one[0] = slots[slot]
        return reduce_lanes(self.one, combine)

    def _score(
        self, queries: Sequence[_Query], where: tuple[Expr, Expr], block: Expr, halves: range
    ) -> None:
        """scale * q k for some vectors of a block, kept, and their maximum over what is seen."""
        slots = [(query, half, query.slot * _HALVES + half) for query in queries for half in halves]
        for _, _, slot in slots:
            self.sums[slot] = splat(T.float32(0))
        with T.serial(0, self.d) as channel:
            at = [*where, block, channel]
            keys = {
                half: T.bind(vload(self.keys, [*at, i64(half * LANES)], "float32x16"))
                for half in halves
            }
            for query in queries:
                value = T.bind(splat(self.q[query.token, query.head, channel]))
                for half in halves:
                    slot = query.slot * _HALVES + half
                    self.sums[slot] = fma(value, keys[half], self.sums[slot])
        for query, half, slot in slots:
            position = T.bind(block * KEY_BLOCK + half * LANES)
            self._keep(query, position, T.bind(self.sums[slot] * splat(self.scale)))

    def _keep(self, query: _Query, position: Expr, score: Expr) -> None:
        at = [i64(query.slot), position]
        vstore(self.scores, score, at)
        with T.If(self.softcap > T.float32(0)), T.Then():
            cap = splat(self.softcap)
            vstore(self.scores, cap * tanh(score / cap), at)
        # How far the keys stand behind the query: whole numbers, so the sum is exact.
        away = splat(T.cast(position - query.last, "float32"))
        away = away + T.cast(T.ramp(T.int32(0), T.int32(1), LANES), f"float32x{LANES}")
        slope = splat(self.slopes[query.head])
        vstore(self.scores, fma(slope, away, vload(self.scores, at, "float32x16")), at)
        most = self.largest[query.slot]
        seen = T.Select(query.sees(position), vload(self.scores, at, "float32x16"), most)
        self.largest[query.slot] = _larger(most, T.bind(seen))

    def _weigh(self, query: _Query, position: Expr, most: Expr) -> None:
        """exp(score - maximum), exactly 0 for what is not seen; kept and summed."""
        at = [i64(query.slot), position]
        score = vload(self.scores, at, "float32x16")
        weight = exp(score - splat(most))
        weight = T.bind(T.Select(query.sees(position), weight, splat(T.float32(0))))
        vstore(self.scores, weight, at)
        self.total[query.slot] = self.total[query.slot] + weight

    def _mix(
        self,
        queries: Sequence[_Query],
        where: tuple[Expr, Expr],
        positions: tuple[Expr, Expr],
        inverse: list[Expr],
    ) -> None:
        """Store the sum of weight * value over the positions, divided by the sum of weights."""
        with T.serial(0, T.floordiv(_padded(self.e), i64(VALUE_PAD))) as chunk:
            first = T.bind(chunk * VALUE_PAD)
            slots = [query.slot * _CHUNK + part for query in queries for part in range(_CHUNK)]
            for slot in slots:
                self.sums[slot] = splat(T.float32(0))
            with loop(*positions) as position:
                value = [
                    T.bind(
                        vload(self.values, [*where, position, first + part * LANES], "float32x16")
                    )
                    for part in range(_CHUNK)
                ]
                for query in queries:
                    weight = T.bind(splat(self.scores[query.slot, position]))
                    for part in range(_CHUNK):
                        slot = query.slot * _CHUNK + part
                        self.sums[slot] = fma(weight, value[part], self.sums[slot])
            for query, factor in zip(queries, inverse, strict=True):
                for part in range(_CHUNK):
                    value = self.sums[query.slot * _CHUNK + part] * splat(factor)
                    self._store(query, T.bind(first + part * LANES), T.bind(value))

    def _store(self, query: _Query, col: Expr, value: Expr) -> None:
        """Store 16 channels, or what is left of the head."""
        at = [query.token, query.head]
        with T.If(col + LANES <= self.e):
            with T.Then():
                vstore(self.y, value, [*at, col])
            with T.Else():
                self.spill[0] = value
                with T.serial(0, T.max(self.e - col, i64(0))) as lane:
                    T.buffer_store(self.y, self.spill.buffer[lane], [*at, col + lane])


def _larger(a: Expr, b: Expr) -> Expr:
    """The larger; b if either is no number."""
    return T.Select(a > b, a, b)
