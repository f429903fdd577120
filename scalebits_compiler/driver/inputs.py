"""What a compile reads: the model, and the text to calibrate on (layer L3)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.errors import FrontendError, UsageError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.runtime.artifact import position_limit
from scalebits_compiler.tasks import ENCODER, MASKED

if TYPE_CHECKING:
    from scalebits_compiler.frontend.hf import EmptyModel, SourceModel

# Longest default window; a model's own limit may be shorter.
WINDOW = 512
TUNING_SHARE = 4
BUNDLED_TEXT = "wikitext2-calibration.txt"


@dataclass(frozen=True)
class TextOptions:
    """What to calibrate on: a text file (None: the bundled one), and how much of it.

    accept_file: where the acceptance windows come from (None: the same file, other windows).
    seq_len: tokens per window (None: the model's limit, at most WINDOW); calibration and
    acceptance: numbers of windows (None: 128 and 64, or as many as the text has). Tuning sees
    TUNING_SHARE times the calibration windows, as far as the text goes.
    """

    file: Path | None = None
    accept_file: Path | None = None
    seq_len: int | None = None
    calibration: int | None = None
    acceptance: int | None = None


def load_source(model: str | Path) -> SourceModel:
    """The model of a folder or hub id; FrontendError if there is none that can be read."""
    from scalebits_compiler.frontend.hf import load_model

    return load_model(model)


def source_digest(source: SourceModel) -> str:
    """sha256 over the names and digests of the model's weight files."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(source.hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def traced_module(source: SourceModel | EmptyModel) -> Module:
    """The module of a model: its graph of ATen calls, or one op where it cannot be traced.

    FrontendError for a model that can neither be traced nor called.
    """
    from scalebits_compiler.frontend.capture import capture
    from scalebits_compiler.frontend.hf import trace
    from scalebits_compiler.frontend.lower_fx import lower

    try:
        return lower(trace(source.model, source.task), source)
    except FrontendError as error:
        return capture(source, error.message)


def input_module(source: SourceModel, text: TextOptions, seed: int) -> Module:
    """The traced model as ATen calls, with the token windows that passes will look at."""
    import torch

    from scalebits_compiler.frontend.calibration import (
        framed,
        load_tokenizer,
        split_text,
    )

    tokenizer = load_tokenizer(source.path)
    limit = position_limit(source.config) or WINDOW
    seq_len = text.seq_len or min(WINDOW, limit)
    if seq_len > limit:
        raise UsageError(f"--seq-len {seq_len} is more than the model's {limit} positions")
    counts = (text.calibration, text.acceptance)
    with as_file(files("scalebits_compiler") / "data" / BUNDLED_TEXT) as bundled:
        file = text.file or bundled
        if text.accept_file is None:
            windows = split_text(file, tokenizer, seq_len, *counts, seed, TUNING_SHARE)
        else:
            _, accepted, _ = split_text(text.accept_file, tokenizer, seq_len, 0, counts[1], seed)
            seen, _, tuned = split_text(file, tokenizer, seq_len, counts[0], 0, seed, TUNING_SHARE)
            windows = (seen, accepted, tuned)
    if source.task in (ENCODER, MASKED):
        windows = tuple(framed(part, tokenizer) for part in windows)
    vocabulary = source.config.get("vocab_size")
    if vocabulary is not None and int(torch.cat(windows).max()) >= vocabulary:
        raise UsageError(
            f"{source.path}: tokenizer.json gives token ids beyond the model's {vocabulary}",
            help="put the tokenizer that belongs to the model into its folder",
        )
    module = traced_module(source)
    names = ("calibration", "acceptance", "tuning")
    texts = {name: part.int() for name, part in zip(names, windows, strict=True) if len(part)}
    return replace(
        module,
        source=source_digest(source),
        **{name: Resource(name) for name in texts},
        resources=module.resources.with_(texts),
    )


def window_counts(module: Module) -> dict[str, int]:
    """The numbers of calibration, acceptance and tuning windows in a module, and their tokens."""
    parts = {
        "calibration_windows": module.calibration,
        "acceptance_windows": module.acceptance,
        "tuning_windows": module.tuning,
    }
    shapes = {
        name: (0, 0) if part is None else module.resources.shape(part.key)
        for name, part in parts.items()
    }
    counts = {name: shape[0] for name, shape in shapes.items()}
    return {**counts, "seq_len": shapes["calibration_windows"][1]}


def short_text(module: Module, text: TextOptions) -> str | None:
    """What to say of a text that has fewer windows than the default; None if it has enough."""
    from scalebits_compiler.frontend.calibration import ACCEPTANCE_WINDOWS, CALIBRATION_WINDOWS

    counts = window_counts(module)
    seen, held = counts["calibration_windows"], counts["acceptance_windows"]
    fewer = text.calibration is None and seen < CALIBRATION_WINDOWS
    if not fewer and not (text.acceptance is None and held < ACCEPTANCE_WINDOWS):
        return None
    return (
        f"the text is short: {seen} windows of {counts['seq_len']} tokens for gradients and {held}"
        f" that accept a step, not {text.calibration or CALIBRATION_WINDOWS} and"
        f" {text.acceptance or ACCEPTANCE_WINDOWS}"
    )
