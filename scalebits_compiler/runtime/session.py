"""A loaded artifact: logits, prefill and decode with a cache, generation.

`scalebits_compiler.sessions.load` opens one: it decides which kernels may run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.runtime.arguments import integers, whole
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cache import Cache, HostCache, KVCache, NativeCache, Replay
from scalebits_compiler.runtime.call_lock import CallLock
from scalebits_compiler.runtime.cpu.isa import ACTIVATIONS, EXACT
from scalebits_compiler.runtime.kernel_files import KernelFiles
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN
from scalebits_compiler.runtime.meter import HostMeter, Meter
from scalebits_compiler.runtime.ops import CallRunner, Frame, RunCall
from scalebits_compiler.runtime.plan import PRODUCTS, Plan, Step, TorchCall, told_by_kind
from scalebits_compiler.runtime.plan_check import table_rows
from scalebits_compiler.runtime.weights import Weights
from scalebits_compiler.tasks import CAUSAL, ENCODER, SEQ2SEQ

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scalebits_compiler.runtime.cpu.library import KernelLibrary
    from scalebits_compiler.runtime.cpu.native import NativeModel
    from scalebits_compiler.runtime.generate import Generation, Prompts

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
MOST_THREADS = 1024
MOST_POSITIONS = 2**31 - 1
"""Kernels count positions in 32 bits."""
_NO_IDS = "give at least one token; padded rows need pad"
_NO_TEXT = "does not continue a text"
_INSTEAD = {ENCODER: "use embed, or scalebitsc run OUT --prompt TEXT, which prints the embedding"}


def check_runs(artifact: Artifact, activations: str, threads: int | None) -> None:
    """Raise for what `make_session` refuses and can be known before any kernel is at hand.

    UsageError for options that are wrong; ArtifactError for kernels that this runtime cannot load,
    and for a cuda artifact without a GPU.
    """
    if activations not in ACTIVATIONS:
        raise UsageError(
            f"unknown activations {activations!r}", help=f"use {' or '.join(ACTIVATIONS)}"
        )
    if threads is not None:
        whole(threads, "threads", 1, MOST_THREADS)
    target, kernels = artifact.manifest.target["kind"], artifact.manifest.kernels
    if target == "cuda":
        if activations != EXACT:
            raise UsageError(
                f"{artifact.path} was compiled for the target 'cuda', which has exact activations"
                " only",
                help=f"leave --activations {activations} out",
            )
        from scalebits_compiler.runtime.cuda.session import check_gpu

        check_gpu(artifact)
    elif kernels is not None and "variants" not in kernels.dispatch:
        raise ArtifactError(
            f"{artifact.path} was compiled for the target '{target}',"
            " whose kernels this runtime cannot load",
            help="run it with --target reference, or with the runtime of the plugin that built it",
        )


def make_session(
    artifact: Artifact,
    kernels: KernelFiles | None,
    activations: str = EXACT,
    threads: int | None = None,
    features: frozenset[str] | None = None,
) -> Session:
    """A session of an opened artifact that `check_runs` has passed.

    kernels: those that run, None for an artifact without. activations, threads and features, and
    what is raised, as `sessions.load` says.
    """
    if artifact.manifest.target["kind"] == "cuda":
        from scalebits_compiler.runtime.cuda.session import load_cuda

        if kernels is None:
            raise ArtifactError(f"{artifact.path} has no CUDA kernels", help=COMPILE_AGAIN)
        return load_cuda(artifact, kernels)
    library = None
    if kernels is not None:
        library = open_kernels(kernels, activations, threads, features)
    return Session(artifact, library)


def open_kernels(
    kernels: KernelFiles,
    activations: str,
    threads: int | None,
    features: frozenset[str] | None = None,
) -> KernelLibrary:
    """Load kernels for the CPU; raises as `sessions.load`."""
    from scalebits_compiler.runtime.cpu.library import KernelLibrary

    code = kernels.read(kernels.library)
    library = KernelLibrary.open(code, kernels.dispatch, features, activations)
    library.share(threads)
    return library


def execution(artifact: Artifact) -> tuple[str, int]:
    """`Session.execution` and `.threads` of an artifact for the CPU here: no kernel is loaded.

    Raises `ArtifactError` for an artifact that does not run here.
    """
    from scalebits_compiler.runtime.cpu.library import KernelLibrary

    kernels = artifact.manifest.kernels
    library = None
    if kernels is not None:
        library = KernelLibrary.without_code(kernels.dispatch)
        library.share(None)
    session = Session(artifact, library)
    return session.execution, session.threads


class Session:
    """Runs one artifact. Made by `make_session`; goes on with any number of caches, in any order.

    Several threads may use one session: `forward`, `prefill` and `decode` wait for each other, so
    each thread gets what it would get alone, and all together are no faster than one. A thread
    should decode with a cache of its own; one that threads share grows by one call after the other,
    in the order in which they come. `on_step` must not call the session.

    Where logits are spoken of, an encoder gives its states f32[batch, sequence, channels].

    variant: which compiled kernels run ("reference": none, packed matrices are dequantized).
    arithmetic: that of the products, or the activations' type on a GPU. threads: how many share a
    step of a large model.
    execution: "native" (a step is one call of compiled code), or "step by step" in numpy and why.
    vocabulary: number of token ids. limit: longest sequence that the model knows, None if unknown.
    on_step: if set, called after every op with its name and the seconds it took.
    call_runner: runs the ops that this runtime has not; `sessions.open_session` sets it.
    calls: held while a call runs.
    """

    execution: str = "step by step"
    arithmetic: str = "float32"
    call_runner: CallRunner | None = None
    threads: int = 1
    calls: CallLock
    _native: NativeModel | None = None

    def __init__(self, artifact: Artifact, library: KernelLibrary | None) -> None:
        self.artifact = artifact
        self.calls = CallLock() if library is None else library.calls
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
        padding = self._padding(pad, tokens)
        with self.calls.hold():
            return self._forward(tokens, padding)

    def prefill(
        self, ids: ArrayLike, pad: ArrayLike | None = None, capacity: int = 0
    ) -> tuple[F32, Cache]:
        """Logits f32[batch, vocabulary] after the last id of each row, and a cache to go on with.

        pad as in `forward`; capacity: positions to make room for, at most as many as the model
        knows. Raises `UsageError` as `forward`.
        """
        tokens = self._tokens(ids)
        padding = self._padding(pad, tokens)
        room = whole(capacity, "capacity", 0, MOST_POSITIONS)
        room = max(tokens.shape[1], room if self.limit is None else min(room, self.limit))
        with self.calls.hold():
            logits, cache = self._prefill(tokens, padding, room)
        cache.session = self
        return logits, cache

    def decode(self, ids: ArrayLike, cache: Cache) -> F32:
        """Logits f32[batch, vocabulary] after one more token i64[batch]; the cache grows by it.

        Raises `UsageError` for ids that do not fit the model or the cache, and for a cache of
        another session.
        """
        if not isinstance(cache, Cache) or cache.session is not self:
            raise UsageError(
                "the cache is of another session, or is none",
                help="give the one that this session's prefill has returned",
            )
        with self.calls.hold():
            return self._decode(self._next_tokens(ids, cache), cache)

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
        return not self._no_padding

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

    @property
    def _no_padding(self) -> str:
        """Why padding would be seen; empty where all ops skip it."""
        return self._plan.one_length

    @property
    def _next_vocabulary(self) -> int:
        """Number of ids that a text may go on with."""
        return self.vocabulary

    def _forward(self, tokens: I64, pad: I64 | None) -> F32:
        """`forward` for arguments that were checked, one call at a time."""
        if self._native is not None:
            cache = self._native.new_cache(len(tokens), pad, tokens.shape[1])
            return self._native.run(tokens, cache, False, self.on_step)
        return self._run(tokens, None, pad, last=False)

    def _prefill(self, tokens: I64, pad: I64 | None, room: int) -> tuple[F32, Cache]:
        """`prefill` for arguments that were checked, one call at a time. room: positions."""
        if self._plan.replays:
            replay = Replay(tokens, pad)
            return self._replayed(replay.ids, pad), replay
        if self._native is not None:
            cache: HostCache = self._native.new_cache(len(tokens), pad, room)
        else:
            cache = KVCache(len(tokens), pad, room)
        return self._extend(tokens, cache), cache

    def _decode(self, tokens: I64, cache: Any) -> F32:
        """`decode` of tokens i64[batch, 1] that fit a cache of this session, one call at a time."""
        if isinstance(cache, Replay):
            ids = np.concatenate([cache.ids, tokens], 1)
            logits = self._replayed(ids, cache.pad)
            cache.ids = ids
            return logits
        return self._extend(tokens, cache)

    def _replayed(self, ids: I64, pad: I64 | None) -> F32:
        """Logits after the last of all ids, where a step runs them all."""
        return self._run(ids, None, pad, last=True)[:, -1]

    def _extend(self, tokens: I64, cache: HostCache) -> F32:
        if self._native is not None:
            assert isinstance(cache, NativeCache)
            logits = self._native.run(tokens, cache, True, self.on_step)
        else:
            assert isinstance(cache, KVCache)
            logits = self._run(tokens, cache, cache.pad, last=True)
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
        made = self.call_runner(call, inputs, past, pad)
        if call.channels and not _has_channels(made, call):
            raise ArtifactError(
                f"{self.artifact.path}: torch gave {_shape_of(made)} for {call}, the plan says"
                f" {call.channels} channels of {call.heads or 'no'} heads",
                help=COMPILE_AGAIN,
            )
        return made

    def _step(self, frame: Frame, step: Step) -> None:
        if self.on_step is None:
            frame.run(step)
            return
        start = time.perf_counter()
        frame.run(step)
        self.on_step(step.op, time.perf_counter() - start)

    def _tokens(self, ids: ArrayLike) -> I64:
        """Token ids of whole sequences, i64[batch, sequence]; `UsageError` if they do not fit."""
        tokens = integers(ids, ("batch", "sequence"), "token ids", _NO_IDS)
        self.check_length(tokens.shape[1])
        return _known(tokens, self.vocabulary)

    def _next_tokens(self, ids: ArrayLike, cache: Cache) -> I64:
        """One more token id for each row of a cache, i64[batch, 1]."""
        tokens = integers(ids, ("batch",), "the next token ids", "give one for each row")
        if len(tokens) != cache.batch:
            raise UsageError(
                f"there are {len(tokens)} next token ids, the cache has rows: {cache.batch}",
                help="give one for each row",
            )
        self.check_length(cache.length + 1)
        return _known(tokens[:, None], self._next_vocabulary)

    def check_length(self, length: int, what: str = "the sequence") -> None:
        """Raise `UsageError` if `length` tokens are more than the model knows positions for."""
        if self.limit is not None and length > self.limit:
            raise UsageError(
                f"{what} would have {length} tokens, the model knows {self.limit} positions",
                help="shorten the prompt or ask for fewer new tokens",
            )

    def _padding(self, pad: ArrayLike | None, tokens: I64) -> I64 | None:
        """i64[batch], None without padding. `UsageError` for counts that do not fit, and for
        padding that an op would not skip.
        """
        if pad is None:
            return None
        counts = integers(pad, ("batch",), "pad")
        if len(counts) != len(tokens) or counts.min() < 0 or counts.max() >= tokens.shape[1]:
            raise UsageError(
                f"pad must hold for each of {tokens.shape[0]} rows a count in"
                f" 0..{tokens.shape[1] - 1}, found {_few(counts)}"
            )
        if not counts.any():
            return None
        if self._no_padding:
            raise UsageError(
                f"{self.artifact.path} cannot skip padding: {self._no_padding}",
                help="run prompts of different length one by one",
            )
        return counts.astype(np.int64)

    def _vocabulary(self) -> int:
        rows, _ = table_rows(self._plan, self.artifact.manifest.weights)
        if rows is None:
            raise ArtifactError(
                f"{self.artifact.path}: the plan has no embedding", help=COMPILE_AGAIN
            )
        return rows


def _known(tokens: NDArray[np.integer], vocabulary: int) -> I64:
    """Token ids as i64; `UsageError` for one that is not in the vocabulary."""
    least, most = tokens.min(), tokens.max()
    if least < 0 or most >= vocabulary:
        raise UsageError(
            f"token id {least if least < 0 else most} is not in the model's vocabulary of"
            f" {vocabulary}",
            help="use the tokenizer of this model",
        )
    return tokens.astype(np.int64)


def _few(counts: NDArray[np.integer]) -> str:
    return f"{counts[:8].tolist()}{' and more' if len(counts) > 8 else ''}"


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


def _has_channels(value: Any, call: TorchCall) -> bool:
    """Whether a value is what the plan says of a call; batch and sequence may be any."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        return False
    if call.heads:
        return value.ndim == 4 and value.shape[1::2] == (
            call.heads,
            call.channels // call.heads,
        )
    return value.ndim == 3 and value.shape[2] == call.channels


def _shape_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"


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
