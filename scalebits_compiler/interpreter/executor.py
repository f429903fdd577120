"""Runs a module of any stage with the rules of `rules.py`; the Evaluator that passes are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from scalebits_compiler.errors import TargetError
from scalebits_compiler.interpreter.host import run_together
from scalebits_compiler.interpreter.rules import RULES, linear_input, product_op
from scalebits_compiler.interpreter.weights import dense
from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.calls import check_call
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten, Embedding, Linear, QLinear
from scalebits_compiler.ir.types import Type
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.pretrained import shifted

LinearRule = Callable[[Linear, torch.Tensor, torch.Tensor], torch.Tensor]
PackedProduct = Callable[[str, torch.Tensor], torch.Tensor]
Weights = Callable[[Symbol], torch.Tensor]
WeightRule = Callable[[Linear, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def _plain_linear(_: Linear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.device))


class _Frame:
    """The live values of one run; gives rules what they read (`rules.Scope`)."""

    def __init__(
        self,
        executor: Executor,
        weight: Weights,
        matrix: Weights,
        linear: LinearRule,
        pad: torch.Tensor | None = None,
    ) -> None:
        self.values: dict[Value, Any] = {}
        self.pad = pad
        self.linear = linear
        self.weight = weight
        self.matrix = matrix
        self.device = executor.place.device
        self._executor = executor

    def value(self, value: Value) -> Any:
        return self.values[value]

    def type(self, value: Value) -> Type:
        return self._executor.types[value]

    def permutation(self, name: str) -> np.ndarray:
        return self._executor.module.permutation(name)

    def fork(self, linear: LinearRule) -> _Frame:
        """A frame that goes on from here with another linear rule."""
        frame = _Frame(self._executor, self.weight, self.matrix, linear, self.pad)
        frame.values = dict(self.values)
        return frame

    def product(self, op: Linear | QLinear, x: torch.Tensor) -> torch.Tensor:
        if isinstance(op, Linear):
            return self.linear(op, x, self.matrix(op.weight))
        if self._executor.packed is not None:
            return self._executor.packed(op.weight.name, x)
        return F.linear(x, self.weight(op.weight))

    def is_packed(self, symbol: Symbol) -> bool:
        return self._executor.module.weight(symbol).type.is_packed

    def step(self, op: Op) -> None:
        """Run one op."""
        self.finish(op, self.result(op))

    def result(self, op: Op) -> Any:
        """What one op gives."""
        rule = RULES.get(type(op))
        if rule is None:
            raise TargetError(
                f"the reference target has no rule for the op {op.name}",
                help="a plugin that adds an op must add its rule to codegen.reference.rules.RULES",
            )
        return rule(op, self)

    def finish(self, op: Op, result: Any) -> None:
        """Keep the result of an op and drop what no later op reads."""
        self.values[op.result] = result
        for value in self._executor.dies_at.get(op.result, ()):
            del self.values[value]

    def part(self, ops: Sequence[Op]) -> None:
        """Run some ops; what their gradients need is computed again in the backward pass."""
        names, left = tuple(self.values), list[Value]()
        given = tuple(self.values.values())
        empty = copy(self)  # a graph that knew our values would keep itself alive
        empty.values = {}

        def run(*given: Any) -> tuple[Any, ...]:
            frame = copy(empty)
            frame.values = dict(zip(names, given, strict=True))
            for op in ops:
                frame.step(op)
            left[:] = frame.values
            return tuple(frame.values.values())

        made = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        self.values = dict(zip(left, made, strict=True))


@dataclass(frozen=True)
class Part:
    """Ops that end where a single activation is live; see `Executor.stream_parts`."""

    ops: Sequence[Op]
    frames: Sequence[_Frame]

    @property
    def matrices(self) -> list[str]:
        """Symbols of the matrices of its products, in the order of execution."""
        found: list[str] = []
        for op in self.ops:
            if isinstance(op, Linear):
                found.append(op.weight.name)
            elif isinstance(op, Host):
                found += [symbol.name for symbol in op.product_symbols().values()]
        return found

    def run(self, batch: int, linear: LinearRule | None = None) -> torch.Tensor:
        """The activation it ends with, for one batch; nothing of the stream changes."""
        frame = self.frames[batch].fork(linear or _plain_linear)
        for op in self.ops:
            frame.step(op)
        return frame.value(self.ops[-1].result)


class Executor:
    """Computes a module's function in float32, one op after the other.

    Works on every stage: raw ATen calls, raised ops, permuted, rounded and packed weights. Dense
    weights are made once and kept on the device for the life of the Executor. Streamed, matrices
    come to it when an op reads them, and with gradients every layer runs twice: only the values
    between layers are kept, and the backward pass makes those inside, and the matrices, again.
    Slow by intent: no KV cache. packed: computes x Wᵀ for a packed matrix (by symbol); None
    dequantizes it.
    """

    def __init__(
        self,
        module: Module,
        place: Placement | None = None,
        packed: PackedProduct | None = None,
    ) -> None:
        for op in module.function.ops:
            if isinstance(op, Aten):  # a module need not have been verified, as by opt --no-verify
                check_call(op.target, op.args, op.kwargs)
        self.module = module
        self.types = module.function.types()
        self.place = place or Placement()
        self.packed = packed
        self.dies_at = _last_uses(module)
        self._dense: dict[str, torch.Tensor] = {}

    def read(self, symbol: Symbol) -> torch.Tensor:
        """The dense float32 tensor of a weight in stored order, on the host (`weights.dense`)."""
        return dense(self.module, self.module.weight(symbol))

    def weight(self, symbol: Symbol) -> torch.Tensor:
        """The same on the device."""
        if symbol.name in self._dense:
            return self._dense[symbol.name]
        made = self.place.here(self.read(symbol))
        if not self.place.streamed or made.dim() < 2:
            self._dense[symbol.name] = made
        return made

    def run(
        self,
        ids: torch.Tensor,
        linear: LinearRule | None = None,
        pad: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The function's result for token ids i64[batch, sequence]; differentiable.

        The decoder of an encoder-decoder goes on from the same ids behind its start token.
        `linear(op, x, dense weight)` replaces the product of every linear op (the bias is added
        to what it returns). `pad` i64[batch] counts padding tokens on the left of each row:
        positions start after them and no token attends to them. Raises TargetError for padding on
        a module with ATen or host ops, whose masks cannot be changed.
        """
        if pad is not None and not bool(pad.any()):
            pad = None
        if pad is not None and any(isinstance(op, (Aten, Host)) for op in self.module.function.ops):
            raise TargetError(
                f"@{self.module.name} has ops that are not ours, its attention cannot skip padding",
                help="run prompts of different length one by one",
            )
        matrix = self.read if self.place.streamed else self.weight
        pad = None if pad is None else self.place.here(pad)
        frame = _Frame(self, self.weight, matrix, linear or _plain_linear, pad)
        frame.values.update(self._arguments(ids))
        if self.place.streamed and torch.is_grad_enabled():
            for part in _parts(self.module):
                frame.part(part)
        else:
            for op in self.module.function.ops:
                frame.step(op)
        return frame.values[self.module.function.result]

    def continuation(self, ids: torch.Tensor) -> Continuation:
        """An encoder-decoder that has read token ids i64[batch, sequence]."""
        return Continuation(self, ids)

    def apply(self, op: Op, values: Mapping[Value, Any], pad: torch.Tensor | None) -> Any:
        """What one op of the module gives for values of its operands; `pad` as in `run`."""
        frame = _Frame(self, self.weight, self.weight, _plain_linear, pad)
        frame.values.update(values)
        return frame.result(op)

    def stream(self, batches: Sequence[torch.Tensor], weight: WeightRule) -> None:
        """Run all batches op by op without gradients, holding only live values.

        At each linear op, `weight(op, the input of every batch, dense weight)` returns the matrix
        to go on with, for all batches; so it sees inputs computed with the matrices it gave
        before. Weights are made when an op reads them and dropped after it.
        """
        held: dict[str, torch.Tensor] = {}

        def read(symbol: Symbol) -> torch.Tensor:
            if symbol.name not in held:
                held[symbol.name] = self.place.here(self.read(symbol))
            return held[symbol.name]

        frames = [_Frame(self, read, read, _plain_linear) for _ in batches]
        with torch.no_grad():
            for frame, ids in zip(frames, batches, strict=True):
                frame.values.update(self._arguments(ids))
            for op in self.module.function.ops:
                if isinstance(op, Linear):
                    inputs = [linear_input(op, frame) for frame in frames]
                    held[op.weight.name] = weight(op, inputs, read(op.weight))
                    del inputs
                if isinstance(op, Host):
                    self._stream_host(op, frames, read, weight)
                else:
                    for frame in frames:
                        frame.step(op)
                held.clear()

    def stream_parts(
        self, batches: Sequence[torch.Tensor], rule: Callable[[Part], Mapping[str, torch.Tensor]]
    ) -> None:
        """Run all batches part by part without gradients, holding only live values.

        `rule(part)` may run the part on a batch, on what the parts before gave with the matrices it
        returned for them; it returns the matrices to go on with, by symbol. Weights are made when
        a part reads them and dropped after it.
        """
        held: dict[str, torch.Tensor] = {}

        def read(symbol: Symbol) -> torch.Tensor:
            if symbol.name not in held:
                held[symbol.name] = self.place.here(self.read(symbol))
            return held[symbol.name]

        frames = [_Frame(self, read, read, _plain_linear) for _ in batches]
        for frame, ids in zip(frames, batches, strict=True):
            frame.values.update(self._arguments(ids))
        for ops in _parts(self.module):
            held.update(rule(Part(ops, frames)))
            with torch.no_grad():
                for frame in frames:
                    for op in ops:
                        frame.step(op)
            held.clear()

    def _stream_host(
        self,
        op: Host,
        frames: Sequence[_Frame],
        read: Callable[[Symbol], torch.Tensor],
        weight: WeightRule,
    ) -> None:
        """`stream` for one host op: its products are the linear ops."""
        symbols = op.product_symbols()

        def decide(name: str, inputs: list[torch.Tensor]) -> torch.Tensor:
            return weight(product_op(Linear, op, symbols[name]), inputs, read(symbols[name]))

        texts = [[frame.value(value) for value in op.operands()] for frame in frames]
        results = run_together(op, texts, read, decide)
        for frame, result in zip(frames, results, strict=True):
            frame.finish(op, result)

    def _arguments(self, ids: torch.Tensor) -> dict[Value, torch.Tensor]:
        """The arguments for one text; a decoder gets the same one behind its start token."""
        values = [argument.value for argument in self.module.function.args]
        start = self.module.start_token
        texts = [ids] if start is None else [ids, shifted(ids, start)]
        if len(values) != len(texts):
            raise TargetError(
                f"@{self.module.name} takes {len(values)} arguments, token ids are expected"
            )
        return dict(zip(values, map(self.place.here, texts), strict=True))


class Continuation:
    """A text that an encoder-decoder has read: the values of ops that do not see what it continues.

    These are the ops before the first that reads the second argument.
    """

    def __init__(self, executor: Executor, ids: torch.Tensor) -> None:
        function, place = executor.module.function, executor.place
        text, self._continued = (argument.value for argument in function.args)
        seen = [self._continued in op.operands() for op in function.ops]
        self._frame = _Frame(executor, executor.weight, executor.weight, _plain_linear)
        self._frame.values[text] = place.here(ids)
        self._later, self._result = function.ops[seen.index(True) :], function.result
        with torch.no_grad():
            for op in function.ops[: seen.index(True)]:
                self._frame.step(op)

    def run(self, decoder_ids: torch.Tensor) -> torch.Tensor:
        """The function's result for what is continued, i64[batch, length]."""
        frame = self._frame.fork(_plain_linear)
        frame.values[self._continued] = decoder_ids.to(frame.device)
        with torch.no_grad():
            for op in self._later:
                frame.step(op)
        return frame.values[self._result]


def _parts(module: Module) -> list[list[Op]]:
    """The ops cut wherever one value alone is live of those computed from an embedding."""
    dies_at = _last_uses(module)
    activations: set[Value] = set()
    parts: list[list[Op]] = [[]]
    for op in module.function.ops:
        parts[-1].append(op)
        if isinstance(op, Embedding) or not activations.isdisjoint(op.operands()):
            activations.add(op.result)
        activations.difference_update(dies_at.get(op.result, ()))
        if activations == {op.result}:
            parts.append([])
    return [ops for ops in parts if ops]


def _last_uses(module: Module) -> dict[Value, list[Value]]:
    """Result of an op -> the values that no later op reads (its own result if nobody does)."""
    function = module.function
    last: dict[Value, Value] = {}
    for op in function.ops:
        last[op.result] = op.result
        for operand in op.operands():
            last[operand] = op.result
    last.pop(function.result, None)
    table: dict[Value, list[Value]] = {}
    for value, at in last.items():
        table.setdefault(at, []).append(value)
    return table
