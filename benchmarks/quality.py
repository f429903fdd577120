"""Quality at equal stored bits: uniform widths, per-tensor search, and this compiler's blocks.

    python benchmarks/quality.py --models models/wikitext2-llama-1m --budgets u2,u3 --seeds 0,1,2 \\
        --calib train.txt --text data/wikitext2/test.txt --out quality.jsonl --markdown

Every method gets the same budget of effective bits (codes, scales, zero points, table of widths).
A budget `u2` is what uniform 2-bit blocks take; at a budget between two of them the uniform methods
widen every n-th block, so that they spend it too. Finished rows of --out are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scalebits_compiler import driver
from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.frontend.calibration import load_tokenizer, read_windows
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.ir.module import Module
from scalebits_compiler.numerics.metrics import QualityMeter
from scalebits_compiler.numerics.placement import Placement
from scalebits_compiler.passes.assign_bits import AssignBits, block_costs
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.starts import Costs
from scalebits_compiler.summary import summarize

if TYPE_CHECKING:
    from scalebits_compiler.passes.base import LinearRule, PartRule, WeightRule

ORDER = "annotate-sensitivity,reorder-channels,fold-permutes"
NEAREST = 'round-weights{method = "rtn"}'
MIN_MAX = 'round-weights{clip = false, method = "rtn"}'
FEEDBACK = "round-weights"
BATCH_WINDOWS = 16


@dataclass(frozen=True)
class Method:
    """How a row is made. uniform: equal widths, no search; ordered: channels are reordered;

    per_tensor: a block is a whole matrix.
    """

    label: str
    rounding: str
    uniform: bool = False
    ordered: bool = False
    per_tensor: bool = False
    tuned: bool = False


METHODS = {
    "rtn": Method("uniform, nearest, min-max range", MIN_MAX, uniform=True),
    "rtn-tuned": Method(
        "uniform, nearest, min-max range, tuned", MIN_MAX, uniform=True, tuned=True
    ),
    "clip": Method("uniform, nearest, searched range", NEAREST, uniform=True),
    "clip-tuned": Method(
        "uniform, nearest, searched range, tuned", NEAREST, uniform=True, tuned=True
    ),
    "gptq": Method("uniform, error feedback (GPTQ)", FEEDBACK, uniform=True),
    "gptq-tuned": Method("uniform, error feedback, tuned", FEEDBACK, uniform=True, tuned=True),
    "tensor": Method("searched width per matrix", FEEDBACK, per_tensor=True),
    "tensor-tuned": Method(
        "searched width per matrix, tuned", FEEDBACK, per_tensor=True, tuned=True
    ),
    "nearest": Method("blocks, nearest (the paper's backend)", NEAREST, ordered=True),
    "blocks": Method("blocks, error feedback", FEEDBACK, ordered=True),
    "unordered": Method("blocks in natural order, tuned", FEEDBACK, tuned=True),
    "ours": Method("ours: blocks, reordered, tuned", FEEDBACK, ordered=True, tuned=True),
}


class CountedEvaluator:
    """Counts the tokens that the passes run; `gradient_tokens` with, `tokens` without gradients."""

    def __init__(self, module: Module, meter: WorkMeter, place: Placement | None = None) -> None:
        self.inner = driver.evaluator(module, place)
        self.meter = meter

    def run(self, ids: torch.Tensor, linear: LinearRule | None = None) -> torch.Tensor:
        """As `Evaluator.run`."""
        if torch.is_grad_enabled():
            self.meter.gradient_tokens += ids.numel()
        else:
            self.meter.tokens += ids.numel()
        return self.inner.run(ids, linear)

    def stream(self, batches: Sequence[torch.Tensor], weight: WeightRule) -> None:
        """As `Evaluator.stream`."""
        self.meter.tokens += sum(ids.numel() for ids in batches)
        self.inner.stream(batches, weight)

    def stream_parts(self, batches: Sequence[torch.Tensor], rule: PartRule) -> None:
        """As `Evaluator.stream_parts`."""
        self.inner.stream_parts(batches, rule)


@dataclass
class WorkMeter:
    """Work of the passes in tokens."""

    gradient_tokens: int = 0
    tokens: int = 0

    def passes(self, calibration: torch.Tensor) -> float:
        """Gradient passes over the calibration windows; a forward pass alone is a third of one."""
        return (self.gradient_tokens + self.tokens / 3) / calibration.numel()


@dataclass(frozen=True)
class Stage:
    """A module on its way, with the gradient passes and seconds that led from its parent to it."""

    module: Module
    passes: float
    seconds: float


class Subject:
    """One model at one seed: stages that methods share are computed once."""

    def __init__(self, path: Path, seed: int, options: argparse.Namespace) -> None:
        self.path, self.seed, self.options = path, seed, options
        self.stages: dict[tuple[object, ...], Stage] = {}
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
        self.text = read_windows(options.text, tokenizer, length, options.windows, 0)
        with torch.no_grad():
            evaluator = driver.evaluator(self.input)
            self.original = [evaluator.run(ids) for ids in self.text.split(BATCH_WINDOWS)]
        self.loss = math.log(self.quality(self.input)["perplexity"])

    def stage(self, key: tuple[object, ...], module: Module, passes: str) -> Stage:
        """The module after a pipeline; computed once per key."""
        if key not in self.stages:
            meter, began = WorkMeter(), time.perf_counter()
            ctx = PassContext(
                evaluate=lambda m, place: CountedEvaluator(m, meter, place),
                seed=self.seed,
                progress=progress_for(),
            )
            made = run_pipeline(module, parse_passes(passes), ctx)
            seconds = time.perf_counter() - began
            self.stages[key] = Stage(made, meter.passes(self.calibration), seconds)
        return self.stages[key]

    def start(self, method: Method) -> Stage:
        """Canonical, blocked, perhaps reordered."""
        whole = max(max(w.type.static_shape()) for w in self.blocked().quantized())
        block = -(-whole // 128) * 128
        chosen = f"{{block = [{block}, {block}], group = {self.group()}}}"
        shape = chosen if method.per_tensor else ""
        order = f",{ORDER}" if method.ordered else ""
        key = ("start", method.per_tensor, method.ordered)
        return self.stage(key, self.input, f"canonicalize{shape}{order}")

    def blocked(self) -> Module:
        """Canonical, in the default blocks."""
        return self.stage(("start", False, False), self.input, "canonicalize").module

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
        key = ("widths", method.uniform, method.per_tensor, method.ordered, budget)
        if not method.uniform:
            return self.stage(key, start.module, f"assign-bits{{avg-bits = {budget!r}}}")
        module = start.module
        bits = evenly(block_costs(module, AssignBits(avg_bits=budget)))
        grids, offset = {}, 0
        for weight in module.quantized():
            shape = weight.grid_shape()
            count = math.prod(shape)
            grids[weight.symbol] = bits[offset : offset + count].reshape(shape).astype(np.uint8)
            offset += count
        given = module.with_bits(grids)
        return Stage(replace(given, facts=given.facts | {"bits"}), 0.0, 0.0)

    def row(self, name: str, budget: str) -> dict[str, Any]:
        """One measured row of the table."""
        method, bits = METHODS[name], self.budget(budget)
        start, widths = self.start(method), self.widths(method, bits)
        key = ("rounded", method.rounding, method.uniform, method.per_tensor, method.ordered, bits)
        rounded = self.stage(key, widths.module, method.rounding)
        stages = [start, widths, rounded]
        if method.tuned:
            stages.append(self.stage((*key, "tuned"), rounded.module, "tune-scales"))
        measured = self.quality(stages[-1].module)
        return {
            "model": self.path.name,
            "seed": self.seed,
            "budget": budget,
            "method": name,
            "bits": summarize(stages[-1].module)["effective_bits"],
            **measured,
            "excess": math.log(measured["perplexity"]) - self.loss,
            "search_passes": start.passes + widths.passes,
            "tuning_passes": stages[-1].passes if method.tuned else 0.0,
            "seconds": sum(stage.seconds for stage in stages),
        }

    def quality(self, module: Module) -> dict[str, Any]:
        """Perplexity, divergence from the original and agreement with it on the test windows."""
        evaluator, meter = driver.evaluator(module), QualityMeter()
        with torch.no_grad():
            for ids, original in zip(self.text.split(BATCH_WINDOWS), self.original, strict=True):
                meter.update(evaluator.run(ids), ids, original)
        found = meter.result()
        return {k: found[k] for k in ("perplexity", "kl_divergence", "top1_agreement")}


def evenly(costs: Costs) -> np.ndarray:
    """The widest uniform width that fits, and one bit more for every n-th block as room is left."""
    blocks = len(costs.fixed)
    width = max(w for w in range(1, 9) if costs.total(np.full(blocks, w)) <= costs.budget)
    bits = np.full(blocks, width, dtype=np.int64)
    if width == 8:
        return bits
    left = costs.budget - costs.total(bits)
    share = left / costs.per_bit.sum()
    ticks = np.floor(np.arange(1, blocks + 1) * share) - np.floor(np.arange(blocks) * share)
    for block in np.flatnonzero(ticks):
        if costs.per_bit[block] <= left:
            bits[block] += 1
            left -= costs.per_bit[block]
    return bits


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows that are not in --out yet, model after model."""
    keys = ("model", "seed", "budget", "method")
    done = {tuple(row[k] for k in keys) for row in read_rows(options.out)}
    for path in options.models:
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


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that earlier runs have measured."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """One table per model: means over seeds, and the spread of perplexity where there are some."""
    rows = list(rows)
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [f"### {model}", "", HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        of_model = [row for row in rows if row["model"] == model]
        for budget in dict.fromkeys(row["budget"] for row in of_model):
            here = [row for row in of_model if row["budget"] == budget]
            anchor = {row["seed"]: row["excess"] for row in here if row["method"] == "gptq"}
            lines += [
                _line([r for r in here if r["method"] == name], anchor)
                for name in METHODS
                if any(r["method"] == name for r in here)
            ]
        lines.append("")
    return "\n".join(lines)


HEAD = (
    "| budget | effective bits | method | seeds | perplexity | KL | top-1 | excess nats"
    " | excess / GPTQ | search passes | tuning passes | seconds |"
)


def _line(rows: list[dict[str, Any]], anchor: dict[int, float]) -> str:
    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    spread = statistics.stdev([r["perplexity"] for r in rows]) if len(rows) > 1 else None
    perplexity = f"{mean('perplexity'):.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    ratios = [row["excess"] / anchor[row["seed"]] for row in rows if row["seed"] in anchor]
    cells = (
        rows[0]["budget"],
        f"{mean('bits'):.3f}",
        METHODS[rows[0]["method"]].label,
        str(len(rows)),
        perplexity,
        f"{mean('kl_divergence'):.3f}",
        f"{100 * mean('top1_agreement'):.1f} %",
        f"{mean('excess'):.3f}",
        f"{statistics.fmean(ratios):.2f}" if ratios else "-",
        f"{mean('search_passes'):.0f}",
        f"{mean('tuning_passes'):.0f}",
        f"{mean('seconds'):.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=_list(Path), default=[Path("models/wikitext2-llama-1m")])
    parser.add_argument("--budgets", type=_list(str), default=["u2", "2.3", "2.5", "u3", "u4"])
    parser.add_argument("--seeds", type=_list(int), default=[0])
    parser.add_argument("--methods", type=_list(str), default=list(METHODS))
    parser.add_argument("--calib", type=Path, help="calibration text (default: the bundled one)")
    parser.add_argument("--calib-windows", type=int, default=128)
    parser.add_argument("--accept-windows", type=int, default=64)
    parser.add_argument("--text", type=Path, default=Path("data/wikitext2/test.txt"))
    parser.add_argument("--windows", type=int, default=96, help="test windows")
    parser.add_argument("--threads", type=int, default=2)
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
    if options.markdown:
        print(markdown(read_rows(options.out)))
        return
    for row in measure(options):
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
