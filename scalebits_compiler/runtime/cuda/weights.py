"""The weights of an artifact on a device. Bytes go from the file to the device as they are."""

from __future__ import annotations

import torch

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cuda.kernels import Kernels, TiledLinear
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN, MODEL_FILE


class DeviceWeights:
    """Weights by symbol, read when an op first asks for them and kept."""

    def __init__(self, artifact: Artifact, kernels: Kernels) -> None:
        from safetensors import safe_open

        self.device, self.arithmetic = kernels.device, kernels.arithmetic
        self._artifact = artifact
        self._kernels = kernels
        self._raw: dict[str, torch.Tensor] = {}
        self._cast: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._packed: dict[tuple[str, str], TiledLinear] = {}
        path = str(artifact.path / MODEL_FILE)
        self._file = safe_open(path, framework="pt", device=str(kernels.device))

    def raw(self, symbol: str) -> torch.Tensor:
        """A tensor as stored."""
        if symbol not in self._raw:
            self._raw[symbol] = self._file.get_tensor(symbol)
        return self._raw[symbol]

    def float32(self, symbol: str) -> torch.Tensor:
        """A dense weight as float32, converted once."""
        return self._as(symbol, torch.float32)

    def dense(self, symbol: str) -> torch.Tensor:
        """A dense weight in the activations' dtype, converted once."""
        return self._as(symbol, self._kernels.dtype)

    def table(self, symbol: str) -> torch.Tensor:
        """An embedding table in the activations' dtype; a packed one is unpacked, once."""
        key = (symbol, self._kernels.dtype)
        if self._artifact.manifest.weights[symbol].kind == "packed" and key not in self._cast:
            self._cast[key] = self.packed(symbol).dense().T.contiguous()
        return self._as(symbol, self._kernels.dtype)

    def packed(self, symbol: str, index: str = "") -> TiledLinear:
        """A packed matrix, ready to be applied.

        index: the weight that the channels of its input are gathered by; empty where they are read
        as they are.
        """
        key = (symbol, index)
        if key not in self._packed:
            layout, _, bits = self._artifact.matrix(symbol)
            if not isinstance(layout, TileLayout):
                raise ArtifactError(
                    f"{self._artifact.path}: the bytes of {symbol} are not in the order of the"
                    " cuda target",
                    help=COMPILE_AGAIN,
                )
            arena, order = self.raw(f"{symbol}.packed"), None
            if index:
                order = torch.from_numpy(self._artifact.index(index).copy()).to(self.device)
            self._packed[key] = TiledLinear(self._kernels, layout, arena, bits, order)
        return self._packed[key]

    def _as(self, symbol: str, dtype: torch.dtype) -> torch.Tensor:
        key = (symbol, dtype)
        if key not in self._cast:
            self._cast[key] = self._file.get_tensor(symbol).to(dtype)
        return self._cast[key]
