"""Decoding with an 8B-shaped Llama of random weights: ours as a CUDA graph, transformers bf16."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matrices import Matrix, build_kernels, mixed, random_matrix

from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.cache import DeviceCache
from scalebits_compiler.runtime.cuda.kernels import Kernels, TiledLinear
from scalebits_compiler.runtime.cuda.session import CudaSession
from scalebits_compiler.runtime.manifest import WeightRecord
from scalebits_compiler.runtime.plan import Plan, Step

HIDDEN, INNER, HEADS, GROUPS, HEAD, VOCABULARY = 4096, 14336, 32, 8, 128, 128256
PROMPT, NEW = 128, 128
MATRICES = {
    "q": (HIDDEN, HIDDEN), "k": (GROUPS * HEAD, HIDDEN), "v": (GROUPS * HEAD, HIDDEN),
    "o": (HIDDEN, HIDDEN), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}  # fmt: skip


def steps(layers: int) -> Iterator[Step]:
    """The plan of a Llama; values are kept to the end of the run."""

    def step(op: str, out: str, *inputs: str, weights: tuple[str, ...] = (), **attrs: Any) -> Step:
        return Step(op, inputs, weights, attrs, out, ())

    yield step("positions", "pos", "ids")
    yield step("embedding", "h", "ids", weights=("embed",))
    for layer in range(layers):

        def matrix(name: str, source: str, out: str, layer: int = layer) -> Step:
            return step("qlinear", out, source, weights=(f"{layer}.{name}",))

        yield step("rms_norm", "x", "h", weights=("gain",), eps=1e-5)
        for name, count in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            yield matrix(name, "x", name)
            yield step("split_heads", name, name, heads=count)
        for name in ("q", "k"):
            yield step(
                "rope", name, name, "pos", weights=("frequency",), scaling=1.0, interleaved=0
            )
        attrs = {"scale": HEAD**-0.5, "window": 0, "softcap": 0.0, "causal": 1, "cache": layer}
        yield step("attention", "a", "q", "k", "v", **attrs)
        yield step("merge_heads", "a", "a")
        yield matrix("o", "a", "a")
        yield step("add", "h", "h", "a")
        yield step("rms_norm", "x", "h", weights=("gain",), eps=1e-5)
        yield matrix("gate", "x", "g")
        yield matrix("up", "x", "u")
        yield step("silu", "g", "g")
        yield step("mul", "g", "g", "u")
        yield matrix("down", "g", "d")
        yield step("add", "h", "h", "d")
    yield step("rms_norm", "x", "h", weights=("gain",), eps=1e-5)
    yield step("linear", "logits", "x", weights=("embed",))


class RandomWeights:
    """In place of an artifact's weights: a copy of its own for every matrix of every layer."""

    def __init__(self, kernels: Kernels, made: dict[str, Matrix], layers: int) -> None:
        self.device, self.arithmetic = kernels.device, kernels.arithmetic
        embed = torch.randn((VOCABULARY, HIDDEN), device=self.device, dtype=kernels.dtype) * 0.02
        gain = torch.ones(HIDDEN, device=self.device)
        exponent = torch.arange(0, HEAD, 2, device=self.device) / HEAD
        self._dense = {"embed": embed, "gain": gain, "frequency": 500000.0**-exponent}
        self._packed = {}
        for layer in range(layers):
            for name, (layout, arena, bits) in made.items():
                held = torch.from_numpy(arena).clone().to(self.device)
                self._packed[f"{layer}.{name}"] = TiledLinear(kernels, layout, held, bits)

    def float32(self, symbol: str) -> torch.Tensor:
        """A small weight; see `DeviceWeights`."""
        return self._dense[symbol]

    dense = table = float32

    def packed(self, symbol: str, index: str) -> TiledLinear:
        """A packed matrix; the plan names no index."""
        return self._packed[symbol]


def our_session(launcher: str, layers: int) -> CudaSession:
    """Mixed 2/3/4 bits, 3 on average, fp16 activations."""
    made = {}
    for name, shape in MATRICES.items():
        layout = TileLayout(*shape, 128, 128, 128)
        made[name] = random_matrix(layout, mixed(layout, (2, 3, 3, 4)))
    kernels = build_kernels([(m.layout, m.bits) for m in made.values()], "fp16", launcher)
    plan = Plan("ids", tuple(steps(layers)), "logits", (), "", "")
    table = {"embed": WeightRecord.dense("F16", (VOCABULARY, HIDDEN))}
    artifact = SimpleNamespace(
        path=Path("random"),
        config={},
        limit=None,
        manifest=SimpleNamespace(plan=plan, weights=table),
    )
    return CudaSession(artifact, RandomWeights(kernels, made, layers))  # type: ignore[arg-type]


def ours(launcher: str, layers: int) -> float:
    """Milliseconds of a token at batch 1, of a captured graph that is replayed; median of five."""
    ids = torch.randint(0, VOCABULARY, (1, PROMPT))
    session = our_session(launcher, layers)
    _, cache = session.prefill(ids.numpy(), capacity=PROMPT + NEW)
    assert isinstance(cache, DeviceCache)
    cache.ids.fill_(1)

    def token() -> None:
        session.decode_step(cache)
        cache.advance(1)

    found = []
    for _ in range(6):
        cache.truncate(PROMPT)
        found.append(_seconds(token, NEW) / NEW)
    return 1e3 * statistics.median(found[1:])  # the first captures the graph


def _seconds(run: Callable[[], object], count: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def transformers(cache: str, layers: int) -> float | None:
    """Milliseconds of a token of transformers in bfloat16; None where it does not run here.

    cache: "dynamic", or "static", with which it compiles the step to CUDA graphs.
    """
    try:
        model = _transformers(layers)
        options = {} if cache == "dynamic" else {"cache_implementation": "static"}
        ids = torch.randint(0, VOCABULARY, (1, PROMPT), device="cuda")
        return 1e3 * _generate_seconds(model, ids, **options)
    except Exception as problem:  # not installed, no compiler for torch, too little memory
        print(f"transformers, {cache} cache, is left out: {problem!r}", file=sys.stderr)
        return None


def _transformers(layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    # Its argument for the dtype has changed its name.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _generate_seconds(model: Any, ids: torch.Tensor, **options: Any) -> float:
    """Seconds of a token: a long generation less a short one, so that the prompt drops out."""

    def run(count: int) -> float:
        given = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **options}
        return _seconds(lambda: model.generate(ids, **given), 1)

    run(NEW)
    run(8)
    return statistics.median((run(NEW) - run(8)) / (NEW - 8) for _ in range(5))
