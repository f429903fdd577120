"""The weights of an artifact in the form that ops read, made on first use and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.runtime.artifact import Artifact, PackedMatrix, StoredTensor

if TYPE_CHECKING:
    from scalebits_compiler.runtime.cpu.library import KernelLibrary, PackedLinear

F32 = NDArray[np.float32]


class DequantizedLinear:
    """A packed matrix as plain float32: what runs where an artifact has no kernels."""

    def __init__(self, matrix: F32) -> None:
        self.matrix = matrix

    def __call__(self, x: F32) -> F32:
        """f32[tokens, N] for x f32[tokens, K]."""
        return x @ self.matrix.T


class PackedRows:
    """A packed matrix of which single rows are read: only their panels are unpacked."""

    def __init__(self, matrix: PackedMatrix) -> None:
        layout, self._arena, self._bits = matrix
        self.height, self.columns = layout.panel, layout.cols
        self._panels_per_block = layout.block_rows // layout.panel
        self._first = layout.metadata(self._bits).offsets
        # One panel is a packed matrix of its own, in the bytes of the whole one.
        self._panel = type(layout)(
            layout.panel, layout.cols, layout.panel, layout.block_cols, layout.group
        )

    def __call__(self, index: NDArray[np.int64]) -> F32:
        """float32 [..., columns] of the rows `index`."""
        out = np.empty((*index.shape, self.columns), np.float32)
        panels = index // self.height
        for panel in np.unique(panels):
            here = panels == panel
            out[here] = self._dequantized(int(panel))[index[here] % self.height]
        return out

    def _dequantized(self, panel: int) -> F32:
        row = panel // self._panels_per_block
        bits, start = self._bits[row : row + 1], self._first[panel]
        return self._panel.dequantize(self._arena[start : start + self._panel.nbytes(bits)], bits)


class Weights:
    """Weights by symbol. With a kernel library, packed bytes are used where they are mapped."""

    def __init__(self, artifact: Artifact, library: KernelLibrary | None) -> None:
        self.library = library
        self._artifact = artifact
        self._dense: dict[str, F32] = {}
        self._packed: dict[str, PackedLinear | DequantizedLinear] = {}
        self._tables: dict[str, PackedRows] = {}
        self._indices: dict[str, NDArray[np.uint16]] = {}

    def float32(self, symbol: str) -> F32:
        """A dense weight as float32, converted once."""
        if symbol not in self._dense:
            self._dense[symbol] = self._artifact.tensors[symbol].float32()
        return self._dense[symbol]

    def rows(self, symbol: str, index: NDArray[np.int64]) -> F32:
        """float32 rows of a weight; only these are read from the file, or unpacked."""
        if self.is_packed(symbol):
            if symbol not in self._tables:
                self._tables[symbol] = PackedRows(self._artifact.matrix(symbol))
            return self._tables[symbol](index)
        return self._artifact.tensors[symbol].rows(index)

    def raw(self, symbol: str) -> NDArray[Any]:
        """A dense weight as stored."""
        return self._artifact.tensors[symbol].data

    def index(self, symbol: str) -> NDArray[np.uint16]:
        """The index that a matrix's input is read by."""
        if symbol not in self._indices:
            self._indices[symbol] = self._artifact.index(symbol)
        return self._indices[symbol]

    def is_packed(self, symbol: str) -> bool:
        """Whether a weight is packed."""
        return self._artifact.manifest.weights[symbol].kind == "packed"

    def stored(self, symbol: str) -> StoredTensor:
        """A dense weight as it is mapped, and its type."""
        return self._artifact.tensors[symbol]

    def shape(self, symbol: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self._artifact.manifest.weights[symbol].shape

    def group(self, symbol: str) -> int:
        """Columns per scale of a packed matrix."""
        return self._artifact.manifest.weights[symbol].group or 0

    def compiled(self, symbol: str) -> PackedLinear:
        """A packed matrix that kernels are there for."""
        matrix = self.packed(symbol)
        if isinstance(matrix, DequantizedLinear):
            raise TypeError(f"{symbol} has no kernels")
        return matrix

    def height(self, symbol: str) -> int:
        """Rows of a matrix: output channels."""
        return self._artifact.manifest.weights[symbol].shape[0]

    def packed(self, symbol: str) -> PackedLinear | DequantizedLinear:
        """A packed matrix, ready to be applied."""
        if symbol not in self._packed:
            self._packed[symbol] = self._apply(symbol)
        return self._packed[symbol]

    def _apply(self, symbol: str) -> PackedLinear | DequantizedLinear:
        layout, arena, bits = self._artifact.matrix(symbol)
        if self.library is None:
            return DequantizedLinear(layout.dequantize(arena, bits))
        from scalebits_compiler.runtime.cpu.library import PackedLinear

        return PackedLinear(self.library, layout, arena, bits)
