"""Texts to vectors with an encoder: the mean of its states over the tokens, of length one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.errors import UsageError
from scalebits_compiler.tasks import ENCODER

if TYPE_CHECKING:
    from scalebits_compiler.runtime.session import Session

F32 = NDArray[np.float32]


def pooled(states: F32) -> F32:
    """f32[batch, channels] of unit length for states f32[batch, sequence, channels]."""
    mean = states.mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def embed(session: Session, texts: Sequence[str]) -> F32:
    """f32[texts, channels]: see `pooled`; with the special tokens of the tokenizer.

    Texts are run one by one: no padding. Raises `UsageError` for a model that gives no states, an
    artifact without tokenizer, an empty text, and one with more tokens than the model knows
    positions for.
    """
    if session.task != ENCODER:
        raise UsageError(
            f"{session.artifact.path} is a {session.task} model: it gives logits, no embeddings",
            help="use generate (scalebitsc run)" if session.generates else "use forward",
        )
    if session.tokenizer is None:
        raise UsageError(f"{session.artifact.path} has no tokenizer.json")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UsageError("the texts are no list of str", help="give a list: embed([text])")
    found = []
    for text in texts:
        ids = session.tokenizer.encode(text).ids if text else []
        if not ids:
            raise UsageError("the text is empty", help="give at least one token of text")
        found.append(pooled(session.forward([ids])))
    if not found:
        raise UsageError("there is no text", help="give one")
    return np.concatenate(found)
