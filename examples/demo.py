"""`make demo`: compile the bundled model, generate text, compare it with a uniform bit-width.

Every step is a `scalebitsc` command, printed before it runs, so that each can be repeated by hand.
The demo takes little text, so that it is quick; `--full` (`make results`) takes the default amount
and prints the table of the README. The uniform rows are round-to-nearest in the same format
(blocks, groups with searched ranges, byte layout), written as artifacts and run by the same
runtime, so their bytes and quality are real too.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scalebits_compiler.cli.main import main as scalebitsc
from scalebits_compiler.cli.progress import progress_for
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.tools.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "uniform_bits.py"
PROMPT = "The album was released"
SAMPLING = ("--temperature", 0.7, "--top-k", 20, "--seed", 1)
FIRST = 3.0
QUICK = ("--calib-windows", 16, "--accept-windows", 16, "--tuning-epochs", 1)
"""Options of the demo's compile: less text and tuning than the default."""


@dataclass(frozen=True)
class Extent:
    """What is compared. budgets: besides FIRST. windows: number of held-out windows."""

    compile_options: tuple[object, ...]
    budgets: tuple[float, ...]
    uniform: tuple[int, ...]
    windows: int


DEMO = Extent(QUICK, budgets=(), uniform=(3,), windows=24)
FULL = Extent((), budgets=(3.1, 2.3), uniform=(4, 3, 2), windows=96)


@dataclass(frozen=True)
class Row:
    """One line of the table. bits: (code bits, effective bits); loss: nats per token."""

    name: str
    bits: tuple[float, float]
    matrix_bytes: int
    file_bytes: int
    loss: float


def run(*words: object) -> None:
    """Print a `scalebitsc` command and run it; SystemExit if it fails."""
    shown = [os.path.relpath(w) if isinstance(w, Path) else str(w) for w in words]
    print(f"\n$ scalebitsc {shlex.join(shown)}", flush=True)
    code = scalebitsc([str(word) for word in words])
    sys.stdout.flush()
    if code:
        raise SystemExit(code)


def compile_all(options: argparse.Namespace, extent: Extent) -> Iterator[tuple[str, Path]]:
    """Compile everything that the table compares; gives (row name, artifact)."""
    out, model = options.out, options.model
    text = ["--calib", options.calib, "--accept", options.accept, *extent.compile_options]
    artifact = out / f"ours-{FIRST:g}"
    flags = ["--target", "cpu", "--force"]
    dump = ["--dump-ir", out / "ir"]
    run("compile", model, *flags, "--avg-bits", FIRST, *text, *dump, "-o", artifact)
    run("run", artifact, "--prompt", PROMPT, "-n", 60, *SAMPLING)
    yield f"ours, --avg-bits {FIRST:g}", artifact
    # The search alone is run again: sensitivities and channel orders do not depend on the budget.
    ready = ["--from", out / "ir" / "04-fold-permutes.sbir"]
    for budget in extent.budgets:
        artifact = out / f"ours-{budget:g}"
        run("compile", model, *flags, "--avg-bits", budget, *ready, "-o", artifact)
        yield f"ours, --avg-bits {budget:g}", artifact
    for bits in extent.uniform:
        packed, artifact = out / "ir" / f"uniform-{bits}.sbir", out / f"uniform-{bits}"
        passes = f'uniform-bits{{bits = {bits}}},round-weights{{method = "rtn"}},pack-blocks'
        start = out / "ir" / "01-canonicalize.sbir"
        run("opt", start, "--plugin", PLUGIN, "-p", passes, "-o", packed)
        # A bit more than the codes: scales count as well.
        room = ["--avg-bits", bits + 1]
        run("compile", model, *flags, *room, "--from", packed, "-q", "-o", artifact)
        yield f"uniform {bits} bits, nearest", artifact


def loss_of(path: Path, text: Path, windows: int) -> float:
    """Mean cross entropy on the held-out text, in nats per token."""
    quality = evaluate(path, text, windows=windows, progress=progress_for())
    return log(quality["perplexity"])


def original_row(model: Path, weights: int, loss: float) -> Row:
    """The row of the original model: bfloat16 matrices."""
    files = [path for path in model.iterdir() if path.suffix != ".md"]
    total = sum(path.stat().st_size for path in files)
    return Row("full precision (bf16)", (16, 16), 2 * weights, total, loss)


def artifact_row(name: str, path: Path, loss: float) -> Row:
    """The row of an artifact."""
    manifest = Artifact.open(path).manifest
    summary = manifest.summary
    bits = (summary["code_bits"], summary["effective_bits"])
    size = summary["matrix_bytes"]
    return Row(name, bits, size, manifest.file_bytes, loss)


def table_of(rows: list[Row]) -> Table:
    """The rows, widest first; the first one given is full precision."""
    best = rows[0].loss
    table = Table(title="Quality and size")
    table.add_column("model", no_wrap=True)
    for column in ("code bits", "effective bits", "matrix bytes", "file bytes"):
        table.add_column(column, justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("excess loss (nats)", justify="right")
    for row in sorted(rows, key=lambda row: -row.bits[1]):
        sizes = (f"{row.matrix_bytes:,}", f"{row.file_bytes:,}")
        bits = (f"{row.bits[0]:.3f}", f"{row.bits[1]:.3f}")
        style = "bold" if row.name.startswith("ours") else None
        quality = (f"{exp(row.loss):.3f}", f"{row.loss - best:.3f}")
        table.add_row(row.name, *bits, *sizes, *quality, style=style)
    return table


def closing(options: argparse.Namespace) -> str:
    """What a reader may do next."""
    artifact = os.path.relpath(options.out / f"ours-{FIRST:g}")
    model, ir = os.path.relpath(options.model), os.path.relpath(options.out / "ir")
    return f"""
uniform: round to nearest, the range of every group searched; same blocks, groups and byte layout
effective bits: codes, scales, bit table and padding, per quantized weight
file bytes: every file, so embedding, head, tokenizer, IR and kernels as well; on a model as
small as this one they are the larger part

Artifacts: {os.path.relpath(options.out)}/. The module after every pass: {ir}/. Go on with

  . .venv/bin/activate
  scalebitsc run {artifact} --prompt "{PROMPT}" -n 100 --temperature 0.7 --seed 2
  scalebitsc eval {artifact} --text {os.path.relpath(options.text)} --vs {model}
  scalebitsc inspect {artifact}
  less {ir}/05-assign-bits.sbir"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "models" / "wikitext2-llama-1m")
    add("--text", type=Path, default=ROOT / "data" / "wikitext2" / "test.txt", help="held-out text")
    add("--out", type=Path, default=ROOT / "out" / "demo")
    add("--calib", type=Path, default=ROOT / "data" / "wikitext2" / "calibration.txt")
    add("--accept", type=Path, default=ROOT / "data" / "wikitext2" / "acceptance.txt")
    add("--full", action="store_true", help="the table of the README; takes some minutes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    options = arguments(argv)
    extent = FULL if options.full else DEMO
    start = time.perf_counter()
    artifacts = list(compile_all(options, extent))
    windows = extent.windows
    print(f"\nScoring {os.path.relpath(options.text)}, {windows} windows each", flush=True)
    weights = Artifact.open(artifacts[0][1]).manifest.summary["weights"]
    rows = [original_row(options.model, weights, loss_of(options.model, options.text, windows))]
    for name, path in artifacts:
        rows.append(artifact_row(name, path, loss_of(path, options.text, windows)))
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(rows))
    print(closing(options))
    print(f"\n{time.perf_counter() - start:.0f} seconds", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; finished artifacts are kept")
