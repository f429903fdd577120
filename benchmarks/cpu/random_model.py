"""Artifacts of Llama-shaped models with random weights: no search, but the real writer and kernels.

Matrices of one shape share their codes: what a product costs does not depend on them. In the file
each has its own bytes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrices import BLOCK, GROUP, MIXES, Packed, random_matrix

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.artifact.writer import write_artifact
from scalebits_compiler.codegen.target import find_target
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.runtime.manifest import Provenance


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; the defaults are those of TinyLlama 1.1B."""

    hidden: int = 2048
    inner: int = 5632
    layers: int = 22
    heads: int = 32
    groups: int = 4
    vocab: int = 32000
    limit: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def config(self) -> dict[str, Any]:
        """As transformers spells it."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.limit,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }


HEAD_MIX = {6: 1}
"""The output matrix is stored in 6 bits, as llama.cpp's mixes store it."""


def write_random_artifact(shape: Shape, out: Path) -> None:
    """Compile a model of `shape` for the cpu target: widths {2, 3, 4}, 3 bits on average."""
    text = _Text(shape)
    module, source = parse_module(text.module())
    verify(module, source)
    module = replace(module, resources=ResourceStore(text.tensors))
    target = find_target("cpu")
    with tempfile.TemporaryDirectory() as folder:
        built = target.build(module, Path(folder))
        write_artifact(
            out,
            module,
            target={"kind": target.name},
            plan=built.plan,
            kernels=built.kernels,
            files=built.files,
            config=shape.config,
            summary=summarize(module),
            provenance=Provenance("random", 0, "0", "random", {}, {}),
        )


@cache
def _packed(rows: int, cols: int, mix: str) -> Packed:
    return random_matrix(rows, cols, {"head": HEAD_MIX, **MIXES}[mix])


class _Text:
    """The module as text, and its tensors."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.weights: list[str] = []
        self.ops: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}

    def module(self) -> str:
        s = self.shape
        hidden = f"f32[?, ?, {s.hidden}]"
        self._dense("embed", np.random.default_rng(0).normal(size=(s.vocab, s.hidden)))
        frequency = 10000.0 ** -(np.arange(0, s.head_dim, 2) / s.head_dim)
        self._dense("frequency", frequency, torch.float32)
        x = self._op("embedding %ids, @embed", hidden)
        positions = self._op("positions %ids", "i64[?, ?]")
        for layer in range(s.layers):
            x = self._layer(f"layers.{layer}", x, positions, hidden)
        x = self._norm("norm", x, hidden)
        x = self._linear("head", x, s.vocab, s.hidden, "head")
        logits = f"f32[?, ?, {s.vocab}]"
        return "\n".join(
            ['module @random {facts = ["bits", "packed"]} {', *self.weights,
             f"  func @forward(%ids: i64[?, ?]) -> {logits} {{", *self.ops,
             f"    return {x}", "  }", "}"]
        )  # fmt: skip

    def _layer(self, name: str, x: str, positions: str, hidden: str) -> str:
        s = self.shape
        y = self._norm(f"{name}.norm1", x, hidden)
        q, k, v = (
            self._heads(f"{name}.{part}", y, positions, count)
            for part, count in (("q", s.heads), ("k", s.groups), ("v", s.groups))
        )
        kind = f"f32[?, {s.heads}, ?, {s.head_dim}]"
        y = self._op(f"attention {q}, {k}, {v} {{scale = {s.head_dim**-0.5}, window = 0}}", kind)
        y = self._op(f"merge_heads {y}", hidden)
        x = self._op(f"add {x}, {self._linear(f'{name}.o', y, s.hidden, s.hidden)}", hidden)
        y = self._norm(f"{name}.norm2", x, hidden)
        gate, up = (self._linear(f"{name}.{part}", y, s.inner, s.hidden) for part in ("gate", "up"))
        wide = f"f32[?, ?, {s.inner}]"
        y = self._op(f"mul {self._op(f'silu {gate}', wide)}, {up}", wide)
        return self._op(f"add {x}, {self._linear(f'{name}.down', y, s.hidden, s.inner)}", hidden)

    def _heads(self, name: str, y: str, positions: str, count: int) -> str:
        size = self.shape.head_dim
        kind = f"f32[?, {count}, ?, {size}]"
        y = self._linear(name, y, count * size, self.shape.hidden)
        y = self._op(f"split_heads {y} {{heads = {count}}}", kind)
        if name.endswith("v"):
            return y
        return self._op(f"rope {y}, {positions}, @frequency", kind)

    def _norm(self, name: str, x: str, kind: str) -> str:
        self._dense(name, np.ones(self.shape.hidden))
        return self._op(f"rms_norm {x}, @{name} {{eps = 1e-05}}", kind)

    def _linear(self, name: str, x: str, rows: int, cols: int, mix: str = "mixed 2,3,4") -> str:
        packed = _packed(rows, cols, mix)
        tensors = {f"{name}.arena": packed.arenas[0], f"{name}.grid": packed.bits}
        self.tensors |= {key: torch.from_numpy(array) for key, array in tensors.items()}
        self.weights.append(
            f'  weight @{name} : packed[{rows}, {cols}] {{data = resource("{name}.arena"),'
            f" quantize = true, block = [{BLOCK}, {BLOCK}], group = {GROUP},"
            f' bits = resource("{name}.grid")}}'
        )
        return self._op(f"qlinear {x}, @{name}", f"f32[?, ?, {rows}]")

    def _op(self, text: str, kind: str) -> str:
        self.ops.append(f"    %{len(self.ops)} = {text} : {kind}")
        return f"%{len(self.ops) - 1}"

    def _dense(self, name: str, values: np.ndarray, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tensors[name] = torch.from_numpy(np.float32(values)).to(dtype)
        shape = ", ".join(map(str, values.shape))
        self.weights.append(f'  weight @{name} : f32[{shape}] {{data = resource("{name}")}}')
