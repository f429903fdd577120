"""How good a model is on text: perplexity, divergence from the original, top-1 agreement.

Protocol: windows of tokens without overlap; every token but the first of a window is scored.
"""

from __future__ import annotations

import math

import torch

from scalebits_compiler.errors import UsageError


class PlaceMeter:
    """Compares what two models give at the same places: logits, or states of an encoder.

    For models that do not predict the next token, so that text alone does not score them.
    """

    def __init__(self, states: bool) -> None:
        self.states = states
        self._sums = {name: 0.0 for name in (_STATES if states else _LOGITS)}
        self._tokens = 0
        self._windows = 0

    def update(self, found: torch.Tensor, original: torch.Tensor) -> None:
        """Compare windows, [batch, sequence, n] each; UsageError for shapes that differ."""
        if found.shape != original.shape:
            raise UsageError(
                f"the original gives {tuple(original.shape)}, the model {tuple(found.shape)}",
                help="compare models of one kind",
            )
        ours, theirs = found.detach().double(), original.detach().double()
        terms = _state_terms(ours, theirs) if self.states else _logit_terms(ours, theirs)
        for name, value in terms.items():
            self._sums[name] += float(value.sum())
        self._tokens += ours.shape[0] * ours.shape[1]
        self._windows += ours.shape[0]

    def result(self) -> dict[str, float | int]:
        """Means: of states cosine (token by token) and pooled_cosine (of the means over a window);
        of logits kl_divergence and top1_agreement. tokens: how many were compared.
        """
        counts = {"pooled_cosine": self._windows}
        means = {name: s / counts.get(name, self._tokens) for name, s in self._sums.items()}
        return {**means, "tokens": self._tokens}


_STATES = ("cosine", "pooled_cosine")
_LOGITS = ("kl_divergence", "top1_agreement")


def _state_terms(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
    cosine = torch.nn.functional.cosine_similarity
    pooled = cosine(ours.mean(1), theirs.mean(1), dim=-1)
    return {"cosine": cosine(ours, theirs, dim=-1), "pooled_cosine": pooled}


def _logit_terms(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    terms = log_theirs.exp() * (log_theirs - log_ours)
    agreed = ours.argmax(-1) == theirs.argmax(-1)
    return {"kl_divergence": terms.nansum(-1), "top1_agreement": agreed}


class QualityMeter:
    """Accumulates over windows, in float64."""

    def __init__(self) -> None:
        self._tokens = 0
        self._nll = 0.0
        self._compared = 0
        self._divergence = 0.0
        self._agreed = 0

    def update(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        reference_logits: torch.Tensor | None = None,
    ) -> None:
        """Score windows: logits [batch, sequence, vocabulary] for ids i64[batch, sequence].

        `reference_logits`: those of the original model, of the same shape. Raises UsageError for
        shapes that do not belong together.
        """
        if logits.dim() != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
            raise UsageError(
                f"logits {tuple(logits.shape)} do not belong to ids {tuple(ids.shape)}:"
                " [batch, sequence >= 2, vocabulary] and [batch, sequence] are expected"
            )
        if reference_logits is not None and reference_logits.shape != logits.shape:
            raise UsageError(
                f"the original's logits {tuple(reference_logits.shape)} do not have the shape of"
                f" the model's, {tuple(logits.shape)}",
                help="compare models of one vocabulary",
            )
        # Row by row: float64 log-probabilities of a large vocabulary are big.
        for row, row_ids in enumerate(ids):
            original = None if reference_logits is None else reference_logits[row]
            self._window(logits[row].detach(), row_ids, original)

    def _window(
        self, logits: torch.Tensor, ids: torch.Tensor, reference: torch.Tensor | None
    ) -> None:
        ours = torch.log_softmax(logits[:-1].double(), -1)
        self._nll -= float(ours.gather(1, ids[1:, None]).sum())
        self._tokens += len(ids) - 1
        if reference is None:
            return
        original = torch.log_softmax(reference[:-1].detach().double(), -1)
        # A token that the original rules out (probability 0) adds nothing.
        terms = original.exp() * (original - ours)
        self._divergence += float(terms[original > -math.inf].sum())
        self._agreed += int((ours.argmax(-1) == original.argmax(-1)).sum())
        self._compared += len(ids) - 1

    def result(self) -> dict[str, float | int | None]:
        """What was measured; UsageError if nothing was.

        perplexity; kl_divergence (original || model, nats per token) and top1_agreement (0..1),
        None if no original was given; tokens (how many were scored).
        """
        if not self._tokens:
            raise UsageError("no text was scored", help="give a text of at least one window")
        nll = self._nll / self._tokens
        compared = self._compared
        return {
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "kl_divergence": max(self._divergence / compared, 0.0) if compared else None,
            "top1_agreement": self._agreed / compared if compared else None,
            "tokens": self._tokens,
        }
