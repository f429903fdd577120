"""One torch rule per op: the definition of what the op computes. Float32, differentiable."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch._ops import OpOverload

from scalebits_compiler.errors import TargetError
from scalebits_compiler.interpreter.host import run_host
from scalebits_compiler.interpreter.misfits import named_errors
from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.calls import (
    GETITEM,
    INT_LIMIT,
    NUMBER_CALLS,
    SUM,
    TORCH_NAMES,
    is_call,
)
from scalebits_compiler.ir.experts import Combine, Dispatch, Route
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import (
    Add,
    Aten,
    Attention,
    Bias,
    Embedding,
    Gelu,
    GeluTanh,
    LayerNorm,
    Linear,
    MergeHeads,
    Mul,
    Permute,
    Positions,
    QLinear,
    Relu,
    RmsNorm,
    Rope,
    Scale,
    Silu,
    SplitHeads,
    Tanh,
)
from scalebits_compiler.ir.stored_order import gather_index, stored_order
from scalebits_compiler.ir.types import TensorType, Type

LinearT = TypeVar("LinearT", Linear, QLinear)


class Scope(Protocol):
    """What a rule may read."""

    pad: torch.Tensor | None

    def value(self, value: Value, /) -> Any:
        """The tensor (for some ATen ops: the number or the tuple) behind a value."""
        ...

    @property
    def weight(self) -> Callable[[Symbol], torch.Tensor]:
        """Gives the dense tensor of a weight."""
        ...

    @property
    def matrix(self) -> Callable[[Symbol], torch.Tensor]:
        """Gives the dense tensor of a matrix of a linear op; on the host if it is streamed."""
        ...

    def type(self, value: Value, /) -> Type:
        """The stated type of a value."""
        ...

    def permutation(self, name: str) -> np.ndarray:
        """int64[n], natural index of every stored element."""
        ...

    def product(self, op: Linear | QLinear, x: torch.Tensor, /) -> torch.Tensor:
        """x Wᵀ of an op, or what the caller put in its place."""
        ...

    def is_packed(self, symbol: Symbol, /) -> bool:
        """Whether a weight is a packed matrix."""
        ...

    @property
    def device(self) -> str:
        """Where values and weights are."""
        ...


def _positions(op: Positions, scope: Scope) -> torch.Tensor:
    ids = scope.value(op.ids)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return positions if scope.pad is None else (positions - scope.pad[:, None]).clamp(min=0)


def _embedding(op: Embedding, scope: Scope) -> torch.Tensor:
    return F.embedding(scope.value(op.ids), scope.weight(op.table))


def _biased(y: torch.Tensor, bias: Symbol | None, scope: Scope) -> torch.Tensor:
    return y if bias is None else y + scope.weight(bias)


def linear_input(op: Linear | QLinear, scope: Scope) -> torch.Tensor:
    """x with its channels in the order of the matrix's columns."""
    x = scope.value(op.x)
    if not op.gather:
        return x
    index = gather_index(scope.type(op.x), op.gather, scope.permutation)
    return x.index_select(-1, torch.from_numpy(index).to(x.device))


def _linear(op: Linear | QLinear, scope: Scope) -> torch.Tensor:
    return _biased(scope.product(op, linear_input(op, scope)), op.bias, scope)


def _rms_norm(op: RmsNorm, scope: Scope) -> torch.Tensor:
    x = scope.value(op.x)
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + op.eps)
    return x * inverse * scope.weight(op.gain)


def _layer_norm(op: LayerNorm, scope: Scope) -> torch.Tensor:
    x, gain = scope.value(op.x), scope.weight(op.gain)
    bias = None if op.bias is None else scope.weight(op.bias)
    return F.layer_norm(x, gain.shape, gain, bias, op.eps)


def _silu(op: Silu, scope: Scope) -> torch.Tensor:
    return F.silu(scope.value(op.x))


def _gelu(op: Gelu, scope: Scope) -> torch.Tensor:
    return F.gelu(scope.value(op.x))


def _gelu_tanh(op: GeluTanh, scope: Scope) -> torch.Tensor:
    return F.gelu(scope.value(op.x), approximate="tanh")


def _relu(op: Relu, scope: Scope) -> torch.Tensor:
    return F.relu(scope.value(op.x))


def _tanh(op: Tanh, scope: Scope) -> torch.Tensor:
    return torch.tanh(scope.value(op.x))


def _scale(op: Scale, scope: Scope) -> torch.Tensor:
    return scope.value(op.x) * op.factor


def _bias(op: Bias, scope: Scope) -> torch.Tensor:
    return scope.value(op.x) + scope.weight(op.bias)


def _add(op: Add, scope: Scope) -> torch.Tensor:
    return scope.value(op.a) + scope.value(op.b)


def _mul(op: Mul, scope: Scope) -> torch.Tensor:
    return scope.value(op.a) * scope.value(op.b)


def _split_heads(op: SplitHeads, scope: Scope) -> torch.Tensor:
    return scope.value(op.x).unflatten(-1, (op.heads, -1)).transpose(1, 2)


def _merge_heads(op: MergeHeads, scope: Scope) -> torch.Tensor:
    return scope.value(op.x).transpose(1, 2).flatten(2)


def _rope(op: Rope, scope: Scope) -> torch.Tensor:
    x, positions = scope.value(op.x), scope.value(op.positions)
    angles = positions[:, None, :, None].to(torch.float32) * scope.weight(op.frequency)
    cos, sin = torch.cos(angles) * op.scaling, torch.sin(angles) * op.scaling
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if op.interleaved else (2, half))
    axis = -1 if op.interleaved else -2
    first, second = pairs.unbind(axis)
    made = torch.stack((first * cos - second * sin, second * cos + first * sin), axis)
    return torch.cat((made.flatten(-2), rest), -1)


def attention_mask(
    sequence: int,
    window: int,
    pad: torch.Tensor | None,
    causal: bool = True,
    device: torch.device | None = None,
) -> torch.Tensor:
    """bool[batch or 1, 1, s, s], true where a query sees a key.

    `pad` i64[batch] counts padding on the left; padding is seen only by itself, so that its rows
    stay finite.
    """
    places = torch.arange(sequence, device=device)
    query, key = places[:, None], places[None, :]
    seen = key <= query if causal else torch.ones_like(key <= query)
    if window:
        seen = seen & (key > query - window)
    if pad is None:
        return seen[None, None]
    return (seen & (key >= pad[:, None, None]) | (key == query))[:, None]


def _attention(op: Attention, scope: Scope) -> torch.Tensor:
    q, k, v = scope.value(op.q), scope.value(op.k), scope.value(op.v)
    plain = not op.window and scope.pad is None
    mask = None
    if not plain:
        mask = attention_mask(q.shape[2], op.window, scope.pad, op.causal, q.device)
    if op.softcap or op.slopes is not None:
        slopes = None if op.slopes is None else scope.weight(op.slopes)
        return _written_out(op, (q, k, v), mask, slopes)
    causal = op.causal and plain
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=op.scale, enable_gqa=True
    )


def _written_out(
    op: Attention,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    q, k, v = inputs
    if mask is None and op.causal:
        mask = attention_mask(q.shape[2], op.window, None, op.causal, q.device)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * op.scale
    if op.softcap:
        scores = torch.tanh(scores / op.softcap) * op.softcap
    if slopes is not None:
        places = torch.arange(q.shape[2], dtype=q.dtype, device=q.device)
        scores = scores + slopes[:, None, None] * (places - places[:, None])
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def _route(op: Route, scope: Scope) -> torch.Tensor:
    best = scope.value(op.scores).softmax(-1)
    weights, experts = best.topk(op.top, -1)
    if op.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(best).scatter(-1, experts, weights)


def _dispatch(op: Dispatch, scope: Scope) -> torch.Tensor:
    return scope.value(op.x)[scope.value(op.routing)[..., op.expert] != 0]


def _combine(op: Combine, scope: Scope) -> torch.Tensor:
    routing, parts = scope.value(op.routing), [scope.value(part) for part in op.parts]
    experts, tokens = (routing.flatten(0, 1).T != 0).nonzero(as_tuple=True)
    weighted = torch.cat(parts) * routing.flatten(0, 1)[tokens, experts][:, None]
    total = weighted.new_zeros(routing[..., 0].numel(), weighted.shape[-1])
    return total.index_add(0, tokens, weighted).unflatten(0, routing.shape[:2])


def _permute(op: Permute, scope: Scope) -> torch.Tensor:
    index = stored_order(op.order, scope.permutation)
    if op.inverse:
        index = np.argsort(index)
    x = scope.value(op.x)
    return x.index_select(op.axis, torch.from_numpy(index).to(x.device))


def aten_callable(target: str) -> Callable[..., Any]:
    """The function behind a target: `aten.linear.default`, `operator.add`, `torch.sym_max`.

    Raises TargetError if a text may not call it (`ir.calls`), or if this torch does not have it.
    """
    if not is_call(target):
        raise TargetError(f"{target!r} is no operator", help="e.g. aten.linear.default")
    namespace, *path = target.split(".")
    found: Any = {"operator": operator, "math": math, "torch": torch}.get(namespace)
    if found is not None:
        return getattr(found, path[0])
    found = torch.ops
    try:
        for part in (namespace, *path):
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        raise TargetError(f"this torch has no operator {target}: {error}") from error
    if not isinstance(found, OpOverload):
        raise TargetError(f"{target} is no operator", help="e.g. aten.linear.default")
    return found


_VIEWS = ("aten.view.default", "aten._unsafe_view.default")


def _argument(value: object, scope: Scope) -> Any:
    if isinstance(value, Value):
        return scope.value(value)
    if isinstance(value, Symbol):
        return scope.weight(value)
    if isinstance(value, tuple):
        return [_argument(item, scope) for item in value]
    if isinstance(value, str) and value in TORCH_NAMES:
        return getattr(torch, value.removeprefix("torch."))
    return value


def _aten(op: Aten, scope: Scope) -> Any:
    args = [_argument(arg, scope) for arg in op.args]
    kwargs = {key: _argument(value, scope) for key, value in op.kwargs.items()}
    with named_errors(op.target, op.loc):
        return _called(op, args, kwargs, scope)


def _called(op: Aten, args: list[Any], kwargs: dict[str, Any], scope: Scope) -> Any:
    if op.target == GETITEM:
        return args[0][args[1]]
    if op.target in _VIEWS:
        # The IR has values, not strides: a tensor that a pass made need not be viewable.
        return torch.reshape(args[0], args[1])
    if op.target == "aten.copy.default":
        # x[...] = y without the place it is written to; torch has no derivative for it.
        return args[1].to(args[0].dtype).expand(args[0].shape)
    called = aten_callable(op.target)
    if op.target in NUMBER_CALLS:
        return _number(op.target, called, args)
    if _makes_tensors(called):
        _check_made(op, called(*args, **kwargs, device="meta"))
        kwargs["device"] = scope.device
    return called(*args, **kwargs)


def _number(target: str, called: Callable[..., Any], args: list[Any]) -> int | float:
    """What a call on numbers gives. Integers have 64 bits: longer ones could grow without end."""
    for value in args[0] if target == SUM else args:
        if not _is_number(value):
            raise ValueError(f"{value!r} is no number of 64 bits")
    if target == "operator.pow" and all(isinstance(value, int) for value in args):
        base, exponent = args
        if abs(base) > 1 and exponent >= 64:
            raise OverflowError("the result has more than 64 bits")
    result = called(*args)
    if not _is_number(result):
        raise OverflowError("the result is no number of 64 bits")
    return result


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return -INT_LIMIT <= value < INT_LIMIT
    return isinstance(value, float)


def _makes_tensors(called: Callable[..., Any]) -> bool:
    """Whether an operator has no tensor among its parameters that says where its result is."""
    if not isinstance(called, OpOverload):
        return False
    kinds = {argument.name: str(argument.type) for argument in called._schema.arguments}
    return "device" in kinds and not any("Tensor" in kind for kind in kinds.values())


def _check_made(op: Aten, made: torch.Tensor) -> None:
    """ValueError for a tensor without data that is not of the stated sizes, or too large.

    Its sizes are numbers of the text: memory that the machine lacks must not be asked for.
    """
    sizes = op.type.shape if isinstance(op.type, TensorType) else None
    fits = sizes is not None and len(sizes) == made.dim()
    if not fits or any(b not in (None, a) for a, b in zip(made.shape, sizes or (), strict=True)):
        raise ValueError(f"it gives the sizes {list(made.shape)}, the text says {op.type}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if made.nbytes > memory:
        raise ValueError(f"it takes {made.nbytes:,} bytes, this machine has {memory:,}")


def product_op(kind: type[LinearT], op: Host, symbol: Symbol) -> LinearT:
    """A product of a host op as the linear op that it is; x and the result have no names."""
    return kind(result=op.result, type=op.type, loc=op.loc, x=op.ids, weight=symbol)


def _host(op: Host, scope: Scope) -> torch.Tensor:
    symbols = op.product_symbols()

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        if scope.is_packed(symbols[name]):
            return scope.product(product_op(QLinear, op, symbols[name]), x)
        return scope.product(product_op(Linear, op, symbols[name]), x)

    return run_host(op, [scope.value(text) for text in op.operands()], scope.weight, product)


RULES: dict[type[Op], Callable[[Any, Scope], Any]] = {
    Positions: _positions,
    Embedding: _embedding,
    Linear: _linear,
    QLinear: _linear,
    RmsNorm: _rms_norm,
    LayerNorm: _layer_norm,
    Silu: _silu,
    Gelu: _gelu,
    GeluTanh: _gelu_tanh,
    Relu: _relu,
    Tanh: _tanh,
    Scale: _scale,
    Bias: _bias,
    Add: _add,
    Mul: _mul,
    SplitHeads: _split_heads,
    MergeHeads: _merge_heads,
    Rope: _rope,
    Attention: _attention,
    Route: _route,
    Dispatch: _dispatch,
    Combine: _combine,
    Permute: _permute,
    Host: _host,
    Aten: _aten,
}
