"""`scalebitsc bench`: how fast an artifact runs on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.cli.targets import add_trust
from scalebits_compiler.runtime.cpu.isa import ACTIVATIONS, EXACT

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `bench`."""
    parser = subparsers.add_parser("bench", help="measure speed and memory of an artifact")
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT", help="a folder that compile wrote")
    add("--prompt-tokens", type=int, default=128, metavar="N", help="of the prefill (default 128)")
    add("--new-tokens", type=int, default=32, metavar="N", help="tokens to decode (default 32)")
    add("--threads", type=int, metavar="N", help="of the CPU; default: the physical cores")
    add("--activations", choices=ACTIVATIONS, default=EXACT, help="int8 is faster, less exact")
    add_trust(add)
    add("--repeat", type=int, default=5, metavar="N", help="rounds (default 5)")
    add("--json", action="store_true", help="print JSON")
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from scalebits_compiler.tools.bench import BenchOptions, bench

    options = BenchOptions(
        args.prompt_tokens, args.new_tokens, args.threads, args.activations, args.repeat
    )
    found = bench(args.artifact, options, progress_for(args.quiet), args.trust_kernels)
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def as_text(found: dict[str, Any]) -> str:
    """The measurements for people."""
    on_gpu = "copy_bandwidth" in found
    megabytes = found["bytes_per_token"] / 1e6
    where = found["device"] if on_gpu else f"{found['threads']} thread(s)"
    lines = [
        f"kernels         {found['variant']}, {found['arithmetic']} arithmetic,"
        f" {where}, {found['repeat']} rounds: median [lowest..highest]",
        f"prefill         {_rate(found['prefill_tokens_per_second'])} tokens/s"
        f" of {found['prompt_tokens']} tokens",
        f"decode          {_rate(found['decode_tokens_per_second'])} tokens/s"
        f" of {found['new_tokens']} tokens",
        f"first decode    {_rate(found['first_decode_seconds'], 1e-3)} ms, not counted in decode",
        f"bytes per token {megabytes:,.1f} MB of weights",
        _bandwidth(found, "copy" if on_gpu else "read"),
        f"peak memory     {found['peak_memory_bytes'] / 1e6:,.0f} MB"
        + (" of the device" if on_gpu else ""),
    ]
    alone = ", each awaited by the host" if on_gpu else " on one thread"
    for phase, by_op in found["seconds_by_op"].items():
        total = sum(by_op.values()) or 1.0
        per_token = " per token" if phase == "decode" else ""
        lines.append(f"{phase} by op{alone}, ms{per_token}")
        lines += [
            f"  {op:<14}{seconds * 1e3:>10.3f}{seconds / total:>7.1%}"
            for op, seconds in by_op.items()
        ]
    return "\n".join(lines)


def _bandwidth(found: dict[str, Any], moves: str) -> str:
    """moves: what was measured, "read" or "copy"."""
    how = "read and written by a copy" if moves == "copy" else "measured"
    return (
        f"{moves} bandwidth  {_rate(found[f'{moves}_bandwidth'], 1e9)} GB/s {how},"
        f" decode uses {found['bandwidth_share']:.0%}"
    )


def _rate(rate: dict[str, float], unit: float = 1.0) -> str:
    middle, low, high = (rate[key] / unit for key in ("median", "low", "high"))
    return f"{middle:,.1f} [{low:,.1f}..{high:,.1f}]"
