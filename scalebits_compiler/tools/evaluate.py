"""Quality of a model on a text: perplexity, or how near it is to the original (layer L3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scalebits_compiler.errors import ArtifactError, FrontendError, UsageError
from scalebits_compiler.frontend.calibration import framed, load_tokenizer, read_windows
from scalebits_compiler.numerics.metrics import PlaceMeter, QualityMeter
from scalebits_compiler.plugins import Registry
from scalebits_compiler.pretrained import call
from scalebits_compiler.progress import Progress, no_progress
from scalebits_compiler.runtime.artifact import CONFIG, position_limit, read_json
from scalebits_compiler.runtime.cpu.isa import EXACT
from scalebits_compiler.runtime.manifest import MANIFEST
from scalebits_compiler.tasks import CAUSAL, ENCODER, MASKED

BATCH_TOKENS = 2048
DEFAULT_WINDOW = 512


class Model(NamedTuple):
    """run: ids i64[b, s] -> f32[b, s, n], logits, of an encoder states; task: see tasks.TASKS.

    execution: of an artifact, how it runs (`Session.execution`).
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    task: str
    execution: str | None = None


def is_artifact(path: Path) -> bool:
    """Whether a folder holds a compiled artifact (and not a plain Hugging Face model)."""
    return (path / MANIFEST).is_file()


def open_model(
    path: Path,
    target: str | None = None,
    activations: str = EXACT,
    registry: Registry | None = None,
    trust_kernels: bool = False,
) -> Model:
    """An artifact or a Hugging Face folder as a function of token ids.

    `target` picks how an artifact is run: None as it was compiled, or "reference"; `registry` knows
    the ops that its module may have; `trust_kernels` is as in `sessions.load`.
    """
    if is_artifact(path):
        from scalebits_compiler.sessions.open import open_session

        session = open_session(
            path, target, activations, torch.get_num_threads(), registry, trust_kernels
        )
        return Model(
            lambda ids: torch.from_numpy(session.forward(ids.numpy())),
            session.task,
            session.execution,
        )
    for option, value in (("--target", target), ("--activations", activations)):
        if value not in (None, EXACT):
            raise UsageError(f"{path} is no artifact, {option} does not apply to it")
    from scalebits_compiler.frontend.hf import load_model

    source = load_model(path)
    return Model(lambda ids: call(source.model, source.task, ids), source.task)


def evaluate(
    path: Path,
    text: Path,
    versus: Path | None = None,
    *,
    seq_len: int | None = None,
    windows: int | None = None,
    target: str | None = None,
    activations: str = EXACT,
    registry: Registry | None = None,
    trust_kernels: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score a text with windows of `seq_len` tokens, no overlap, all but the first token scored.

    windows: how many from the start of the text (None: all). versus: the original model.
    trust_kernels: as in `sessions.load`, of both. Gives the
    keys perplexity, kl_divergence, top1_agreement, tokens, protocol, execution; of a model that
    does not predict the next token those of `PlaceMeter` instead, and `versus` is needed.
    """
    limit = _limit(path)
    length = seq_len or min(DEFAULT_WINDOW, limit)
    if length > limit:
        raise UsageError(f"--seq-len {length} is more than the model's {limit} positions")
    tokenizer = load_tokenizer(path)
    tokens = read_windows(text, tokenizer, length)[:windows]
    ours = open_model(path, target, activations, registry, trust_kernels)
    if ours.task in (ENCODER, MASKED):
        tokens = framed(tokens, tokenizer)
    original = None if versus is None else open_model(versus, trust_kernels=trust_kernels)
    if ours.task != CAUSAL and original is None:
        raise UsageError(
            f"{path} is of the kind {ours.task}: text alone does not score it",
            help="give the original model to compare with: --vs MODEL",
        )
    if original is not None and original.task != ours.task:
        raise UsageError(f"{path} is of the kind {ours.task}, {versus} of the kind {original.task}")
    parts = tokens.split(max(1, BATCH_TOKENS // length))
    meter = QualityMeter() if ours.task == CAUSAL else PlaceMeter(ours.task == ENCODER)
    with torch.no_grad():
        for ids in progress(parts, "evaluating", len(parts)):
            theirs = None if original is None else original.run(ids)
            if isinstance(meter, QualityMeter):
                meter.update(ours.run(ids), ids, theirs)
            elif theirs is not None:
                meter.update(ours.run(ids), theirs)
    protocol = _protocol(length, len(tokens), text, versus, ours.task)
    return {**meter.result(), "protocol": protocol, "execution": ours.execution}


def _limit(path: Path) -> int:
    try:
        return position_limit(read_json(path / CONFIG)) or DEFAULT_WINDOW
    except ArtifactError as error:
        raise FrontendError(
            f"{path} has no readable config.json", help="give an artifact or a model folder"
        ) from error


def _protocol(length: int, windows: int, text: Path, versus: Path | None, task: str) -> str:
    told = f"{windows} windows of {length} tokens of {text.name}, no overlap"
    if task == ENCODER:
        return f"{told}; cosine of the states of every token, and of their means over a window"
    compared = "" if versus is None else "; KL(original || model) in nats per token"
    scored = "all but the first token of a window" if task == CAUSAL else "every token"
    return f"{told}, {scored} scored{compared}"
