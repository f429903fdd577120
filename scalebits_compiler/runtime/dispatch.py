"""The tables that lead from a matrix to its kernels: `dispatch` of the manifest (layer L1).

A table of the cpu target is sealed: the library exports the function of a variant under a name that
holds the digest of the variant's record. So a table that is not the library's finds no function,
and kernel numbers, widths and token counts are those that were compiled in. In a table of the cuda
target the name of a kernel says what it was compiled for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.formats import unknown
from scalebits_compiler.numerics.layout import FORMAT_VERSION, PANEL_HEIGHTS, BlockLayout
from scalebits_compiler.numerics.tiles import MAX_GROUP
from scalebits_compiler.runtime.cpu.isa import FEATURES, X86_64
from scalebits_compiler.runtime.cuda.spec import KernelSpec
from scalebits_compiler.runtime.schema import COMPILE_AGAIN, Count, Size, convert

Mode = Literal["int16", "int8", "float32"]
_DIGEST_DIGITS = 16


class KernelRecord(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A kernel of the library; its place in the list is its number in programs.

    Those of packed matrices have an arithmetic `mode` and what they were compiled for; those of
    other ops at most the `dtype` of a dense weight.
    """

    kind: str
    dtype: str = ""
    mode: Mode | Literal[""] = ""
    group: Count = 0
    panel: Count = 0
    block_cols: Count = 0
    bits: tuple[int, ...] = ()


class VariantRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Kernels for one kind of processor; `codegen.tvm.spec.Variant` explains the fields."""

    name: str
    arch: str
    features: tuple[str, ...]
    modes: tuple[Mode, ...]
    gemv_tokens: Size
    threads: bool
    kernels: tuple[KernelRecord, ...]

    @property
    def run(self) -> str:
        """The name of the function that runs programs of these kernels."""
        text = json.dumps(msgspec.to_builtins(self), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"scalebits_{self.name}_run_{digest[:_DIGEST_DIGITS]}"


class CpuDispatch(Struct, frozen=True, forbid_unknown_fields=True):
    """The kernels of an artifact for CPUs: the variants of a library, best first."""

    version: int
    variants: tuple[VariantRecord, ...]


def cpu_dispatch(table: Mapping[str, Any], where: str) -> CpuDispatch:
    """The kernel table of the cpu target. Raises `ArtifactError` unless it is one."""
    check_version(table, where)
    found = convert(table, CpuDispatch, where)
    for index, variant in enumerate(found.variants):
        known = variant.arch == X86_64 and FEATURES.get(variant.name) == variant.features
        other = variant.arch != X86_64 and variant.name not in FEATURES and not variant.features
        if not (known or other):
            raise ArtifactError(
                f"{where}: variants[{index}].features: these are not the features of"
                f" {variant.name!r} on {variant.arch}",
                help=COMPILE_AGAIN,
            )
        if not variant.modes or not variant.kernels:
            raise ArtifactError(
                f"{where}: variants[{index}]: it has no kernels", help=COMPILE_AGAIN
            )
    if not found.variants:
        raise ArtifactError(f"{where}: variants: there are none", help=COMPILE_AGAIN)
    return found


def check_version(table: Mapping[str, Any], where: str) -> None:
    """Raise `ArtifactError` for a kernel table of another version."""
    if table.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: kernel table of version {table.get('version')}, expected {FORMAT_VERSION}",
            help="compile the model again with this version of scalebits_compiler",
        )


class Bucket(Struct, frozen=True, forbid_unknown_fields=True):
    """The kernel for up to `tokens` tokens: its tile, and programs wanted per multiprocessor."""

    tokens: Size
    kernel: str
    tile_m: Size
    tile_n: Size
    programs: Annotated[int, Meta(ge=1, le=64)]


class CudaMatrix(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The kernels of matrices of one kind; beyond: of more tokens than the last bucket has."""

    panel: Size
    group: Size
    ragged: bool
    bits: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    beyond: str
    gather: bool = False


class CudaBinary(Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled kernel: its file, bytes of shared memory, pointers that Triton has added."""

    file: str
    shared: Annotated[int, Meta(ge=0, le=228 << 10)]
    scratch: Annotated[int, Meta(ge=0, le=8)]


class CudaKernel(Struct, frozen=True, forbid_unknown_fields=True):
    """How a kernel is started, and its binaries by architecture."""

    warps: Size
    stages: Size
    binaries: Mapping[str, CudaBinary]


class CudaDispatch(Struct, frozen=True, forbid_unknown_fields=True):
    """The kernels of an artifact for GPUs."""

    version: int
    dtype: Literal["fp16", "bf16"]
    matrices: tuple[CudaMatrix, ...]
    kernels: Mapping[str, CudaKernel]

    def knows(self, layout: BlockLayout, bits: NDArray[np.uint8], gather: bool) -> bool:
        """Whether there are kernels for a matrix, all of its formats included."""
        ragged = layout.cols % layout.group != 0
        shape = (layout.panel, layout.group, ragged, gather)
        return any(
            shape == (found.panel, found.group, found.ragged, found.gather)
            and set(np.unique(bits).tolist()) <= set(found.bits)
            for found in self.matrices
        )


def cuda_dispatch(table: Mapping[str, Any], files: Container[str], where: str) -> CudaDispatch:
    """The kernel table of the cuda target; files: those that the artifact lists.

    Raises `ArtifactError` unless it is one, and every number of it is what its kernels were
    compiled for.
    """
    check_version(table, where)
    found = convert(table, CudaDispatch, where)
    specs: dict[str, KernelSpec] = {}
    place = "matrices"
    try:
        for index, matrix in enumerate(found.matrices):
            place = f"matrices[{index}]"
            specs |= {spec.key: spec for spec in _specs(matrix, found.dtype)}
        shapes = {(m.panel, m.group, m.ragged, m.gather) for m in found.matrices}
        place = "matrices"
        _check(0 < len(shapes) == len(found.matrices), "none, or two for the same matrices")
        place = "kernels"
        _check(specs.keys() == found.kernels.keys(), "these are not the kernels of the matrices")
        for name, spec in specs.items():
            place, kernel = f"kernels.{name}", found.kernels[name]
            started = (kernel.warps, kernel.stages)
            _check(started == (spec.warps, spec.stages), "it has other warps or stages")
            for arch, binary in kernel.binaries.items():
                _check(re.fullmatch(r"sm_[1-9][0-9]{1,2}", arch) is not None, f"{arch!r}")
                known = binary.file == f"kernels/{name}.{arch}.cubin" and binary.file in files
                _check(known, f"{binary.file!r} is not its binary for {arch}")
    except ValueError as problem:
        raise ArtifactError(f"{where}: {place}: {problem}", help=COMPILE_AGAIN) from None
    return found


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _specs(matrix: CudaMatrix, dtype: Literal["fp16", "bf16"]) -> Iterator[KernelSpec]:
    """The kernels that an entry names. ValueError unless its numbers are theirs."""
    bits, tokens = matrix.bits, [bucket.tokens for bucket in matrix.buckets]
    _check(matrix.panel in PANEL_HEIGHTS, f"panels of {matrix.panel} rows")
    _check(matrix.group % 32 == 0 and matrix.group <= MAX_GROUP, f"groups of {matrix.group}")
    known = bool(bits) and list(bits) == sorted(set(bits)) and not unknown(bits)
    _check(known, f"formats {list(bits)}")
    _check(tokens == sorted(set(tokens)), "the tokens of its buckets do not rise")
    whole = KernelSpec(
        "dequantize", dtype, matrix.panel, matrix.group, bits, matrix.ragged, gather=matrix.gather
    )
    _check(matrix.beyond == whole.key, f"{matrix.beyond!r} is not its kernel {whole.key!r}")
    yield whole
    for bucket in matrix.buckets:
        if bucket.tile_m == 1:
            spec = replace(whole, kind="matvec")
            _check(bucket.tokens == 1, f"{spec.key!r} is for one token")
        else:
            spec = replace(whole, kind="matmul", tile_m=bucket.tile_m)
        _check(
            (bucket.kernel, bucket.tile_n) == (spec.key, spec.tile_n),
            f"{bucket.kernel!r} with tiles of {bucket.tile_m} x {bucket.tile_n} is not {spec.key!r}"
            f" with tiles of {bucket.tile_m} x {spec.tile_n}",
        )
        yield spec
