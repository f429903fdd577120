"""KernelSpecs -> the text of a Python module with a Triton kernel for each.

A kernel walks the groups of a panel in stored order with one loop for each format, so that nothing
in a loop depends on it. With `gather`, column k of the matrix belongs to channel index[k] of
x: products load that channel in place of channel k, and `dequantize` stores the column at its
place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scalebits_compiler.codegen.triton import dequantize, matmul, matvec
from scalebits_compiler.runtime.cuda.spec import KernelSpec

_TABLES = "arena, offsets, starts, groups"
_PRODUCT = f"x, {_TABLES}, y, partial, tickets, tokens, rows, cols, stored, count, span, splits"
_PARAMETERS = {
    "matvec": _PRODUCT,
    "matmul": _PRODUCT,
    "dequantize": f"{_TABLES}, y, rows, cols, stored, count, span",
}
_KINDS = {"matvec": matvec, "matmul": matmul, "dequantize": dequantize}

_HEADER = f'''"""Written by scalebits_compiler/codegen/triton/emit.py, not by hand."""

import triton
import triton.language as tl

{matvec.FUNCTIONS}
{matmul.FUNCTIONS}'''


def parameters(spec: KernelSpec) -> str:
    """The arguments of a kernel, in order; docs/cuda.md says what they are."""
    return f"{'index, ' if spec.gather else ''}{_PARAMETERS[spec.kind]}"


def emit_module(specs: Sequence[KernelSpec]) -> str:
    """The text of a module with a kernel for each spec, named by its key. Equal specs, equal text.

    Only what Triton 3.6 and later, and its interpreter, have in common is used.
    """
    return "\n\n".join([_HEADER, *map(emit, specs)])


def emit(spec: KernelSpec) -> str:
    """The functions of one kernel."""
    kind = _KINDS[spec.kind]
    steps = [_function(*kind.step(spec, number)) for number in spec.bits]
    return "\n\n".join([*steps, _function(f"{spec.key}({parameters(spec)})", kind.kernel(spec))])


def _function(signature: str, body: Iterator[str]) -> str:
    return "\n".join(["@triton.jit", f"def {signature}:", *(f"    {line}" for line in body), ""])
