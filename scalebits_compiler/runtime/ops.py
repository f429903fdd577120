"""The ops of a plan in numpy float32: one function for each of `plan.STEP_RULES`.

Activations are [batch, sequence, channels] or [batch, heads, sequence, d]. What the ops mean is
defined by the torch rules in `interpreter/rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from scalebits_compiler.runtime.cache import KVCache
from scalebits_compiler.runtime.plan import TORCH, Step, TorchCall
from scalebits_compiler.runtime.weights import Weights

F32 = NDArray[np.float32]
Array = NDArray[Any]

# Queries that attention scores at once: bounds the memory of a long prefill.
_QUERIES = 256


RunCall: TypeAlias = Callable[[int, Sequence[Any], int, NDArray[np.int64] | None], Any]
"""What `CallRunner` does, for the number of a call in the plan."""


class CallRunner(Protocol):
    """Runs an op that the runtime has not; the layers above have one."""

    def __call__(
        self, call: TorchCall, inputs: Sequence[Any], past: int, pad: NDArray[np.int64] | None, /
    ) -> Any:
        """What the op gives for its operands, arrays, numbers and tuples of them.

        past: positions before those of this run. pad: padding on the left of each row.
        """
        ...


@dataclass
class Frame:
    """The live values of one run. Without a cache a run sees its own tokens only.

    call: runs the steps `torch`, by the number of their call.
    """

    weights: Weights
    cache: KVCache | None
    pad: NDArray[np.int64] | None
    values: dict[str, Any]
    call: RunCall
    _quantized: dict[tuple[str, int, str], Any] = field(default_factory=dict)
    _tables: dict[tuple[str, str, float], tuple[F32, F32]] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        """Execute one step and drop what no later step reads."""
        self.values[step.out] = OPS[step.op](self, step)
        for name in step.free:
            self.drop(name)

    def replace(self, name: str, value: Array) -> None:
        """Give a value another content."""
        self.drop(name)
        self.values[name] = value

    def drop(self, name: str) -> None:
        """Forget a value and what was derived from it."""
        del self.values[name]
        for key in [key for key in self._quantized if key[0] == name]:
            del self._quantized[key]

    def quantized(self, name: str, group: int, index: str = "") -> Any:
        """The input of a packed matrix, quantised once for all matrices that read it in one order.

        index: the weight that its channels are gathered by; empty where they are read as they are.
        """
        key = (name, group, index)
        if key not in self._quantized:
            x, order = self.values[name], self.weights.index(index) if index else None
            flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
            library = self.weights.library
            if library is not None:
                self._quantized[key] = library.quantize(flat, group, order)
            else:
                self._quantized[key] = flat if order is None else flat[:, order]
        return self._quantized[key]

    def rotation(self, name: str, frequency: str, scaling: float) -> tuple[F32, F32]:
        """(cos, sin) f32[batch, 1, sequence, d/2] of the positions `name`, shared by all layers."""
        key = (name, frequency, scaling)
        if key not in self._tables:
            # In float32, as the model was trained: the angles themselves are rounded.
            positions = self.values[name][:, None, :, None].astype(np.float32)
            angles = positions * self.weights.float32(frequency)
            scale = np.float32(scaling)
            self._tables[key] = (np.cos(angles) * scale, np.sin(angles) * scale)
        return self._tables[key]


def _positions(frame: Frame, step: Step) -> Array:
    batch, count = frame.values[step.inputs[0]].shape
    past = 0 if frame.cache is None else frame.cache.length
    positions = np.broadcast_to(np.arange(past, past + count), (batch, count))
    return positions if frame.pad is None else np.maximum(positions - frame.pad[:, None], 0)


def _embedding(frame: Frame, step: Step) -> F32:
    return frame.weights.rows(step.weights[0], frame.values[step.inputs[0]])


def _linear(frame: Frame, step: Step) -> F32:
    return _biased(
        frame, step, frame.values[step.inputs[0]] @ frame.weights.float32(step.weights[0]).T
    )


def _qlinear(frame: Frame, step: Step) -> F32:
    return _product(frame, step, "")


def _gather_qlinear(frame: Frame, step: Step) -> F32:
    matrix, index, *bias = step.weights
    return _product(frame, replace(step, weights=(matrix, *bias)), index)


def _product(frame: Frame, step: Step, index: str) -> F32:
    name, symbol = step.inputs[0], step.weights[0]
    leading = frame.values[name].shape[:-1]
    if 0 in leading:  # an expert that no token is sent to
        rows = frame.weights.height(symbol)
        return np.zeros((*leading, rows), np.float32)
    x = frame.quantized(name, frame.weights.group(symbol), index)
    y = frame.weights.packed(symbol)(x)
    return _biased(frame, step, y.reshape(*leading, -1))


def _biased(frame: Frame, step: Step, y: F32) -> F32:
    if len(step.weights) == 2:
        y += frame.weights.float32(step.weights[1])
    return y


def _rms_norm(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    spread = np.square(x).mean(-1, keepdims=True, dtype=np.float32)
    spread += np.float32(step.attrs["eps"])
    return x / np.sqrt(spread, out=spread) * frame.weights.float32(step.weights[0])


def _silu(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    with np.errstate(over="ignore"):  # exp gives inf where the quotient is 0
        divisor = np.exp(-x)
    divisor += 1
    return np.divide(x, divisor, out=divisor)


def _layer_norm(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    x = x - x.mean(-1, keepdims=True, dtype=np.float32)
    spread = np.square(x).mean(-1, keepdims=True, dtype=np.float32)
    spread += np.float32(step.attrs["eps"])
    x /= np.sqrt(spread, out=spread)
    x *= frame.weights.float32(step.weights[0])
    if len(step.weights) == 2:
        x += frame.weights.float32(step.weights[1])
    return x


def _gelu(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    return x * ((_erf(x * np.float32(0.5**0.5)) + 1) * np.float32(0.5))


# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _erf(x: F32) -> F32:
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series = np.zeros_like(t)
    for coefficient in _ERF:
        series = (series + np.float32(coefficient)) * t
    return np.copysign(1 - series * np.exp(-np.square(size)), x)


def _gelu_tanh(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    inner = (x + np.float32(0.044715) * x * x * x) * np.float32((2 / np.pi) ** 0.5)
    return x * ((np.tanh(inner) + 1) * np.float32(0.5))


def _relu(frame: Frame, step: Step) -> F32:
    return np.maximum(frame.values[step.inputs[0]], 0)


def _tanh(frame: Frame, step: Step) -> F32:
    return np.tanh(frame.values[step.inputs[0]])


def _scale(frame: Frame, step: Step) -> F32:
    return frame.values[step.inputs[0]] * np.float32(step.attrs["factor"])


def _bias(frame: Frame, step: Step) -> F32:
    return frame.values[step.inputs[0]] + frame.weights.float32(step.weights[0])


def _add(frame: Frame, step: Step) -> F32:
    return frame.values[step.inputs[0]] + frame.values[step.inputs[1]]


def _mul(frame: Frame, step: Step) -> F32:
    return frame.values[step.inputs[0]] * frame.values[step.inputs[1]]


def _split_heads(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    return x.reshape(*x.shape[:-1], int(step.attrs["heads"]), -1).swapaxes(1, 2)


def _merge_heads(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]].swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def _rope(frame: Frame, step: Step) -> F32:
    x = frame.values[step.inputs[0]]
    cos, sin = frame.rotation(step.inputs[1], step.weights[0], step.attrs["scaling"])
    turned = 2 * cos.shape[-1]
    y = x.copy()
    first, second = _pairs(turned, bool(step.attrs["interleaved"]))
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def _pairs(turned: int, interleaved: bool) -> tuple[slice, slice]:
    """The first and the second channels of the pairs that rope turns."""
    if interleaved:
        return slice(0, turned, 2), slice(1, turned, 2)
    return slice(0, turned // 2), slice(turned // 2, turned)


def _route(frame: Frame, step: Step) -> F32:
    scores = frame.values[step.inputs[0]]
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    best = np.argsort(-scores, -1, kind="stable")[..., : int(step.attrs["top"])]
    weights = np.take_along_axis(scores, best, -1)
    if step.attrs["normalize"]:
        weights /= weights.sum(-1, keepdims=True)
    routing = np.zeros_like(scores)
    np.put_along_axis(routing, best, weights, -1)
    return routing


def _dispatch(frame: Frame, step: Step) -> F32:
    x, routing = (frame.values[name] for name in step.inputs)
    return x[routing[..., int(step.attrs["expert"])] != 0]


def _combine(frame: Frame, step: Step) -> F32:
    routing, *parts = (frame.values[name] for name in step.inputs)
    total = np.zeros((*routing.shape[:2], parts[0].shape[-1]), np.float32)
    for expert, part in enumerate(parts):
        weights = routing[..., expert]
        seen = weights != 0
        total[seen] += part * weights[seen][:, None]
    return total


def _permute(frame: Frame, step: Step) -> Array:
    index = frame.weights.raw(step.weights[0])
    return np.take(frame.values[step.inputs[0]], index, axis=int(step.attrs["axis"]))


def _attention(frame: Frame, step: Step) -> F32:
    q, k, v = (frame.values[name] for name in step.inputs)
    if frame.cache is not None:
        k, v = frame.cache.extend(int(step.attrs["cache"]), k, v)
    window, softcap = int(step.attrs["window"]), step.attrs["softcap"]
    causal, scale = bool(step.attrs["causal"]), step.attrs["scale"]
    slopes = frame.weights.float32(step.weights[0]) if step.weights else None
    return attend(q, k, v, scale, window, frame.pad, softcap=softcap, causal=causal, slopes=slopes)


def attend(
    q: F32,
    k: F32,
    v: F32,
    scale: float,
    window: int,
    pad: NDArray[np.int64] | None,
    *,
    softcap: float = 0.0,
    causal: bool = True,
    slopes: F32 | None = None,
) -> F32:
    """Attention of the newest positions q [b, H, s, d] to k [b, G, t, d], v [b, G, t, e].

    The last query stands at position t - 1; H is a multiple of G. `window` > 0 limits how many
    positions a query sees; the first pad[row] keys of a row are hidden; `softcap` c > 0 makes
    scores z to c · tanh(z/c); without `causal` later keys are seen too; slopes [H] as in the op.
    Gives [b, H, s, e].
    """
    batch, heads, count, _ = q.shape
    groups, total = k.shape[1:3]
    out = np.empty((batch, heads, count, v.shape[3]), np.float32)
    q = q * np.float32(scale)
    for start in range(0, count, _QUERIES):
        stop = min(start + _QUERIES, count)
        last = total - count + stop
        end = last if causal else total
        first = max(0, end - (stop - start) - window + 1) if window else 0
        # The queries of all heads that share keys form one matrix.
        rows = q[:, :, start:stop].reshape(batch, groups, -1, q.shape[3])
        scores = rows @ k[:, :, first:end].swapaxes(-1, -2)
        scores = scores.reshape(batch, heads, stop - start, end - first)
        if softcap:
            scores = np.tanh(scores / np.float32(softcap)) * np.float32(softcap)
        if slopes is not None:
            away = np.arange(first, end) - np.arange(last - (stop - start), last)[:, None]
            scores += slopes[:, None, None] * away.astype(np.float32)
        _hide(scores, first, last, window, pad, causal)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        part = scores.reshape(batch, groups, -1, end - first) @ v[:, :, first:end]
        out[:, :, start:stop] = part.reshape(batch, heads, stop - start, -1)
    return out


def _hide(
    scores: F32,
    first: int,
    last: int,
    window: int,
    pad: NDArray[np.int64] | None,
    causal: bool,
) -> None:
    """Set to -inf, in scores [b, H, queries, keys], what a query does not see.

    Keys count from position `first`, the last query stands at position last - 1.
    """
    count = scores.shape[2]
    if pad is None and (count == 1 or not causal):
        return
    query, key = np.arange(last - count, last)[:, None], first + np.arange(scores.shape[3])
    hidden = (key > query) if causal else np.zeros((count, len(key)), bool)
    if window:
        hidden |= key <= query - window
    if pad is None:
        scores[:, :, hidden] = -np.inf
        return
    # A padding position sees itself, so that its row stays finite.
    padded = (key < pad[:, None, None]) & (key != query)
    np.copyto(scores, -np.inf, where=(hidden | padded)[:, None])


def _torch(frame: Frame, step: Step) -> Any:
    past = 0 if frame.cache is None else frame.cache.length
    inputs = [frame.values[name] for name in step.inputs]
    return frame.call(int(step.attrs["call"]), inputs, past, frame.pad)


OPS: dict[str, Callable[[Frame, Step], Array]] = {
    "positions": _positions,
    "embedding": _embedding,
    "linear": _linear,
    "qlinear": _qlinear,
    "gather_qlinear": _gather_qlinear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "tanh": _tanh,
    "scale": _scale,
    "bias": _bias,
    "add": _add,
    "mul": _mul,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "rope": _rope,
    "attention": _attention,
    "route": _route,
    "dispatch": _dispatch,
    "combine": _combine,
    "permute": _permute,
    TORCH: _torch,
}
