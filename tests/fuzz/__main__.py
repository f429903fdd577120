"""Command line of the fuzzer; see the package."""

from __future__ import annotations

import os

# Before numpy and torch are imported: a process that forks must not have threads, and one case
# must not disturb another that runs beside it.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus.jsonl"
# Findings of these kinds may come from an earlier case of the same process.
_RECHECKED = ("signal", "hang", "unstable output", "memory")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--cases", type=int, default=2000, metavar="N", help="how many (default 2000)")
    add("--seconds", type=float, metavar="S", help="start no case after this time")
    add("--case", type=int, metavar="I", help="this one only, with everything it says")
    add("--first", type=int, metavar="I", help="with --case: all cases from this one on")
    add("--workers", type=int, default=1, metavar="N")
    add("--full", action="store_true", help="more kinds of models")
    add("--corpus", type=Path, default=CORPUS, metavar="FILE", help="cases that come first")
    add("--work", type=Path, metavar="DIR", help="keep the compiled models here")
    add("--log", type=Path, metavar="FILE", help="write findings and counts as JSON lines")
    add("--report", type=Path, metavar="LOG", help="print the tables of a log, and run nothing")
    return parser.parse_args()


def main() -> int:
    """0 if there was no finding."""
    args = _arguments()
    if args.report is not None:
        from tests.fuzz.report import markdown

        print(markdown(args.report), end="")
        return 0
    # A program that reads a file twice must not find /tmp full: cases are small.
    work = args.work or Path(tempfile.mkdtemp(prefix="scalebits-fuzz-"))
    work.mkdir(parents=True, exist_ok=True)
    work = work.resolve()
    os.environ.setdefault("SCALEBITS_CACHE", str(work / "cache"))
    try:
        return _fuzz(args, work)
    finally:
        shutil.rmtree(work / "scratch", ignore_errors=True)
        if args.work is None:
            shutil.rmtree(work)


def _fuzz(args: argparse.Namespace, work: Path) -> int:
    import torch

    torch.set_num_threads(1)
    from tests.fuzz import bases, cases, mutations, report
    from tests.fuzz.edits import Case
    from tests.fuzz.runner import Runner

    _in_a_child(lambda: bases.build(work, args.full))
    known = bases.bases(work, args.full)
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    cases.warm_up(known, scratch, work, args.full)
    os.chdir(work)
    lines = [] if args.case is not None else args.corpus.read_text().splitlines()
    corpus = [Case.from_json(line) for line in lines if line and not line.startswith("#")]
    corpus = [case for case in corpus if case.base in known]

    def make(index: int) -> Case:
        """Numbers below 0 are the corpus."""
        return (
            corpus[index] if index < 0 else mutations.generate(args.seed, index, known, args.full)
        )

    runner, tally = Runner(make, known, work, args.full), report.Tally()
    if args.case is not None:
        first = args.case if args.first is None else args.first
        indexes: Iterator[int] = iter(range(first, args.case + 1))
        total = args.case + 1 - first
    else:
        total = len(corpus) + args.cases
        indexes = itertools.chain(range(-len(corpus), 0), range(args.cases))
    start = time.monotonic()
    if args.seconds is not None:
        indexes = itertools.takewhile(lambda _: time.monotonic() - start < args.seconds, indexes)
    log = args.log.open("w") if args.log else None
    shown: set[str] = set()
    due = start + 5
    for result in runner.run(indexes, args.workers):
        if args.case is not None:
            print(json.dumps(json.loads(result.case.to_json()), indent=1))
            print(f"{result.outcome.result}  {result.outcome.signature}\n{result.outcome.detail}")
        elif result.outcome.result in _RECHECKED:
            again = runner.alone(result.index).outcome
            same = again.result == result.outcome.result
            result = report.Result(
                result.index, result.case, result.outcome, result.seconds, same, result.first
            )
        tally.add(result)
        if result.index < 0 and result.outcome.result == "edit did not fit":
            print(f"an edit of the corpus does not fit: {result.case.to_json()}", file=sys.stderr)
            return 1
        if result.outcome.is_finding:
            if log is not None:
                log.write(json.dumps(report.finding_json(args.seed, result)) + "\n")
                log.flush()
            _show(args, result, shown)
        if time.monotonic() > due:
            due = time.monotonic() + 20
            done = (due - 20 - start) / tally.cases
            left = (total - tally.cases) * done / 60
            print(
                f"{tally.cases:,} of {total:,} cases, {len(tally.findings)} findings,"
                f" about {left:.0f} minutes left",
                file=sys.stderr,
            )
    if log is not None:
        body = tally.to_json(report.about(args.seed, args.workers))
        log.write(json.dumps({**body, "wall": round(time.monotonic() - start, 1)}) + "\n")
        log.close()
    ended = ", ".join(f"{name} {count:,}" for name, count in report.ended(tally).items())
    print(f"{tally.cases:,} cases: {ended}")
    return 1 if tally.findings else 0


def _show(args: argparse.Namespace, result: report.Result, shown: set[str]) -> None:  # noqa: F821
    """A finding: in full the first of its signature, else one line."""
    outcome = result.outcome
    full = " --full" if args.full else ""
    command = f"python -m tests.fuzz{full} --seed {args.seed} --case {result.index}"
    if not result.alone:
        command += f" --first {result.first}"
    print(f"\nFINDING {outcome.result}: {outcome.signature}\n  {command}")
    if outcome.signature not in shown:
        shown.add(outcome.signature)
        print(f"  {result.case.to_json()[:2000]}\n{outcome.detail}")
    sys.stdout.flush()


def _in_a_child(work: object) -> None:
    """Compiling starts threads, and this process has to fork later."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()  # type: ignore[operator]
            code = 0
        finally:
            import traceback

            if code:
                traceback.print_exc()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the models to edit could not be compiled")


if __name__ == "__main__":
    sys.exit(main())
