"""How fast an artifact runs here: tokens per second, bytes, memory, time by op (layer L3)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.progress import Progress, no_progress
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cpu.isa import EXACT
from scalebits_compiler.runtime.session import Cache, Session
from scalebits_compiler.sessions.open import load_with_torch


@dataclass(frozen=True)
class BenchOptions:
    """What is measured. threads: None for the default. Raises `UsageError` for a count below 1."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    threads: int | None = None
    activations: str = EXACT
    repeat: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "threads", "repeat"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1")


def bench(
    path: Path,
    options: BenchOptions | None = None,
    progress: Progress = no_progress,
    trust_kernels: bool = False,
) -> dict[str, Any]:
    """Measure the artifact at `path` on random tokens; the result is JSON-able.

    trust_kernels as in `sessions.load`.

    Rates are {median, low, high} over the rounds, tokens or bytes per second. A round measures
    memory bandwidth, prefill and decode one after the other, so that a busy machine slows all of
    them; `bandwidth_share` is the median of the rounds' shares. A CPU's memory is read
    (`read_bandwidth`), a GPU's is copied (`copy_bandwidth`: bytes read and written). The first
    decode step of a cache, in which a GPU captures its graph, is measured apart. `ArtifactError`
    for an artifact that does not run here, `UsageError` for more tokens than the model knows.
    """
    options = options or BenchOptions()
    session = load_with_torch(
        path, options.activations, options.threads, trust_kernels=trust_kernels
    )
    if not session.generates:
        raise UsageError(
            f"{path} is of the kind {session.task}: it does not decode token by token",
            help="measure a causal language model",
        )
    length = options.prompt_tokens + options.new_tokens
    session.check_length(length, "prompt and new tokens together")
    ids = np.random.default_rng(0).integers(0, session.vocabulary, length)
    _run(session, ids, options.prompt_tokens)  # makes the weights, reads the file
    ops = _time_by_op(session, ids, options.prompt_tokens)
    meter = session.meter()
    peak = meter.peak_memory()  # before the meter takes memory of its own
    meter.bandwidth()  # takes it
    rounds = [
        (meter.bandwidth(), *_run(session, ids, options.prompt_tokens))
        for _ in progress(range(options.repeat), "measuring", options.repeat)
    ]
    bandwidth, prefill, first, decode = zip(*rounds, strict=True)
    rates = [options.new_tokens / seconds for seconds in decode]
    bytes_read = bytes_per_token(session.artifact)
    shares = [bytes_read * rate / most for rate, most in zip(rates, bandwidth, strict=True)]
    return {
        "variant": session.variant,
        "device": meter.device,
        "arithmetic": session.arithmetic,
        **vars(options),
        "threads": session.threads,
        "prefill_tokens_per_second": _spread([options.prompt_tokens / s for s in prefill]),
        "decode_tokens_per_second": _spread(rates),
        "first_decode_seconds": _spread(first),
        "bytes_per_token": bytes_read,
        f"{meter.moves}_bandwidth": _spread(bandwidth),
        "bandwidth_share": median(shares),
        "peak_memory_bytes": peak,
        "seconds_by_op": ops,
    }


def bytes_per_token(artifact: Artifact) -> int:
    """Stored bytes of all weights that one decoded token reads; the key-value cache not counted."""
    plan, weights = artifact.manifest.plan, artifact.manifest.weights
    total = 0
    for step in plan.steps if plan else ():
        for symbol in step.weights:
            packed = weights[symbol].kind == "packed"
            stored = artifact.tensors[f"{symbol}.packed" if packed else symbol].data.nbytes
            total += stored // weights[symbol].shape[0] if step.op == "embedding" else stored
    return total


def _run(session: Session, ids: NDArray[np.int64], prompt: int) -> tuple[float, float, float]:
    """Seconds of the prefill of ids[:prompt], of one decode step, and of decoding the rest.

    The one step is taken back before the rest, token by token, begins.
    """
    start = time.perf_counter()
    _, cache = session.prefill(ids[None, :prompt], capacity=len(ids))
    filled = time.perf_counter()
    _decode(session, ids[prompt : prompt + 1], cache)
    ready = time.perf_counter()
    cache.truncate(prompt)
    begun = time.perf_counter()
    _decode(session, ids[prompt:], cache)
    return filled - start, ready - filled, time.perf_counter() - begun


def _decode(session: Session, ids: NDArray[np.int64], cache: Cache) -> None:
    for token in ids:
        session.decode(token[None], cache)


def _time_by_op(session: Session, ids: NDArray[np.int64], prompt: int) -> dict[str, Any]:
    """Seconds by op of one prefill and, per token, of decoding; slowest first.

    Every op is run for itself: on one thread of a CPU, and awaited on a GPU.
    """
    with _watched(session) as prefill:
        _, cache = session.prefill(ids[None, :prompt], capacity=len(ids))
    with _watched(session) as decode:
        _decode(session, ids[prompt:], cache)
    count = len(ids) - prompt
    return {
        "prefill": _slowest_first(prefill),
        "decode": _slowest_first({op: seconds / count for op, seconds in decode.items()}),
    }


@contextmanager
def _watched(session: Session) -> Iterator[dict[str, float]]:
    """Collect the seconds of every op that the session runs."""
    seconds: dict[str, float] = defaultdict(float)

    def add(op: str, took: float) -> None:
        seconds[op] += took

    session.on_step = add
    try:
        yield seconds
    finally:
        session.on_step = None


def _slowest_first(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}
