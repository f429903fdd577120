"""Entry points: the commands and calls that read the edited files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import scalebits_compiler as sb
from scalebits_compiler.cli.main import main
from scalebits_compiler.errors import ScalebitsError
from scalebits_compiler.runtime.session import Session
from scalebits_compiler.sessions.open import open_session
from tests.fuzz.bases import SHORT, Base


@dataclass(frozen=True)
class Place:
    """Where a case runs. here: the edited folder; base: the pristine one; out: a path for results;
    subject: the file or matrix of the case; text: a text to score."""

    here: Path
    base: Base
    out: Path
    subject: str
    text: Path


@dataclass(frozen=True)
class Ran:
    """code: of the command, 0 for a call that returned; output: what it gave, paths left out."""

    code: int
    output: bytes
    errors: str


@dataclass(frozen=True)
class Entry:
    """An entry point for bases of the kind `what`; `weight` is how often it is taken.

    argv: of the command, with {here}, {base}, {out}, {file}, {subject}, {model}, {text}; or call.
    reads_all: whether it has to notice a file whose digest is wrong. output: "printed", or
    "written" where the command prints times. slow: takes more than half a second.
    """

    what: str
    weight: float
    argv: str = ""
    call: Callable[[Place], bytes] | None = None
    reads_all: bool = False
    output: str = "printed"
    slow: bool = False

    @property
    def executes(self) -> bool:
        """Whether it computes what the model computes."""
        return self.call is not None or self.argv.startswith(("run", "eval"))

    def run(self, place: Place) -> Ran:
        """An exception of the package is a refusal; any other goes up."""
        if self.call is None:
            return self._command(place)
        try:
            return Ran(0, self.call(place), "")
        except ScalebitsError as error:
            return Ran(1, b"", f"error: {error}")

    def _command(self, place: Place) -> Ran:
        names = {
            "here": place.here, "base": place.base.folder, "out": place.out,
            "file": place.here / place.subject, "subject": place.subject,
            "model": place.base.model, "text": place.text,
        }  # fmt: skip
        argv = [word.format(**names) for word in self.argv.split()]
        if "compile" in argv:
            argv += ["--calib", str(place.text), *SHORT]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(argv)
            except SystemExit as stop:  # argparse
                code = stop.code if isinstance(stop.code, int) else 99
        printed = f"{code}\n{out.getvalue()}\n{err.getvalue()}".encode("utf-8", "surrogatepass")
        return Ran(code, printed if self.output == "printed" else b"", err.getvalue())


def contents(folder: Path) -> bytes:
    """A digest of everything that a command has written."""
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder] if folder.is_file() else []
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(str(path.relative_to(folder.parent)).encode() + path.read_bytes())
    return digest.hexdigest().encode()


def _exercise(session: Session) -> bytes:
    """Everything that a session can do, on a few tokens: with padding, and enough for both of the
    matrix kernels."""
    results: list[bytes] = []

    def keep(array: Any) -> None:
        array = np.asarray(array)
        results.append(f"{array.dtype}{array.shape}".encode() + array.tobytes())

    ids = np.arange(3, 25).reshape(2, 11) % max(1, session.vocabulary)
    keep(session.forward(ids))
    keep(session.forward(ids[:1, :3]))
    if session.skips_padding:
        keep(session.forward(ids, [0, 2]))
    if session.generates:
        logits, cache = session.prefill(ids, [3, 0] if session.skips_padding else None)
        keep(logits)
        for _ in range(2):
            keep(session.decode(np.array([1, 2]) % session.vocabulary, cache))
        for generation in session.generate("ab", 3):
            results.append(repr((generation.tokens, generation.text)).encode())
    else:
        with contextlib.suppress(ScalebitsError):  # of an encoder without its states
            keep(session.embed(["ab", "abc"]))
    results.append(repr((session.limit, session.task, sorted(session.stop_tokens))).encode())
    return b"".join(results)


def _load(place: Place) -> bytes:
    return _exercise(sb.load(place.here))


def _load_int8(place: Place) -> bytes:
    return _exercise(sb.load(place.here, activations="int8"))


def _open(place: Place) -> bytes:
    return _exercise(open_session(place.here))


def _open_reference(place: Place) -> bytes:
    return _exercise(open_session(place.here, "reference"))


_EVAL = "eval {here} --text {text} --windows 1 --seq-len 8 -q"

# In the order of the dumps; options that make them short.
PASSES = (
    ("canonicalize", ""), ("annotate-sensitivity", ""), ("reorder-channels", ""),
    ("fold-permutes", ""), ("assign-bits", "{{rounds=1}}"), ("round-weights", ""),
    ("tune-scales", "{{epochs=1}}"), ("pack-blocks", ""), ("gather-inputs", ""),
)  # fmt: skip

ENTRIES: dict[str, Entry] = {
    "load": Entry("artifact", 24, call=_load, reads_all=True),
    "load int8": Entry("artifact", 4, call=_load_int8, reads_all=True),
    "open": Entry("artifact", 8, call=_open, reads_all=True),
    "open reference": Entry("artifact", 6, call=_open_reference, reads_all=True),
    "run": Entry("artifact", 6, "run {here} --prompt ab -n 3", reads_all=True),
    "run batch": Entry(
        "artifact", 2, "run {here} --prompt ab --prompt abcd -n 2 --json", reads_all=True
    ),
    "run reference": Entry(
        "artifact", 4, "run {here} --prompt ab -n 2 --target reference", reads_all=True
    ),
    "eval": Entry("artifact", 4, _EVAL, reads_all=True),
    "eval reference": Entry("artifact", 3, _EVAL + " --target reference", reads_all=True),
    "inspect": Entry("artifact", 5, "inspect {here}", reads_all=True),
    "inspect json": Entry("artifact", 2, "inspect {here} --json", reads_all=True),
    "verify": Entry("artifact", 8, "verify {here} -q", reads_all=True),
    "explain": Entry("artifact", 5, "explain {here} {subject}", reads_all=True),
    "diff": Entry("artifact", 2, "diff {here} {base}"),
    "diff json": Entry("artifact", 1, "diff {base} {here} --json"),
    "retarget": Entry(
        "artifact", 4, "retarget {here} --target reference -o {out}",
        reads_all=True, output="written",
    ),
    "retarget cpu": Entry(
        "artifact", 0.4, "retarget {here} --target cpu -o {out}",
        reads_all=True, output="written", slow=True,
    ),
    "opt module": Entry("artifact", 3, "opt {here}/module.sbir"),
    "opt": Entry("dump", 10, "opt {file}"),
    **{f"opt -p {name}": Entry("dump", 0.6, f"opt {{file}} -p {name}{o}") for name, o in PASSES},
    "opt -o": Entry("dump", 2, "opt {file} -o {out}.sbir", output="written"),
    "opt split": Entry("dump", 1, "opt {file} --split-input-file --verify-diagnostics"),
    "diff texts": Entry("dump", 2, "diff {file} {base}/{subject}"),
    "compile from": Entry(
        "dump", 0.6, "compile {model} -o {out} --from {file}", output="written", slow=True
    ),
    "compile point": Entry(
        "frontier", 2, "compile {model} -o {out} --from {file}", output="written", slow=True
    ),
    "opt point": Entry("frontier", 3, "opt {file}"),
    "inspect frontier": Entry("frontier", 3, "inspect {here}"),
    "diff frontier": Entry("frontier", 3, "diff {file} {base}/{subject} --json"),
    "run frontier": Entry("frontier", 3, "run {here} --prompt ab -n 2"),
    "resume": Entry(
        "search", 1, "compile {model} -o {here}/out --resume", output="written", slow=True
    ),
}  # fmt: skip


def choose(rng: random.Random, names: Sequence[str]) -> str:
    """An entry by its weight."""
    return rng.choices(names, [ENTRIES[name].weight for name in names])[0]
