"""What the parts have measured as Markdown tables for docs/cuda.md, and beside what was asked."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

ANCHOR, MIXED, UNIFORM = "cuBLAS bf16", "mixed 2/3/4 {}", "uniform 3 {}"
COLUMNS = ("uniform 2 fp16", "uniform 3 fp16", "uniform 4 fp16", "uniform 8 fp16")
COLUMNS += ("mixed 2/3/4 fp16", "mixed 2/3/4 bf16", "gathered 2/3/4 fp16", "cuBLAS fp16")
COLUMNS += ("gemlite 4 fp16",)
DECODE = {
    "decode ours": "ours, mixed 2/3/4 fp16, CUDA graph",
    "decode transformers dynamic": "transformers bf16",
    "decode transformers static": "transformers bf16, static cache, CUDA graphs",
}
# What is to be shown on an H200: tokens, least width of the matrix, least ratio to cuBLAS bf16.
BARS = ((1, 8192 * 8192, 2.5), (16, 0, 1.5), (2048, 0, 0.7))
MOST_OVER_UNIFORM, LEAST_DECODE = 1.05, 2.5


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of one candidate's time over another's."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def as_markdown(state: dict[str, Any]) -> str:
    """All tables."""
    machine, done = state["machine"], state["parts"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}"
        f" ({machine['launcher']} launcher{', quick' if machine['quick'] else ''}). A copy moves"
        f" {done['bandwidth'] / 1e9:.0f} GB/s. Worst relative error against float64:"
        f" fp16 {done['check fp16']:.1e}, bf16 {done['check bf16']:.1e}.",
        "",
        *_products(_measured(done), done["bandwidth"]),
        "",
        *_decoding(done),
        "",
        *_bars(_measured(done), done),
    ]
    return "\n".join(lines)


def _measured(done: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """(shape, tokens) -> the part."""
    parts = {name: part for name, part in done.items() if name[0].isdigit()}
    return {(name.split()[0], int(name.split()[1])): part for name, part in parts.items()}


def _products(parts: dict[tuple[str, int], dict[str, Any]], bandwidth: float) -> Iterator[str]:
    """One row for a matrix and a number of tokens: times as fast as cuBLAS bf16."""
    named = " | ".join(COLUMNS)
    yield f"| matrix | tokens | cuBLAS bf16, us | {named} | mixed / uniform 3 | share of copy |"
    yield "|---" * (len(COLUMNS) + 5) + "|"
    for (shape, tokens), part in parts.items():
        times = part["microseconds"]
        cells = [f"{ratio(times, ANCHOR, name):.2f}" if name in times else "-" for name in COLUMNS]
        mixed = MIXED.format("fp16")
        over = ratio(times, mixed, UNIFORM.format("fp16"))
        share = 1e6 * part["bytes"][mixed] / statistics.median(times[mixed]) / bandwidth
        anchor = statistics.median(times[ANCHOR])
        row = (shape, str(tokens), f"{anchor:.1f}", *cells, f"{over:.3f}", f"{share:.2f}")
        yield f"| {' | '.join(row)} |"


def _decoding(done: dict[str, Any]) -> Iterator[str]:
    yield "| decoding, batch 1, an 8B-shaped Llama of random weights | ms a token | of ours |"
    yield "|---|---|---|"
    ours = done["decode ours"]
    for name, what in DECODE.items():
        time = done[name]
        cells = ("-", "not measured") if time is None else (f"{time:.2f}", f"{time / ours:.2f}")
        yield f"| {what} | {' | '.join(cells)} |"


def _bars(parts: dict[tuple[str, int], dict[str, Any]], done: dict[str, Any]) -> Iterator[str]:
    """What was asked, and the worst that was measured of it."""
    yield "| asked | measured, the worst | |"
    yield "|---|---|---|"
    for tokens, least, wanted in BARS:
        found = [
            ratio(part["microseconds"], ANCHOR, MIXED.format("fp16"))
            for (shape, count), part in parts.items()
            if count == tokens and _size(shape) >= least
        ]
        yield _bar(f"{tokens} tokens, mixed: at least {wanted} times cuBLAS bf16", found, wanted)
    over = [
        -ratio(part["microseconds"], MIXED.format(dtype), UNIFORM.format(dtype))
        for (_, tokens), part in parts.items()
        for dtype in ("fp16", "bf16")
        if tokens == 1
    ]
    yield _bar(
        f"1 token, mixed over uniform 3: at most {MOST_OVER_UNIFORM}", over, -MOST_OVER_UNIFORM
    )
    anchors = [done[name] for name in list(DECODE)[1:] if done[name] is not None]
    fastest = [min(anchors) / done["decode ours"]] if anchors else []
    what = f"decoding: at least {LEAST_DECODE} times the faster transformers"
    yield _bar(what, fastest, LEAST_DECODE)


def _bar(what: str, found: list[float], wanted: float) -> str:
    if not found:
        return f"| {what} | - | not measured |"
    worst = min(found)
    return f"| {what} | {abs(worst):.2f} | {'met' if worst >= wanted else 'missed'} |"


def _size(shape: str) -> int:
    rows, columns = map(int, shape.split("x"))
    return rows * columns
