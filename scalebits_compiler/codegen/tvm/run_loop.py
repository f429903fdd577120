"""`run`: the one public function of a variant, with the calling convention of C.

It executes a program on one of several threads.

Called at once on every thread, with its number. The threads meet at a barrier where a row asks for
it: each counts its arrivals in a cache line of its own and waits for the counters of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import IRBuilder

from scalebits_compiler.codegen.tvm.calling_convention import MANY, Expr, T
from scalebits_compiler.codegen.tvm.emit import Scalar, i64, loop
from scalebits_compiler.runtime.cpu.program import (
    ALONE,
    ARRIVED,
    CODE,
    COUNTER_STRIDE,
    ITEMS,
    SYNC,
    TOOK,
    WAITED,
    WIDTH,
)

SPINS = 2000
"""Looks at a counter (about 20 us) before the thread offers its core to others between looks."""


def build_run(symbol: str, kernels: Sequence[str], threads_meet: bool) -> Any:
    """The function `symbol`; kernel number i of a program is the one called kernels[i].

    Arguments, all of 64 bits: the address of the program int64[steps, WIDTH], the steps first..last
    to execute, the number of this thread, how many there are, the address of
    int64[threads, COUNTER_STRIDE] zeros to meet at. Without `threads_meet` there may be one thread
    only.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(symbol)
        # Not noalias: that would let LLVM keep the counters of other threads in registers.
        T.func_attr({"global_symbol": symbol})
        table = T.arg("program", T.handle("int64"))
        first, last, thread, threads = (
            T.arg(name, T.int64()) for name in ("first", "last", "thread", "threads")
        )
        slots = T.arg("counters", T.handle("int64"))
        program = T.decl_buffer((MANY, i64(WIDTH)), "int64", data=table, align=8)
        counters = T.decl_buffer((MANY, i64(COUNTER_STRIDE)), "int64", data=slots, align=8)
        barrier = _Barrier(counters, thread, threads)
        start = _cycles() if threads_meet else i64(0)
        with loop(first, last) as step:
            if threads_meet:
                with T.If(T.And(threads > 1, program[step, SYNC] != 0)), T.Then():
                    barrier.wait()
            items = T.bind(program[step, ITEMS])
            shares = T.bind(T.Select(program[step, ALONE] != 0, i64(1), threads))
            lo = T.bind(T.min(T.floordiv(items * thread, shares), items))
            hi = T.bind(T.min(T.floordiv(items * (thread + 1), shares), items))
            with T.If(lo < hi), T.Then():
                row = T.bind(program[step, CODE])
                arguments = [T.address_of(program[step, CODE]), lo, hi, thread]
                _dispatch(kernels, row, arguments, 0)
        if threads_meet:
            T.buffer_store(counters, barrier.waited.get(), [thread, WAITED])
            T.buffer_store(counters, _cycles() - start, [thread, TOOK])
    return builder.get()


def _dispatch(kernels: Sequence[str], code: Expr, arguments: list[Expr], base: int) -> None:
    """Call kernel number `code`, found by halving."""
    if len(kernels) == 1:
        T.evaluate(T.call_extern("int32", kernels[0], *arguments))
        return
    half = len(kernels) // 2
    with T.If(code < base + half):
        with T.Then():
            _dispatch(kernels[:half], code, arguments, base)
        with T.Else():
            _dispatch(kernels[half:], code, arguments, base + half)


class _Barrier:
    """Where all threads meet. x86 keeps the order of stores; the calls keep that of the compiler.

    After SPINS looks a waiting thread yields: the one it waits for may need this core.
    """

    def __init__(self, counters: Expr, thread: Expr, threads: Expr) -> None:
        self.counters, self.thread, self.threads = counters, thread, threads
        self.arrivals, self.looks, self.waited = Scalar(), Scalar(), Scalar()
        self.arrivals.set(i64(0))
        self.waited.set(i64(0))

    def wait(self) -> None:
        """Emit the code that counts this thread and waits for all others."""
        self.arrivals.set(self.arrivals.get() + 1)
        _fence()
        T.buffer_store(self.counters, self.arrivals.get(), [self.thread, ARRIVED])
        start = _cycles()
        with T.serial(0, self.threads) as other:
            self.looks.set(i64(0))
            with T.While(self.counters[other, ARRIVED] < self.arrivals.get()):
                self.looks.set(self.looks.get() + 1)
                with T.If(self.looks.get() < SPINS):
                    with T.Then():
                        _fence()
                    with T.Else():
                        T.evaluate(T.call_extern("int32", "sched_yield"))
        self.waited.set(self.waited.get() + _cycles() - start)
        _fence()


def _cycles() -> Expr:
    """The processor's cycle counter."""
    return T.bind(T.call_llvm_intrin("int64", "llvm.readcyclecounter"))


def _fence() -> None:
    """A pause; LLVM moves no load or store across it."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.sse2.pause"))
