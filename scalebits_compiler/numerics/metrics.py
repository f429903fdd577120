"""How good a model is on text: perplexity, divergence from the original, top-1 agreement.

Protocol: windows of tokens without overlap; every token but the first of a window is scored.
"""

from __future__ import annotations

import math

import torch

from scalebits_compiler.errors import UsageError


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
