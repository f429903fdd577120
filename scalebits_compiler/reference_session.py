"""An artifact run by the torch definition of each op, with or without its kernels (layer L3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scalebits_compiler.codegen.plan import unplanned
from scalebits_compiler.codegen.reference.executor import Executor
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.roles import embedding_tables, untraced
from scalebits_compiler.plugins import Registry, load_plugins
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cache import Replay
from scalebits_compiler.runtime.session import Session, open_kernels
from scalebits_compiler.runtime.weights import Weights

if TYPE_CHECKING:
    from scalebits_compiler.runtime.kernels import KernelLibrary

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class ReferenceSession(Session):
    """Session with every op by its definition in codegen/reference; slow by intent.

    With a kernel library, packed matrices are multiplied by its kernels: for an artifact without a
    plan.
    """

    def __init__(
        self, artifact: Artifact, registry: Registry, library: KernelLibrary | None = None
    ) -> None:
        module, source = read_module(artifact.path / "module.sbir", registry.ops)
        verify(module, source)
        registry.install_rules()
        self.artifact = artifact
        self.variant = "reference" if library is None else library.variant
        if library is not None:
            self.execution = f"by torch: {why_torch(module)}"
        weights = Weights(artifact, library)
        self.executor = Executor(module, packed=None if library is None else _kernels(weights))
        self.vocabulary = vocabulary(module, artifact.config)
        self.limit = artifact.limit

    def forward(self, ids: ArrayLike, pad: ArrayLike | None = None) -> F32:
        """Logits f32[batch, sequence, vocabulary] of token ids i64[batch, sequence]."""
        tokens = self._tokens(ids)
        return self._logits(tokens, self._pad(pad, tokens))

    def prefill(  # type: ignore[override]
        self, ids: ArrayLike, pad: ArrayLike | None = None, capacity: int = 0
    ) -> tuple[F32, Replay]:
        """Logits f32[batch, vocabulary] after the last id of each row, and what to go on with."""
        tokens = self._tokens(ids)
        replay = Replay(tokens, self._pad(pad, tokens))
        return self._logits(tokens, replay.pad)[:, -1], replay

    def decode(self, ids: ArrayLike, cache: Replay) -> F32:  # type: ignore[override]
        """Logits f32[batch, vocabulary] after one more token i64[batch]."""
        tokens = self._tokens(np.asarray(ids)[:, None], cache.length)
        cache.ids = np.concatenate([cache.ids, tokens], 1)
        return self._logits(cache.ids, cache.pad)[:, -1]

    def _logits(self, tokens: I64, pad: I64 | None) -> F32:
        counts = None if pad is None else torch.from_numpy(pad)
        with torch.no_grad():
            return self.executor.run(torch.from_numpy(tokens), pad=counts).numpy()


def vocabulary(module: Module, config: Mapping[str, Any]) -> int:
    """How many token ids the model knows: the rows of its table, or by its config."""
    tables = embedding_tables(module)
    if tables:
        return module.weight(tables[0]).type.static_shape()[0]
    return int(config["vocab_size"])


def why_torch(module: Module) -> str:
    """Why there is no plan."""
    reason = untraced(module)
    if reason is not None:
        return f"{reason}, so its own code in transformers runs it"
    return unplanned(module.function)


def _kernels(weights: Weights) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def product(symbol: str, x: torch.Tensor) -> torch.Tensor:
        flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
        if not len(flat):
            return x.new_zeros(*x.shape[:-1], weights.height(symbol))
        return torch.from_numpy(weights.packed(symbol)(flat)).reshape(*x.shape[:-1], -1)

    return product


def load_reference(path: str | Path, registry: Registry | None = None) -> ReferenceSession:
    """Open an artifact for the reference target; ArtifactError if it is damaged.

    registry: the ops that the module may have (None: ours and those of installed plugins).
    """
    return ReferenceSession(Artifact.open(path), registry or load_plugins())


def load_with_kernels(
    path: str | Path, activations: str, threads: int | None, registry: Registry | None = None
) -> ReferenceSession:
    """Open an artifact without a plan: torch runs its ops, kernels multiply its packed matrices."""
    artifact = Artifact.open(path)
    library = open_kernels(artifact, activations, threads)
    return ReferenceSession(artifact, registry or load_plugins(), library)
