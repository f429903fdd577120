"""The log of a run, and the table that is made of it."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.cases import ACCEPTED, FINDINGS, REFUSED, UNAPPLIED
from tests.fuzz.edits import Case
from tests.fuzz.runner import Result


class Tally:
    """Counts results by edited file, kind of edit and entry; keeps the findings."""

    def __init__(self) -> None:
        self.by_file: Counter[tuple[str, str]] = Counter()
        self.by_kind: Counter[tuple[str, str]] = Counter()
        self.by_entry: Counter[tuple[str, str]] = Counter()
        self.times: Counter[str] = Counter()
        self.findings: list[Result] = []
        self.cases = 0
        self.seconds = 0.0

    def add(self, result: Result) -> None:
        """A case with several edits counts under its first."""
        edit, ended = result.case.edits[0], result.outcome.result
        self.cases += 1
        self.seconds += result.seconds
        self.times[result.case.entry] += result.seconds
        self.by_file[file_class(result.case, edit["file"]), ended] += 1
        self.by_kind[edit["kind"], ended] += 1
        self.by_entry[result.case.entry, ended] += 1
        if result.outcome.is_finding:
            self.findings.append(result)

    def to_json(self, about: dict[str, Any]) -> dict[str, Any]:
        tables = {
            name: [[*key, count] for key, count in sorted(table.items())]
            for name, table in (
                ("files", self.by_file), ("kinds", self.by_kind), ("entries", self.by_entry)
            )
        }  # fmt: skip
        times = {name: round(seconds, 2) for name, seconds in self.times.items()}
        return {
            **about,
            "times": times,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "tables": tables,
        }


def file_class(case: Case, file: str) -> str:
    """How the table names a file."""
    if case.base in ("dump", "frontier"):
        what = "dump" if case.base == "dump" else "frontier"
        return f"{what}: *.{file.rpartition('.')[2]}"
    if case.base == "search":
        return "search state"
    return "kernels/*.cubin" if file.endswith(".cubin") else file


def finding_json(seed: int, result: Result) -> dict[str, Any]:
    return {
        "seed": seed,
        "index": result.index,
        "result": result.outcome.result,
        "signature": result.outcome.signature,
        "detail": result.outcome.detail,
        "alone": result.alone,
        "first": result.first,
        "case": json.loads(result.case.to_json()),
    }


def about(seed: int, workers: int) -> dict[str, Any]:
    """What a log says of the run."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "seed": seed, "workers": workers, "commit": commit, "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def markdown(log: Path) -> str:
    """The tables of a log, for benchmarks/results/fuzz.md."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    summary = next(line for line in lines if "tables" in line)
    findings = [line for line in lines if "signature" in line]
    text = [
        "# A run of the fuzzer",
        "",
        f"`python -m tests.fuzz --full --seed {summary['seed']} --cases {summary['cases']}"
        f" --workers {summary['workers']}` at commit {summary['commit']}: {summary['cases']:,}"
        f" cases in {summary['wall'] / 60:.0f} minutes on {summary['workers']} cores,"
        f" {len(findings)} findings.",
        f"Python {summary['python']}, torch {summary['torch']}, transformers"
        f" {summary['transformers']}. Accepted cases ran twice, with different bytes in fresh"
        " memory, and gave the same output.",
        "",
    ]
    for name, title in (("files", "file"), ("kinds", "edit"), ("entries", "entry point")):
        text += _table(title, summary["tables"][name])
    text += ["## Findings", ""] if findings else []
    for line in findings:
        text.append(f"* {line['result']}: `{line['signature']}` (case {line['index']})")
    return "\n".join(text).rstrip() + "\n"


def _table(title: str, rows: Sequence[tuple[str, str, int]]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for name, ended, count in rows:
        counts.setdefault(name, Counter())[ended] += count
    total: Counter[str] = sum(counts.values(), Counter())
    columns = [ACCEPTED, REFUSED, UNAPPLIED, *(name for name in FINDINGS if total[name])]
    head = [title, "cases", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in [*counts.items(), ("all", total)]:
        cells = [f"{row.total():,}", *(f"{row[column]:,}" for column in columns)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return [*lines, ""]


def ended(tally: Tally) -> dict[str, int]:
    """How many cases ended in each way."""
    counts: Counter[str] = Counter()
    for (_, result), count in tally.by_entry.items():
        counts[result] += count
    return dict(counts)
