"""What a private input order costs at run time: `python benchmarks/cpu/gather.py`.

The same matrix in three ways: x is read as it is, or through an index (`--gather fused`) of a
random order, or numpy gathers it before. Rounding of x and product are timed together, and the
rounding alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from matrices import MIXES, OurKernels, random_matrix
from measure import Case, interleave, pin, ratio, spread
from numpy.typing import NDArray

from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cpu.program import Program, Rows

SHAPES = ("2048x2048", "4096x4096", "4096x11008")
MIX = "mixed 2,3,4"


def main() -> None:
    args = _arguments()
    pin(1)
    features = cpu_features() - set(args.lacks)
    with tempfile.TemporaryDirectory(prefix="scalebits-bench-") as folder:
        ours = OurKernels(MIXES[MIX], Path(folder) / "kernels", None, 1, features)
        print(ours.describe())
        head = ("matrix, tokens, place", "activations", "fused / none", "numpy / none", "rounding")
        print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for shape in args.shapes:
            for tokens in args.batches:
                for place in args.places:
                    for line in setting(ours, shape, tokens, place == "cold", args.rounds):
                        print(line, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, metavar="NxK", help="rows x columns")
    add("--batches", nargs="+", type=int, default=(1, 128), metavar="M", help="tokens")
    add("--places", nargs="+", choices=("hot", "cold"), default=("hot", "cold"))
    add("--rounds", type=int, default=15, metavar="N", help="default 15")
    add("--lacks", nargs="+", default=[], metavar="FLAG", help="of the processor, e.g. avx512_vnni")
    return parser.parse_args()


def setting(ours: OurKernels, shape: str, tokens: int, cold: bool, rounds: int) -> Iterator[str]:
    """The rows of the table for one shape, number of tokens, and place of the weights."""
    rows, cols = map(int, shape.split("x"))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(tokens, cols)).astype(np.float32)
    index = rng.permutation(cols).astype(np.uint16)
    packed = random_matrix(rows, cols, MIXES[MIX], cold)
    for mode in ours.libraries:
        plain = ours.case("none", packed, mode, x)
        # Elsewhere among the copies, and first: what it leaves in the cache is there for both.
        half = len(plain.calls) // 2
        calls = [*plain.calls[half:], *plain.calls[:half]]
        cases = [
            Case("numpy", [partial(_after, call, x, index) for call in calls]),
            plain,
            ours.case("fused", packed, mode, x, index=index),
            _rounding(ours, "rounding", x, mode, packed.layout.group, None),
            _rounding(ours, "rounding fused", x, mode, packed.layout.group, index),
        ]
        seconds = interleave(cases, rounds)
        fused, numpy = (ratio(seconds[name], seconds["none"]) for name in ("fused", "numpy"))
        small = [spread(seconds[f"rounding{kind}"], 1e-6) for kind in ("", " fused")]
        title = f"{shape}, {tokens}, {'cold' if cold else 'hot'}"
        yield f"| {title} | {mode} | {fused:.3f} | {numpy:.3f} | {small[0]} -> {small[1]} us |"


def _after(call: Callable[[], object], x: NDArray, index: NDArray) -> None:
    x[:, index]
    call()


def _rounding(
    ours: OurKernels, name: str, x: NDArray, mode: str, group: int, index: NDArray | None
) -> Case:
    library, program = ours.libraries[mode], Program()
    library.add_quantize(program, Rows(x, 0, 1, len(x)), group, index)
    return Case(name, [partial(library.run, program)])


if __name__ == "__main__":
    main()
