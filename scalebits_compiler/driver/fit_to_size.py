"""`--fit`: the widths that make the files of an artifact as large as they may be (layer L3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalebits_compiler.artifact.writer import TooLarge
from scalebits_compiler.driver.compilation import Compilation, CompileReport
from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module
from scalebits_compiler.passes.rounding.pack_blocks import as_packed, layout_of
from scalebits_compiler.passes.search.assign_bits import AssignBits, searched_costs
from scalebits_compiler.passes.search.initial_allocations import Costs, Ints, greedy_raise
from scalebits_compiler.passes.search.problem import SearchProblem

# What the texts of an artifact may differ by from those of the trial, per matrix and at all: the
# digits of counts in histograms, and of averages.
_PER_MATRIX, _ONCE = 64, 512
_TRIES = 3


def compile_to_size(work: Compilation, out: Path, most_bytes: int) -> CompileReport:
    """The best artifact whose files, all of them, take at most `most_bytes`.

    What the files hold besides the searched matrices is measured on trial artifacts: of the least
    widths, which says what is feasible, and of the widths that the search would start from, whose
    kernels are about those of the result. A result that is too large still is searched again.
    PassError names the smallest feasible size.
    """
    before, search, after = work.split()
    module = work.run(work.module, before, [_Least(search, most_bytes)])
    pinned = search.pinned(module)
    costs = searched_costs(pinned, search)
    least, most = costs.total(costs.low), costs.total(costs.high)
    beside = _bytes_beside(work, pinned, search, costs.low, costs)
    told = "head and embedding can be quantized too: --head-bits, --embedding-bits"
    _check_least(most_bytes, beside + -(-least // 8), "the smallest feasible has", told)
    how = search.name, search.ladder(), search.loss, search.whole_blocks
    curves = SearchProblem.load(pinned, work.ctx, *how).curves
    guess = replace(costs, budget=max(least, 8 * (most_bytes - beside)))
    likely = greedy_raise(curves, guess, costs.low)
    beside = _bytes_beside(work, pinned, search, likely, costs)
    for _ in range(_TRIES):
        budget = min(max(least, 8 * (most_bytes - beside)), most)
        item = replace(search, avg_bits=(budget + 0.5) / costs.weights)
        done = work.run(module, [item, *after])
        try:
            with work.output.replacement() as folder:
                manifest = work.emit(done, folder, most_bytes)
        except TooLarge as error:
            beside += error.excess
            continue
        work.search.remove()
        return work.report(out, manifest)
    raise PassError(f"no artifact of at most {most_bytes:,} bytes was found in {_TRIES} tries")


@dataclass(frozen=True)
class _Least:
    """Refuses, before the search's curves are made, what the searched matrices alone exceed."""

    search: AssignBits
    most_bytes: int

    def problem(self, module: Module) -> None:
        """PassError if they do at their least widths."""
        costs = searched_costs(self.search.pinned(module), self.search)
        least = -(-costs.total(costs.low) // 8)
        what, told = "its searched matrices alone have at least", "a number alone is bytes"
        _check_least(self.most_bytes, least, what, f"{told}: give a size such as 24MiB")


def _check_least(most_bytes: int, least: int, what: str, told: str) -> None:
    if most_bytes < least:
        raise PassError(
            f"an artifact of {most_bytes:,} bytes cannot be made: {what}"
            f" {least:,} ({math.ceil(least / 2**20 * 100) / 100:.2f} MiB)",
            help=told,
        )


def _bytes_beside(
    work: Compilation, module: Module, search: AssignBits, choice: Ints, costs: Costs
) -> int:
    """Bytes of an artifact without its searched matrices, measured by writing one of zeros."""
    ids = np.array([item.id for item in search.ladder()], np.uint8)[choice]
    with work.output.temporary_folder() as folder:
        written = work.emit(_trial(module, ids), folder)
    rest = written.file_bytes - costs.total(choice) // 8
    return rest + _ONCE + _PER_MATRIX * len(module.quantized())


def _trial(module: Module, ids: NDArray[np.uint8]) -> Module:
    """The module packed with zeros in the formats `ids` of its searched blocks."""
    import torch

    grids, offset = {}, 0
    for weight in module.quantized():
        shape = weight.grid_shape()
        if weight.fixed_bits is not None:
            grids[weight.symbol] = np.full(shape, weight.fixed_bits, np.uint8)
            continue
        count = shape[0] * shape[1]
        grids[weight.symbol] = ids[offset : offset + count].reshape(shape)
        offset += count
    made = module.with_bits(grids)
    tensors = {
        f"{weight.symbol}.move_scores": torch.zeros(*weight.grid_shape(), 4, dtype=torch.bfloat16)
        for weight in made.searched()
    }
    made = made.with_weights(
        replace(weight, move_scores=Resource(f"{weight.symbol}.move_scores"))
        for weight in made.searched()
    )
    arenas = {
        weight.symbol: torch.zeros(
            layout_of(weight).nbytes(grids[weight.symbol]), dtype=torch.uint8
        )
        for weight in made.quantized()
    }
    packed = as_packed(replace(made, resources=made.resources.with_(tensors)), arenas)
    history = (*made.history, "assign-bits{avg-bits = 3.0123456789012345}", "round-weights")
    facts = made.facts | {"bits", "packed"}
    return replace(packed, facts=facts, history=(*history, "tune-scales", "pack-blocks"))
