"""The passes by name, resolved on first use, so that listing names imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from scalebits_compiler.errors import UsageError
from scalebits_compiler.passes.base import Pass

# name -> "module:Class", or the class itself (plugins)
PassTable = Mapping[str, str | type[Pass]]

_HOME = "scalebits_compiler.passes"
PASSES: dict[str, str | type[Pass]] = {
    "canonicalize": f"{_HOME}.canonicalize.canonicalize:Canonicalize",
    "annotate-sensitivity": f"{_HOME}.sensitivity.annotate_sensitivity:AnnotateSensitivity",
    "reorder-channels": f"{_HOME}.reorder.reorder_channels:ReorderChannels",
    "fold-permutes": f"{_HOME}.reorder.fold_permutes:FoldPermutes",
    "gather-inputs": f"{_HOME}.reorder.gather_inputs:GatherInputs",
    "assign-bits": f"{_HOME}.search.assign_bits:AssignBits",
    "round-weights": f"{_HOME}.rounding.round_weights:RoundWeights",
    "tune-scales": f"{_HOME}.rounding.tune_scales:TuneScales",
    "pack-blocks": f"{_HOME}.rounding.pack_blocks:PackBlocks",
}

_REORDERED = "canonicalize,annotate-sensitivity,reorder-channels,fold-permutes"
_TUNED = "assign-bits{rounds = 0},round-weights,tune-scales,pack-blocks"
_UNTUNED = "assign-bits,round-weights,pack-blocks"
# Named pipelines are data: a name in a pipeline stands for this text. Swaps lower the loss of the
# rounded model and raise that of the tuned one (benchmarks/results/quality.md): none before tuning.
PIPELINES: dict[str, str] = {
    "default": f"{_REORDERED},{_TUNED}",
    "untuned": f"{_REORDERED},{_UNTUNED}",
    "gathered": f"{_REORDERED},gather-inputs,{_TUNED}",
    "gathered-untuned": f"{_REORDERED},gather-inputs,{_UNTUNED}",
}


def find_pass(name: str, table: PassTable = PASSES) -> type[Pass]:
    """The class of a pass. UsageError with the nearest name if there is none."""
    entry = table.get(name)
    if entry is None:
        near = get_close_matches(name, [*table, *PIPELINES], n=1)
        raise UsageError(
            f"there is no pass '{name}'",
            help=f"did you mean '{near[0]}'?" if near else f"the passes are {', '.join(table)}",
        )
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(import_module(module), attribute)
    return entry
