"""Compile kernel specs to one shared object that needs nothing of TVM to load or run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scalebits_compiler.codegen.children import Children
from scalebits_compiler.codegen.tvm.attention import (
    build_attention,
    build_positions,
    build_store_keys,
    build_store_values,
)
from scalebits_compiler.codegen.tvm.dense import build_dense
from scalebits_compiler.codegen.tvm.gemm import build_gemm
from scalebits_compiler.codegen.tvm.gemv import build_gemv
from scalebits_compiler.codegen.tvm.objects import object_of
from scalebits_compiler.codegen.tvm.quantize import build_quantize
from scalebits_compiler.codegen.tvm.rows import (
    ELEMENTWISE,
    build_bias,
    build_elementwise,
    build_embedding,
    build_layer_norm,
    build_rms_norm,
    build_rope,
)
from scalebits_compiler.codegen.tvm.run_loop import build_run
from scalebits_compiler.codegen.tvm.spec import (
    KernelSpec,
    OpSpec,
    threads_meet,
    variant_record,
)
from scalebits_compiler.errors import TargetError, system_remedy

BUILDERS: dict[str, Callable[[Any], Any]] = {
    "quantize": build_quantize,
    "gather_quantize": build_quantize,
    "gemv": build_gemv,
    "gemm": build_gemm,
    "dense": build_dense,
    "embedding": build_embedding,
    "bias": build_bias,
    "rms_norm": build_rms_norm,
    "layer_norm": build_layer_norm,
    "rope": build_rope,
    "positions": build_positions,
    "store_keys": build_store_keys,
    "store_values": build_store_values,
    "attention": build_attention,
    **dict.fromkeys(ELEMENTWISE, build_elementwise),
}
"""Kind of kernel -> the function that writes it. `runtime/cpu/program.py` has their arguments."""
LINKERS: dict[str, tuple[str, ...]] = {
    "ld": (),
    "ld.lld": (),
    "cc": ("-nostdlib",),
    "gcc": ("-nostdlib",),
    "clang": ("-nostdlib",),
}
"""Linkers in order of preference, with what each needs to leave the C library out."""


def compile_kernels(
    specs_by_variant: Mapping[str, Sequence[KernelSpec | OpSpec]], out_path: Path
) -> dict[str, str]:
    """Compile all specs to the shared object `out_path`; return the TVM script of each by key.

    The same specs give the same bytes. Raises `TargetError` for a variant of another machine, or
    without a linker.
    """
    linker = find_linker()
    sources: dict[str, str] = {}
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_path.parent) as folder:
        objects = []
        for name, specs in specs_by_variant.items():
            for symbol, function in build_functions(name, specs).items():
                objects.append(Path(folder) / f"{symbol}.o")
                sources[symbol] = function.script()
                objects[-1].write_bytes(object_of(name, function, sources[symbol]))
        _link(linker, objects, out_path)
    _check_standalone(out_path)
    return sources


def _check_standalone(library: Path) -> None:
    """A kernel that calls TVM's allocator cannot be loaded without TVM."""
    if b"TVM" in library.read_bytes():
        raise TargetError(
            "a generated kernel needs TVM at run time",
            help="this is a bug of the kernel generator; compile with --target reference meanwhile",
        )


def build_functions(variant: str, specs: Sequence[KernelSpec | OpSpec]) -> dict[str, Any]:
    """The TVM functions of specs, and of `run`, which calls them by their number; by symbol."""
    functions = {spec.key: BUILDERS[spec.kind](spec) for spec in specs}
    symbol = variant_record(variant, specs).run
    return functions | {symbol: build_run(symbol, list(functions), threads_meet(variant))}


def find_linker() -> tuple[str, ...]:
    """The command of a linker on PATH; raises `TargetError` if there is none."""
    for name, flags in LINKERS.items():
        if path := shutil.which(name):
            return (path, *flags)
    raise TargetError(
        f"no linker found: none of {', '.join(LINKERS)} is on PATH",
        help="install binutils or a C compiler, or compile with --target reference",
    )


def _link(linker: Sequence[str], objects: Sequence[Path], out_path: Path) -> None:
    """Link objects to a shared object, without names, paths or ids that change between runs.

    Only what the runtime calls is seen from outside, and what nobody calls is left out: TVM puts
    conversions of its own into every object.
    """
    exports = objects[0].parent / "exports"
    exports.write_text("{ global: scalebits_*_run_*; local: *; };\n")
    flags = ["--build-id=none", "--gc-sections", f"--version-script={exports}"]
    if linker[1:]:
        flags = [f"-Wl,{flag}" for flag in flags]
    command = [*linker, "-shared", "-s", *flags, "-o", str(out_path), *map(str, objects)]
    with Children() as children:
        # Messages in English: the remedy depends on them.
        done = children.run(command, environment={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise _link_error(linker[0], out_path, done.returncode, done.stderr)


_SIGNALLED = 128  # what `Children.run` adds to the number of a signal


def _link_error(linker: str, out_path: Path, code: int, printed: str) -> TargetError:
    """Why linking failed: what the linker says, or the signal that has ended it."""
    lines = printed.strip().splitlines()
    remedy = system_remedy(printed)
    if code > _SIGNALLED:
        reason = f"signal {signal.Signals(code - _SIGNALLED).name} has ended it"
        if code == _SIGNALLED + signal.SIGXFSZ:
            remedy = system_remedy(OSError(errno.EFBIG, ""))
    else:
        reason = lines[0] if lines else f"exit code {code}"
    return TargetError(
        f"{linker} could not link the kernels to {out_path}: {reason}",
        help=remedy or "check that this linker is for this machine, or put another one on PATH",
        notes=lines[1:5],
    )
