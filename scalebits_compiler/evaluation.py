"""Quality of a model on a text: perplexity, KL divergence, top-1 agreement (layer L3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalebits_compiler.errors import FrontendError, UsageError
from scalebits_compiler.frontend.calibration import load_tokenizer, read_windows
from scalebits_compiler.numerics.metrics import QualityMeter
from scalebits_compiler.passes.base import Progress, no_progress
from scalebits_compiler.plugins import Registry
from scalebits_compiler.runtime.artifact import position_limit
from scalebits_compiler.runtime.manifest import MANIFEST
from scalebits_compiler.runtime.variants import EXACT

Logits = Callable[[torch.Tensor], torch.Tensor]
BATCH_TOKENS = 2048
DEFAULT_WINDOW = 512


def is_artifact(path: Path) -> bool:
    """Whether a folder holds a compiled artifact (and not a plain Hugging Face model)."""
    return (path / MANIFEST).is_file()


def logits_of(
    path: Path,
    target: str | None = None,
    activations: str = EXACT,
    registry: Registry | None = None,
) -> Logits:
    """A function ids i64[b, s] -> logits f32[b, s, v] of an artifact or a Hugging Face folder.

    `target` picks how an artifact is run: None as it was compiled, or "reference"; `registry` knows
    the ops that its module may have.
    """
    if is_artifact(path):
        from scalebits_compiler.sessions import open_session

        session = open_session(path, target, activations, torch.get_num_threads(), registry)
        return lambda ids: torch.from_numpy(session.forward(ids.numpy()))
    for option, value in (("--target", target), ("--activations", activations)):
        if value not in (None, EXACT):
            raise UsageError(f"{path} is no artifact, {option} does not apply to it")
    return _model_logits(path)


def _model_logits(path: Path) -> Logits:
    from scalebits_compiler.frontend.hf import load_model

    model = load_model(path).model
    return lambda ids: model(input_ids=ids, use_cache=False).logits


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
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score a text with windows of `seq_len` tokens, no overlap, all but the first token scored.

    windows: how many from the start of the text (None: all). versus: the original model. Gives the
    keys perplexity, kl_divergence, top1_agreement, tokens, protocol.
    """
    limit = _limit(path)
    length = seq_len or min(DEFAULT_WINDOW, limit)
    if length > limit:
        raise UsageError(f"--seq-len {length} is more than the model's {limit} positions")
    tokens = read_windows(text, load_tokenizer(path), length)[:windows]
    ours = logits_of(path, target, activations, registry)
    original = None if versus is None else logits_of(versus)
    meter = QualityMeter()
    with torch.no_grad():
        parts = tokens.split(max(1, BATCH_TOKENS // length))
        for ids in progress(parts, "evaluating", len(parts)):
            meter.update(ours(ids), ids, None if original is None else original(ids))
    return {**meter.result(), "protocol": _protocol(length, len(tokens), text, versus)}


def _limit(path: Path) -> int:
    try:
        config = json.loads((path / "config.json").read_text())
        return position_limit(config) or DEFAULT_WINDOW
    except (OSError, ValueError) as error:
        raise FrontendError(
            f"{path} has no readable config.json", help="give an artifact or a model folder"
        ) from error


def _protocol(length: int, windows: int, text: Path, versus: Path | None) -> str:
    compared = "" if versus is None else "; KL(original || model) in nats per token"
    return (
        f"{windows} windows of {length} tokens of {text.name}, no overlap, all but the first token"
        f" of a window scored{compared}"
    )
