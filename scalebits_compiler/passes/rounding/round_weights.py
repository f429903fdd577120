"""round-weights: final codes and scales in the assigned formats."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from scalebits_compiler.errors import PassError
from scalebits_compiler.ir.attrs import Grid, Resource
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.ops import Linear
from scalebits_compiler.ir.roles import embedding_tables
from scalebits_compiler.passes.base import Pass, PassContext

if TYPE_CHECKING:
    import torch

    from scalebits_compiler.numerics.quantize import Quantized

METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round by error feedback in the permuted order (GPTQ), or to nearest as the paper does.

    With error feedback, layers are rounded in the order of execution on the activations that the
    already rounded layers give. Tables of embeddings are rounded to nearest.
    """

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[frozenset[str]] = frozenset({"bits"})
    establishes: ClassVar[frozenset[str]] = frozenset({"rounded"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"tuned"})
    refuses: ClassVar[frozenset[str]] = frozenset({"packed"})

    method: str = field(default="gptq", metadata={"help": "gptq (error feedback) or rtn (nearest)"})
    damping: float = field(default=0.01, metadata={"help": "share of the mean Hessian diagonal"})
    clip: bool = field(
        default=True,
        metadata={"help": "search the range of every group; false: its largest magnitude"},
    )

    def run(self, module: Module, ctx: PassContext) -> Module:
        """Adds codes uint8 [m, n], and scales float16 [m, groups] to each matrix."""
        if self.method not in METHODS:
            raise PassError(f"unknown rounding method {self.method!r}: {' or '.join(METHODS)}")
        if self.method == "rtn":
            return _stored(module, self._rtn(module, module.quantized(), ctx))
        tables = set(embedding_tables(module))
        looked_up = [weight for weight in module.quantized() if weight.symbol in tables]
        if looked_up:
            module = _stored(module, self._rtn(module, looked_up, ctx))
        return _stored(module, self._gptq(module, tables, ctx))

    def _rtn(
        self, module: Module, weights: Sequence[Weight], ctx: PassContext
    ) -> dict[str, Quantized]:
        shown = ctx.progress(weights, "rounding to nearest")
        return {w.symbol: self._nearest(module, w, ctx.place.device).to("cpu") for w in shown}

    def _nearest(self, module: Module, weight: Weight, device: str) -> Quantized:
        from scalebits_compiler.numerics.formats import format_of
        from scalebits_compiler.numerics.quantize import LevelTable

        dense, group = _dense(module, weight)
        dense, ids = dense.to(device), group_formats(module, weight).to(device)
        used = [format_of(number) for number in ids.unique().tolist()]
        return LevelTable.fit(dense, group, clip=self.clip, formats=used).quantize(dense, ids)

    def _gptq(
        self, module: Module, tables: Collection[str], ctx: PassContext
    ) -> dict[str, Quantized]:
        from scalebits_compiler.numerics.gptq import gptq
        from scalebits_compiler.numerics.quantize import dequantize
        from scalebits_compiler.passes.sensitivity.scores import batches

        wanted = {w.symbol: w for w in module.quantized() if w.symbol not in tables}
        done: dict[str, Quantized] = {}
        ticks = iter(ctx.progress(range(len(wanted)), "rounding with error feedback", len(wanted)))
        shared = _Hessian()

        def rule(op: Linear, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
            symbol = op.weight.name
            if symbol not in wanted:
                return weight
            ids = group_formats(module, wanted[symbol]).to(weight.device)
            group = wanted[symbol].group or 0
            if symbol not in done:
                if not any(x.shape[0] for x in inputs):
                    return weight
                next(ticks, None)
                hessian = shared.of(inputs)
                rounded = gptq(weight, hessian, ids, group, self.damping, self.clip)
                done[symbol] = rounded.to("cpu")
            rounded = done[symbol].to(weight.device)
            return dequantize(rounded.codes, rounded.scales, ids, group)

        windows = ctx.windows(module, self.name).calibration
        ctx.evaluator(module, self.name).stream(batches(windows), rule)
        next(ticks, None)
        # Experts that no token is sent to, whether or not the model comes to their product.
        return done | self._rtn(module, [w for s, w in wanted.items() if s not in done], ctx)


def _stored(module: Module, done: Mapping[str, Quantized]) -> Module:
    """The module with the codes and scales of some matrices."""
    weights, tensors = [], {}
    for symbol, rounded in done.items():
        made = {"codes": rounded.codes, "scales": rounded.scales}
        tensors.update({f"{symbol}.{role}": tensor for role, tensor in made.items()})
        keys = {role: Resource(f"{symbol}.{role}") for role in made}
        weight = module.weights[symbol]
        digest = Grid.of(module.bits(weight)).digest()
        weights.append(replace(weight, rounded_at=digest, **keys))
    changed = module.with_weights(weights)
    return replace(changed, resources=module.resources.with_(tensors))


@dataclass
class _Hessian:
    """Σ x xᵀ of a layer's inputs; kept for the next matrix that reads the very same input."""

    source: torch.Tensor | None = None
    value: torch.Tensor | None = None

    def of(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """float64 [n, n] for the inputs [batch, sequence, n] of all batches."""
        if self.value is None or self.source is not inputs[0]:
            flat = [x.detach().flatten(0, -2) for x in inputs]
            self.value = (flat[0].T @ flat[0]).double()
            for x in flat[1:]:
                self.value += (x.T @ x).double()
            self.source = inputs[0]
        return self.value


def _dense(module: Module, weight: Weight) -> tuple[torch.Tensor, int]:
    if weight.data is None or weight.group is None:
        raise PassError(f"@{weight.symbol} has no data or group", help="run canonicalize first")
    return module.resources.torch(weight.data.key).float(), weight.group


def group_formats(module: Module, weight: Weight) -> torch.Tensor:
    """Format id per group, int64 [m, groups]."""
    import torch

    from scalebits_compiler.numerics.quantize import expand_grid

    if weight.block is None or weight.group is None:
        raise PassError(f"@{weight.symbol} has no block and group", help="run canonicalize first")
    rows, columns = weight.type.static_shape()
    grid = torch.from_numpy(module.bits(weight)).long()
    return expand_grid(grid, weight.block, weight.group, (rows, columns))
