"""Our matrix kernels beside torch's and llama.cpp's: `python benchmarks/cpu/kernels.py`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ggml import REPACKED, TYPES, Ggml
from matrices import MIXES, OurKernels, random_matrix
from measure import Case, copies, interleave, pin, ratio, spread
from numpy.typing import NDArray

from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cpu.isa import ACTIVATIONS

SHAPES = ("2048x2048", "5632x2048", "4096x4096", "11008x4096")
ONLY_ONE_TOKEN = ("uniform 5", "uniform 6", "uniform 7")
"""These show the share of the memory bandwidth, which matters for one token only."""
BASE = "mixed 2,3,4 exact"
READ = "memory read"
Seconds = dict[str, NDArray[np.float64]]


def main() -> None:
    args = _arguments()
    pin(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    ggml = Ggml.find(args.threads)
    features = cpu_features() - set(args.lacks)
    records = []
    with tempfile.TemporaryDirectory(prefix="scalebits-bench-") as folder:
        ours = {
            name: OurKernels(mix, Path(folder) / str(nth), args.activations, args.threads, features)
            for nth, (name, mix) in enumerate(MIXES.items())
            if name not in ONLY_ONE_TOKEN or (1 in args.batches and not args.few)
        }
        any_of_ours = next(iter(ours.values()))
        print(f"ours: {any_of_ours.describe()}")
        for shape in args.shapes:
            for batch in args.batches:
                for place in args.places:
                    setting = Setting(
                        shape, batch, place == "cold", args.threads, list(any_of_ours.libraries)
                    )
                    seconds = interleave(list(setting.cases(ours, ggml)), args.rounds, args.threads)
                    records.append(setting.report(seconds))
    print(f"\n### Ratios: medians over {args.rounds} rounds\n\n{summary(records)}")
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, metavar="NxK", help="rows x columns")
    add("--batches", nargs="+", type=int, default=(1, 8, 32, 128), metavar="M", help="tokens")
    add("--places", nargs="+", choices=("hot", "cold"), default=("hot", "cold"))
    add("--threads", type=int, default=1, metavar="N", help="and as many pinned cores")
    add("--rounds", type=int, default=15, metavar="N", help="default 15")
    add("--activations", nargs="+", choices=ACTIVATIONS, help="default: all of this processor")
    add("--lacks", nargs="+", default=(), metavar="FLAG", help="do without avx512_vnni, say")
    add("--few", action="store_true", help="without the uniform widths above 4")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    return parser.parse_args()


class Setting:
    """One shape and batch, with weights in the cache (hot) or in memory (cold)."""

    def __init__(
        self, shape: str, batch: int, cold: bool, threads: int, activations: list[str]
    ) -> None:
        self.rows, self.cols = map(int, shape.split("x"))
        self.batch, self.cold, self.activations = batch, cold, activations
        self.title = f"{shape}, batch {batch}, {'cold' if cold else 'hot'}, {threads} core(s)"
        self.nbytes: dict[str, int] = {}

    def cases(self, built: dict[str, OurKernels], ggml: Ggml | None) -> Iterator[Case]:
        """Everything that is timed in this setting."""
        rng = np.random.default_rng(1)
        x = rng.normal(size=(self.batch, self.cols)).astype(np.float32)
        for name, kernels in built.items():
            if name in ONLY_ONE_TOKEN and self.batch > 1:
                continue
            packed = random_matrix(self.rows, self.cols, MIXES[name], self.cold)
            for activations in self.activations:
                ours = f"{name} {activations}"
                self.nbytes[ours] = packed.nbytes
                yield kernels.case(ours, packed, activations, x)
                if self.cold and self.batch == 1:
                    rounded = f"{ours}, x rounded before"
                    self.nbytes[rounded] = packed.nbytes
                    yield kernels.case(rounded, packed, activations, x, rounded=True)
        weights = rng.normal(size=(self.rows, self.cols)).astype(np.float32)
        yield from self._torch(weights, x)
        if ggml is not None:
            kinds = [*TYPES, *(f"{kind} repacked" for kind in REPACKED)]
            for kind in kinds:
                if case := ggml.case(f"llama.cpp {kind}", kind, weights, x, self.cold):
                    yield case
        if self.cold and self.batch == 1:
            yield self._read()

    def _torch(self, weights: NDArray, x: NDArray) -> Iterator[Case]:
        import torch
        from torch.nn.functional import linear

        for dtype in (torch.float32, torch.bfloat16):
            weight, source = (torch.from_numpy(array).to(dtype) for array in (weights, x))
            count = copies(weight.nbytes, self.cold)
            calls = [partial(linear, source, weight.clone()) for _ in range(count)]
            yield Case(f"torch {str(dtype).removeprefix('torch.')}", calls)

    def _read(self) -> Case:
        """Reads as many bytes as the matrix of BASE has, from memory."""
        import torch

        count = self.nbytes[BASE] // 8
        parts = [torch.ones(count, dtype=torch.int64) for _ in range(copies(8 * count, True))]
        self.nbytes[READ] = 8 * count
        return Case(READ, [part.sum for part in parts])

    def report(self, seconds: Seconds) -> dict[str, Any]:
        """Print the table of this setting; gives the same for programs."""
        print(f"\n### {self.title}\n\n| | us, median [p10..p90] | / {BASE} | of read bandwidth |")
        print("|---|---|---|---|")
        rows = []
        for name, values in seconds.items():
            relative, share = ratio(values, seconds[BASE]), self._share(name, seconds)
            shown = "" if share is None else f"{share:.0%}"
            print(f"| {name} | {spread(values, 1e-6)} | {relative:.2f} | {shown} |", flush=True)
            rows.append(
                {"name": name, "seconds": values.tolist(), "relative": relative}
                | ({} if share is None else {"share": share})
            )
        return {"setting": self.title, "rows": rows, "ratios": self._ratios(seconds)}

    def _ratios(self, seconds: Seconds) -> dict[str, dict[str, float]]:
        """What the summary has for each activation mode."""
        found = {}
        for mode in self.activations:
            ours, uniform = seconds[f"mixed 2,3,4 {mode}"], seconds[f"uniform 3 {mode}"]
            line = {
                "mixed 2,3,4 / uniform 3": ratio(ours, uniform),
                "mixed 1..8 / uniform 3": ratio(seconds[f"mixed 1..8 {mode}"], uniform),
            }
            anchors = [name for name in seconds if name.startswith(("llama.cpp", "torch"))]
            found[mode] = line | {f"{name} / mixed": ratio(seconds[name], ours) for name in anchors}
        return found

    def _share(self, name: str, seconds: Seconds) -> float | None:
        """Bytes per second of the weights over those of a plain read, in the same rounds."""
        if READ not in seconds or name not in self.nbytes:
            return None
        per_byte = seconds[READ] / self.nbytes[READ]
        return ratio(per_byte * self.nbytes[name], seconds[name])


def summary(records: list[dict[str, Any]]) -> str:
    """One line of ratios for each setting and mode."""
    columns = list(next(iter(records[0]["ratios"].values())))
    lines = [
        f"| setting | activations | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for record in records:
        for mode, found in record["ratios"].items():
            cells = " | ".join(f"{found[name]:.2f}" for name in columns)
            lines.append(f"| {record['setting']} | {mode} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
