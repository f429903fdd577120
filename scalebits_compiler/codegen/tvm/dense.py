"""y = x Wᵀ with a matrix that stays in its 16 or 32 bits: the head, and what is not quantized.

Every output is a sum in 16 lanes over the columns, in order, and then over the lanes, for one token
as for many.
"""

from __future__ import annotations

from operator import add
from typing import Any

from scalebits_compiler.codegen.tvm.calling_convention import MANY, Arguments, Expr, T, kernel
from scalebits_compiler.codegen.tvm.emit import Slots, fma, i64, loop, splat
from scalebits_compiler.codegen.tvm.rows import STORED
from scalebits_compiler.codegen.tvm.spec import OpSpec
from scalebits_compiler.codegen.tvm.vectors import Lanes, each_vector, reduce_lanes
from scalebits_compiler.runtime.cpu.program import DENSE_ROWS

_MOST_TOKENS = 4


def build_dense(spec: OpSpec) -> Any:
    """y f32[x_rows, y_cols] = x Wᵀ, x f32[x_rows, x_stride] with `cols` columns, W [y_cols, cols].

    Items are DENSE_ROWS rows of W. Tokens are taken several at a time, those left over one by one;
    what is taken at a time fits into the registers.
    """
    many, at_once = (_MOST_TOKENS, 4) if spec.wide else (2, 2)
    alone = DENSE_ROWS if spec.wide else DENSE_ROWS // 2
    with kernel(spec.key, spec.kind) as (builder, args):
        product = _Product(args, spec.dtype)
        tokens = args.int("x_rows")
        tiles = T.bind(T.floordiv(tokens, i64(many)))
        with loop(args.lo, args.hi) as item:
            first = T.bind(item * DENSE_ROWS)
            for part in range(0, DENSE_ROWS, at_once):
                with T.serial(0, tiles) as tile:
                    product.tile(T.bind(tile * many), many, T.bind(first + part), at_once)
            for part in range(0, DENSE_ROWS, alone):
                with loop(T.bind(tiles * many), tokens) as token:
                    product.tile(token, 1, T.bind(first + part), alone)
    return builder.get()


class _Product:
    """The arguments, and the product of some tokens with some rows."""

    def __init__(self, args: Arguments, dtype: str) -> None:
        self.dtype = dtype
        self.cols, self.rows = args.int("cols"), args.int("y_cols")
        self.x = args.buffer("x", (MANY, args.int("x_stride")), "float32")
        self.w = args.buffer("w", (MANY, self.cols), STORED[dtype])
        self.y = args.buffer("y", (MANY, self.rows), "float32")
        self.sums = [Slots.alloc(DENSE_ROWS, "float32") for _ in range(_MOST_TOKENS)]
        self.one, self.spill = (Slots.alloc(1, "float32") for _ in range(2))

    def tile(self, token: Expr, tokens: int, row: Expr, rows: int) -> None:
        """Emit the product. Rows beyond the matrix are computed as its last one, and not stored."""
        pairs = [(t, r) for t in range(tokens) for r in range(rows)]
        for t, r in pairs:
            self.sums[t][r] = splat(T.float32(0))
        read = [T.bind(T.min(row + r, self.rows - 1)) for r in range(rows)]

        def body(lanes: Lanes, col: Expr) -> None:
            weights = [lanes.load(self.w, [at, col], self.dtype) for at in read]
            values = [lanes.load(self.x, [token + t, col]) for t in range(tokens)]
            for t, r in pairs:
                self.sums[t][r] = fma(values[t], weights[r], self.sums[t][r])

        each_vector(self.cols, self.spill, body)
        for t, r in pairs:
            self.one[0] = self.sums[t][r]
            value = reduce_lanes(self.one, add)
            with T.If(row + r < self.rows), T.Then():
                T.buffer_store(self.y, value, [token + t, row + r])
