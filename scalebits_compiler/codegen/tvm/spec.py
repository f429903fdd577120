"""Which CPU kernels a model needs, and the table that leads the runtime to them (no TVM here)."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.layout import FORMAT_VERSION, LANES, BlockLayout, joined
from scalebits_compiler.runtime.cpu.isa import FEATURES, X86_64
from scalebits_compiler.runtime.dispatch import CpuDispatch, KernelRecord, Mode, VariantRecord
from scalebits_compiler.runtime.schema import plain

Kind = Literal["gemv", "gemm", "quantize", "gather_quantize"]


@dataclass(frozen=True)
class Variant:
    """A machine that kernels are compiled for: what LLVM may use, and what the processor must have.

    `features` are the flags as Linux names them. A kernel of this variant must never run elsewhere.
    Up to `gemv_tokens` tokens its gemv kernel is faster than its gemm kernel (measured).
    """

    name: str
    arch: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    modes: tuple[Mode, ...]
    gemv_tokens: int

    def target(self) -> dict[str, Any]:
        """The TVM target of this variant."""
        target: dict[str, Any] = {"kind": "llvm"}
        if self.mcpu:
            target["mcpu"] = self.mcpu
        if self.mattr:
            target["mattr"] = list(self.mattr)
        return target


JOINED_GROUP = 256
"""Columns of a group up to which a sum of codes times 16-bit values fits int32."""
VNNI = Variant(
    "vnni",
    X86_64,
    "x86-64-v4",
    ("+avx512vnni",),
    FEATURES["vnni"],
    ("int16", "int8"),
    8,
)
AVX2 = Variant("avx2", X86_64, "x86-64-v3", (), FEATURES["avx2"], ("int16",), 3)


def host_variants() -> dict[str, Variant]:
    """The variants that this machine can compile for, best first, by name."""
    machine = platform.machine()
    if machine in (X86_64, "AMD64"):
        return {variant.name: variant for variant in (VNNI, AVX2)}
    return {"plain": Variant("plain", machine, "", (), (), ("float32",), 2)}


def threads_meet(variant: str) -> bool:
    """Whether programs run on several threads; the barrier is written for x86 only."""
    return host_variants()[variant].arch == X86_64


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. N, K and tokens are run-time symbols; everything here is compiled in.

    `bits` are the ids of the formats that it reads (1 to 8: bit-widths). `panel`, `block_cols` and
    `bits` are 0 and () for `quantize` and `gather_quantize`, which depend
    on the group only.
    """

    variant: str
    kind: Kind
    mode: Mode
    group: int
    panel: int = 0
    block_cols: int = 0
    bits: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Symbol, file and cache name."""
        name = f"scalebits_{self.variant}_{self.kind}_{self.mode}_g{self.group}"
        if not self.bits:
            return name
        return f"{name}_p{self.panel}_c{self.block_cols}_b{joined(self.bits)}"

    @property
    def row_groups(self) -> int:
        """16-row groups of a panel."""
        return self.panel // LANES

    @property
    def planes(self) -> int:
        """int8 planes of an activation: 2 (high and low byte) in int16, else 1."""
        return 2 if self.mode == "int16" else 1

    @property
    def madd(self) -> bool:
        """Whether products are of 16-bit numbers (vpmaddwd), not of bytes (vpdpbusd)."""
        return self.variant == AVX2.name and self.mode == "int16"


@dataclass(frozen=True)
class OpSpec:
    """A kernel of any other op. `dtype` is that of the dense weight it reads, if any."""

    variant: str
    kind: str
    dtype: str = ""

    @property
    def key(self) -> str:
        """Symbol, file and cache name."""
        return f"scalebits_{self.variant}_{self.kind}{f'_{self.dtype}' if self.dtype else ''}"

    @property
    def wide(self) -> bool:
        """Whether there are 32 registers of 512 bits, else 16 of 256 are assumed."""
        return "avx512f" in host_variants()[self.variant].features


OPS = (
    *("positions", "rms_norm", "layer_norm", "rope", "store_keys", "store_values", "attention"),
    *("silu", "gelu", "gelu_tanh", "relu", "tanh", "scale", "bias", "add", "mul", "silu_mul"),
)
TABLE_OPS = ("embedding", "dense")


def op_specs(variant: str, dtypes: Iterable[str]) -> list[OpSpec]:
    """The kernels of every op that is not a packed matrix; of dense ones for some dtypes."""
    tables = [OpSpec(variant, kind, dtype) for kind in TABLE_OPS for dtype in sorted(dtypes)]
    return [*(OpSpec(variant, kind) for kind in OPS), *tables]


def select_specs(
    matrices: Sequence[tuple[BlockLayout, NDArray[np.uint8]]],
    dtypes: Iterable[str] = (),
    gathered: Iterable[int] = (),
) -> tuple[dict[str, list[KernelSpec | OpSpec]], dict[str, Any]]:
    """The kernels for packed matrices, each given as its layout and u8 bit grid, and all other ops.

    dtypes: of the dense matrices, "float32", "bfloat16", "float16". gathered: the groups of those
    packed matrices whose input is read through an index. Returns the specs by variant, and the
    JSON-able dispatch table for the manifest. Matrices of the same panel height, group and block
    columns share kernels, which then know the widths of all of them. Raises `TargetError` if there
    are no matrices.
    """
    if not matrices:
        raise TargetError("the model has no packed matrix, so there is no kernel to generate")
    shapes: dict[tuple[int, int, int], set[int]] = {}
    for layout, bits in matrices:
        shape = (layout.group, layout.panel, layout.block_cols)
        shapes.setdefault(shape, set()).update(np.unique(bits).tolist())
    groups, by_index = sorted({group for group, _, _ in shapes}), sorted(set(gathered))
    specs: dict[str, list[KernelSpec | OpSpec]] = {}
    for name in host_variants():
        kernels = specs.setdefault(name, [])
        for mode in _modes(name, groups):
            kernels += [KernelSpec(name, "quantize", mode, group) for group in groups]
            kernels += [KernelSpec(name, "gather_quantize", mode, group) for group in by_index]
            for (group, panel, cols), widths in sorted(shapes.items()):
                bits = tuple(sorted(widths))
                kernels.append(KernelSpec(name, "gemv", mode, group, panel, cols, bits))
                kernels.append(KernelSpec(name, "gemm", mode, group, panel, cols, bits))
        kernels += op_specs(name, dtypes)
    records = tuple(variant_record(name, specs[name]) for name in specs)
    return specs, plain(CpuDispatch(FORMAT_VERSION, records))


def _modes(variant: str, groups: Sequence[int]) -> tuple[Mode, ...]:
    """The arithmetics of a variant for matrices with these groups."""
    if variant == AVX2.name and max(groups) > JOINED_GROUP:
        return ("float32",)
    return host_variants()[variant].modes


def variant_record(name: str, specs: Sequence[KernelSpec | OpSpec]) -> VariantRecord:
    """What the dispatch table says of a variant with these kernels, in this order."""
    variant = host_variants()[name]
    modes: list[Mode] = []
    for spec in specs:
        if isinstance(spec, KernelSpec) and spec.mode not in modes:
            modes.append(spec.mode)
    return VariantRecord(
        name=name,
        arch=variant.arch,
        features=variant.features,
        modes=tuple(modes),
        gemv_tokens=variant.gemv_tokens,
        threads=threads_meet(name),
        kernels=tuple(_record(spec) for spec in specs),
    )


def _record(spec: KernelSpec | OpSpec) -> KernelRecord:
    if isinstance(spec, OpSpec):
        return KernelRecord(spec.kind, spec.dtype)
    return KernelRecord(
        spec.kind, "", spec.mode, spec.group, spec.panel, spec.block_cols, spec.bits
    )
