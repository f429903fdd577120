"""Runs `// RUN:` lines of *.sbir files in this process: lit's syntax, without lit.

A line is `[not] scalebitsc ARGS [2>&1] [| filecheck %s]`; %s is the file, %t a temporary path,
%S the folder of the file. `not` expects a failing exit code.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser

_RUN = re.compile(r"^// RUN: (.*)$", re.MULTILINE)


class RunFailed(Exception):
    """A RUN line did not do what it should."""


class SbirFile(pytest.File):
    """One file, one test."""

    def collect(self) -> Iterator[pytest.Item]:
        """The one test of the file."""
        yield SbirItem.from_parent(self, name=self.path.stem)


class SbirItem(pytest.Item):
    """All RUN lines of a file, in order."""

    def runtest(self) -> None:
        """Run them."""
        lines = _RUN.findall(self.path.read_text())
        if not lines:
            raise RunFailed(f"{self.path} has no RUN line")
        with tempfile.TemporaryDirectory() as folder:
            for line in lines:
                run_line(line, self.path, Path(folder) / "t")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        """The message alone; where this runner stands does not matter."""
        if isinstance(excinfo.value, RunFailed):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))


def run_line(line: str, path: Path, temporary: Path) -> None:
    """Run one line and check its exit code and, if it is piped into filecheck, its output."""
    command, piped, checker = line.partition("| filecheck ")
    for mark, value in (("%s", path), ("%S", path.parent), ("%t", temporary)):
        command = command.replace(mark, shlex.quote(str(value)))
    words = shlex.split(command)
    fails = words[0] == "not"
    words = words[1:] if fails else words
    merged = words[-1] == "2>&1"
    argv = words[1:-1] if merged else words[1:]
    if words[0] != "scalebitsc":
        raise RunFailed(f"{path}: only scalebitsc can be run: {line}")
    code, out, err = call_main(argv)
    if (code != 0) != fails:
        raise RunFailed(f"{path}: exit code {code} of {line}\n{out}\n{err}")
    if piped:
        check(path, checker, out + err if merged else out)


def call_main(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `scalebitsc ARGV`, run in this process."""
    from scalebits_compiler.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
    return code or 0, out.getvalue(), err.getvalue()


def check(path: Path, arguments: str, text: str) -> None:
    """Match the text against the CHECK lines of the file."""
    prefix = re.search(r"--check-prefix[ =](\S+)", arguments)
    options = Options(str(path), check_prefixes=[prefix.group(1) if prefix else "CHECK"])
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = Matcher(options, FInput("output", text), Parser.from_opts(options)).run()
    if code != 0:
        raise RunFailed(f"{told.getvalue()}\n--- the output was:\n{text}")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SbirFile | None:
    """Every *.sbir with a RUN line below this folder is a test; others are inputs of tests."""
    if file_path.suffix == ".sbir" and _RUN.search(file_path.read_text()):
        return SbirFile.from_parent(parent, path=file_path)
    return None
