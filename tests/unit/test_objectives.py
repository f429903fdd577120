"""The losses of models that do not predict the next token: what they are, and what they give."""

from __future__ import annotations

import pytest
import torch

from scalebits_compiler.passes.sensitivity.objectives import VARIANCE, scored_tokens, summed_loss

IDS = torch.arange(6).reshape(2, 3)


class Plain:
    """Gives `original` without a rule and `found` with one."""

    def __init__(self, original, found):
        self.original, self.found = original, found

    def run(self, ids, linear=None):
        return self.original if linear is None else self.found


def loss(kind, original, found):
    return summed_loss(Plain(original, found), IDS, lambda *_: None, kind)


@pytest.mark.parametrize("kind", ["tokens", "states"])
def test_nothing_is_lost_at_the_original_and_the_draw_is_repeated(kind):
    original = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert float(loss(kind, original, original.clone())) == 0
    other = original + 0.3
    assert float(loss(kind, original, other * 1.1)) == float(loss(kind, original, other * 1.1))
    assert torch.equal(state, torch.get_rng_state())
    assert scored_tokens(IDS, kind) == 6
    assert scored_tokens(IDS) == 4


def drawn(kind, original, found, count=4000):
    """Means of loss and squared gradient over many draws (one for each text)."""
    total, squares = 0.0, torch.zeros_like(found)
    for seed in range(count):
        at = found.clone().requires_grad_()
        ids = torch.full((1, 1), seed)
        value = summed_loss(Plain(original, at), ids, lambda *_: None, kind)
        value.backward()
        total += float(value.detach())
        squares += at.grad.square()
    return total / count, squares / count


def test_tokens_give_the_divergence_and_the_fisher_information():
    original = torch.tensor([[[0.2, 1.0, -0.5]]])
    found = torch.tensor([[[0.5, 0.4, 0.0]]])
    p = original.softmax(-1)
    expected = float((p * (original.log_softmax(-1) - found.log_softmax(-1))).sum())
    mean, _ = drawn("tokens", original, found)
    assert mean == pytest.approx(expected, abs=0.02)
    _, squares = drawn("tokens", original, original)
    torch.testing.assert_close(squares, p * (1 - p), atol=0.02, rtol=0)


def test_states_give_the_squared_error_and_the_fisher_information():
    original = torch.tensor([[[1.0, -2.0, 0.5]]])
    found = torch.tensor([[[1.1, -1.8, 0.4]]])
    variance = VARIANCE * float(original.square().mean())
    expected = float((found - original).square().sum()) / (2 * variance)
    mean, _ = drawn("states", original, found)
    assert mean == pytest.approx(expected, abs=0.03)
    _, squares = drawn("states", original, original)
    torch.testing.assert_close(squares, torch.full((1, 1, 3), 1 / variance), rtol=0.1, atol=0)
