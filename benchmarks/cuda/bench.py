"""Our CUDA kernels: right first, then how fast, beside cuBLAS and (where it installs) gemlite.

    PYTHONPATH=. python benchmarks/cuda/bench.py [--quick] [--launcher binary|source] [--json FILE]

Needs a GPU, torch with CUDA, Triton and numpy; the last part needs transformers too. Every number
is a median over rounds in which all candidates take turns, timed with device events around a
captured graph that goes through copies of the weights larger together than the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decode import compare
from matrices import Matrix, copies_beyond_cache, mixed, on_device, random_matrix, uniform

from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.kernels import DTYPES

SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192), (14336, 4096))
TOKENS = (1, 4, 16, 64, 512, 2048)
TOLERANCE = {"fp16": 2e-3, "bf16": 1.5e-2}
CHECKED = {
    "128 x 128, group 128": TileLayout(512, 1024, 128, 128, 128),
    "128 x 128, group 64": TileLayout(384, 512, 128, 128, 64),
    "64-row panels": TileLayout(960, 1024, 128, 128, 128),
    "16 x 64, group 32": TileLayout(80, 320, 16, 64, 32),
    "ragged": TileLayout(200, 456, 32, 128, 128),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. microseconds: of one product. ratio: cuBLAS bf16 over it."""

    shape: str
    tokens: int
    candidate: str
    microseconds: float
    ratio: float
    bandwidth_share: float


def check(launcher: str) -> None:
    """Compare every width, mixed widths and all buckets with float64; exit if one is wrong."""
    worst = dict.fromkeys(DTYPES, 0.0)
    for name, layout in CHECKED.items():
        grids = {f"{width} bits": uniform(layout, width) for width in range(1, 9)}
        grids["1 to 8 bits"] = mixed(layout, range(1, 9))
        for dtype in DTYPES:
            for kind, bits in grids.items():
                error = _error(random_matrix(layout, bits), dtype, launcher)
                worst[dtype] = max(worst[dtype], error)
                if not error < TOLERANCE[dtype]:
                    sys.exit(f"WRONG: {name}, {kind}, {dtype}: relative error {error:.2e}")
    told = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    print(f"correct: {len(CHECKED)} shapes, 9 grids, 7 numbers of tokens; worst error {told}\n")


def _error(matrix: Matrix, dtype: str, launcher: str) -> float:
    (layer,) = on_device(matrix, dtype, 1, launcher)
    dense = torch.from_numpy(matrix.layout.dequantize(matrix.arena, matrix.bits)).cuda().double()
    worst = 0.0
    for tokens in (1, 3, 16, 40, 64, 200, 300):
        x = torch.randn((tokens, matrix.layout.cols), device="cuda").to(DTYPES[dtype])
        expected = x.double() @ dense.T
        for _ in range(2):  # again, with the tickets as the first run has left them
            error = (layer(x).double() - expected).norm() / expected.norm()
            worst = max(worst, float(error))
    return worst


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls in a row as one graph, after a first run outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Device seconds of one `run`, from events around `repeats` of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def interleaved(
    candidates: dict[str, tuple[Callable[[], None], int]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one product per candidate and round. A candidate is (run, products in it)."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for run, _ in candidates.values():
        seconds(run, 2)
    for _ in range(rounds):
        for name, (run, products) in candidates.items():
            found[name].append(seconds(run, 3) / products)
    return found


def copy_bandwidth() -> float:
    """Bytes per second that a device-to-device copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), 3) for _ in range(9)]
    return 2 * source.numel() / statistics.median(times)


def measure(shape: tuple[int, int], launcher: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one shape of matrix."""
    layout = TileLayout(*shape, 128, 128, 128)
    grids = {f"uniform {width}": uniform(layout, width) for width in (2, 3, 4, 8)}
    grids["mixed 2/3/4"] = mixed(layout, (2, 3, 3, 4))
    layers: dict[str, tuple[list[Any], str]] = {}
    for dtype in DTYPES:
        for name, bits in grids.items():
            matrix = random_matrix(layout, bits)
            count = copies_beyond_cache(matrix.arena.nbytes)
            layers[f"ours {name} {dtype}"] = (on_device(matrix, dtype, count, launcher), dtype)
    dense_bytes = 2 * layout.rows * layout.cols
    count = copies_beyond_cache(dense_bytes)
    dense = {
        dtype: [torch.randn(shape, device="cuda").to(kind) for _ in range(count)]
        for dtype, kind in DTYPES.items()
    }
    bandwidth = copy_bandwidth()
    rows = []
    for tokens in options.tokens:
        x = {
            dtype: torch.randn((tokens, layout.cols), device="cuda").to(kind)
            for dtype, kind in DTYPES.items()
        }
        calls: dict[str, list[Callable[[], object]]] = {
            f"cuBLAS {dtype}": [(lambda w=w, y=x[dtype]: F.linear(y, w)) for w in weights]
            for dtype, weights in dense.items()
        }
        calls |= {
            name: [(lambda layer=layer, y=x[dtype]: layer(y)) for layer in made]
            for name, (made, dtype) in layers.items()
        }
        calls |= gemlite_calls(shape, x["fp16"], count) if options.gemlite else {}
        candidates = {name: (captured(made), len(made)) for name, made in calls.items()}
        times = interleaved(candidates, options.rounds)
        sizes = {name: made[0].arena.numel() for name, (made, _) in layers.items()}
        rows += _rows(shape, tokens, times, sizes, dense_bytes, bandwidth)
    return rows


def _rows(
    shape: tuple[int, int],
    tokens: int,
    times: dict[str, list[float]],
    sizes: dict[str, int],
    dense_bytes: int,
    bandwidth: float,
) -> list[Row]:
    anchor = times["cuBLAS bf16"]
    rows = []
    for name, found in times.items():
        middle = statistics.median(found)
        ratio = statistics.median(a / b for a, b in zip(anchor, found, strict=True))
        read = sizes.get(name, dense_bytes if name.startswith("cuBLAS") else 0)
        share = read / middle / bandwidth
        rows.append(Row("{}x{}".format(*shape), tokens, name, middle * 1e6, ratio, share))
    return rows


def gemlite_calls(
    shape: tuple[int, int], x: torch.Tensor, count: int
) -> dict[str, list[Callable[[], object]]]:
    """4-bit products of gemlite, which packs 1, 2, 4 and 8 bits only."""
    gemlite: Any = import_module("gemlite.core")
    rows, cols = shape
    made = []
    for _ in range(4 * count):  # as many bytes as `count` fp16 matrices
        layer = gemlite.GemLiteLinear(
            W_nbits=4,
            group_size=128,
            in_features=cols,
            out_features=rows,
            input_dtype=gemlite.DType.FP16,
            output_dtype=gemlite.DType.FP16,
        )
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda")
        scales = torch.rand((rows, cols // 128), dtype=torch.float16, device="cuda")
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        made.append(layer)
    return {"gemlite 4": [(lambda layer=layer: layer(x)) for layer in made]}


def report(rows: Sequence[Row]) -> None:
    """The table, and the ratios that the bars are about."""
    print("| matrix | tokens | | us | times as fast as cuBLAS bf16 | share of copy bandwidth |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.shape} | {row.tokens} | {row.candidate} | {row.microseconds:.1f} |"
            f" {row.ratio:.2f} | {row.bandwidth_share:.2f} |"
        )
    found = {(row.shape, row.tokens, row.candidate): row.microseconds for row in rows}
    print("\nmixed 2/3/4 over uniform 3 (fp16), time:")
    for (shape, tokens, name), time in found.items():
        if name == "ours mixed 2/3/4 fp16":
            other = found[shape, tokens, "ours uniform 3 fp16"]
            print(f"  {shape}, {tokens} tokens: {time / other:.3f}")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens and rounds")
    parser.add_argument("--launcher", choices=("binary", "source"), default="binary")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    options = parser.parse_args()
    options.shapes = SHAPES[:1] if options.quick else SHAPES
    options.tokens = (1, 16, 512) if options.quick else TOKENS
    options.rounds = 5 if options.quick else 21
    return options


def main() -> None:
    """Check, measure, print."""
    options = _parsed()
    if not torch.cuda.is_available():
        sys.exit(f"no NVIDIA GPU for torch {torch.__version__}; there is nothing to measure here")
    options.gemlite = find_spec("gemlite") is not None
    if not options.gemlite:
        print("gemlite is not installed and is left out")
    import triton

    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    torch.manual_seed(0)
    np.random.seed(0)
    check(options.launcher)
    rows = [row for shape in options.shapes for row in measure(shape, options.launcher, options)]
    report(rows)
    decoded = compare(options.launcher, layers=4 if options.quick else 32)
    if options.json is not None:
        body = {"device": name, "rows": [asdict(row) for row in rows], "decode": decoded}
        options.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
