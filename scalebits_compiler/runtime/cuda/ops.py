"""The ops of a plan in torch, on a device: one function for each of `plan.STEP_RULES`.

Activations are fp16 or bf16, [batch, sequence, channels] or [batch, heads, sequence, d]; norms,
angles, routing weights and the sums inside products are float32. Only the ops of `UNCAPTURED` read
a value back from the device, the number of tokens of an expert; a run of the others can be captured
as a graph. What the ops mean is defined in `interpreter/rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from msgspec.structs import replace

from scalebits_compiler.runtime.cuda.cache import DeviceCache
from scalebits_compiler.runtime.cuda.weights import DeviceWeights
from scalebits_compiler.runtime.plan import Step


@dataclass
class Frame:
    """The live values of one run: of whole sequences from their start, or (`decoding`) of one more
    token behind what the cache holds. Without a cache a run leaves nothing behind.

    pad: i64[batch] on the device, padding on the left of each row, or None.
    """

    weights: DeviceWeights
    cache: DeviceCache | None
    pad: torch.Tensor | None
    decoding: bool
    values: dict[str, torch.Tensor]
    _tables: dict[tuple[str, str, float], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )
    _masks: dict[tuple[int, int, bool], torch.Tensor] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        """Execute one step and drop what no later step reads."""
        self.values[step.out] = OPS[step.op](self, step)
        for name in step.free:
            del self.values[name]

    def input(self, step: Step, index: int = 0) -> torch.Tensor:
        """An operand of a step."""
        return self.values[step.inputs[index]]

    def slots(self, count: int) -> torch.Tensor:
        """i64[count]: the positions of the run's tokens in its sequence, padding included."""
        if self.decoding and self.cache is not None:
            return self.cache.position
        return torch.arange(count, device=self.weights.device)

    def rotation(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [batch, 1, sequence, rotated/2], shared by all layers."""
        key = (step.inputs[1], step.weights[0], step.attrs["scaling"])
        if key not in self._tables:
            positions = self.values[key[0]][:, None, :, None].float()
            angles = positions * self.weights.float32(key[1])
            cos, sin = torch.cos(angles) * key[2], torch.sin(angles) * key[2]
            self._tables[key] = (cos, sin)
        return self._tables[key]

    def is_plain(self, window: int) -> bool:
        """Whether a query sees all of the run, or all of its past: no mask is needed."""
        return not (self.decoding or window or self.pad is not None)

    def mask(self, count: int, window: int, causal: bool) -> torch.Tensor:
        """bool[batch or 1, 1, queries, keys], true where a query sees a key.

        Keys are those of the run, or all that fit the cache when decoding.
        """
        key = (count, window, causal)
        if key not in self._masks:
            self._masks[key] = self._make_mask(count, window, causal)
        return self._masks[key]

    def distances(self, count: int) -> torch.Tensor:
        """[queries, keys]: how far each key of `mask` stands behind the query; below 0: before."""
        total = self.cache.capacity if self.decoding and self.cache is not None else count
        keys = torch.arange(total, device=self.weights.device)
        return keys - self.slots(count)[:, None]

    def _make_mask(self, count: int, window: int, causal: bool) -> torch.Tensor:
        total = self.cache.capacity if self.decoding and self.cache is not None else count
        query = self.slots(count)[:, None]
        keys = torch.arange(total, device=self.weights.device)[None, :]
        seen = keys <= query if causal else torch.ones_like(keys <= query)
        if window:
            seen = seen & (keys > query - window)
        if self.pad is None:
            return seen[None, None]
        # A padding position sees itself, so that its row stays finite.
        return (seen & (keys >= self.pad[:, None, None]) | (keys == query))[:, None]


def _positions(frame: Frame, step: Step) -> torch.Tensor:
    batch, count = frame.input(step).shape
    positions = frame.slots(count).expand(batch, count)
    return positions if frame.pad is None else (positions - frame.pad[:, None]).clamp(min=0)


def _embedding(frame: Frame, step: Step) -> torch.Tensor:
    return F.embedding(frame.input(step), frame.weights.table(step.weights[0]))


def _linear(frame: Frame, step: Step) -> torch.Tensor:
    y = F.linear(frame.input(step), frame.weights.dense(step.weights[0]))
    return _biased(frame, step, y)


def _qlinear(frame: Frame, step: Step) -> torch.Tensor:
    return _product(frame, step, "")


def _gather_qlinear(frame: Frame, step: Step) -> torch.Tensor:
    matrix, index, *bias = step.weights
    return _product(frame, replace(step, weights=(matrix, *bias)), index)


def _product(frame: Frame, step: Step, index: str) -> torch.Tensor:
    x = frame.input(step)
    y = frame.weights.packed(step.weights[0], index)(x.reshape(-1, x.shape[-1]))
    return _biased(frame, step, y.view(*x.shape[:-1], y.shape[-1]))


def _biased(frame: Frame, step: Step, y: torch.Tensor) -> torch.Tensor:
    return y + frame.weights.dense(step.weights[1]) if len(step.weights) == 2 else y


def _rms_norm(frame: Frame, step: Step) -> torch.Tensor:
    x = frame.input(step)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + step.attrs["eps"])
    return (wide * frame.weights.float32(step.weights[0])).to(x.dtype)


def _layer_norm(frame: Frame, step: Step) -> torch.Tensor:
    x, (gain, *bias) = frame.input(step), [frame.weights.float32(name) for name in step.weights]
    return F.layer_norm(x.float(), gain.shape, gain, *bias, eps=step.attrs["eps"]).to(x.dtype)


def _gelu(frame: Frame, step: Step) -> torch.Tensor:
    return F.gelu(frame.input(step))


def _gelu_tanh(frame: Frame, step: Step) -> torch.Tensor:
    return F.gelu(frame.input(step), approximate="tanh")


def _relu(frame: Frame, step: Step) -> torch.Tensor:
    return F.relu(frame.input(step))


def _tanh(frame: Frame, step: Step) -> torch.Tensor:
    return torch.tanh(frame.input(step))


def _scale(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step) * step.attrs["factor"]


def _bias(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step) + frame.weights.dense(step.weights[0])


def _silu(frame: Frame, step: Step) -> torch.Tensor:
    return F.silu(frame.input(step))


def _add(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step) + frame.input(step, 1)


def _mul(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step) * frame.input(step, 1)


def _split_heads(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step).unflatten(-1, (int(step.attrs["heads"]), -1)).transpose(1, 2)


def _merge_heads(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step).transpose(1, 2).flatten(2)


def _rope(frame: Frame, step: Step) -> torch.Tensor:
    x = frame.input(step)
    cos, sin = frame.rotation(step)
    half, wide = cos.shape[-1], x.float()
    shape, axis = ((half, 2), -1) if step.attrs["interleaved"] else ((2, half), -2)
    first, second = wide[..., : 2 * half].unflatten(-1, shape).unbind(axis)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), axis)
    return torch.cat((turned.flatten(-2), wide[..., 2 * half :]), -1).to(x.dtype)


def _permute(frame: Frame, step: Step) -> torch.Tensor:
    index = frame.weights.raw(step.weights[0])
    return frame.input(step).index_select(int(step.attrs["axis"]), index)


def _attention(frame: Frame, step: Step) -> torch.Tensor:
    q, k, v = (frame.values[name] for name in step.inputs)
    count, window, causal = q.shape[2], int(step.attrs["window"]), bool(step.attrs["causal"])
    if frame.cache is not None:
        held = frame.cache.store(int(step.attrs["cache"]), frame.slots(count), k, v)
        k, v = held if frame.decoding else (k, v)
    scale, softcap = step.attrs["scale"], step.attrs["softcap"]
    slopes = frame.weights.float32(step.weights[0]) if step.weights else None
    if not softcap and slopes is None and frame.is_plain(window):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=True
        )
    mask = frame.mask(count, window, causal)
    bias = None if slopes is None else slopes[:, None, None] * frame.distances(count)
    if frame.decoding:
        # One query for each head: the heads that share keys are the queries of one product.
        queries = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        if bias is not None:
            bias = bias.reshape(k.shape[1], -1, bias.shape[-1])
        return attend(queries, k, v, mask, scale, softcap, bias).reshape(*q.shape[:3], -1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return attend(q, k, v, mask, scale, softcap, bias)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [b, H, s, d] to keys and values of as many heads; `softcap` as in the op.

    bias [H, s, keys] is added to the scores.
    """
    if not softcap and bias is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _route(frame: Frame, step: Step) -> torch.Tensor:
    scores = frame.input(step).float().softmax(-1)
    best, experts = scores.sort(dim=-1, descending=True, stable=True)
    top = int(step.attrs["top"])
    best, experts = best[..., :top], experts[..., :top]
    if step.attrs["normalize"]:
        best = best / best.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, experts, best)


def _dispatch(frame: Frame, step: Step) -> torch.Tensor:
    return frame.input(step)[frame.input(step, 1)[..., int(step.attrs["expert"])] != 0]


def _combine(frame: Frame, step: Step) -> torch.Tensor:
    routing, *parts = (frame.values[name] for name in step.inputs)
    total = routing.new_zeros((*routing.shape[:2], parts[0].shape[-1]))
    for expert, part in enumerate(parts):
        weights = routing[..., expert]
        seen = weights != 0
        total[seen] += part.float() * weights[seen][:, None]
    return total.to(parts[0].dtype)


UNCAPTURED = ("dispatch", "combine")
"""Ops whose sizes only the values tell: a captured graph cannot hold them."""

OPS: dict[str, Callable[[Frame, Step], torch.Tensor]] = {
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
    "permute": _permute,
    "route": _route,
    "dispatch": _dispatch,
    "combine": _combine,
}
