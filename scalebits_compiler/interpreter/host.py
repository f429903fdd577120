"""The rule of `host`: torch runs the code of a transformers model, the caller its products."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from scalebits_compiler.interpreter.misfits import named_errors
from scalebits_compiler.ir.attrs import Symbol
from scalebits_compiler.ir.host import Host
from scalebits_compiler.pretrained import call, linear_layers, model_class, skeleton

Product: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]
# (name of the matrix, input [..., n]) -> x Wᵀ [..., m], in the run that goes on in this thread.
_product: ContextVar[Product] = ContextVar("product")


_models_in_use = threading.RLock()
"""Held while a model of `_model` runs: its tensors are those of the run."""


@lru_cache(maxsize=2)
def _model(config: str, products: frozenset[str]) -> tuple[nn.Module, str]:
    """The model of a config and its task; the layers of `products` ask `_product`."""
    model = skeleton(config)
    for name, layer in linear_layers(model).items():
        if name in products:
            layer.forward = _forward(name, layer)  # type: ignore[method-assign]
    module: Any = model
    return model, model_class(module.config)[1]


def _forward(name: str, layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = _product.get()(name, x)
        return y if layer.bias is None else y + layer.bias

    return forward


def run_host(
    op: Host,
    texts: Sequence[torch.Tensor],
    weight: Callable[[Symbol], torch.Tensor],
    product: Product,
) -> torch.Tensor:
    """The result for the values of its operands, i64[batch, sequence] each; differentiable.

    Tensors that are no products are set in the model, which is kept without its own. Several
    threads wait for each other.
    """
    with _models_in_use:
        return _run(op, texts, weight, product)


def _run(
    op: Host,
    texts: Sequence[torch.Tensor],
    weight: Callable[[Symbol], torch.Tensor],
    product: Product,
) -> torch.Tensor:
    """`run_host` in a thread that has `_models_in_use`, or on behalf of one."""
    model, task = _model(op.config, frozenset(op.products))
    token = _product.set(product)
    try:
        with named_errors("the model", op.loc):
            for name, symbol in zip(op.names, op.weights, strict=True):
                if name not in op.products:
                    _set(model, name, weight(symbol))
            for name, buffer in model.named_buffers():
                if buffer.device != texts[0].device:
                    _set(model, name, buffer.to(texts[0].device))
            return call(model, task, *texts)
    finally:
        _product.reset(token)


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def run_together(
    op: Host,
    batches: Sequence[Sequence[torch.Tensor]],
    weight: Callable[[Symbol], torch.Tensor],
    decide: Callable[[str, list[torch.Tensor]], torch.Tensor],
) -> list[torch.Tensor]:
    """The results of `run_host` for several batches, which go on in turn from product to product.

    `decide(name, inputs)` gives the matrix for all runs that wait at a product; a run whose control
    flow comes to it later, or never, is asked for then, or not.
    """
    with _models_in_use:
        lanes = [_Lane(partial(_run, op, texts, weight)) for texts in batches]
        try:
            for lane in lanes:
                lane.advance(None)
            while waiting := [lane for lane in lanes if lane.asked is not None]:
                assert waiting[0].asked is not None
                name = waiting[0].asked[0]
                here = [
                    (lane, lane.asked[1])
                    for lane in waiting
                    if lane.asked and lane.asked[0] == name
                ]
                matrix = decide(name, [x for _, x in here])
                for lane, _ in here:
                    lane.advance(matrix)
        finally:
            for lane in lanes:
                lane.stop()
        return [lane.result for lane in lanes]


class _Stopped(Exception):
    """Ends the thread of a run that nobody waits for any more."""


class _Lane:
    """One run in a thread of its own; `asked` is the product it waits at, None at its end."""

    result: torch.Tensor
    asked: tuple[str, torch.Tensor] | None = None

    def __init__(self, run: Callable[[Product], torch.Tensor]) -> None:
        self._run = run
        self._error: BaseException | None = None
        self._asks: queue.SimpleQueue[tuple[str, torch.Tensor] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def advance(self, matrix: torch.Tensor | None) -> None:
        """Go on, with the matrix of the product that was asked for, to the next one or the end."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(matrix)
        self.asked = self._asks.get()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread."""
        if self.asked is not None:
            self._answers.put(None)
            self._thread.join()

    def _work(self) -> None:
        try:
            with torch.no_grad():
                self.result = self._run(self._product)
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        self._asks.put(None)

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self._asks.put((name, x))
        matrix = self._answers.get()
        if matrix is None:
            raise _Stopped
        return F.linear(x, matrix)
