"""What the passes call the loss of a model, by what its result is.

Where the text says what comes next (`ce`), the loss is the cross entropy of the next token. Else it
is how far the result is from the original's: labels are drawn from what the original gives at the
same place, a token from its distribution (`tokens`), or a point of a Gaussian around its state
(`states`), and the loss is by how much they are likelier under the original, in nats. Its mean is
the KL divergence; unlike the divergence itself it has a gradient at full precision, whose square is
the Fisher information that the scores need (Martens, arXiv 1412.1193, section 5).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scalebits_compiler.passes.base import Evaluator, LinearRule

# Variance of the Gaussian around a state, as a share of the mean square of its channels.
VARIANCE = 0.1


def scored_tokens(windows: Tensor, loss: str = "ce") -> int:
    """How many tokens of windows [n, s] `summed_loss` scores."""
    return windows.shape[0] * (windows.shape[1] - (loss in ("ce", "kl")))


def summed_loss(evaluator: Evaluator, ids: Tensor, rule: LinearRule, loss: str) -> Tensor:
    """Loss of the model run with `rule` (nats), summed over the scored tokens.

    `ce` and `kl` score all tokens of a window but the first, the others all of them. For all but
    `ce` the module's own weights are the original.
    """
    found = evaluator.run(ids, rule).float()
    if loss == "ce":
        logits = found[:, :-1].flatten(0, 1)
        wanted = ids[:, 1:].flatten().to(logits.device)
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    with torch.no_grad():
        original = evaluator.run(ids).float()
    if loss == "kl":
        return divergence(found[:, :-1], original[:, :-1])
    draw = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes()))
    if loss == "states":
        return _states_loss(found, original, draw)
    return _tokens_loss(found.flatten(0, 1), original.flatten(0, 1), draw)


def divergence(logits: Tensor, original: Tensor) -> Tensor:
    """KL(original || model) of logits [..., vocabulary], summed over tokens, nats."""
    ours, theirs = logits.log_softmax(-1), original.log_softmax(-1)
    return torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)


def relative_error(states: Tensor, original: Tensor) -> Tensor:
    """|x - x0|² / |x0|² of states [..., channels], summed over tokens."""
    size = original.square().sum(-1).clamp(min=1e-12)
    return ((states - original).square().sum(-1) / size).sum()


def _tokens_loss(logits: Tensor, original: Tensor, draw: torch.Generator) -> Tensor:
    # Drawn on the host, so that every device sees the same labels.
    chances = original.softmax(-1).cpu()
    labels = torch.multinomial(chances, 1, generator=draw).squeeze(-1).to(logits.device)
    ours = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return ours - torch.nn.functional.cross_entropy(original, labels, reduction="sum")


def _states_loss(states: Tensor, original: Tensor, draw: torch.Generator) -> Tensor:
    variance = VARIANCE * original.square().mean(-1, keepdim=True).clamp(min=1e-12)
    drawn = torch.randn(original.shape, generator=draw).to(original.device)
    noise = drawn * variance.sqrt()
    excess = (states - original - noise).square() - noise.square()
    return (excess / (2 * variance)).sum()
