"""Text file -> token windows, drawn by a seed; calibration and acceptance never overlap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from scalebits_compiler.errors import FrontendError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Text is tokenized in pieces of about this many characters, cut at line ends, so that a long file
# neither takes one huge buffer nor one core.
_PIECE = 1 << 16

CALIBRATION_WINDOWS, ACCEPTANCE_WINDOWS = 128, 64
"""Windows for gradients, and windows that accept a step, where their numbers are not given."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer.json of a model folder; FrontendError if it is missing or broken.

    It neither pads nor cuts, as those of encoders are often told to.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FrontendError(
            f"{folder} has no tokenizer.json",
            help="save the model's fast tokenizer there: tokenizer.save_pretrained(folder)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise FrontendError(
            f"{file} cannot be read: {error}", help="save the model's fast tokenizer there again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_windows(
    text: str | Path, tokenizer: Tokenizer, seq_len: int, count: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Windows i64[n, seq_len] of a text file, without overlap and without special tokens.

    `count` windows drawn by `seed`, or all of them in the order of the text. FrontendError if the
    file cannot be read, is empty, or has too few tokens.
    """
    windows = _windows(Path(text), tokenizer, seq_len, 1 if count is None else count)
    return _tensor(windows if count is None else windows[_order(len(windows), seed)[:count]])


def split_text(
    text: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    calibration: int | None,
    acceptance: int | None,
    seed: int = 0,
    tuning_share: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calibration, acceptance and tuning windows, i64[count, seq_len] each, disjoint.

    All are drawn by `seed` from one text file. A number that is None is the default, or less where
    the text ends, but at least 1. There are `tuning_share` - 1 times as many tuning windows as
    calibration windows, as far as the text goes. FrontendError as in `read_windows`.
    """
    least = sum(1 if count is None else count for count in (calibration, acceptance))
    windows = _windows(Path(text), tokenizer, seq_len, least)
    calibration, acceptance = _shares(len(windows), calibration, acceptance)
    needed = calibration + acceptance
    tuning = (tuning_share - 1) * calibration
    drawn = _tensor(windows[_order(len(windows), seed)[: needed + tuning]])
    return drawn[:calibration].clone(), drawn[calibration:needed].clone(), drawn[needed:]


def _shares(available: int, calibration: int | None, acceptance: int | None) -> tuple[int, int]:
    """Calibration and acceptance windows of a text that has windows for both.

    A text that is too short for the default numbers is divided in their proportion.
    """
    if calibration is None and acceptance is None:
        default = CALIBRATION_WINDOWS + ACCEPTANCE_WINDOWS
        total = min(available, default)
        acceptance = max(1, total * ACCEPTANCE_WINDOWS // default)
        return total - acceptance, acceptance
    if calibration is None:
        assert acceptance is not None
        return min(CALIBRATION_WINDOWS, available - acceptance), acceptance
    if acceptance is None:
        return calibration, min(ACCEPTANCE_WINDOWS, available - calibration)
    return calibration, acceptance


def framed(windows: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Windows i64[n, s] whose ends are the special tokens that the tokenizer puts around a text.

    What an encoder has learned to see; the same windows for a tokenizer that puts none.
    """
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(inner)] == inner]
    if not inner or not starts:
        return windows
    before, after = whole[: starts[0]], whole[starts[0] + len(inner) :]
    if len(before) + len(after) >= windows.shape[1]:
        return windows
    changed = windows.clone()
    changed[:, : len(before)] = torch.tensor(before, dtype=torch.long)
    changed[:, changed.shape[1] - len(after) :] = torch.tensor(after, dtype=torch.long)
    return changed


def _windows(file: Path, tokenizer: Tokenizer, seq_len: int, least: int) -> np.ndarray:
    """int64[n, seq_len]: a text file cut into windows; FrontendError if n is below `least`."""
    if seq_len < 2 or least < 1:
        raise FrontendError(
            f"{least} windows of {seq_len} tokens were asked of {file}",
            help="at least one window of at least two tokens is needed",
        )
    tokens = _tokens(file, tokenizer)
    available = len(tokens) // seq_len
    if available < least:
        raise FrontendError(
            f"{file} has {len(tokens)} tokens, {least} windows of {seq_len} need {least * seq_len}",
            help="give a longer text, or ask for fewer or shorter windows",
        )
    return tokens[: available * seq_len].reshape(available, seq_len)


def _order(available: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(available)


def _tensor(windows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(windows))


def read_text(file: Path) -> str:
    """The content of a UTF-8 text file; FrontendError if it cannot be read."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise FrontendError(
            f"the text {file} cannot be read: {error.strerror}", help="give a UTF-8 text file"
        ) from error
    except UnicodeDecodeError as error:
        raise FrontendError(
            f"{file} is not UTF-8 text, the byte at {error.start} cannot be decoded",
            help="give a plain text file in UTF-8",
        ) from error


def _tokens(file: Path, tokenizer: Tokenizer) -> np.ndarray:
    """int64[n]: the tokens of a whole file."""
    pieces = _pieces(read_text(file))
    encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    parts = [np.array(piece.ids, dtype=np.int64) for piece in encoded]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _pieces(content: str) -> list[str]:
    pieces, start = [], 0
    while start < len(content):
        end = content.find("\n", start + _PIECE) + 1 or len(content)
        pieces.append(content[start:end])
        start = end
    return pieces
