"""gather-inputs: columns of a matrix in an order of its own, read through an index at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from scalebits_compiler.analysis.orders import axis_indices
from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module, Perm, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import INDEX_BITS, Linear
from scalebits_compiler.ir.types import Dim, Factor
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.reorder.fold_permutes import TOLERANCE, LogitCheck
from scalebits_compiler.passes.reorder.reorder_channels import (
    Order,
    free_names,
    log_score,
    make_perm,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GatherInputs(Pass):
    """Give matrices a private order of their columns where it saves more bits than its index takes.

    Columns are sorted by sensitivity; the linear ops that read the matrix bring their input into
    that order as they read it (`gather`). Rows keep the order of their class. The index, 16 bits
    for each column, counts in the effective bits; `worth = 0` takes every order that saves any.
    """

    name: ClassVar[str] = "gather-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "sensitivity"})
    establishes: ClassVar[frozenset[str]] = frozenset({"gathered"})
    refuses: ClassVar[frozenset[str]] = frozenset({"bits", "rounded", "packed"})

    worth: float = field(
        default=1.0, metadata={"help": "bits that an order must save for each bit of its index"}
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds a permutation for each such matrix, and stores the matrix in it.

        Where the module has text, the logits before and after are compared on a few tokens; if they
        differ the module stays as it is, which the report says.
        """
        if not self.worth >= 0:
            raise PassError(f"gather-inputs: worth {self.worth} is no number of 0 or more")
        check = LogitCheck.of(module, ctx)
        found = {weight.symbol: _private_order(module, weight) for weight in _candidates(module)}
        chosen = {
            symbol: (order, saved)
            for symbol, (order, saved) in found.items()
            if self._keeps(saved, order)
        }
        made = _stored(module, {symbol: order for symbol, (order, _) in chosen.items()})
        error = None if check is None or not chosen else check.error(made)
        kept = error is None or error <= TOLERANCE
        bits = made.index_bits()
        ctx.report[self.name] = {
            "gathers": {
                symbol: {"bits": bits[symbol], "saves": saved}
                for symbol, (_, saved) in chosen.items()
                if kept
            },
            "logits_error": error,
            "reverted": not kept,
        }
        return made if kept else module

    def _keeps(self, saved: float, order: Order) -> bool:
        return saved > self.worth * INDEX_BITS * len(order)


def _candidates(module: Module) -> list[Weight]:
    """The searched matrices that only linear ops read, and that an index can order."""
    other = {
        symbol.name
        for op in module.function.ops
        if not isinstance(op, Linear) or op.gather
        for symbol in op.symbols()
    }
    return [
        weight
        for weight in module.searched()
        if weight.symbol not in other and weight.type.static_shape()[1] <= 2**INDEX_BITS
    ]


def _private_order(module: Module, weight: Weight) -> tuple[Order, float]:
    """(stored columns by falling sensitivity, bits that this order saves).

    A bit more divides the error of a block by about four, so widths that are log4(score) apart are
    as good; the order saves by how much it lowers the sum of log4(score) over all weights.
    """
    if weight.column_scores is None or weight.block is None:
        raise PassError(
            f"@{weight.symbol} has no sensitivity scores", help="run annotate-sensitivity first"
        )
    scores = module.resources.numpy(weight.column_scores.key).astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    rows, block = weight.type.static_shape()[0], weight.block[1]
    saved = (log_score(scores, block) - log_score(scores[order], block)) * rows / math.log(4)
    return order, saved


def _stored(module: Module, orders: dict[str, Order]) -> Module:
    """The module with the columns of some matrices brought into an order."""
    import torch

    free = free_names(module)
    perms: dict[str, Perm] = {}
    weights: dict[str, Weight] = {}
    tensors: dict[str, torch.Tensor] = {}
    for symbol, order in orders.items():
        weight, name = module.weights[symbol], next(free)
        before = weight.type.dims[1]
        natural = axis_indices(before, module)
        stored = order if natural is None else natural[order]
        perms[name], tensor = make_perm(name, stored, f"input channels of {symbol}")
        tensors |= tensor
        changes: dict[str, Any] = {"move_scores": None}
        for role, axis in (("data", 1), ("column_scores", 0)):
            resource = getattr(weight, role)
            if isinstance(resource, Resource):
                held = module.resources.torch(resource.key)
                tensors[resource.key] = held.index_select(axis, torch.from_numpy(order))
        kind = weight.type.with_dim(1, Dim.of(Factor(len(order), name)))
        weights[symbol] = replace(weight, type=kind, **changes)
    ops = tuple(_gathering(op, weights) for op in module.function.ops)
    changed = replace(
        module,
        function=replace(module.function, ops=ops),
        perms={**module.perms, **perms},
        resources=module.resources.with_(tensors),
    )
    return changed.with_weights(weights.values())


def _gathering(op: Op, weights: dict[str, Weight]) -> Op:
    if isinstance(op, Linear) and op.weight.name in weights:
        return replace(op, gather=str(weights[op.weight.name].type.dims[1]))
    return op
