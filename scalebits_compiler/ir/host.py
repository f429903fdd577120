"""A model that is not traced, as one op: torch runs its code, and we its products."""

# ruff: noqa: D102  (`infer` is documented in Op; the docstring of the class says what it computes)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.op import Op, Typing, check
from scalebits_compiler.ir.types import Type


@dataclass(frozen=True, kw_only=True)
class Host(Op):
    """The model of the transformers library that `config` (JSON) describes, applied to token ids.

    decoder_ids: what the decoder of an encoder-decoder goes on from. names: the tensors of its
    state dict, one for each of `weights`, dense or packed. products: those that are read by layers
    x Wᵀ + b alone, as [outputs, inputs]; the caller computes these. dense: (symbol, why) of each
    matrix that is not quantized. reason: why the model is not traced. Its channels keep their
    order.
    """

    name: ClassVar[str] = "host"
    ids: Value
    decoder_ids: Value | None = None
    weights: tuple[Symbol, ...]
    names: tuple[str, ...]
    products: tuple[str, ...]
    dense: tuple[tuple[str, str], ...] = ()
    config: str
    reason: str

    def infer(self, t: Typing) -> Type:
        count = len(self.weights)
        check(len(self.names) == count, f"{count} weights have {len(self.names)} names")
        check(set(self.products) <= set(self.names), "products are no names of weights")
        for symbol in self.weights:
            for dim in t.weight(symbol).dims:
                t.natural(dim, f"channels of {self.loc or 'a model'}, which is not traced")
        check(not self.type.orders, "a host op gives natural order")
        return self.type

    def product_symbols(self) -> dict[str, Symbol]:
        """Name -> weight of the matrices of linear layers."""
        found = dict(zip(self.names, self.weights, strict=True))
        return {name: found[name] for name in self.products}
