"""Which loss the passes measure a model by (imports no torch; objectives.py computes them)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from scalebits_compiler.errors import PassError
from scalebits_compiler.tasks import CAUSAL, ENCODER, MASKED, SEQ2SEQ

if TYPE_CHECKING:
    from scalebits_compiler.ir.module import Module

Loss: TypeAlias = Literal["ce", "kl", "tokens", "states"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
LOSS_HELP = "the loss that the search lowers (docs/how-it-works.md); by the task if not given"
_OF_TASK = {CAUSAL: "ce", MASKED: "tokens", SEQ2SEQ: "tokens", ENCODER: "states"}


def loss_of(module: Module, asked: str | None = None) -> str:
    """The loss that the search lowers, by the task of the module if none is asked for.

    PassError for a loss that does not exist or that the result of the module does not have.
    """
    if asked is None:
        return _OF_TASK[module.task]
    fitting = [loss for loss in LOSSES if (loss == "states") == (module.task == ENCODER)]
    fitting = [loss for loss in fitting if loss != "ce" or module.task == CAUSAL]
    if asked not in fitting:
        raise PassError(
            f"the loss {asked!r} does not fit the task {module.task!r}",
            help=f"for this task: {' or '.join(fitting)}",
        )
    return asked


def curvature_of(loss: str) -> str:
    """The loss whose squared gradient stands for the curvature of another.

    The divergence has no gradient at full precision. That of labels drawn from the original has
    the same mean, and a square.
    """
    return "tokens" if loss == "kl" else loss
