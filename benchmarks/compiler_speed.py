"""Seconds of the compiler's own steps on large inputs: `python benchmarks/compiler_speed.py`.

Text: a module of 2000 ops is parsed, verified and printed. Packing: a matrix of 1024 x 4096.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.layout import BlockLayout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=500, metavar="N", help="of 4 ops each; default 500")
    add("--rows", type=int, default=1024, metavar="N", help="of the packed matrix; default 1024")
    add("--rounds", type=int, default=5, metavar="N", help="default 5")
    args = parser.parse_args()
    text = deep_text(args.layers)
    module, source = parse_module(text)
    layout = BlockLayout(args.rows, 4096, 128, 128, 128)
    matrix = random_matrix(layout)
    steps: dict[str, Callable[[], object]] = {
        f"parse {4 * args.layers} ops": lambda: parse_module(text),
        f"verify {4 * args.layers} ops": lambda: verify(module, source),
        f"print {4 * args.layers} ops": lambda: print_module(module),
        f"pack {args.rows} x 4096": lambda: layout.pack(*matrix),
    }
    print(f"| step | processor seconds, least of {args.rounds} |\n|---|---|")
    for name, step in steps.items():
        print(f"| {name} | {min(seconds(step) for _ in range(args.rounds)):.3f} |", flush=True)


def seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def deep_text(layers: int) -> str:
    """A module with a residual connection around a norm, a product and an activation per layer."""
    lines, value, count = ["module @deep {"], "%x", 0
    for layer in range(layers):
        lines += [
            f"  weight @l{layer}.norm : f32[256]",
            f"  weight @l{layer}.w : f32[256, 256] {{quantize = true, block = [128, 128],"
            " group = 128, bits = grid([[4, 3], [3, 2]])}",
        ]
    lines.append("  func @forward(%x: f32[?, ?, 256]) -> f32[?, ?, 256] {")
    for layer in range(layers):
        lines.append(
            f"    %{count} = rms_norm {value}, @l{layer}.norm {{eps = 1e-05}} : f32[?, ?, 256]"
        )
        lines.append(
            f'    %{count + 1} = linear %{count}, @l{layer}.w : f32[?, ?, 256] loc("l{layer}")'
        )
        lines.append(f"    %{count + 2} = silu %{count + 1} : f32[?, ?, 256]")
        lines.append(f"    %{count + 3} = add {value}, %{count + 2} : f32[?, ?, 256]")
        value, count = f"%{count + 3}", count + 4
    return "\n".join([*lines, f"    return {value}", "  }", "}", ""])


def random_matrix(layout: BlockLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and bit-widths 2 to 4 of a matrix, as `BlockLayout.pack` takes them."""
    rng = np.random.default_rng(0)
    bits = rng.integers(2, 5, layout.grid).astype(np.uint8)
    wide = bits.repeat(layout.block_rows, 0).repeat(layout.block_cols, 1)
    codes = rng.integers(0, 256, (layout.rows, layout.cols), dtype=np.uint8)
    codes >>= 8 - wide[: layout.rows, : layout.cols]
    return codes, np.ones((layout.rows, layout.groups), np.float16), bits


if __name__ == "__main__":
    main()
