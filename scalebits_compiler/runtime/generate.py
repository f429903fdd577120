"""Text generation: prompts to tokens, a batch with padding on the left, text piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.arguments import integers, whole
from scalebits_compiler.runtime.sampling import Sampling
from scalebits_compiler.tasks import CAUSAL, SEQ2SEQ

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scalebits_compiler.runtime.session import Session

Tokens: TypeAlias = Sequence[int] | NDArray[np.integer]
Prompts: TypeAlias = str | Tokens | Sequence[str] | Sequence[Tokens]
Stream: TypeAlias = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt.

    tokens: the new tokens, without the one that ended the text. text: what they add to the prompt's
    text, by an encoder-decoder a text of its own; None without a tokenizer. finish: "stop" (end of
    text) or "length".
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    finish: str


@dataclass
class _Row:
    """One prompt of a batch while it grows."""

    prompt: tuple[int, ...]
    rng: np.random.Generator
    text: TextStream | None
    tell: Callable[[str], None] | None
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    def push(self, token: int) -> None:
        self.tokens.append(token)
        if self.text is not None:
            self._show(self.text.push(token))

    def finish(self) -> Generation:
        if self.text is not None:
            self._show(self.text.flush())
        text = None if self.text is None else self.text.text
        reason = "stop" if self.stopped else "length"
        return Generation(self.prompt, tuple(self.tokens), text, reason)

    def _show(self, piece: str) -> None:
        if self.tell is not None and piece:
            self.tell(piece)


class TextStream:
    """Tokens to text, piece by piece. The pieces join to `text`.

    Decoded with the tokens before them, because what a token adds can depend on its neighbours
    (leading spaces); an unfinished character waits for its remaining bytes.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._context = list(prompt[-4:])
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """What one more token adds; empty while a character is unfinished."""
        self._waiting.append(token)
        before, after = self._decoded()
        if after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before):
            return ""
        return self._emit(after[len(before) :])

    def flush(self) -> str:
        """What is left at the end, unfinished characters included."""
        before, after = self._decoded()
        return self._emit(after[len(before) :])

    def _decoded(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._context), decode(self._context + self._waiting)

    def _emit(self, piece: str) -> str:
        self._context, self._waiting = self._waiting or self._context, []
        self.text += piece
        return piece


def generate(
    session: Session,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    stream: Stream | None = None,
) -> list[Generation]:
    """Continue every prompt by up to `max_new_tokens`, or to the end of the text; in prompt order.

    A prompt is text or token ids; several run as one batch, or those of one length where the model
    cannot skip padding, and each gets what it would get alone (up to rounding). `stream(prompt
    index, piece of text)` is called as text appears. Raises `UsageError` for an empty prompt, or
    more tokens than the model knows positions for.
    """
    max_new_tokens = whole(max_new_tokens, "max-new-tokens", 1)
    encoded = [_encode(session, prompt) for prompt in _as_list(prompts)]
    _check_room(session, max(map(len, encoded)), max_new_tokens)
    tokenizer, continues = session.tokenizer, session.task == CAUSAL
    rows = [
        _Row(
            prompt,
            sampling.generator(index),
            None if tokenizer is None else TextStream(tokenizer, prompt if continues else ()),
            None if stream is None else partial(stream, index),
        )
        for index, prompt in enumerate(encoded)
    ]
    for batch in _batches(session, rows):
        _run(session, batch, max_new_tokens, sampling)
    return [row.finish() for row in rows]


def _check_room(session: Session, longest: int, new: int) -> None:
    if session.task == SEQ2SEQ:
        session.check_length(longest, "the prompt")
        session.check_length(1 + new, "start token and new tokens together")
    else:
        session.check_length(longest + new, "prompt and new tokens together")


def _batches(session: Session, rows: list[_Row]) -> list[list[_Row]]:
    """Rows that run together."""
    if session.skips_padding:
        return [rows]
    found: dict[int, list[_Row]] = {}
    for row in rows:
        found.setdefault(len(row.prompt), []).append(row)
    return list(found.values())


def _run(session: Session, rows: list[_Row], max_new_tokens: int, sampling: Sampling) -> None:
    longest = max(len(row.prompt) for row in rows)
    pad = [longest - len(row.prompt) for row in rows]
    ids = np.array([[0] * n + list(row.prompt) for n, row in zip(pad, rows, strict=True)], np.int64)
    logits, cache = session.prefill(ids, pad, capacity=longest + max_new_tokens)
    for count in range(1, max_new_tokens + 1):
        picked = [sampling.pick(of, row.rng) for of, row in zip(logits, rows, strict=True)]
        _advance(rows, picked, session.stop_tokens)
        if count == max_new_tokens or all(row.stopped for row in rows):
            break
        logits = session.decode(picked, cache)


def _advance(rows: Sequence[_Row], picked: Sequence[int], stop_tokens: frozenset[int]) -> None:
    for row, token in zip(rows, picked, strict=True):
        row.stopped = row.stopped or token in stop_tokens
        if not row.stopped:
            row.push(token)


def _as_list(prompts: Prompts) -> list[str | Tokens]:
    """One prompt or several as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts, "the prompts are")
    if not items:
        raise UsageError("there is no prompt", help='give one, e.g. --prompt "Once upon a time"')
    return items if all(map(np.iterable, items)) else [items]


def _encode(session: Session, prompt: str | Tokens) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        tokens = _items(prompt, "a prompt is")
        if tokens:
            tokens = integers(tokens, ("tokens",), "a prompt of token ids").tolist()
    elif session.tokenizer is None:
        raise UsageError(
            f"{session.artifact.path} has no tokenizer.json", help="give the prompt as token ids"
        )
    else:
        tokens = _tokens(session.tokenizer, prompt)
    if not tokens:
        raise UsageError("the prompt is empty", help="give at least one token of text")
    return tuple(tokens)


def _items(value: Any, what: str) -> list[Any]:
    """The elements of what should be a list. Those of bytes are integers, but no token ids."""
    if not np.iterable(value) or isinstance(value, (bytes, bytearray, Mapping, Set)):
        raise UsageError(
            f"{what} of the type {type(value).__name__}",
            help="give a text or a list of token ids, or a list of these",
        )
    return list(value)


def _tokens(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    # Bytes of a command line that are no UTF-8 arrive as lone surrogates.
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise UsageError("the prompt is not UTF-8 text", help="give it in UTF-8")
    return tuple(tokenizer.encode(prompt).ids) if prompt else ()
