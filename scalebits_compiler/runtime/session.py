"""A loaded artifact: logits, prefill and decode with a cache, generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cache import KVCache, NativeCache, Replay
from scalebits_compiler.runtime.cpu.features import default_threads
from scalebits_compiler.runtime.cpu.isa import ACTIVATIONS, EXACT
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN
from scalebits_compiler.runtime.meter import HostMeter, Meter
from scalebits_compiler.runtime.ops import CallRunner, Frame, RunCall
from scalebits_compiler.runtime.plan import PRODUCTS, Plan, Step, told_by_kind
from scalebits_compiler.runtime.weights import Weights
from scalebits_compiler.tasks import CAUSAL, ENCODER, SEQ2SEQ

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scalebits_compiler.runtime.cpu.library import KernelLibrary
    from scalebits_compiler.runtime.cpu.native import NativeModel
    from scalebits_compiler.runtime.generate import Generation, Prompts

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Cache: TypeAlias = KVCache | NativeCache | Replay
_NO_TEXT = "does not continue a text"
_INSTEAD = {ENCODER: "use embed, or scalebitsc run OUT --prompt TEXT, which prints the embedding"}


def load(
    path: str | Path,
    *,
    activations: str = EXACT,
    threads: int | None = None,
    features: frozenset[str] | None = None,
) -> Session:
    """Open an artifact and make it ready to run.

    activations: "exact" (weight-only semantics, about 3e-5 relative error) or "int8" (rounded to
    8 bits, faster). threads: how many share a step of a large model, a core each; None: as many as
    there are physical cores, see `cpu_features.default_threads`. They sleep between steps, so that
    torch in the same process may use all cores too. features: processor flags, those of this
    machine if None. Raises `ArtifactError` for a damaged artifact or one that this machine cannot
    run, `TargetError` for int8 activations where the processor's kernels have none.
    """
    if activations not in ACTIVATIONS:
        raise UsageError(
            f"unknown activations {activations!r}", help=f"use {' or '.join(ACTIVATIONS)}"
        )
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, it must be 1 or more")
    artifact = Artifact.open(path)
    if artifact.manifest.target["kind"] == "cuda":
        return _open_cuda(artifact, activations)
    return Session(artifact, open_kernels(artifact, activations, threads, features))


def _open_cuda(artifact: Artifact, activations: str) -> Session:
    if activations != EXACT:
        raise UsageError(
            f"{artifact.path} was compiled for the target 'cuda', which has exact activations only",
            help=f"leave --activations {activations} out",
        )
    from scalebits_compiler.runtime.cuda.session import load_cuda

    return load_cuda(artifact)


def open_kernels(
    artifact: Artifact,
    activations: str,
    threads: int | None,
    features: frozenset[str] | None = None,
) -> KernelLibrary | None:
    """The kernels of an artifact for the CPU, None if it has none; raises as `load`."""
    kernels = artifact.manifest.kernels
    if kernels is None:
        return None
    if "variants" not in kernels.dispatch:
        raise ArtifactError(
            f"{artifact.path} was compiled for the target '{artifact.manifest.target['kind']}',"
            " whose kernels this runtime cannot load",
            help="run it with --target reference, or with the runtime of the plugin that built it",
        )
    try:
        from scalebits_compiler.runtime.cpu.library import KernelLibrary
    except ImportError as error:
        raise ArtifactError(
            f"{artifact.path} has compiled kernels, and {error.name} is not installed to load them",
            help='pip install "scalebits-compiler[cpu]"',
        ) from error
    path = artifact.path / kernels.library
    library = KernelLibrary.open(path, dict(kernels.dispatch), features, activations)
    wanted = default_threads() if threads is None else threads
    library.threads = wanted if library.threads_meet else 1
    return library


class Session:
    """Runs one artifact. Made by `load`; safe to use for several caches in turn.

    Where logits are spoken of, an encoder gives its states f32[batch, sequence, channels].

    variant: which compiled kernels run ("reference": none, packed matrices are dequantized).
    arithmetic: that of the products, or the activations' type on a GPU. threads: how many share a
    step of a large model.
    execution: "native" (a step is one call of compiled code), or "step by step" in numpy and why.
    vocabulary: number of token ids. limit: longest sequence that the model knows, None if unknown.
    on_step: if set, called after every op with its name and the seconds it took.
    call_runner: runs the ops that this runtime has not; `sessions.open_session` sets it.
    """

    execution: str = "step by step"
    arithmetic: str = "float32"
    call_runner: CallRunner | None = None
    threads: int = 1
    _native: NativeModel | None = None

    def __init__(self, artifact: Artifact, library: KernelLibrary | None) -> None:
        self.artifact = artifact
        self.variant = "reference" if library is None else library.variant
        if library is not None:
            self.threads, self.arithmetic = library.threads, library.mode
        self._plan = runnable(artifact)
        self._weights = Weights(artifact, library)
        for step in self._plan.steps:
            if step.op in PRODUCTS and library is not None:
                self._weights.packed(step.weights[0])
        self._native, self.execution = _native(self._plan, self._weights, self._call)
        self.vocabulary = self._vocabulary()
        self.limit: int | None = artifact.limit
        self.on_step: Callable[[str, float], None] | None = None

    def forward(self, ids: ArrayLike, pad: ArrayLike | None = None) -> F32:
        """Logits f32[batch, sequence, vocabulary] of token ids i64[batch, sequence].

        pad: i64[batch], how many ids on the left of each row are padding. Raises `UsageError` for
        ids that do not fit the model.
        """
        tokens = self._tokens(ids)
        padded = self._padding(pad, tokens)
        if self._native is not None:
            cache = self._native.new_cache(len(tokens), padded, tokens.shape[1])
            return self._native.run(tokens, cache, False, self.on_step)
        return self._run(tokens, None, padded, last=False)

    def prefill(
        self, ids: ArrayLike, pad: ArrayLike | None = None, capacity: int = 0
    ) -> tuple[F32, Cache]:
        """Logits f32[batch, vocabulary] after the last id of each row, and a cache to go on with.

        pad as in `forward`; capacity: positions to make room for.
        """
        tokens = self._tokens(ids)
        padded, room = self._padding(pad, tokens), max(capacity, tokens.shape[1])
        if self._plan.replays:
            replay = Replay(tokens, padded)
            return self._replayed(replay), replay
        if self._native is not None:
            cache: Cache = self._native.new_cache(len(tokens), padded, room)
        else:
            cache = KVCache(padded, room)
        return self._extend(tokens, cache), cache

    def decode(self, ids: ArrayLike, cache: Cache) -> F32:
        """Logits f32[batch, vocabulary] after one more token i64[batch]; the cache grows by it."""
        tokens = self._tokens(np.asarray(ids)[:, None], cache.length)
        if isinstance(cache, Replay):
            cache.ids = np.concatenate([cache.ids, tokens], 1)
            return self._replayed(cache)
        return self._extend(tokens, cache)

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continue or answer one prompt or several, text or token ids; see `generate.generate`."""
        from scalebits_compiler.runtime.generate import generate
        from scalebits_compiler.runtime.sampling import Sampling

        if not self.generates:
            what = "gives states, not the next token" if self.task == ENCODER else _NO_TEXT
            raise UsageError(
                f"{self.artifact.path} is of the kind {self.task}: it {what}",
                help=_INSTEAD.get(self.task, "use forward, or scalebitsc eval OUT --vs MODEL"),
            )

        sampling = Sampling(temperature, top_k, top_p, seed)
        return generate(self, prompts, max_new_tokens, sampling, stream)

    def meter(self) -> Meter:
        """What measures the memory that the session works in."""
        return HostMeter(self.threads)

    @property
    def task(self) -> str:
        """What `forward` gives, one of tasks.TASKS: logits of the next token, or something else."""
        return self.artifact.manifest.summary.get("task", CAUSAL)

    @property
    def generates(self) -> bool:
        """Whether the model continues a text, or writes one that answers it."""
        return self.task in (CAUSAL, SEQ2SEQ)

    @property
    def skips_padding(self) -> bool:
        """Whether rows of a batch may have padding; else all must have one length."""
        return not self._plan.one_length

    def embed(self, texts: Sequence[str]) -> F32:
        """Unit vectors f32[texts, channels] by an encoder; see `embed.embed`."""
        from scalebits_compiler.runtime.embed import embed

        return embed(self, texts)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The artifact's tokenizer, None if it has none. Raises `ArtifactError` if unreadable."""
        path = self.artifact.path / "tokenizer.json"
        if "tokenizer.json" not in self.artifact.manifest.files:
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ArtifactError(f"{path}: {error}", help=COMPILE_AGAIN) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The token ids that end a text."""
        found = self.artifact.generation("eos_token_id")
        return frozenset([found] if isinstance(found, int) else found or ())

    def _replayed(self, replay: Replay) -> F32:
        """Logits after the last of all ids, where a step runs them all."""
        return self._run(replay.ids, None, replay.pad, last=True)[:, -1]

    def _extend(self, tokens: I64, cache: KVCache | NativeCache) -> F32:
        if self._native is not None and isinstance(cache, NativeCache):
            logits = self._native.run(tokens, cache, True, self.on_step)
        elif isinstance(cache, KVCache):
            logits = self._run(tokens, cache, cache.pad, last=True)
        else:
            raise UsageError("the cache is of another session")
        cache.advance(tokens.shape[1])
        return logits[:, -1]

    def _run(self, tokens: I64, cache: KVCache | None, pad: I64 | None, last: bool) -> F32:
        """All steps; with `last` the final product is computed for the last position only."""
        frame = Frame(self._weights, cache, pad, {self._plan.input: tokens}, self._call)
        for step in self._plan.steps[:-1]:
            self._step(frame, step)
        final = self._plan.steps[-1]
        if last and final.op in ("linear", *PRODUCTS):
            frame.replace(final.inputs[0], frame.values[final.inputs[0]][:, -1:])
        self._step(frame, final)
        return frame.values[self._plan.output]

    def _call(self, number: int, inputs: Sequence[Any], past: int, pad: I64 | None) -> Any:
        """An op that this runtime has not."""
        call = self._plan.calls[number]
        if self.call_runner is None:
            raise ArtifactError(
                f"{self.artifact.path}: the runtime has no op for {call}, it needs torch",
                help="install torch and open it with sessions.open_session (scalebitsc run)",
            )
        return self.call_runner(call, inputs, past, pad)

    def _step(self, frame: Frame, step: Step) -> None:
        if self.on_step is None:
            frame.run(step)
            return
        start = time.perf_counter()
        frame.run(step)
        self.on_step(step.op, time.perf_counter() - start)

    def _tokens(self, ids: ArrayLike, past: int = 0, vocabulary: int | None = None) -> I64:
        tokens, known = np.asarray(ids), vocabulary or self.vocabulary
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(
                f"token ids must be integers [batch, sequence], found {tokens.dtype}"
                f"{list(tokens.shape)}",
                help="give at least one token; padded rows need pad",
            )
        if tokens.min() < 0 or tokens.max() >= known:
            raise UsageError(
                f"token id {tokens.min() if tokens.min() < 0 else tokens.max()} is not in the"
                f" model's vocabulary of {known}",
                help="use the tokenizer of this model",
            )
        self.check_length(past + tokens.shape[1])
        return tokens.astype(np.int64)

    def check_length(self, length: int, what: str = "the sequence") -> None:
        """Raise `UsageError` if `length` tokens are more than the model knows positions for."""
        if self.limit is not None and length > self.limit:
            raise UsageError(
                f"{what} would have {length} tokens, the model knows {self.limit} positions",
                help="shorten the prompt or ask for fewer new tokens",
            )

    def _pad(self, pad: ArrayLike | None, tokens: I64) -> I64 | None:
        if pad is None:
            return None
        counts: Any = np.asarray(pad)
        fits = counts.shape == tokens.shape[:1] and np.issubdtype(counts.dtype, np.integer)
        if not fits or counts.min() < 0 or counts.max() >= tokens.shape[1]:
            raise UsageError(
                f"pad must hold for each of {tokens.shape[0]} rows a count in"
                f" 0..{tokens.shape[1] - 1}, found {counts.tolist()}"
            )
        return counts.astype(np.int64) if counts.any() else None

    def _padding(self, pad: ArrayLike | None, tokens: I64) -> I64 | None:
        """As `_pad`; UsageError for padding that an op would not skip."""
        padded = self._pad(pad, tokens)
        if padded is not None and self._plan.one_length:
            raise UsageError(
                f"{self.artifact.path} cannot skip padding: {self._plan.one_length}",
                help="run prompts of different length one by one",
            )
        return padded

    def _vocabulary(self) -> int:
        for step in self._plan.steps:
            if step.op == "embedding" and step.inputs[0] == self._plan.input:
                return self.artifact.manifest.weights[step.weights[0]].shape[0]
        raise ArtifactError(f"{self.artifact.path}: the plan has no embedding", help=COMPILE_AGAIN)


def _native(plan: Plan, weights: Weights, call: RunCall) -> tuple[NativeModel | None, str]:
    """The plan on native kernels, or None where an op has none, and how it runs."""
    told = _told_calls(plan)
    if weights.library is None or (plan.calls and plan.replays):
        return None, _how("step by step", told)
    from scalebits_compiler.runtime.cpu.native import NativeModel
    from scalebits_compiler.runtime.cpu.native_ops import NotNative

    try:
        return NativeModel(plan, weights, weights.library, call), _how("native", told)
    except NotNative as reason:
        return None, _how("step by step", [f"no native kernel for {reason}", *told])


def _told_calls(plan: Plan) -> list[str]:
    """Which ops torch runs, and whether there is a key-value cache all the same."""
    if not plan.calls:
        return []  # attention that is not causal mixes positions, and decodes nothing
    told = [f"torch runs {told_by_kind(plan.calls)}"]
    return told + ([f"decoding runs all tokens again, {plan.replays}"] if plan.replays else [])


def _how(mode: str, reasons: list[str]) -> str:
    return f"{mode}: {'; '.join(reasons)}" if reasons else mode


def runnable(artifact: Artifact) -> Plan:
    """The plan of an artifact; `ArtifactError` if it has none that a session executes."""
    plan = artifact.manifest.plan
    if plan is None or not plan.steps or plan.steps[-1].out != plan.output:
        raise ArtifactError(
            f"{artifact.path} was compiled for the target '{artifact.manifest.target['kind']}' and"
            " has no plan that this runtime executes",
            help="retarget it to cpu or cuda; with scalebitsc run, or sessions.open_session, torch"
            " runs its ops",
        )
    return plan
