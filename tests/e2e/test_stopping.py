"""What a compile says and leaves when a signal, the memory or the disk ends it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalebits_compiler.errors import PassError, memory_error

SMALL = ("--calib-windows", "2", "--accept-windows", "2", "--seq-len", "16", "--no-tuning")


@pytest.fixture
def at_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`at_stage(name, action)`: the compiles of this test take the action at a stage."""

    def at_stage(name: str, action: Callable[[], object]) -> None:
        def progress(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
            if label == name:
                action()
            return iter(items)

        monkeypatch.setattr("scalebits_compiler.cli.compile.progress_for", lambda quiet: progress)

    return at_stage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def child(code: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Runs `scalebitsc` with an action at a stage.
_AT_STAGE = """
import os, re, resource, signal, sys
import scalebits_compiler.cli.compile
from scalebits_compiler.cli.main import main

def progress(items, label, total=None):
    if label == sys.argv[1]:
        action()
    return iter(items)

scalebits_compiler.cli.compile.progress_for = lambda quiet: progress
"""


def test_a_signal_that_comes_when_all_is_done(
    cli: Any, compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written, it would say, of an artifact that is there."""
    out, start = tmp_path / "out", compiled.dump / "08-pack-blocks.sbir"
    monkeypatch.setattr(
        "scalebits_compiler.cli.compile.as_text", lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )
    ran = cli("compile", compiled.model, "-o", out, "--from", start, "--target=reference", "-q")
    assert (ran.code, ran.err) == (143, f"interrupted; {out} is complete\n")
    assert (out / "manifest.json").is_file()


def test_the_same_signal_again_ends_at_once(compiled: Any, tmp_path: Path) -> None:
    """As where what the first one raises is lost in native code."""
    code = """
def action():
    for _ in range(2):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass

sys.exit(main(sys.argv[2:]))
"""
    ran = child(_AT_STAGE + code, "load", "compile", compiled.model, "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (-signal.SIGTERM, "")


def test_two_compiles_of_one_output(
    cli: Any, compiled: Any, compile_small: Any, at_stage: Any, tmp_path: Path
) -> None:
    """The second is refused at once, with --force too; the state of the first stays."""
    out, second = tmp_path / "out", []

    def compile_too() -> None:
        code = "import sys; from scalebits_compiler.cli.main import main; sys.exit(main())"
        state = (tmp_path / "out.search", tmp_path / ".out.partial")
        before = [names(folder) for folder in state]
        second.append(child(code, "compile", compiled.model, "-o", out, "--force", "-q"))
        assert [names(folder) for folder in state] == before

    at_stage("kernels", compile_too)
    ran = compile_small(compiled.model, out, *SMALL, "--target=reference")
    assert ran.code == 0, ran.err
    (refused,) = second
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        f"error: process {os.getpid()} is writing the output {out}",
        "help: wait until it ends, or give another folder with -o",
    ]
    assert names(tmp_path) == ["out"]


def test_force_keeps_a_state_until_there_is_another(
    compiled: Any, compile_small: Any, at_stage: Any, tmp_path: Path
) -> None:
    """A compile with --force that fails before its search has one leaves that of the last."""

    def stop() -> None:
        raise KeyboardInterrupt

    out, search = tmp_path / "out", tmp_path / "out.search"
    options = (*SMALL, "--target=reference")
    at_stage("kernels", stop)
    assert compile_small(compiled.model, out, *options).code == 130
    (state,) = search.iterdir()
    before = state.read_bytes()
    at_stage("trace", stop)
    assert compile_small(compiled.model, out, *options, "--force", "--seed=1").code == 130
    assert state.read_bytes() == before
    stale = search / "search-another.json"
    stale.write_text("{}")
    at_stage("kernels", stop)
    assert compile_small(compiled.model, out, *options, "--force", "--seed=1").code == 130
    assert state.read_bytes() != before
    assert not stale.exists()


def _torch_allocation() -> None:
    torch.empty(1 << 55)


def _numpy_allocation() -> None:
    np.empty(1 << 55)


def _chained() -> None:
    try:
        np.empty(1 << 55)
    except MemoryError as error:
        raise PassError("the model cannot be loaded") from error


def _thread() -> None:
    raise RuntimeError("can't start new thread")


def _mapping() -> None:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (_torch_allocation, "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        (_numpy_allocation, "Unable to allocate 256. PiB for an array"),
        (_chained, "Unable to allocate 256. PiB for an array"),
        (_thread, "can't start new thread"),
        (_mapping, "[Errno 12] Cannot allocate memory"),
    ],
)
def test_out_of_memory(
    compiled: Any,
    compile_small: Any,
    at_stage: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], None],
    told: str,
) -> None:
    """One error that says what was asked for and what takes less, and no reproducer."""
    monkeypatch.chdir(tmp_path)
    at_stage("sensitivity at full precision", action)
    ran = compile_small(compiled.model, tmp_path / "out", *SMALL, "--target=reference")
    assert ran.code == 1
    error, help_ = ran.err.splitlines()
    assert error.startswith(f"error: out of memory: {told}")
    assert help_.startswith("help: fewer windows (--calib-windows")
    assert names(tmp_path) == []


def test_other_errors_are_not_of_memory() -> None:
    assert memory_error(OSError(28, "No space left on device")) is None
    assert memory_error(PassError("out of memory is a word here")) is None
    hidden = PassError("x")
    hidden.__cause__, hidden.__context__ = None, MemoryError()
    hidden.__suppress_context__ = True
    assert memory_error(hidden) is None


def test_a_limit_on_memory(compiled: Any, text: Path, tmp_path: Path) -> None:
    """As `prlimit --data`, once the model is loaded: 1 MB more than the process has then."""
    code = """
def action():
    used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    most = used * 1024 + 1_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))

sys.exit(main(sys.argv[2:]))
"""
    options = ("--calib", text, *SMALL, "--target=reference")
    stage = "sensitivity at full precision"
    ran = child(
        _AT_STAGE + code, stage, "compile", compiled.model, "-o", tmp_path / "out", *options
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.startswith("error: out of memory")
    assert len(ran.stderr.splitlines()) == 2
    assert set(names(tmp_path)) <= {"out.search"}


def test_a_limit_that_torch_alone_exceeds(compiled: Any, tmp_path: Path) -> None:
    """Its libraries would end the process while they are loaded."""
    code = """
resource.setrlimit(resource.RLIMIT_DATA, (150_000_000, 150_000_000))
sys.exit(main(sys.argv[2:]))
"""
    ran = child(_AT_STAGE + code, "", "compile", compiled.model, "-o", tmp_path / "out")
    assert ran.returncode == 1
    error, help_ = ran.stderr.splitlines()
    assert error.startswith("error: out of memory: the limit on data of this process")
    assert help_ == "help: raise it: ulimit -d unlimited"


@pytest.mark.parametrize(
    ("target", "limit", "told"),
    [
        ("reference", 1, "cannot write the output {}: File too large"),
        ("reference", 100_000, "cannot write the output {}: File too large"),
        ("cpu", 100_000, "could not link the kernels"),
    ],
)
def test_a_full_disk(
    compiled: Any, cli: Any, copy_of: Any, tmp_path: Path, target: str, limit: int, told: str
) -> None:
    """One error, and the old artifact stays. The limit on the size of files stands for the disk."""
    old = copy_of(compiled.path)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    start = ("--from", compiled.dump / "08-pack-blocks.sbir", "--target", target)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        ran = cli("compile", compiled.model, "-o", old, "--force", "-q", *start)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code == 1, ran.err
    error, *rest = ran.err.splitlines()
    assert error.startswith("error: ")
    assert told.format(old) in error
    assert all(line.startswith(("note: ", "help: ")) for line in rest)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == [old.name]
