"""Our CUDA kernels: right first, then how fast, beside cuBLAS and (where it installs) gemlite.

    PYTHONPATH=. python benchmarks/cuda/bench.py --out FILE.json [--quick] [--minutes M]

Needs a GPU, torch with CUDA, Triton and numpy; gemlite and transformers are measured where they are
installed. Parts are done in order and each is kept in FILE; a call that has run for M minutes stops
before the next part, and the same command goes on there. When all parts are done, and on every call
after that, the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import as_markdown

SHAPES = ((8192, 8192), (28672, 8192), (14336, 4096), (4096, 4096))
TOKENS = (1, 4, 16, 64, 512, 2048)
LAYERS = 32
Part = Callable[[], Any]


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """Name -> what measures it, in order; their results are plain values."""
    from check import check
    from decode import ours, transformers
    from products import bandwidth, product

    shapes = SHAPES[:1] if options.quick else SHAPES
    tokens = (1, 16, 2048) if options.quick else TOKENS
    rounds, layers = (5, 4) if options.quick else (21, LAYERS)
    made: dict[str, Part] = {
        f"check {dtype}": partial(check, dtype, options.launcher) for dtype in ("fp16", "bf16")
    }
    made["bandwidth"] = bandwidth
    made["decode ours"] = partial(ours, options.launcher, layers)
    made["decode transformers dynamic"] = partial(transformers, "dynamic", layers)
    for shape in shapes:
        for count in tokens:
            name = "{}x{} {}".format(*shape, count)
            made[name] = partial(product, shape, count, options.launcher, rounds)
    # Last: torch takes longer to compile it than all others take together.
    made["decode transformers static"] = partial(transformers, "static", layers)
    return made


def run(wanted: dict[str, Part], state: dict[str, Any], out: Path, minutes: float) -> bool:
    """Do the parts that the state lacks, and keep each; False if the time is up before the end."""
    began, worked = time.monotonic(), False
    for name, part in wanted.items():
        if name in state["parts"]:
            continue
        spent = time.monotonic() - began
        if worked and spent > 60 * minutes:
            print(f"{minutes:g} minutes are over; the same command goes on with: {name}")
            return False
        print(f"[{spent:4.0f} s] {name} ...", file=sys.stderr, flush=True)
        state["parts"][name], worked = part(), True
        written = out.with_suffix(".part")
        written.write_text(json.dumps(state, indent=1) + "\n")
        written.replace(out)
    return True


def opened(out: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has measured on this very machine, with these options; else nothing."""
    if not out.is_file():
        return {"machine": machine, "parts": {}}
    state = json.loads(out.read_text())
    if state["machine"] != machine:
        sys.exit(f"{out} was measured as {state['machine']}, this is {machine}: name another file")
    return state


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="what is measured, part by part",
    )
    add("--minutes", type=float, default=8.0, help="begin no part after so many (default 8)")
    add("--quick", action="store_true", help="one shape, few tokens, rounds and layers")
    add("--launcher", choices=("binary", "source"), default="binary")
    return parser.parse_args()


def main() -> None:
    """Check, measure, print."""
    options = _parsed()
    if not torch.cuda.is_available():
        sys.exit(f"no NVIDIA GPU for torch {torch.__version__}; there is nothing to measure here")
    import triton

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "launcher": options.launcher,
        "quick": options.quick,
    }
    state = opened(options.out, machine)
    torch.manual_seed(0)
    np.random.seed(0)
    if run(parts(options), state, options.out, options.minutes):
        print(as_markdown(state))


if __name__ == "__main__":
    main()
