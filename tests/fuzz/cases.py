"""Runs one case in this process and says how it ended."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import resource
import shutil
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.bases import Base, text_file
from tests.fuzz.edits import Case, apply, is_damaged
from tests.fuzz.entries import ENTRIES, Place, Ran, contents

# The model has a hundred thousand weights; a case that needs this much more is out of proportion.
MEMORY = 768 << 20
RESIDENT = 384 << 20
ACCEPTED, REFUSED, UNAPPLIED = "accepted", "refused", "edit did not fit"
WELL = (ACCEPTED, REFUSED, UNAPPLIED)
# Findings; `signal` and `hang` are seen by the runner.
SIGNAL, HANG, TRACEBACK, MEMORY_BLOWUP = "signal", "hang", "traceback", "memory"
UNSTABLE, DAMAGED, FILES = "unstable output", "wrong digest accepted", "files written"
FOREIGN, EXIT = "foreign code loaded", "exit code"
FINDINGS = (
    SIGNAL, HANG, TRACEBACK, MEMORY_BLOWUP, UNSTABLE, DAMAGED, FILES, FOREIGN, EXIT,
)  # fmt: skip

_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate|cannot allocate|unable to allocate|bad_alloc"
    r"|memory limit",
    re.IGNORECASE,
)
_PACKAGE = f"{os.sep}scalebits_compiler{os.sep}"
_M_PERTURB = -6  # of mallopt: fresh memory is filled with a byte
_FILLS = (0x55, 0xAA)
_NUMBERS = itertools.count()
_REPRODUCER = "scalebits-reproducer"


@dataclass(frozen=True)
class Outcome:
    """result: ACCEPTED, REFUSED, UNAPPLIED or a finding. signature: equal for findings with one
    cause, as far as can be told. detail: for people."""

    result: str
    signature: str = ""
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.result not in WELL


def limit_memory() -> None:
    """Let this process have `MEMORY` bytes more than it has."""
    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmData:\s+(\d+)", status)[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def warm_up(known: dict[str, Base], scratch: Path, work: Path, full: bool) -> None:
    """Run every entry once on files that are in order, so that no case pays for imports.

    Raises RuntimeError if one does not end well, or leaves a thread behind: this process forks.
    """
    for name, base in known.items():
        for entry, what in ENTRIES.items():
            if what.what != base.what or (what.slow and (not full or base.what == "artifact")):
                continue
            texts = [file for file in base.files if file.endswith(".sbir")]
            subject = "q_proj" if base.what == "artifact" else texts[-1] if texts else ""
            case = Case(name, entry, subject, False, ())
            outcome = run_case(case, base, scratch, work, full=False)
            if outcome.is_finding and outcome.result != MEMORY_BLOWUP:  # that is the imports
                raise RuntimeError(f"{name}, {entry}: {outcome}")
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("the fuzzer has threads")


def _fill_fresh_memory(byte: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc
    if mallopt is not None:
        mallopt(_M_PERTURB, byte)


def run_case(case: Case, base: Base, scratch: Path, work: Path, full: bool) -> Outcome:
    """Apply the edits and run the entry; if the files are accepted twice, to compare the outputs.

    Without `full` only where kernels or ops run.
    """
    warnings.simplefilter("ignore")
    entry = ENTRIES[case.entry]
    twice = full or entry.executes
    # A library is known to the process by its path; another one needs a path of its own.
    here, out = scratch / f"case{next(_NUMBERS)}", scratch / "out"
    place = Place(here, base, out, case.subject, text_file(work))
    results: list[tuple[int, bytes]] = []
    for fill in _FILLS:
        _clean(scratch)
        skipped = apply(case, base.folder, here)
        if case.edits and len(skipped) == len(case.edits):
            return Outcome(UNAPPLIED)
        before = _listing(here)
        _fill_fresh_memory(fill)
        resident = _peak()
        try:
            ran = entry.run(place)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return _raised(error)
        finally:
            _fill_fresh_memory(0)
        outcome = _judge(case, base, place, ran, before)
        if _peak() - resident > RESIDENT:
            return Outcome(MEMORY_BLOWUP, case.entry, f"{(_peak() - resident) >> 20} MiB more")
        # Tokenizers hash their vocabulary with a random seed: what an edited one gives may vary.
        varies = any(edit["file"] == "tokenizer.json" for edit in case.edits)
        if outcome.result != ACCEPTED or not twice or varies:
            return outcome
        written = (
            contents(here if base.what == "search" else out) if entry.output != "printed" else b""
        )
        results.append((ran.code, ran.output + written))
    if results[0] != results[1]:
        return Outcome(UNSTABLE, case.entry, _difference(*(output for _, output in results)))
    return Outcome(ACCEPTED)


def _judge(case: Case, base: Base, place: Place, ran: Ran, before: set[str]) -> Outcome:
    """What a command that came to its end did."""
    here, scratch = place.here, place.here.parent
    if _NO_MEMORY.search(ran.errors):
        return Outcome(MEMORY_BLOWUP, case.entry, ran.errors[-2000:])
    if "Traceback (most recent call last)" in ran.errors:
        return Outcome(TRACEBACK, "printed", ran.errors[-4000:])
    left = {path.name for path in (scratch / "cwd").iterdir()} - {_REPRODUCER}
    left |= {path.name for path in scratch.iterdir() if not path.name.startswith("out")}
    left -= {here.name, "cwd"}
    if base.what != "search":
        left |= _listing(here) - before
    if left:
        return Outcome(FILES, case.entry, ", ".join(sorted(left)))
    if _foreign(here, base):
        return Outcome(FOREIGN, case.entry, "a library that this machine did not build")
    if ran.code == 0:
        stale = ENTRIES[case.entry].reads_all and not case.fresh
        if stale and is_damaged(here, base.folder):
            return Outcome(DAMAGED, case.entry)
        return Outcome(ACCEPTED)
    if ran.code not in (1, 2) or not re.search(r"^(error|usage): ", ran.errors, re.MULTILINE):
        return Outcome(EXIT, f"{case.entry} {ran.code}", ran.errors[-2000:])
    return Outcome(REFUSED, detail=ran.errors[:300])


def _raised(error: BaseException) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _PACKAGE in frame.filename]
    at = ""
    if own:
        file = own[-1].filename.rpartition(_PACKAGE)[2]
        at = f" at {file} {own[-1].name}: {own[-1].line}"
    text = "".join(traceback.format_exception(error, limit=-12))[-6000:]
    result = MEMORY_BLOWUP if isinstance(error, MemoryError) else TRACEBACK
    return Outcome(result, f"{type(error).__name__}{at}", text)


def _foreign(here: Path, base: Base) -> bool:
    """Whether a library of the edited folder that is not the pristine one is mapped."""
    libraries = [name for name in base.files if name.endswith(".so")]
    if all(_same(here / name, base.folder / name) for name in libraries):
        return False
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return any(f"{here}{os.sep}" in line and line.endswith(".so") for line in mapped)


def _same(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)


def _peak() -> int:
    """Bytes that were resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _clean(scratch: Path) -> None:
    """An empty scratch folder, and an empty working directory in it."""
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (scratch / "cwd").mkdir()
    os.chdir(scratch / "cwd")


def _listing(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, folders, names in os.walk(folder)
        for name in (*folders, *names)
    }


def _difference(one: bytes, two: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    start = max(0, at - 40)
    return f"from byte {at}: {one[start : at + 80]!r} and {two[start : at + 80]!r}"
