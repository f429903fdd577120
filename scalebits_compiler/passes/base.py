"""What a pass is: a frozen dataclass whose fields are its options on the command line.

The metadata of a field holds its `help`, and a `flag` if `scalebitsc compile` has a flag for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from scalebits_compiler.errors import PassError
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.progress import Progress, no_progress

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.ir.module import Module
    from scalebits_compiler.ir.ops import Linear

    # (op, input [batch, sequence, n], dense weight [m, n]) -> output [batch, sequence, m]; a
    # streamed weight is on the host
    LinearRule = Callable[[Linear, torch.Tensor, torch.Tensor], torch.Tensor]
    # (op, the input of every batch, dense weight) -> the weight to go on with
    WeightRule = Callable[[Linear, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
    # part -> the matrices to go on with, by symbol (those left out stay)
    PartRule = Callable[["Part"], Mapping[str, torch.Tensor]]


class Part(Protocol):
    """Ops between two points where a single activation is live, such as an attention or an MLP."""

    @property
    def matrices(self) -> Sequence[str]:
        """Symbols of the matrices of its linear ops, in the order of execution."""
        ...

    def run(self, batch: int, linear: LinearRule | None = None) -> torch.Tensor:
        """The activation it ends with, for one of the batches; differentiable."""
        ...


class Evaluator(Protocol):
    """Runs one module; the driver injects an implementation (the reference target's)."""

    def run(self, ids: torch.Tensor, linear: LinearRule | None = None) -> torch.Tensor:
        """The function's result for token ids i64[batch, sequence]; differentiable.

        `linear` replaces the rule of every linear op (its result has no bias added yet). Streamed,
        gradients run it again in the backward pass.
        """
        ...

    def stream(self, batches: Sequence[torch.Tensor], weight: WeightRule) -> None:
        """Run all batches op by op, holding only live values.

        At each linear op `weight` sees the inputs of all batches, computed with the weights it
        gave for earlier ops, and returns the matrix to go on with.
        """
        ...

    def stream_parts(self, batches: Sequence[torch.Tensor], rule: PartRule) -> None:
        """Run all batches part by part, holding only live values and the matrices of one part.

        `rule` may run the part on any batch, with inputs computed by the matrices that it gave for
        earlier parts, and returns the matrices to go on with.
        """
        ...


@dataclass(frozen=True)
class TextSplit:
    """Token windows i64[n, sequence]: what gradients see, and what accepts or rejects a step.

    tuning: what tune-scales sees besides the calibration windows.
    """

    calibration: torch.Tensor
    acceptance: torch.Tensor
    tuning: torch.Tensor | None = None


class Checkpoint(Protocol):
    """Keeps the state of a long search, so that a killed run can go on; the driver injects it."""

    def load(self, name: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
        """What was last saved under a name, None if nothing was.

        UsageError if it was saved for another identity: kind of difference -> what it is of.
        """
        ...

    def save(self, name: str, identity: Mapping[str, str], state: Mapping[str, Any]) -> None:
        """Keep a state of plain values; replaces the last one at once or not at all."""
        ...


@dataclass
class PassContext:
    """What the driver gives to passes; `report` collects what a pass wants to tell, by its name.

    place: where passes compute; the tensors of modules, and text, are on the host always. cache:
    what one pass may reuse when it runs again in the same compile.
    """

    evaluate: Callable[[Module, Placement], Evaluator] | None = None
    place: Placement = field(default_factory=Placement)
    text: TextSplit | None = None
    seed: int = 0
    progress: Progress = no_progress
    checkpoint: Checkpoint | None = None
    cache: dict[str, object] = field(default_factory=dict)
    report: dict[str, object] = field(default_factory=dict)

    def evaluator(
        self, module: Module, needed_by: str, place: Placement | None = None
    ) -> Evaluator:
        """The injected evaluator for a module, at `place` (None: the context's).

        PassError where there is none.
        """
        if self.evaluate is None:
            raise PassError(f"{needed_by} evaluates the model, and no evaluator was given")
        return self.evaluate(module, place or self.place)

    def windows(self, module: Module, needed_by: str) -> TextSplit:
        """The text of the module (or of the context, which wins); PassError where there is none."""
        if self.text is not None:
            return self.text
        if module.calibration is None or module.acceptance is None:
            raise PassError(
                f"{needed_by} needs calibration text, and the module names none",
                help="start from a dump that `scalebitsc compile --dump-ir` wrote",
            )
        store = module.resources
        return TextSplit(
            store.torch(module.calibration.key).long(),
            store.torch(module.acceptance.key).long(),
            None if module.tuning is None else store.torch(module.tuning.key).long(),
        )


@dataclass(frozen=True)
class Pass(ABC):
    """Valid module in, valid module out. Never prints, dumps or mutates; observers do that."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[frozenset[str]] = frozenset()  # facts of a module that it cannot work on

    def check(self) -> None:  # noqa: B027  (most passes take any options)
        """Raise a ScalebitsError, before any pass runs, for options that cannot work."""

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> Module:
        """The module after this pass; the pipeline updates the facts."""
