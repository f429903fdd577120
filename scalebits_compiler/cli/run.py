"""`scalebitsc run`: generate text with an artifact, or embed it with an encoder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from scalebits_compiler.cli.targets import add_trust
from scalebits_compiler.runtime.cpu.isa import ACTIVATIONS, EXACT
from scalebits_compiler.tasks import CAUSAL, ENCODER

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from scalebits_compiler.runtime.session import Session

# Of an embedding, so many numbers are shown to people; --json has all.
SHOWN = 6


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `run`."""
    parser = subparsers.add_parser("run", help="generate text with an artifact, or embed it")
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT", help="a folder that compile wrote")
    add("--prompt", action="append", required=True, help="give it several times for a batch")
    add("-n", "--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest mass P")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--target", choices=("reference",), help="run by torch definitions, not by kernels")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE", help="load a plugin")
    add("--activations", choices=ACTIVATIONS, default=EXACT, help="int8 is faster, less exact")
    add_trust(add)
    add("--threads", type=int, metavar="N", help="for large models (default: physical cores)")
    add("--json", action="store_true", help="print prompts, tokens and text as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate and print; a single prompt is printed as it is written. An encoder embeds."""
    from scalebits_compiler.plugins import load_plugins
    from scalebits_compiler.sessions.open import open_session

    session = open_session(
        args.artifact,
        args.target,
        args.activations,
        args.threads,
        load_plugins(args.plugin),
        args.trust_kernels,
    )
    if session.execution.startswith(("native: ", "step by step: ", "by torch: ")):
        print(f"note: runs {session.execution}", file=sys.stderr)
    if session.task == ENCODER:
        return _embed(session, args)
    # An encoder-decoder answers a prompt, it does not continue it.
    shown = args.prompt if session.task == CAUSAL else [""] * len(args.prompt)
    live = _after(shown[0]) if len(args.prompt) == 1 and not args.json else None
    done = session.generate(
        args.prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stream=live,
    )
    if args.json:
        pairs = zip(args.prompt, done, strict=True)
        rows = [{"prompt_text": text, **asdict(generation)} for text, generation in pairs]
        print(
            json.dumps(
                {"variant": session.variant, "execution": session.execution, "generations": rows},
                indent=2,
            )
        )
    elif live is not None:
        live(0, "\n")
    else:
        for text, generation in zip(shown, done, strict=True):
            print(f"{text}{generation.text}\n---")
    return 0


def _embed(session: Session, args: argparse.Namespace) -> int:
    """Print the embedding of every prompt; of several also how near each is to the first."""
    vectors = session.embed(args.prompt)
    if args.json:
        rows = [
            {"prompt_text": text, "embedding": vector.tolist()}
            for text, vector in zip(args.prompt, vectors, strict=True)
        ]
        told = {"variant": session.variant, "execution": session.execution, "embeddings": rows}
        print(json.dumps(told, indent=2))
        return 0
    print(f"embeddings of {vectors.shape[1]} channels: mean of the states, of length one")
    for text, vector in zip(args.prompt, vectors, strict=True):
        first = " ".join(f"{value:.4f}" for value in vector[:SHOWN])
        near = f"cosine to the first {float(vector @ vectors[0]):.4f}, " if len(vectors) > 1 else ""
        print(f"{text}: {near}{first} ...")
    return 0


def _after(prompt: str) -> Callable[[int, str], None]:
    """Writes pieces as they come, the prompt with the first: not before the options are checked."""
    head = [prompt]

    def write(row: int, piece: str) -> None:
        sys.stdout.write("".join(head) + piece)
        sys.stdout.flush()
        head.clear()

    return write
