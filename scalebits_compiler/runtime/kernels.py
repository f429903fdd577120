"""Compiled CPU kernels: loading, choice by processor, the packed linear layer (layer L1)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics.layout import FORMAT_VERSION, BlockLayout
from scalebits_compiler.runtime.cpu_features import cpu_features
from scalebits_compiler.runtime.variants import EXACT, choose_mode, choose_variant

THREAD_WORK = 1 << 23
"""Multiply-adds below which a thread is not worth its ~25 us of hand-over."""

F32 = NDArray[np.float32]
_PLANES = {"int16": (2, np.int8), "int8": (1, np.int8), "float32": (1, np.float32)}
Function = Callable[..., None]


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """Activations x[tokens, cols] as the matrix kernels read them; see `KernelLibrary.quantize`.

    values: [groups, padded tokens, planes, group], int8, in mode float32 float32. scales:
    f32[groups, padded tokens, 2], the step and the sum of x of each group.
    """

    tokens: int
    cols: int
    group: int
    mode: str
    values: NDArray[np.int8] | F32
    scales: F32

    @cached_property
    def arguments(self) -> tuple[Any, Any]:
        """Both arrays as kernel arguments."""
        return _view(self.values), _view(self.scales)


class KernelLibrary:
    """The kernels of an artifact that this processor can run; made by `open`.

    variant: name of the chosen variant. mode: its arithmetic, as `variants` explains it.
    threads: how many threads large products are split over. gemv_tokens: up to so many tokens use
    the gemv kernel; beyond, gemm works on multiples of tile_tokens, chunk_tokens at a time.
    """

    def __init__(self, module: Any, variant: dict[str, Any], mode: str) -> None:
        self.variant: str = variant["name"]
        self.mode = mode
        self.gemv_tokens: int = variant["gemv_tokens"]
        self.tile_tokens: int = variant["tile_tokens"]
        self.chunk_tokens: int = variant["chunk_tokens"]
        self.threads = 1
        self._module = module
        self._kernels = {
            (kernel["kind"], kernel["group"], kernel["panel"], kernel["block_cols"]): kernel
            for kernel in variant["kernels"]
            if kernel["mode"] == mode
        }

    @classmethod
    def open(
        cls,
        path: Path,
        dispatch: dict[str, Any],
        features: frozenset[str] | None = None,
        activations: str = EXACT,
    ) -> KernelLibrary:
        """Load the shared object `path`; choose the first variant of `dispatch` that runs here.

        `features` are processor flags (default: those of this one). Raises `ArtifactError` if no
        variant runs here, or the file or table is damaged; `TargetError` if the chosen variant
        does not have the `activations`.
        """
        if dispatch.get("version") != FORMAT_VERSION:
            raise ArtifactError(
                f"kernel table of version {dispatch.get('version')}, expected {FORMAT_VERSION}",
                help="compile the model again with this version of scalebits_compiler",
            )
        flags = cpu_features() if features is None else features
        if "variants" not in dispatch:
            raise ArtifactError("the kernel table lacks 'variants'", help="compile the model again")
        variant = choose_variant(dispatch["variants"], flags)
        mode = choose_mode(variant, activations)
        if not path.is_file():
            raise ArtifactError(f"kernel file {path} is missing", help="compile the model again")
        try:
            module = tvm_ffi.load_module(str(path))
        except (RuntimeError, OSError) as error:
            raise ArtifactError(
                f"kernel file {path} cannot be loaded: {error}", help="compile the model again"
            ) from None
        return cls(module, variant, mode)

    def function(
        self,
        kind: str,
        group: int,
        panel: int = 0,
        block_cols: int = 0,
        bits: frozenset[int] = frozenset(),
    ) -> Function:
        """The kernel of these properties that knows the widths `bits`, or `ArtifactError`."""
        kernel = self._kernels.get((kind, group, panel, block_cols))
        if kernel is None or not bits <= set(kernel["bits"]):
            raise ArtifactError(
                f"the artifact has no {self.variant} {kind} kernel for group {group},"
                f" panel {panel}, block columns {block_cols} and widths {sorted(bits)}",
                help="compile the model again; its kernels and its weights do not belong together",
            )
        try:
            return self._module.get_function(kernel["symbol"])
        except AttributeError:
            raise ArtifactError(
                f"the kernel file has no function {kernel['symbol']}",
                help="compile the model again; its kernels and its manifest do not belong together",
            ) from None

    def quantize(self, x: F32, group: int) -> QuantizedInput:
        """Quantise x f32[tokens, K] once for all matrices that read it in groups of `group`."""
        if x.ndim != 2 or x.dtype != np.float32 or not x.size:
            raise TargetError(
                f"activations must be float32[tokens, K], found {x.dtype}{list(x.shape)}"
            )
        tokens, cols = x.shape
        groups, tile = -(-cols // group), self.tile_tokens
        padded = tokens if tokens <= self.gemv_tokens else -(-tokens // tile) * tile
        if cols % group:
            source = np.zeros((tokens, groups * group), np.float32)
            source[:, :cols] = x
        else:
            source = np.ascontiguousarray(x)
        planes, dtype = _PLANES[self.mode]
        # Padding tokens are computed and thrown away; zeros keep slow denormals out of them.
        make = np.empty if padded == tokens else np.zeros
        values: NDArray[Any] = make((groups, padded, planes, group), dtype)
        scales: F32 = make((groups, padded, 2), np.float32)
        result = QuantizedInput(tokens, cols, group, self.mode, values, scales)
        self._quantizer(group)(_view(source), *result.arguments)
        return result

    def _quantizer(self, group: int) -> Function:
        found = self._quantizers.get(group)
        if found is None:
            found = self._quantizers[group] = self.function("quantize", group)
        return found

    @cached_property
    def _quantizers(self) -> dict[int, Function]:
        return {}

    def each_range(self, panels: int, work: int, run: Callable[[int, int], None]) -> None:
        """Cover 0..panels by run(lo, hi), on threads if `work` multiply-adds are worth it."""
        parts = max(1, min(self.threads, panels, work // THREAD_WORK))
        bounds = [panels * part // parts for part in range(parts + 1)]
        if parts == 1:
            run(0, panels)
            return
        futures = [self._pool.submit(run, lo, hi) for lo, hi in pairwise(bounds[1:])]
        run(*bounds[:2])
        for future in futures:
            future.result()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(thread_name_prefix="scalebits")


class PackedLinear:
    """y = x W^T for one packed matrix W[N, K]."""

    def __init__(
        self,
        library: KernelLibrary,
        layout: BlockLayout,
        arena: NDArray[np.uint8],
        bits: NDArray[np.uint8],
    ) -> None:
        """`arena` u8[nbytes] is used in place and may be read-only; `bits` is the u8 grid.

        Raises `ArtifactError` if the arena's size is wrong or the library lacks the kernels.
        """
        if arena.dtype != np.uint8 or arena.shape != (layout.nbytes(bits),):
            raise ArtifactError(
                f"packed matrix {layout.rows} x {layout.cols}: expected"
                f" {layout.nbytes(bits)} bytes, found {arena.dtype}{list(arena.shape)}",
                help="the file is damaged; compile the model again",
            )
        self.library = library
        self.layout = layout
        widths = frozenset(np.unique(bits).tolist())
        shape = (layout.group, layout.panel, layout.block_cols, widths)
        self._gemv = library.function("gemv", *shape)
        self._gemm = library.function("gemm", *shape)
        self._arrays = (np.ascontiguousarray(arena), *layout.metadata(bits))
        self._tables = (*(_view(array) for array in self._arrays), layout.cols)

    def __call__(self, x: F32 | QuantizedInput) -> F32:
        """f32[tokens, N] for x f32[tokens, K], given as such or quantised by this library."""
        layout, library = self.layout, self.library
        if isinstance(x, np.ndarray):
            x = library.quantize(x, layout.group)
        if (x.cols, x.group, x.mode) != (layout.cols, layout.group, library.mode):
            raise TargetError(
                f"activations of {x.cols} columns, groups of {x.group}, mode {x.mode} do not fit"
                f" a matrix of {layout.cols} columns, groups of {layout.group}, mode {library.mode}"
            )
        y = np.empty((x.tokens, layout.rows), np.float32)
        run = self._gemv_range if x.tokens <= library.gemv_tokens else self._gemm_range
        work = layout.rows * layout.cols * x.tokens
        library.each_range(layout.panels, work, run(x, _view(y)))
        return y

    def _gemv_range(self, x: QuantizedInput, y: Any) -> Callable[[int, int], None]:
        arguments = (*self._tables, *x.arguments, y)
        return lambda lo, hi: self._gemv(*arguments, lo, hi)

    def _gemm_range(self, x: QuantizedInput, y: Any) -> Callable[[int, int], None]:
        panel, group = self.layout.panel, self.layout.group
        dtype = np.float32 if x.mode == "float32" else np.uint8

        def run(lo: int, hi: int) -> None:
            codes = np.empty(panel * group, dtype)
            total = np.empty((self.library.chunk_tokens, panel), np.float32)
            scratch = (_view(codes), _view(total))
            self._gemm(*self._tables, *x.arguments, y, *scratch, lo, hi)

        return run


def _view(array: NDArray[Any]) -> Any:
    """The array as a kernel argument, without a copy. The caller keeps the array alive."""
    if not array.flags.writeable:
        # DLPack has no read-only views in older numpy; the kernels only read what is read-only.
        raw: Any = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
        array = np.frombuffer(raw, array.dtype).reshape(array.shape)
    return tvm_ffi.from_dlpack(array)
