"""An artifact run by the torch definition of each op, with or without its kernels (layer L3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalebits_compiler.codegen.plan import unplanned
from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.interpreter.executor import Continuation, Executor
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.roles import embedding_tables, untraced
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.plugins import Registry, load_plugins
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cache import Cache, Replay
from scalebits_compiler.runtime.call_lock import CallLock
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN, MODULE_FILE
from scalebits_compiler.runtime.session import Session, check_runs, open_kernels
from scalebits_compiler.runtime.weights import Weights
from scalebits_compiler.sessions.trust import trusted_kernels
from scalebits_compiler.tasks import SEQ2SEQ

if TYPE_CHECKING:
    from scalebits_compiler.runtime.cpu.library import KernelLibrary

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class ReferenceSession(Session):
    """Session with every op by its definition in interpreter/rules.py; slow by intent.

    With a kernel library, packed matrices are multiplied by its kernels: for an artifact without a
    plan.
    """

    def __init__(
        self, artifact: Artifact, registry: Registry, library: KernelLibrary | None = None
    ) -> None:
        module, source = read_module(artifact.path / MODULE_FILE, registry.ops)
        verify(module, source)
        registry.install_rules()
        self.artifact = artifact
        self.calls = CallLock() if library is None else library.calls
        self.variant = "reference" if library is None else library.variant
        if library is not None:
            self.execution = f"by torch: {why_torch(module)}"
        weights, module = Weights(artifact, library), encoder_first(module)
        self.executor = Executor(module, packed=None if library is None else _kernels(weights))
        self.vocabulary = vocabulary(module, artifact.config)
        self.limit = artifact.limit

    @property
    def _no_padding(self) -> str:
        """Our own ops know of padding."""
        ours = not any(isinstance(op, (Aten, Host)) for op in self.executor.module.function.ops)
        return "" if ours else "it has ops that are not ours, whose masks cannot be changed"

    def _forward(self, tokens: I64, pad: I64 | None) -> F32:
        return self._logits(tokens, pad)

    def _prefill(self, tokens: I64, pad: I64 | None, room: int) -> tuple[F32, Cache]:
        return self._logits(tokens, pad)[:, -1], Replay(tokens, pad)

    def _decode(self, tokens: I64, cache: Replay) -> F32:
        ids = np.concatenate([cache.ids, tokens], 1)
        logits = self._logits(ids, cache.pad)[:, -1]
        cache.ids = ids
        return logits

    def _logits(self, tokens: I64, pad: I64 | None) -> F32:
        counts = None if pad is None else torch.from_numpy(pad)
        with torch.no_grad():
            return self.executor.run(torch.from_numpy(tokens), pad=counts).numpy()


@dataclass(eq=False)
class Writing(Replay):
    """What an encoder-decoder has read, and in `ids` what it has written, start token first."""

    text: Continuation


class EncoderDecoderSession(ReferenceSession):
    """Session that reads a prompt once, and then writes a text of its own.

    `forward` gives the logits of the text itself behind the start token, as calibration sees them.
    """

    @property
    def _no_padding(self) -> str:
        """All that was read is attended to."""
        return "it is an encoder-decoder, which attends to all that it reads"

    @property
    def _next_vocabulary(self) -> int:
        """That of the language it writes."""
        return self.executor.module.function.type.shape[-1] or self.vocabulary

    def _prefill(self, tokens: I64, pad: I64 | None, room: int) -> tuple[F32, Cache]:
        first = np.tile(np.array(self._first_tokens()), (len(tokens), 1))
        writing = Writing(first, None, self.executor.continuation(torch.from_numpy(tokens)))
        return self._written(writing.text, first), writing

    def _decode(self, tokens: I64, cache: Writing) -> F32:  # type: ignore[override]
        ids = np.concatenate([cache.ids, tokens], 1)
        logits = self._written(cache.text, ids)
        cache.ids = ids
        return logits

    def _written(self, text: Continuation, ids: I64) -> F32:
        return text.run(torch.from_numpy(ids))[:, -1].numpy()

    def _first_tokens(self) -> list[int]:
        """The start token, and the language or the like that the model wants after it."""
        start = self.executor.module.start_token
        assert start is not None
        forced = self.artifact.generation("forced_bos_token_id")
        if forced is None:
            return [start]
        written = self.executor.module.function.type.shape[-1]
        if not 0 <= forced < (written or 0):
            raise ArtifactError(
                f"{self.artifact.path}: forced_bos_token_id: {forced} is not among the"
                f" {written} tokens that the model writes",
                help=COMPILE_AGAIN,
            )
        return [start, forced]


def encoder_first(module: Module) -> Module:
    """The ops that do not depend on a second argument, if there is one, before those that do."""
    late = {argument.value for argument in module.function.args[1:]}
    first: list[Op] = []
    rest: list[Op] = []
    for op in module.function.ops:
        if late.isdisjoint(op.operands()):
            first.append(op)
        else:
            late.add(op.result)
            rest.append(op)
    return replace(module, function=replace(module.function, ops=(*first, *rest)))


def vocabulary(module: Module, config: Mapping[str, Any]) -> int:
    """How many token ids the model knows: the rows of its table, or by its config."""
    tables = embedding_tables(module)
    if tables:
        return module.weight(tables[0]).type.static_shape()[0]
    # Of a translator it may be told for each of its two languages.
    found = (config.get(name) for name in ("vocab_size", "src_vocab_size"))
    known = next((size for size in found if size is not None), None)
    if known is None:
        raise ArtifactError("config.json: vocab_size: missing field", help=COMPILE_AGAIN)
    return known


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
    return _open(Artifact.open(path), registry)


def load_with_kernels(
    path: str | Path,
    activations: str,
    threads: int | None,
    registry: Registry | None = None,
    trust_kernels: bool = False,
) -> ReferenceSession:
    """Open an artifact without a plan: torch runs its ops, kernels multiply its packed matrices.

    registry as in `load_reference`; trust_kernels as in `sessions.load`.
    """
    artifact = Artifact.open(path)
    check_runs(artifact, activations, threads)
    kernels = trusted_kernels(artifact, trust_kernels, registry)
    library = None if kernels is None else open_kernels(kernels, activations, threads)
    return _open(artifact, registry, library)


def _open(
    artifact: Artifact, registry: Registry | None, library: KernelLibrary | None = None
) -> ReferenceSession:
    two = artifact.manifest.summary.get("task") == SEQ2SEQ
    kind = EncoderDecoderSession if two else ReferenceSession
    return kind(artifact, registry or load_plugins(), library)
