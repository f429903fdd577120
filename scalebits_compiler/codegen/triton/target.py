"""The cuda target: Triton kernels, compiled ahead of time; no GPU is needed to build."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.codegen.kernel_cache import check_cache
from scalebits_compiler.codegen.plan import make_plan
from scalebits_compiler.codegen.target import Built, Target
from scalebits_compiler.errors import TargetError, UsageError
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.manifest import Kernels

if TYPE_CHECKING:
    from scalebits_compiler.codegen.triton.spec import Matrix
    from scalebits_compiler.ir.module import Module, Weight
    from scalebits_compiler.runtime.plan import Plan

LIBRARY = "kernels/cuda.py"
DTYPES = ("fp16", "bf16")
OLDEST = 80  # the first architecture with asynchronous copies and bfloat16 products


@dataclass(frozen=True)
class CudaTarget(Target):
    """NVIDIA GPUs. arch: what to compile for, separated by commas; on others the source, which is
    in the artifact too, is compiled at first use. dtype: of the activations, fp16 or bf16.
    """

    name: ClassVar[str] = "cuda"
    order: ClassVar[str] = "tiled"
    gathers: ClassVar[bool] = True
    arch: str = "sm_80,sm_89,sm_90"
    dtype: str = "fp16"

    def check(self) -> None:
        """Triton must be there, the options must be right, and the cache can be written."""
        if self.dtype not in DTYPES:
            raise UsageError(
                f"the cuda target has no dtype {self.dtype!r}", help=f"use {' or '.join(DTYPES)}"
            )
        for arch in self.archs:
            if not re.fullmatch(r"sm_\d{2,3}", arch) or int(arch[3:]) < OLDEST:
                raise UsageError(
                    f"arch {self.arch}: {arch!r} is no architecture from sm_{OLDEST} on",
                    help="for example 'cuda{arch = \"sm_80,sm_89,sm_90\"}'",
                )
        if find_spec("triton") is None:
            raise TargetError(
                "the cuda target needs Triton, which is not installed",
                help='pip install "scalebits-compiler[cuda]", or compile with --target reference',
            )
        check_cache()

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures, each once, sorted."""
        return tuple(sorted({arch.strip() for arch in self.arch.split(",")}))

    def check_module(self, module: Module) -> None:
        """Every op needs a step of the runtime, and every matrix must fit the order of tiles."""
        make_plan(module, torch=False)
        for weight in module.quantized():
            _layout(weight)

    def build(self, module: Module, folder: Path) -> Built:
        """Select, write and compile the kernels that the module's matrices need."""
        from scalebits_compiler.codegen.triton.aot import compile_specs
        from scalebits_compiler.codegen.triton.emit import emit_module
        from scalebits_compiler.codegen.triton.spec import select_specs

        plan = make_plan(module, torch=False)
        plain, gathered = _by_input(module, plan)
        specs, dispatch = select_specs(plain, self.dtype, gathered)
        files: dict[str, Path | bytes] = {LIBRARY: emit_module(specs).encode()}
        kernels = {}
        made = compile_specs(specs, self.archs, folder)
        for spec in specs:
            entries = {}
            for arch, binary in made[spec.key].items():
                name = f"kernels/{spec.key}.{arch}.cubin"
                files[name] = binary.image
                entries[arch] = {
                    "file": name,
                    "shared": binary.shared,
                    "scratch": binary.scratch,
                }
            options = {"warps": spec.warps, "stages": spec.stages}
            kernels[spec.key] = {**options, "binaries": entries}
        return Built(plan, Kernels(LIBRARY, {**dispatch, "kernels": kernels}), files)


def _by_input(module: Module, plan: Plan) -> tuple[list[Matrix], list[Matrix]]:
    """The matrices whose input is read as it is, and those that read it through an index."""
    found: tuple[list[Matrix], list[Matrix]] = ([], [])
    for weight in module.quantized():
        readers = [step.op for step in plan.steps if weight.symbol in step.weights]
        for gather, matrices in enumerate(found):
            if any((op == "gather_qlinear") == gather for op in readers):
                matrices.append((_layout(weight), module.bits(weight)))
    return found


def _layout(weight: Weight) -> TileLayout:
    if weight.block is None or weight.group is None:
        raise TargetError(f"@{weight.symbol} has no block and group")
    rows, columns = weight.type.static_shape()
    try:
        return TileLayout(rows, columns, *weight.block, weight.group)
    except TargetError as error:
        raise TargetError(f"@{weight.symbol}: {error.message}", help=error.help) from None
