"""One kernel -> one object file, kept in the cache: most kernels are the same for every model."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import Pass, PassContext, Sequential, module_pass
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
from tvm.target.codegen import llvm_get_system_triple, llvm_version_major

from scalebits_compiler.codegen import kernel_cache as cache
from scalebits_compiler.codegen.tvm.spec import Variant, host_variants
from scalebits_compiler.errors import TargetError

LOWERING: tuple[Callable[[], Pass], ...] = (
    s_tir.transform.StmtSimplify,
    s_tir.transform.LowerOpaqueBlock,
    tirx.transform.FlattenBuffer,
    lambda: tirx.transform.NarrowDataType(32),
    lambda: tirx.transform.VectorizeLoop(True),
    tirx.transform.StorageRewrite,
    tirx.transform.UnrollLoop,
    tirx.transform.StmtSimplify,
    s_tir.transform.RewriteUnsafeSelect,
    tirx.transform.CommonSubexprElim,
)
"""The passes of TVM's own pipeline that our functions need, in its order. The others leave them as
they are, or in a form that gives the same machine code, and take as long as these.
"""


def object_of(variant: str, function: Any, script: str) -> bytes:
    """The object file of a function, which is called by its `global_symbol`.

    script: the text of the function. The same texts give the same bytes; what the cache has is not
    compiled.
    """
    # Everything that the bytes depend on. The script is the whole function.
    name = f"{cache.content_key(script, _compiler(variant))}.o"
    if (kept := cache.load(name)) is not None:
        return kept
    made = _machine_code(lowered(variant, function))
    cache.store(name, made)
    return made


def _machine_code(module: Any) -> bytes:
    """The object file of a module of TVM, by way of a file in memory.

    On a disk LLVM would end the process where there is no space left.
    """
    with os.fdopen(os.memfd_create("kernel.o"), "rb") as file:
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        return file.read()


def lowered(variant: str, function: Any) -> Any:
    """A function lowered for a variant, as a module of TVM; LLVM runs when the result is used.

    Raises `TargetError` for a variant that this machine cannot compile: LLVM aborts the process
    when it meets an instruction that its target lacks, so nothing else may reach it.
    """
    target = tvm.target.Target(_known(variant).target())
    symbol = str(function.attrs["global_symbol"])
    module = tvm.IRModule({GlobalVar(symbol): function})
    return tvm.compile(module, target=target, tir_pipeline=_PIPELINE).mod


@functools.cache
def _compiler(variant: str) -> str:
    """What objects depend on besides their function."""
    passes = [make().info.name for make in LOWERING]
    machine = [asdict(_known(variant)), llvm_get_system_triple(), llvm_version_major()]
    return json.dumps([passes, machine, version("apache-tvm")])


def _known(variant: str) -> Variant:
    variants = host_variants()
    if variant not in variants:
        raise TargetError(
            f"kernels of variant {variant!r} cannot be compiled on this machine",
            help=f"compile for {', '.join(variants)}, or on another machine",
        )
    return variants[variant]


@module_pass(opt_level=0)
def _lower(module: tvm.IRModule, _: PassContext) -> tvm.IRModule:
    return Sequential([make() for make in LOWERING])(module)


_PIPELINE = "scalebits"
tirx.register_tir_pipeline(
    _PIPELINE, lambda: (_lower, finalize_host_passes, finalize_device_passes)
)
