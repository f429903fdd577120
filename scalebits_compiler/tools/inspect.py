"""What can be said of a model before it is compiled, from its config alone (layer L3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalebits_compiler.analysis.order_classes import describe
from scalebits_compiler.driver.compile import evaluator
from scalebits_compiler.driver.inputs import traced_module
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize


def analyse(path: str | Path) -> dict[str, Any]:
    """The matrices and permutation classes of the model that a config.json describes.

    No weights are read or made: the model is traced on the meta device. Keys: `matrices` (symbol ->
    shape, of those that would be quantized), `dense` (symbol -> why not), `aten` (calls that were
    not recognised -> how many), and those of `order_classes.describe`. Raises FrontendError for a
    folder that is no model or cannot be traced.
    """
    from scalebits_compiler.frontend.hf import empty_model

    empty = empty_model(path)
    ctx = PassContext(evaluate=evaluator)
    module = Canonicalize().run(traced_module(empty), ctx)
    report: Any = ctx.report[Canonicalize.name]
    return {
        "model": empty.name,
        "matrices": {w.symbol: list(w.type.static_shape()) for w in module.quantized()},
        "dense": report["dense"],
        "aten": report["aten"],
        "not_traced": report["not_traced"],
        **describe(module),
    }
