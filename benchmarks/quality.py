"""Quality at equal stored bits: uniform widths, per-tensor search, and this compiler's blocks.

    python benchmarks/quality.py --models models,../shared/models --seeds 0,1,2 \\
        --calib train.txt --text data/wikitext2/test.txt --out quality.jsonl
    python benchmarks/quality.py --out quality.jsonl --markdown

Every method gets the same budget of effective bits (codes, scales, table of widths).
A budget `u2` is what uniform 2-bit blocks take; at a budget between two of them the uniform methods
widen every n-th block, so that they spend it too. Finished rows of --out are not computed again;
what methods and budgets of one model and seed share is computed once per run. With --chain searches
with swaps start at the widths of the next larger budget, as in `compile --avg-bits 2.3,3.1`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from quality_tables import METHODS, Method, markdown

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.driver import compile as driver
from scalebits_compiler.driver.budgets import WARM_ROUNDS
from scalebits_compiler.driver.device import DEVICES, check_device, computing_on
from scalebits_compiler.frontend.calibration import load_tokenizer, read_windows
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.ir.module import Module
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.numerics.layout import FORMAT_VERSION
from scalebits_compiler.numerics.metrics import QualityMeter
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.search.assign_bits import AssignBits, block_costs
from scalebits_compiler.passes.search.initial_allocations import Costs, best_uniform

if TYPE_CHECKING:
    from scalebits_compiler.passes.base import LinearRule, Part, PartRule, WeightRule

BATCH_WINDOWS = 16


class CountedEvaluator:
    """Counts the tokens that the passes run; `gradient_tokens` with, `tokens` without gradients."""

    def __init__(self, module: Module, meter: WorkMeter, place: Placement | None = None) -> None:
        self.module, self.meter = module, meter
        self.inner = driver.evaluator(module, place)

    def run(self, ids: torch.Tensor, linear: LinearRule | None = None) -> torch.Tensor:
        """As `Evaluator.run`."""
        self.meter.count(ids.numel())
        return self.inner.run(ids, linear)

    def stream(self, batches: Sequence[torch.Tensor], weight: WeightRule) -> None:
        """As `Evaluator.stream`."""
        self.meter.tokens += sum(ids.numel() for ids in batches)
        self.inner.stream(batches, weight)

    def stream_parts(self, batches: Sequence[torch.Tensor], rule: PartRule) -> None:
        """As `Evaluator.stream_parts`."""
        self.meter.tokens += sum(ids.numel() for ids in batches)
        sizes = {w.symbol: math.prod(w.type.static_shape()) for w in self.module.searched()}
        counts = [ids.numel() / sum(sizes.values()) for ids in batches]

        def counted(part: Part) -> Mapping[str, torch.Tensor]:
            size = sum(sizes.get(symbol, 0) for symbol in part.matrices)
            return rule(CountedPart(part, [size * count for count in counts], self.meter))

        self.inner.stream_parts(batches, counted)


@dataclass(frozen=True)
class CountedPart:
    """A part of a model whose runs are counted; `tokens` per batch, times its share of weights."""

    inner: Part
    tokens: Sequence[float]
    meter: WorkMeter

    @property
    def matrices(self) -> Sequence[str]:
        """As `Part.matrices`."""
        return self.inner.matrices

    def run(self, batch: int, linear: LinearRule | None = None) -> torch.Tensor:
        """As `Part.run`."""
        self.meter.count(self.tokens[batch])
        return self.inner.run(batch, linear)


@dataclass
class WorkMeter:
    """Work of the passes in tokens."""

    gradient_tokens: float = 0
    tokens: float = 0

    def count(self, tokens: float) -> None:
        """A run of so many, with gradients if these are on."""
        if torch.is_grad_enabled():
            self.gradient_tokens += tokens
        else:
            self.tokens += tokens

    def passes(self, calibration: torch.Tensor) -> float:
        """Gradient passes over the calibration windows; a forward pass alone is a third of one."""
        return (self.gradient_tokens + self.tokens / 3) / calibration.numel()


@dataclass(frozen=True)
class Stage:
    """A module on its way; the gradient passes and CPU seconds that led from its parent to it."""

    module: Module
    passes: float
    seconds: float


class Subject:
    """One model at one seed: stages that methods share are computed once."""

    def __init__(self, path: Path, seed: int, options: argparse.Namespace) -> None:
        self.path, self.seed, self.options = path, seed, options
        self.place = Placement(options.device)
        self.stages: dict[tuple[object, ...], Stage] = {}
        self.meter = WorkMeter()  # one for all: what a cache holds goes on counting with it
        self.caches: dict[tuple[object, ...], dict[str, object]] = {}
        source = load_model(path)
        text = driver.TextOptions(
            file=options.calib, calibration=options.calib_windows, acceptance=options.accept_windows
        )
        self.input = driver.input_module(source, text, seed)
        calibration = self.input.calibration
        assert calibration is not None
        self.calibration = self.input.resources.torch(calibration.key)
        tokenizer = load_tokenizer(path)
        length = self.calibration.shape[1]
        windows = read_windows(options.text, tokenizer, length, options.windows, 0)
        self.text = self.place.here(windows)
        parts = (calibration, self.input.tuning, self.input.acceptance)
        counts = [self.input.resources.shape(part.key)[0] if part else 0 for part in parts]
        self.windows = [*counts, len(self.text), length]
        with torch.no_grad():
            evaluator = driver.evaluator(self.input, self.place)
            self.original = [evaluator.run(ids) for ids in self.text.split(BATCH_WINDOWS)]
        self.loss = math.log(self.quality(self.input)["perplexity"])

    def stage(
        self,
        key: tuple[object, ...],
        module: Module,
        passes: str,
        shared: tuple[object, ...] = (),
    ) -> Stage:
        """The module after a pipeline; once per key. Stages with one `shared` share a cache."""
        if key not in self.stages:
            done, began = self.meter.passes(self.calibration), time.process_time()
            ctx = PassContext(
                evaluate=lambda m, place: CountedEvaluator(m, self.meter, place),
                place=self.place,
                seed=self.seed,
                progress=progress_for(),
                cache=self.caches.setdefault(shared, {}),
            )
            with computing_on(self.place.device):
                made = run_pipeline(module, parse_passes(passes), ctx)
            seconds = time.process_time() - began
            work = self.meter.passes(self.calibration) - done
            self.stages[key] = Stage(made, work, seconds)
        return self.stages[key]

    def start(self, method: Method) -> Stage:
        """Canonical, blocked, perhaps reordered."""
        whole = max(max(w.type.static_shape()) for w in self.blocked().quantized())
        block = -(-whole // 128) * 128
        chosen = f"{{block = [{block}, {block}], group = {self.group()}}}"
        shape = chosen if method.per_tensor else ""
        order = f",{method.order}" if method.order else ""
        key = ("start", method.per_tensor, method.order)
        return self.stage(key, self.input, f"canonicalize{shape}{order}")

    def blocked(self) -> Module:
        """Canonical, in the default blocks."""
        return self.stage(("start", False, ""), self.input, "canonicalize").module

    def group(self) -> int:
        """Columns of a group."""
        group = self.blocked().quantized()[0].group
        assert group is not None
        return group

    def budget(self, text: str) -> float:
        """Effective bits of a budget `2.3` or `u2`."""
        if not text.startswith("u"):
            return float(text)
        module = self.blocked()
        width = int(text[1:])
        found = summarize(
            module.with_bits(
                {w.symbol: np.full(w.grid_shape(), width, np.uint8) for w in module.quantized()}
            )
        )
        # Half a bit of storage more, so that the product with the weights does not round down.
        return found["effective_bits"] + 0.5 / found["weights"]

    def widths(self, method: Method, budget: float) -> Stage:
        """With a width per block under the budget."""
        start = self.start(method)
        if method.uniform:
            return Stage(uniform(start.module, budget), 0.0, 0.0)
        before, rounds = start, AssignBits().rounds if method.swaps else 0
        settings = f"avg-bits = {budget!r}"
        larger = [other for other in map(self.budget, self.options.budgets) if other > budget]
        if self.options.chain and larger and method.swaps:
            before = self.widths(method, min(larger))
            settings, rounds = f"{settings}, warm = true", min(rounds, WARM_ROUNDS)
        shared = ("search", method.per_tensor, method.order)
        loss = f', loss = "{method.loss}"' if method.loss else ""
        passes = f"assign-bits{{{settings}, rounds = {rounds}{loss}}}"
        return self.stage((*shared, budget, rounds), before.module, passes, shared)

    def row(self, name: str, budget: str) -> dict[str, Any]:
        """One measured row of the table."""
        method, bits = METHODS[name], self.budget(budget)
        start, widths = self.start(method), self.widths(method, bits)
        kind = (method.rounding, method.uniform, method.per_tensor, method.order, method.swaps)
        key = (*kind, bits)
        stages = [start, widths, self.stage(key, widths.module, method.rounding)]
        if method.tuning:
            shared = ("tuning", method.order)
            stages.append(
                self.stage((*key, method.tuning), stages[-1].module, method.tuning, shared)
            )
        measured = self.quality(stages[-1].module)
        return {
            "model": self.path.name,
            "seed": self.seed,
            "budget": budget,
            "method": name,
            "format": FORMAT_VERSION,
            "windows": self.windows,
            "bits": summarize(stages[-1].module)["effective_bits"],
            "device": self.place.device,
            **measured,
            "excess": math.log(measured["perplexity"]) - self.loss,
            "search_passes": start.passes + widths.passes,
            "tuning_passes": stages[-1].passes if method.tuning else 0.0,
            "seconds": sum(stage.seconds for stage in stages),
        }

    def quality(self, module: Module) -> dict[str, Any]:
        """Perplexity, divergence from the original and agreement with it on the test windows."""
        evaluator, meter = driver.evaluator(module, self.place), QualityMeter()
        with torch.no_grad():
            for ids, original in zip(self.text.split(BATCH_WINDOWS), self.original, strict=True):
                meter.update(evaluator.run(ids), ids, original)
        found = meter.result()
        return {k: found[k] for k in ("perplexity", "kl_divergence", "top1_agreement")}


def uniform(module: Module, budget: float) -> Module:
    """With the format of every block that `evenly` gives; ids are places on the ladder plus 1."""
    ids = evenly(block_costs(module, AssignBits(avg_bits=budget))) + 1
    grids, offset = {}, 0
    for weight in module.quantized():
        shape = weight.grid_shape()
        count = math.prod(shape)
        grids[weight.symbol] = ids[offset : offset + count].reshape(shape).astype(np.uint8)
        offset += count
    return replace(module.with_bits(grids), facts=module.facts | {"bits"})


def evenly(costs: Costs) -> np.ndarray:
    """The finest uniform choice that fits, and every n-th block one step up as room is left."""
    place, choice = best_uniform(costs)
    choice, blocks = choice.copy(), len(choice)
    if place == len(costs.table) - 1:
        return choice
    left, price = costs.budget - costs.total(choice), costs.up(choice)
    share = left / price.sum()
    ticks = np.floor(np.arange(1, blocks + 1) * share) - np.floor(np.arange(blocks) * share)
    for block in np.flatnonzero(ticks):
        if price[block] <= left:
            choice[block] += 1
            left -= price[block]
    return choice


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows that are not in --out yet, model after model."""
    keys = ("model", "seed", "budget", "method")
    done = {tuple(row[k] for k in keys) for row in read_rows(options.out)}
    for path in found_models(options.models):
        for seed in options.seeds:
            wanted = [
                (budget, name)
                for budget in options.budgets
                for name in options.methods
                if (path.name, seed, budget, name) not in done
            ]
            if not wanted:
                continue
            subject = Subject(path, seed, options)
            for budget, name in wanted:
                yield subject.row(name, budget)


def found_models(paths: Sequence[Path]) -> list[Path]:
    """The model folders among and directly below these folders, the first of each name."""
    folders = [f for path in paths for f in (path, *sorted(path.iterdir()))]
    return list({f.name: f for f in reversed(folders) if (f / "config.json").is_file()}.values())[
        ::-1
    ]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of this packed format that earlier runs have measured."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row.get("format") == FORMAT_VERSION]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=_list(Path), default=[Path("models")])
    parser.add_argument("--budgets", type=_list(str), default=["u2", "2.3", "2.5", "u3", "u4"])
    parser.add_argument("--chain", action="store_true", help="searches start at a larger budget's")
    parser.add_argument("--seeds", type=_list(int), default=[0])
    parser.add_argument("--methods", type=_list(str), default=list(METHODS))
    parser.add_argument("--calib", type=Path, help="calibration text (default: the bundled one)")
    parser.add_argument("--calib-windows", type=int, default=128)
    parser.add_argument("--accept-windows", type=int, default=64)
    parser.add_argument("--text", type=Path, default=Path("data/wikitext2/test.txt"))
    parser.add_argument("--windows", type=int, default=96, help="test windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where passes compute")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--markdown", action="store_true", help="print --out as tables and stop")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]}: {', '.join(METHODS)}")
    return options


def _list(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    """Measure what is missing, or print the tables."""
    options = parse()
    torch.set_num_threads(options.threads)
    check_device(options.device)
    if options.markdown:
        print(markdown(read_rows(options.out)))
        return
    for row in measure(options):
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
