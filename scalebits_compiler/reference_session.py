"""`--target reference`: an artifact run by the torch definition of each op (layer L3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scalebits_compiler.codegen.reference.executor import Executor
from scalebits_compiler.ir.ops import Embedding
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.plugins import Registry, load_plugins
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.session import Session

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass
class Replay:
    """In place of a key-value cache: all ids so far, i64[batch, length]; a step runs them all."""

    ids: I64
    pad: I64 | None

    @property
    def length(self) -> int:
        """Positions so far."""
        return self.ids.shape[1]


class ReferenceSession(Session):
    """Session with every op by its definition in codegen/reference; slow by intent."""

    def __init__(self, artifact: Artifact, registry: Registry) -> None:
        module, source = read_module(artifact.path / "module.sbir", registry.ops)
        verify(module, source)
        registry.install_rules()
        self.artifact = artifact
        self.variant = "reference"
        self.executor = Executor(module)
        tables = [op.table for op in module.function.ops if isinstance(op, Embedding)]
        self.vocabulary = module.weight(tables[0]).type.static_shape()[0]
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


def load_reference(path: str | Path, registry: Registry | None = None) -> ReferenceSession:
    """Open an artifact for the reference target; ArtifactError if it is damaged.

    registry: the ops that the module may have (None: ours and those of installed plugins).
    """
    return ReferenceSession(Artifact.open(path), registry or load_plugins())
