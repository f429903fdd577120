"""llama.cpp's matrix kernels, called through its own compute graph; see README.md for the build."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from measure import Case, copies
from numpy.typing import NDArray

VARIABLE = "GGML_LIBRARIES"
TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
REPACKED = ("Q2_K", "Q4_K")
"""The types that this ggml stores in another order for vector units."""
DISTINCT_ROWS = 256
"""Quantised rows that are repeated to the height of a matrix; what they hold does not matter."""
_FLOAT32 = 0
_CONTEXT_BYTES = 1 << 20

_REPACK = "_Z35ggml_backend_cpu_repack_buffer_typev"  # a C++ function


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_log_set": (None, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    _REPACK: (c_void_p, ()),
}


class Ggml:
    """The libraries of a folder, `threads` for every product."""

    def __init__(self, folder: Path, threads: int) -> None:
        libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu")
        ]
        self.c: Any = SimpleNamespace()
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self.c, name, function)
        self._quiet = ctypes.CFUNCTYPE(None, c_int, c_void_p, c_void_p)(lambda *_: None)
        self.c.ggml_log_set(ctypes.cast(self._quiet, c_void_p), None)
        self.backend = self.c.ggml_backend_cpu_init()
        self.c.ggml_backend_cpu_set_n_threads(self.backend, threads)

    @classmethod
    def find(cls, threads: int) -> Ggml | None:
        """The libraries in the folder that the environment names; prints why there are none."""
        folder = os.environ.get(VARIABLE)
        if not folder:
            print(f"llama.cpp's kernels are left out: {VARIABLE} names no folder (see README.md)")
            return None
        try:
            return cls(Path(folder), threads)
        except (OSError, StopIteration) as error:
            print(f"llama.cpp's kernels are left out: {folder}: {error or 'another ggml'}")
            return None

    def case(
        self, name: str, kind: str, weights: NDArray[np.float32], x: NDArray, cold: bool
    ) -> Case | None:
        """y = x W^T; `weights` f32[DISTINCT_ROWS or N, K] are repeated to N rows.

        None, with a message, if this ggml does not multiply the kind on this processor.
        """
        rows = self._quantize(TYPES[kind.split()[0]], weights)
        products = [
            _Product(self, kind, rows, weights.shape[1], x)
            for _ in range(copies(rows.nbytes, cold))
        ]
        if not products[0].supported():
            print(f"{name} is left out: this ggml has no kernel of it for this processor and shape")
            return None
        for product in products:
            product.fill()
        products[0].check(weights, x)
        return Case(name, [product.run for product in products])

    def _quantize(self, kind: int, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, cols = weights.shape
        some = np.ascontiguousarray(weights[:DISTINCT_ROWS])
        out = np.empty((len(some), self.c.ggml_row_size(kind, cols)), np.uint8)
        data = (some.ctypes.data, out.ctypes.data)
        self.c.ggml_quantize_chunk(kind, *data, 0, len(some), cols, None)
        return np.resize(out, (rows, out.shape[1]))


class _Product:
    """A graph with one multiplication, its weights in the plain or the repacked order."""

    def __init__(
        self, lib: Ggml, kind: str, rows: NDArray[np.uint8], cols: int, x: NDArray[np.float32]
    ) -> None:
        self._lib, self._backend, self._shape = lib, lib.backend, (len(x), len(rows))
        stored, inner = self._context(), self._context()
        weight = lib.c.ggml_new_tensor_2d(stored, TYPES[kind.split()[0]], cols, len(rows))
        repacked = kind.endswith("repacked")
        order = getattr(lib.c, _REPACK if repacked else "ggml_backend_cpu_buffer_type")()
        lib.c.ggml_backend_alloc_ctx_tensors_from_buft(stored, order)
        source = lib.c.ggml_new_tensor_2d(inner, _FLOAT32, cols, len(x))
        self._result = lib.c.ggml_mul_mat(inner, weight, source)
        self._graph = lib.c.ggml_new_graph(inner)
        lib.c.ggml_build_forward_expand(self._graph, self._result)
        lib.c.ggml_backend_alloc_ctx_tensors(inner, self._backend)
        self._data = ((weight, rows), (source, x))

    def _context(self) -> int:
        return self._lib.c.ggml_init(_InitParams(_CONTEXT_BYTES, None, True))

    def supported(self) -> bool:
        """Whether the backend multiplies weights in this order.

        Which types are repacked depends on the processor: of Q2_K only those with AVX-512. Where a
        type is not, setting the tensor would call a null pointer.
        """
        return self._lib.c.ggml_backend_supports_op(self._backend, self._result)

    def fill(self) -> None:
        """Set weights and x; only of a product that is supported."""
        for tensor, values in self._data:
            self._lib.c.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def run(self) -> None:
        status = self._lib.c.ggml_backend_graph_compute(self._backend, self._graph)
        assert status == 0, status

    def check(self, weights: NDArray[np.float32], x: NDArray[np.float32]) -> None:
        """The product must be that of the weights, up to their rounding to 2 to 4 bits."""
        self.run()
        found = np.empty(self._shape, np.float32)
        self._lib.c.ggml_backend_tensor_get(self._result, found.ctypes.data, 0, found.nbytes)
        expected = x @ weights[:DISTINCT_ROWS].T
        found = found[:, : expected.shape[1]]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 0.5, f"llama.cpp's product is {error:.2f} away: another ggml?"
