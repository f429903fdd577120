"""`scalebitsc eval`: quality of an artifact or a model on a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.cli.targets import add_trust
from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.cpu.isa import ACTIVATIONS, EXACT

if TYPE_CHECKING:
    from argparse import _SubParsersAction


_LINES = {
    "perplexity": "perplexity      {:.4f}",
    "kl_divergence": "KL divergence   {:.6f} nats per token",
    "top1_agreement": "top-1 agreement {:.2%}",
    "cosine": "cosine          {:.6f} of the states of tokens",
    "pooled_cosine": "pooled cosine   {:.6f} of their means over a window",
}


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `eval`."""
    parser = subparsers.add_parser("eval", help="perplexity, KL divergence, top-1 agreement")
    add = parser.add_argument
    add("model", type=Path, metavar="OUT", help="an artifact, or a Hugging Face folder")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    add("--vs", type=Path, metavar="MODEL", help="the original model")
    add("--seq-len", type=int, metavar="N", help="tokens per window")
    add("--windows", type=int, metavar="N", help="only the first N windows of the text")
    add("--target", choices=("reference",), help="run by torch definitions, not by kernels")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--activations", choices=ACTIVATIONS, default=EXACT, help="int8 is faster, less exact")
    add_trust(add)
    add("--json", action="store_true", help="print JSON")
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run, memory_help="fewer --windows or a shorter --seq-len take less")


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    for name in ("seq_len", "windows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1")
    from scalebits_compiler.plugins import load_plugins
    from scalebits_compiler.tools.evaluate import evaluate

    result = evaluate(
        args.model,
        args.text,
        args.vs,
        seq_len=args.seq_len,
        windows=args.windows,
        target=args.target,
        activations=args.activations,
        registry=load_plugins(args.plugin),
        trust_kernels=args.trust_kernels,
        progress=progress_for(args.quiet),
    )
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for key, line in _LINES.items():
        if result.get(key) is not None:
            print(line.format(result[key]))
    print(f"tokens scored   {result['tokens']:,}")
    print(f"protocol        {result['protocol']}")
    if result["execution"] is not None:
        print(f"execution       {result['execution']}")
    return 0
