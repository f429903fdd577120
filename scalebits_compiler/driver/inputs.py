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
    acceptance: numbers of windows. Tuning sees TUNING_SHARE times the calibration windows, as far
    as the text goes.
    """

    file: Path | None = None
    accept_file: Path | None = None
    seq_len: int | None = None
    calibration: int = 128
    acceptance: int = 64


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
        read_windows,
        split_text,
    )

    tokenizer = load_tokenizer(source.path)
    limit = position_limit(source.config) or WINDOW
    seq_len = text.seq_len or min(WINDOW, limit)
    if seq_len > limit:
        raise UsageError(f"--seq-len {seq_len} is more than the model's {limit} positions")
    counts = (text.calibration, text.acceptance)
    more = (TUNING_SHARE - 1) * text.calibration
    with as_file(files("scalebits_compiler") / "data" / BUNDLED_TEXT) as bundled:
        file = text.file or bundled
        if text.accept_file is None:
            windows = split_text(file, tokenizer, seq_len, *counts, seed, more)
        else:
            accepted = read_windows(text.accept_file, tokenizer, seq_len, text.acceptance, seed)
            seen, _, tuned = split_text(file, tokenizer, seq_len, counts[0], 0, seed, more)
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
