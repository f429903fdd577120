"""The output folder: whole or not there, of one run at a time, whatever kills that run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from scalebits_compiler.artifact import output as module
from scalebits_compiler.artifact.output import open_output
from scalebits_compiler.errors import OutputError, UsageError, memory_error
from scalebits_compiler.files import complete_file, remove_parts

# In a child: it opens the output sys.argv[1] and writes an artifact into it, until it dies.
_HEAD = """
import os, signal, sys, time
from pathlib import Path
from scalebits_compiler.artifact import output as module
from scalebits_compiler.artifact.output import open_output

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
"""
_WRITE = """
with open_output(Path(sys.argv[1]), True) as output, output.temporary_folder() as beside:
    (beside / "object").write_text("x")
    with output.replacement() as folder:
        (folder / "manifest.json").write_text("new")
        {}
"""
_MOMENTS = {
    "before it is published": ("", "die()", "old"),
    "before the exchange": ("module._exchange = die", "", "old"),
    "after the exchange": (
        "real = module._exchange\nmodule._exchange = lambda *a: real(*a) and die()", "", "new",
    ),
    "before the two renames": ("module._exchange = lambda *_: False\nPath.rename = die", "", "old"),
    "between the two renames": (
        "module._exchange = lambda *_: False\nreal = Path.rename\n"
        "Path.rename = lambda *a: die() if a[0].name == 'artifact' else real(*a)", "", None,
    ),
    "after the two renames": (
        "module._exchange = lambda *_: False\nmodule.sync = die", "", "new",
    ),
}  # fmt: skip


def child(code: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HEAD + code, str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def artifact(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    return folder


def content(out: Path) -> str | None:
    """What the only file of the artifact holds."""
    assert not out.exists() or [path.name for path in out.iterdir()] == ["manifest.json"]
    return (out / "manifest.json").read_text() if out.exists() else None


@pytest.mark.parametrize("moment", _MOMENTS)
def test_killed_while_replacing(moment: str, tmp_path: Path) -> None:
    """An artifact is visible, whole; the next run restores it where need be, and clears the rest.

    Only between two renames, of a file system that cannot exchange folders, there is none.
    """
    before, inside, visible = _MOMENTS[moment]
    out = artifact(tmp_path / "out", "old")
    with child(f"{before}\n{_WRITE.format(inside or 'pass')}", out) as process:
        assert process.wait() == -signal.SIGKILL
    assert content(out) == visible
    assert (tmp_path / ".out.partial").is_dir()
    with open_output(out, force=True) as output:
        assert [path.name for path in output.workspace.iterdir()] == ["lock"]
    assert content(out) == (visible or "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """The second says who writes there, and does not touch what that one has."""
    out = artifact(tmp_path / "out", "old")
    waiting = _WRITE.format("print('ready', flush=True); time.sleep(600)")
    with child(waiting, out) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (workspace,) = tmp_path.glob(".out.*")
        files = sorted(workspace.rglob("*"))
        for force in (True, False):
            with (
                pytest.raises(OutputError, match=f"process {process.pid} is writing the output"),
                open_output(out, force),
            ):
                pass
        assert sorted(workspace.rglob("*")) == files
        process.kill()
    with open_output(out, force=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_has_appeared_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_output(out, force=False) as output, ExitStack() as stack:
        folder = stack.enter_context(output.replacement())
        (folder / "manifest.json").write_text("new")
        artifact(out, "of another program")
        with pytest.raises(UsageError, match="exists and is not empty"):
            stack.close()
    assert content(out) == "of another program"


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", "old")
    with (
        pytest.raises(OutputError, match=r"cannot write the output .*: No space left on device"),
        open_output(out, force=True) as output,
        output.replacement(),
        Path("/dev/full").open("w") as file,
    ):
        file.write("new")
    assert content(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_on_the_disk_before_they_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is synced, then the names are exchanged, then the parent is synced."""
    out = artifact(tmp_path / "out", "old")
    events: list[str] = []
    real, exchange = os.fsync, module._exchange

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        events.append(str(path.relative_to(tmp_path)))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(module, "_exchange", lambda *a: events.append("exchange") or exchange(*a))
    with open_output(out, force=True) as output, output.replacement() as folder:
        (folder / "kernels").mkdir()
        (folder / "kernels" / "cpu.so").write_text("x")
        (folder / "manifest.json").write_text("new")
    new = ".out.partial/artifact"
    synced = [f"{new}/kernels/cpu.so", f"{new}/kernels", f"{new}/manifest.json", new]
    assert sorted(events[:4]) == sorted(synced)
    assert events[3] == new
    assert events[4:] == ["exchange", "."]


def test_bad_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(out: Path, force: bool) -> None:
        with open_output(out, force):
            pass

    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        opened(file, force=True)
    for out in (Path("/proc/none/out"), file / "out"):
        with pytest.raises(UsageError, match="cannot write the output"):
            opened(out, force=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="holds the current folder"):
        opened(Path(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_through_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    with open_output(tmp_path / "link", force=False) as output, output.replacement() as folder:
        (folder / "f").write_text("x")
    assert (tmp_path / "link" / "f").read_text() == "x"
    assert os.readlink(tmp_path / "link") == str(real)


def test_parts_of_killed_processes(tmp_path: Path) -> None:
    """A file that is being written by nobody goes; the file itself, and one in work, stay."""
    path = tmp_path / "state.json"
    path.write_text("old")
    code = (
        "from scalebits_compiler.files import complete_file\n"
        "with complete_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'ne'); file.flush(); die()\n"
    )
    with child(code, path) as process:
        assert process.wait() == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    with complete_file(path) as file:
        file.write(b"new")
        remove_parts(tmp_path, "state.json")
        assert len(list(tmp_path.iterdir())) == 2
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_an_error_that_is_its_own_cause_is_not_searched_forever() -> None:
    error = UsageError("wrong")
    error.__cause__ = error  # `raise error from error`
    assert memory_error(error) is None
