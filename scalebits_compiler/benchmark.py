"""How fast an artifact runs here: tokens per second, bytes, memory, time by op (layer L3)."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.passes.base import Progress, no_progress
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.manifest import Manifest
from scalebits_compiler.runtime.session import Cache, Session
from scalebits_compiler.runtime.variants import EXACT, choose_mode
from scalebits_compiler.sessions import load_with_torch

READ_BYTES = 256 << 20
"""Read to measure the memory's bandwidth; several times what a last-level cache holds."""


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
    path: Path, options: BenchOptions | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """Measure the artifact at `path` on random tokens; the result is JSON-able.

    Rates are {median, low, high} over the rounds, tokens or bytes per second. A round measures
    memory bandwidth, prefill and decode one after the other, so that a busy machine slows all of
    them; `bandwidth_share` is the median of the rounds' shares. Raises `ArtifactError` for an
    artifact that does not run here, `UsageError` for more tokens than the model knows.
    """
    options = options or BenchOptions()
    session = load_with_torch(path, options.activations, options.threads)
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
    peak = _peak_memory()
    manifest = session.artifact.manifest
    needed = bytes_per_token(session.artifact)
    reader = _Reader(session.threads)
    rounds = [
        (reader.bandwidth(), *_run(session, ids, options.prompt_tokens))
        for _ in progress(range(options.repeat), "measuring", options.repeat)
    ]
    prefill = [options.prompt_tokens / seconds for _, seconds, _ in rounds]
    decode = [options.new_tokens / seconds for _, _, seconds in rounds]
    bandwidth = [measured for measured, _, _ in rounds]
    return {
        "variant": session.variant,
        "arithmetic": _arithmetic(manifest, session.variant, options.activations),
        **vars(options),
        "threads": session.threads,
        "prefill_tokens_per_second": _spread(prefill),
        "decode_tokens_per_second": _spread(decode),
        "bytes_per_token": needed,
        "read_bandwidth": _spread(bandwidth),
        "bandwidth_share": median(
            needed * rate / measured for rate, measured in zip(decode, bandwidth, strict=True)
        ),
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


def _run(session: Session, ids: NDArray[np.int64], prompt: int) -> tuple[float, float]:
    """Seconds of the prefill of ids[:prompt], and of decoding the rest token by token."""
    start = time.perf_counter()
    _, cache = session.prefill(ids[None, :prompt], capacity=len(ids))
    middle = time.perf_counter()
    _decode(session, ids[prompt:], cache)
    return middle - start, time.perf_counter() - middle


def _decode(session: Session, ids: NDArray[np.int64], cache: Cache) -> None:
    for token in ids:
        session.decode(token[None], cache)


def _time_by_op(session: Session, ids: NDArray[np.int64], prompt: int) -> dict[str, Any]:
    """Seconds by op on one thread of one prefill and, per token, of decoding; slowest first."""
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


class _Reader:
    """Reads a large array from memory, by as many threads as the artifact runs on."""

    def __init__(self, threads: int) -> None:
        # Zeros that nobody wrote would all be one page, and come from the cache.
        data = np.full(READ_BYTES // 8, 1, np.uint64)
        self._parts = np.array_split(data, threads)
        self._pool = ThreadPoolExecutor(threads)

    def bandwidth(self) -> float:
        """Bytes per second of one pass."""
        start = time.perf_counter()
        for _ in self._pool.map(np.sum, self._parts):
            pass
        return READ_BYTES / (time.perf_counter() - start)


def _peak_memory() -> int:
    """Largest resident set of this process so far, in bytes, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _arithmetic(manifest: Manifest, variant: str, activations: str) -> str:
    variants = () if manifest.kernels is None else manifest.kernels.dispatch["variants"]
    named = {found["name"]: found for found in variants}
    return choose_mode(named[variant], activations) if variant in named else "float32"


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}
