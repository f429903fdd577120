"""Products of one matrix: cuBLAS, ours at several widths, gemlite; in turns in every round."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from check import dequantized, error, exact_of
from matrices import (
    U8,
    build_kernels,
    copies_beyond_cache,
    mixed,
    random_matrix,
    random_order,
    uniform,
)

from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.kernels import DTYPES, TiledLinear

Calls = list[Callable[[], object]]
GATHERED = "gathered 2/3/4"


def captured(calls: Calls) -> Callable[[], None]:
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


def interleaved(candidates: dict[str, Calls], rounds: int) -> dict[str, list[float]]:
    """Microseconds of one product of each candidate in each round."""
    graphs = {name: captured(calls) for name, calls in candidates.items()}
    for graph in graphs.values():
        seconds(graph, 2)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, graph in graphs.items():
            found[name].append(1e6 * seconds(graph, 3) / len(candidates[name]))
    return found


def bandwidth() -> float:
    """Bytes per second that a device-to-device copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), 3) for _ in range(9)]
    return 2 * source.numel() / statistics.median(times)


@functools.cache
def _layers(shape: tuple[int, int], launcher: str) -> dict[str, list[TiledLinear]]:
    """Candidate -> its layers, as many as are together larger than the cache; all are checked."""
    layout = TileLayout(*shape, 128, 128, 128)
    grids: dict[str, U8] = {f"uniform {width}": uniform(layout, width) for width in (2, 3, 4, 8)}
    grids["mixed 2/3/4"] = grids[GATHERED] = mixed(layout, (2, 3, 3, 4))
    made: dict[str, list[TiledLinear]] = {}
    with ThreadPoolExecutor() as pool:  # numpy takes a minute for the largest shape in a row
        packed = dict(
            zip(grids, pool.map(partial(random_matrix, layout), grids.values()), strict=True)
        )
        exact = dict(zip(grids, pool.map(dequantized, packed.values()), strict=True))
    for name, matrix in packed.items():
        for dtype in DTYPES:
            given = [(layout, matrix.bits)]
            plain, gathered = ([], given) if name == GATHERED else (given, [])
            kernels = build_kernels(plain, dtype, launcher, gathered)
            arena = torch.from_numpy(matrix.arena).to(kernels.device)
            index = random_order(layout).to(kernels.device) if gathered else None
            copies = copies_beyond_cache(arena.numel())
            layers = [
                TiledLinear(kernels, layout, arena.clone(), matrix.bits, index)
                for _ in range(copies)
            ]
            expected = exact_of(exact[name], kernels, index)
            for tokens in (1, 16, 64, 256, 512):
                error(layers[0], expected, kernels, tokens, f"{shape}, {name}")
            made[f"{name} {dtype}"] = layers
    return made


def product(shape: tuple[int, int], tokens: int, launcher: str, rounds: int) -> dict[str, Any]:
    """`microseconds`: candidate -> of a product, by round; `bytes`: candidate -> of a matrix."""
    layers, dense_bytes = _layers(shape, launcher), 2 * shape[0] * shape[1]
    count = copies_beyond_cache(dense_bytes)
    calls: dict[str, Calls] = {}
    for dtype, kind in DTYPES.items():
        x = torch.randn((tokens, shape[1]), device="cuda").to(kind)
        dense = [torch.randn(shape, device="cuda").to(kind) for _ in range(count)]
        calls[f"cuBLAS {dtype}"] = [partial(F.linear, x, weight) for weight in dense]
        for name, made in layers.items():
            if name.endswith(dtype):
                calls[name] = [partial(layer, x) for layer in made]
    calls |= _gemlite(shape, tokens, 4 * count)
    sizes = {name: made[0].arena.numel() for name, made in layers.items()}
    sizes |= {f"cuBLAS {dtype}": dense_bytes for dtype in DTYPES}
    return {"microseconds": interleaved(calls, rounds), "bytes": sizes}


def _gemlite(shape: tuple[int, int], tokens: int, count: int) -> dict[str, Calls]:
    """4-bit products of gemlite, which packs 1, 2, 4 and 8 bits only; none if it does not work."""
    if find_spec("gemlite") is None:
        return {}
    try:
        layers = [_gemlite_layer(*shape) for _ in range(count)]
        x = torch.randn((tokens, shape[1]), device="cuda", dtype=torch.float16)
        layers[0](x)
    except Exception as problem:  # whatever its version lacks, ours is measured
        print(f"gemlite is left out: {problem!r}", file=sys.stderr)
        return {}
    return {"gemlite 4 fp16": [partial(layer, x) for layer in layers]}


def _gemlite_layer(rows: int, cols: int) -> Any:
    gemlite: Any = import_module("gemlite.core")
    layer = gemlite.GemLiteLinear(
        W_nbits=4,
        group_size=128,
        in_features=cols,
        out_features=rows,
        input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device="cuda")
    scales = torch.rand((rows, cols // 128), dtype=torch.float16, device="cuda")
    layer.pack(codes, scales, torch.full_like(scales, 8), None)
    return layer
