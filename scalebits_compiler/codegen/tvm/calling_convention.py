"""The calling convention of generated kernels: a row of a program, a range of items, a thread.

A kernel is a function (step, lo, hi, thread) that only `run` of the same library calls. `step` is
the address of its row in the program (runtime/cpu/program.py), which holds its arguments; it works
on the items lo..hi. All indices are int64. Buffers are declared with the alignment of their
element: TVM would otherwise assume 64 bytes and emit aligned moves, which fault on pointers of
numpy or of a mapped file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.ir import Call, Op, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Var
from tvm.tirx.script import builder

from scalebits_compiler.runtime.cpu.program import FIELDS, HEAD, WIDTH

# TVM annotates its builder more narrowly than it behaves: it takes Python numbers for expressions.
T: Any = builder
Expr = Any
MANY = T.int64(1 << 40)
"""The first extent of a buffer whose size no kernel needs to know."""
ELEMENT_BYTES = {
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "int64": 8,
    "float32": 4,
}


def pointer(address: Expr, name: str, dtype: str) -> Expr:
    """An address (int64) as a pointer to `dtype`."""
    kind = PointerType(PrimType(dtype))
    return T.bind(Call(Op.get("tirx.reinterpret"), [address], ret_ty=kind), var=Var(name, kind))


def buffer_at(address: Expr, name: str, shape: tuple[Expr, ...], dtype: str) -> Expr:
    """The buffer that starts at an address (int64)."""
    align = ELEMENT_BYTES[dtype]
    return T.decl_buffer(shape, dtype, data=pointer(address, name, dtype), align=align)


class Arguments:
    """The arguments of the kernel under construction, by their names in `program.FIELDS`."""

    def __init__(self, kind: str) -> None:
        self._fields = FIELDS[kind]
        step = T.arg("step", T.handle("int64"))
        self.lo, self.hi, self.thread = (T.arg(n, T.int64()) for n in ("lo", "hi", "thread"))
        self._row = T.decl_buffer((WIDTH,), "int64", data=step, align=8)

    def _raw(self, name: str) -> Expr:
        return self._row[HEAD + self._fields.index(name)]

    def has(self, name: str) -> bool:
        """Whether the kernel has this argument."""
        return name in self._fields

    def int(self, name: str) -> Expr:
        """An integer."""
        return T.bind(self._raw(name), var=Var(name, "int64"))

    def float(self, name: str) -> Expr:
        """A float32."""
        bits = T.cast(self._raw(name), "int32")
        return T.bind(T.reinterpret("float32", bits), var=Var(name, "float32"))

    def buffer(self, name: str, shape: tuple[Expr, ...], dtype: str) -> Expr:
        """A buffer."""
        return buffer_at(self._raw(name), name, shape, dtype)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: str) -> Expr:
        """The part of this thread of an array of `shape` for each thread."""
        size = ELEMENT_BYTES[dtype]
        for extent in shape:
            size *= extent
        address = self._raw(name) + self.thread * T.int64(size)
        return buffer_at(address, name, tuple(T.int64(extent) for extent in shape), dtype)


@contextmanager
def kernel(name: str, kind: str) -> Iterator[tuple[IRBuilder, Arguments]]:
    """An IRBuilder with one open kernel called `name`, and its arguments."""
    with IRBuilder() as made, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name})
        yield made, Arguments(kind)
