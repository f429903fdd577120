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
    return _draw(Path(text), tokenizer, seq_len, count, seed)


def split_text(
    text: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    calibration: int,
    acceptance: int,
    seed: int = 0,
    tuning: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calibration, acceptance and tuning windows, i64[count, seq_len] each, disjoint.

    All are drawn by `seed` from one text file. There are fewer than `tuning` of the last where the
    text ends. FrontendError as in `read_windows`.
    """
    needed = calibration + acceptance
    windows = _draw(Path(text), tokenizer, seq_len, needed, seed, tuning)
    return windows[:calibration].clone(), windows[calibration:needed].clone(), windows[needed:]


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


def _draw(
    file: Path, tokenizer: Tokenizer, seq_len: int, count: int | None, seed: int, more: int = 0
) -> torch.Tensor:
    """`count` windows, and up to `more` as far as the text goes."""
    if seq_len < 2 or (count is not None and count < 1):
        raise FrontendError(
            f"{'all' if count is None else count} windows of {seq_len} tokens were asked of {file}",
            help="at least one window of at least two tokens is needed",
        )
    tokens = _tokens(file, tokenizer)
    available = len(tokens) // seq_len
    needed = 1 if count is None else count
    if available < needed:
        raise FrontendError(
            f"{file} has {len(tokens)} tokens, {needed} windows of {seq_len} need"
            f" {needed * seq_len}",
            help="give a longer text, or ask for fewer or shorter windows",
        )
    windows = tokens[: available * seq_len].reshape(available, seq_len)
    if count is not None:
        windows = windows[np.random.default_rng(seed).permutation(available)[: count + more]]
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
