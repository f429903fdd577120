"""Small packed modules, written as IR text, and artifacts of them."""

import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from scalebits_compiler.artifact.output import open_output
from scalebits_compiler.artifact.sizes import matrix_summary
from scalebits_compiler.artifact.writer import write_artifact
from scalebits_compiler.codegen.plan import make_plan, unplanned
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.formats.base import stored_scale
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime.manifest import Provenance

BLOCK_ROWS, BLOCK_COLS, GROUP = 16, 64, 32


@dataclass(frozen=True)
class Shape:
    """A Llama (`qk_norm`: Qwen3, `bias`: Qwen2, `window`: Mistral), small and ragged.

    gather: every packed matrix has a private order of its columns.
    """

    vocab: int = 90
    hidden: int = 72
    heads: int = 4
    groups: int = 2
    head_dim: int = 16
    inner: int = 104
    layers: int = 2
    window: int = 0
    qk_norm: bool = False
    bias: bool = False
    gather: bool = False
    eps: float = 1e-5
    limit: int = 64


class TextBuilder:
    """Collects weights with random values, and ops, of a module in its text form."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.weights, self.ops, self.tensors = [], [], {}
        self.perms = []

    def op(self, text, kind):
        self.ops.append(f"    %{len(self.ops)} = {text} : {kind}")
        return f"%{len(self.ops) - 1}"

    def dense(self, name, array, dtype=torch.bfloat16):
        self.tensors[name] = torch.from_numpy(np.float32(array)).to(dtype)
        shape = ", ".join(map(str, array.shape))
        self.weights.append(f'  weight @{name} : f32[{shape}] {{data = resource("{name}")}}')

    def perm(self, size):
        """The name of a random permutation."""
        name = f"p{len(self.perms)}"
        data = list(map(int, self.rng.permutation(size)))
        self.perms.append(f"  perm @{name} : i32[{size}] {{data = {data}}}")
        return name

    def packed(self, name, rows, cols, order=None):
        layout = BlockLayout(rows, cols, BLOCK_ROWS, BLOCK_COLS, GROUP)
        bits = self.rng.integers(1, 9, layout.grid).astype(np.uint8)
        wide = bits.repeat(BLOCK_ROWS, 0)[:rows].repeat(BLOCK_COLS, 1)[:, :cols]
        codes = self.rng.integers(0, 1 << wide.astype(np.int64)).astype(np.uint8)
        spread = np.ldexp(1.0, -bits.astype(int)).repeat(BLOCK_ROWS, 0)[:rows]
        spread = spread.repeat(BLOCK_COLS // GROUP, 1)[:, : layout.groups]
        scales = stored_scale(torch.from_numpy(spread * 2 / np.sqrt(cols))).numpy()
        self.tensors[f"{name}.arena"] = torch.from_numpy(layout.pack(codes, scales, bits))
        grid = [list(map(int, row)) for row in bits]
        self.weights.append(
            f"  weight @{name} : packed[{rows}, {cols}{f'@{order}' if order else ''}]"
            f' {{data = resource("{name}.arena"),'
            f" quantize = true, block = [{BLOCK_ROWS}, {BLOCK_COLS}], group = {GROUP},"
            f" bits = grid({grid})}}"
        )


def build(shape, seed=0):
    """The packed module of a Llama-like model with random weights."""
    b, s = TextBuilder(seed), shape
    hid = f"f32[?, ?, {s.hidden}]"
    b.dense("embed", b.rng.normal(size=(s.vocab, s.hidden)))
    b.dense("norm", b.rng.normal(1, 0.1, s.hidden), torch.float32)
    b.dense("head", b.rng.normal(size=(s.vocab, s.hidden)) / 4, torch.float16)
    frequency = 10000.0 ** -(np.arange(0, s.head_dim, 2) / s.head_dim)
    b.dense("frequency", frequency, torch.float32)
    x = b.op("embedding %ids, @embed", hid)
    positions = b.op("positions %ids", "i64[?, ?]")
    for layer in range(s.layers):
        x = _layer(b, s, f"layers.{layer}", x, positions, hid)
    x = b.op(f"rms_norm {x}, @norm {{eps = {s.eps}}}", hid)
    x = b.op(f"linear {x}, @head", f"f32[?, ?, {s.vocab}]")
    text = "\n".join(
        ['module @tiny {facts = ["bits", "packed"]} {', *b.perms, *b.weights,
         f"  func @forward(%ids: i64[?, ?]) -> f32[?, ?, {s.vocab}] {{", *b.ops,
         f"    return {x}", "  }", "}"]
    )  # fmt: skip
    module, source = parse_module(text)
    verify(module, source)
    return replace(module, resources=ResourceStore(b.tensors))


def _layer(b, s, name, x, positions, hid):
    y = _norm(b, f"{name}.norm1", x, s.hidden, s.eps, hid)
    heads = {
        part: _heads(b, s, name, part, count, y, positions)
        for part, count in (("q", s.heads), ("k", s.groups), ("v", s.groups))
    }
    scale = s.head_dim**-0.5
    y = b.op(
        f"attention {heads['q']}, {heads['k']}, {heads['v']}"
        f" {{scale = {scale}, window = {s.window}}}",
        f"f32[?, {s.heads}, ?, {s.head_dim}]",
    )
    y = b.op(f"merge_heads {y}", f"f32[?, ?, {s.heads * s.head_dim}]")
    x = b.op(f"add {x}, {_qlinear(b, s, f'{name}.o', y, s.hidden, s.heads * s.head_dim)}", hid)
    y = _norm(b, f"{name}.norm2", x, s.hidden, s.eps, hid)
    gate = _qlinear(b, s, f"{name}.gate", y, s.inner, s.hidden)
    up = _qlinear(b, s, f"{name}.up", y, s.inner, s.hidden)
    wide = f"f32[?, ?, {s.inner}]"
    y = b.op(f"mul {b.op(f'silu {gate}', wide)}, {up}", wide)
    return b.op(f"add {x}, {_qlinear(b, s, f'{name}.down', y, s.hidden, s.inner)}", hid)


def _heads(b, s, name, part, count, y, positions):
    size, kind = count * s.head_dim, f"f32[?, {count}, ?, {s.head_dim}]"
    y = _qlinear(b, s, f"{name}.{part}", y, size, s.hidden, s.bias)
    y = b.op(f"split_heads {y} {{heads = {count}}}", kind)
    if part == "v":
        return y
    if s.qk_norm:
        y = _norm(b, f"{name}.{part}norm", y, s.head_dim, s.eps, kind)
    return b.op(f"rope {y}, {positions}, @frequency", kind)


def _norm(b, name, x, size, eps, kind):
    b.dense(name, b.rng.normal(1, 0.2, size))
    return b.op(f"rms_norm {x}, @{name} {{eps = {eps}}}", kind)


def _qlinear(b, s, name, x, rows, cols, bias=False):
    order = b.perm(cols) if s.gather else None
    b.packed(name, rows, cols, order)
    extra = ""
    if bias:
        b.dense(f"{name}.bias", b.rng.normal(size=rows) / 3)
        extra = f", @{name}.bias"
    if order:
        extra += f' {{gather = "{cols}@{order}"}}'
    return b.op(f"qlinear {x}, @{name}{extra}", f"f32[?, ?, {rows}]")


class Float64:
    """The same model in float64, written from the formulas, one row at a time without a cache."""

    def __init__(self, module, shape):
        self.module, self.shape = module, shape

    def weight(self, name):
        weight = self.module.weight(name)
        data = self.module.resources.torch(weight.data.key)
        if weight.type.dtype != "packed":
            return data.double().numpy()
        layout = BlockLayout(*weight.type.static_shape(), *weight.block, weight.group)  # type: ignore[call-arg]
        stored = layout.dequantize(data.numpy(), self.module.bits(weight)).astype(np.float64)
        natural = np.empty_like(stored)
        orders = weight.type.dims[1].orders
        natural[:, self.module.permutation(orders[0]) if orders else slice(None)] = stored
        return natural

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.shape.eps) * self.weight(name)

    def heads(self, y, name, part, count):
        out = y @ self.weight(f"{name}.{part}").T
        if self.shape.bias:
            out = out + self.weight(f"{name}.{part}.bias")
        out = out.reshape(len(y), count, -1).transpose(1, 0, 2)
        if part == "v":
            return out
        if self.shape.qk_norm:
            out = self.norm(out, f"{name}.{part}norm")
        angle = np.arange(len(y))[:, None] * self.weight("frequency")
        turned = np.exp(1j * angle) * (out[..., : angle.shape[1]] + 1j * out[..., angle.shape[1] :])
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(self, y, name):
        s, length = self.shape, len(y)
        q = self.heads(y, name, "q", s.heads)
        k, v = (
            np.repeat(self.heads(y, name, part, s.groups), s.heads // s.groups, 0) for part in "kv"
        )
        score = q @ k.transpose(0, 2, 1) * s.head_dim**-0.5
        back = np.arange(length)[:, None] - np.arange(length)
        score = np.where((back >= 0) & ((back < s.window) | (s.window == 0)), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        mixed = weight / weight.sum(-1, keepdims=True) @ v
        return mixed.transpose(1, 0, 2).reshape(length, -1) @ self.weight(f"{name}.o").T

    def __call__(self, row):
        x = self.weight("embed")[row]
        for layer in range(self.shape.layers):
            name = f"layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.norm1"), name)
            y = self.norm(x, f"{name}.norm2")
            gate, up = (y @ self.weight(f"{name}.{part}").T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"{name}.down").T
        return self.norm(x, "norm") @ self.weight("head").T


def kind_of(kernels):
    """The target that kernels are for."""
    if kernels is None:
        return "reference"
    return "cuda" if "matrices" in kernels.dispatch else "cpu"


def provenance():
    return Provenance("pack-blocks", 0, "0.1.0", "tiny", {"model.safetensors": "0" * 64}, {})


def summary(module):
    """As `summarize`, for modules without matrices too; the totals are made up."""
    return {
        "weights": 1,
        "code_bits": 4.5,
        "effective_bits": 5.0,
        "matrix_bytes": 1,
        "dense_bytes": 1,
        "matrices": {w.symbol: matrix_summary(w, module.bits(w)) for w in module.quantized()},
        "dense": {},
        "not_recognised": {},
        "not_traced": None,
        "task": module.task,
    }


@pytest.fixture(scope="session")
def module_shape():
    return Shape


@pytest.fixture(scope="session")
def build_module():
    return build


@pytest.fixture
def write(tmp_path):
    """Writes a module as an artifact; gives the folder."""

    def _write(module, out=None, limit=64, kernels=None, files=None, force=False):
        out = tmp_path / "out" if out is None else out
        with open_output(out, force) as output, output.replacement() as folder:
            write_artifact(
                folder,
                module,
                target={"kind": kind_of(kernels)},
                plan=None if unplanned(module.function) else make_plan(module),
                kernels=kernels,
                files={"generation_config.json": b'{"eos_token_id": 0}', **(files or {})},
                config={"model_type": "llama", "max_position_embeddings": limit},
                summary=summary(module),
                provenance=provenance(),
            )
        return out

    return _write


@pytest.fixture(scope="session")
def float64():
    return Float64


def overlapping(first, second, pause_in):
    """The results of two calls; the second comes from another thread in the middle of the first.

    `pause_in(pause)` makes the first one call `pause`. The second must wait for the first to end.
    """
    inside, ended = threading.Event(), threading.Event()
    results = {}

    def pause(*_):
        if threading.current_thread() is not threads[0] or inside.is_set():
            return
        inside.set()
        # Long enough for a call that does not wait; one that does costs this time.
        results["waited"] = not ended.wait(0.1)

    def run_first():
        pause_in(pause)
        results["first"] = first()

    def run_second():
        inside.wait(60)
        results["second"] = second()
        ended.set()

    threads = [threading.Thread(target=run, daemon=True) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results["waited"]
    return results["first"], results["second"]


@pytest.fixture(scope="session")
def two_threads():
    return overlapping


def texts_of_threads(session, prompts, count):
    """What every thread generates for its prompt, all at once."""
    results = {}
    start = threading.Barrier(len(prompts))

    def run(number):
        start.wait(60)
        results[number] = session.generate(prompts[number], count)[0].tokens

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[number] for number in range(len(prompts))]


@pytest.fixture(scope="session")
def generate_in_threads():
    return texts_of_threads
