"""A killed search goes on with --resume to the same bytes; a foreign state is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scalebits_compiler.numerics.layout import FORMAT_VERSION

GRADIENTS = "gradients at the quantized weights"
TARGET = ("--target", "reference", "--avg-bits", "3.5", "--no-tuning", "--json")
Interrupt = Callable[[int], None]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny_llama: Any, compile_small: Any, tmp_path_factory: Any) -> Any:
    """An artifact whose search was not interrupted, and what that compile told."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ran = compile_small(tiny_llama(), out, *TARGET)
    assert ran.code == 0, ran.err
    assert not out.with_name("out.search").exists()
    return content(out), json.loads(ran.out)["passes"]["assign-bits"]


@pytest.fixture
def interrupt(monkeypatch: Any) -> Interrupt:
    """Stops the process' next compile before its n-th gradient pass (1: that of the reorder)."""

    def interrupt(number: int) -> None:
        seen: list[str] = []

        def progress(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
            seen.append(label)
            if seen.count(GRADIENTS) == number:
                raise KeyboardInterrupt
            return iter(items)

        monkeypatch.setattr("scalebits_compiler.cli.compile.progress_for", lambda quiet: progress)

    return interrupt


@pytest.fixture
def stopped(tiny_llama: Any, compile_small: Any, tmp_path: Path, interrupt: Interrupt) -> Path:
    """Where the output would be, of a compile that was stopped in its second round."""
    out = tmp_path / "out"
    interrupt(3)
    assert compile_small(tiny_llama(), out, *TARGET).code == 130
    interrupt(99)
    assert [path.name for path in tmp_path.iterdir()] == ["out.search"]
    return out


def test_the_same_bytes(whole: Any, stopped: Path, tiny_llama: Any, compile_small: Any) -> None:
    artifact, report = whole
    assert len(report["steps"]) >= 2, "a search of one round has nothing to go on with"
    ran = compile_small(tiny_llama(), stopped, *TARGET, "--resume")
    assert ran.code == 0, ran.err
    again = json.loads(ran.out)["passes"]["assign-bits"]
    assert again.pop("resumed_at_round") == 1
    assert {**report, "resumed_at_round": 1} == {**again, "resumed_at_round": 1}
    assert content(stopped) == artifact
    assert not stopped.with_name("out.search").exists()


def test_stopped_after_the_search(
    whole: Any, tiny_llama: Any, compile_small: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def progress(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        if label == "write":
            raise KeyboardInterrupt
        return iter(items)

    monkeypatch.setattr("scalebits_compiler.cli.compile.progress_for", lambda quiet: progress)
    out = tmp_path / "out"
    assert compile_small(tiny_llama(), out, *TARGET).code == 130
    monkeypatch.undo()
    ran = compile_small(tiny_llama(), out, *TARGET, "--resume")
    assert ran.code == 0, ran.err
    assert content(out) == whole[0]


def test_a_state_is_not_lost_by_mistake(
    whole: Any, stopped: Path, tiny_llama: Any, compile_small: Any
) -> None:
    ran = compile_small(tiny_llama(), stopped, *TARGET)
    assert ran.code == 2
    assert "holds the state of a search that was cut short" in ran.err
    ran = compile_small(tiny_llama(), stopped, *TARGET, "--force")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["passes"]["assign-bits"]["resumed_at_round"] == 0
    assert content(stopped) == whole[0]


def test_nothing_to_go_on_with(
    whole: Any, tiny_llama: Any, compile_small: Any, tmp_path: Path
) -> None:
    ran = compile_small(tiny_llama(), tmp_path / "out", *TARGET, "--resume")
    assert ran.code == 0
    assert "there is no out.search to go on with, starting anew" in ran.err
    assert content(tmp_path / "out") == whole[0]


def test_foreign_states_are_refused(
    stopped: Path, tiny_llama: Any, compile_small: Any, text: Path, tmp_path: Path
) -> None:
    """Every refusal leaves the state as it is."""
    folder = stopped.with_name("out.search")
    (state,) = folder.iterdir()
    kept = state.read_bytes()

    def refused(*options: object, model: Path | None = None) -> str:
        ran = compile_small(model or tiny_llama(), stopped, *TARGET, *options, "--resume")
        assert ran.code == 2
        assert not stopped.exists()
        errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    assert "was made of another model" in refused(model=tiny_llama(seed=1))
    assert "with other calibration windows" in refused("--seed", "5")
    assert "for another setting, " in refused("--avg-bits", "4")
    assert "avg-bits = 3.5" in refused("--bits", "*.down_proj=2..8")
    body = json.loads(kept)
    assert body["identity"]["version"].endswith(f" (format {FORMAT_VERSION})")
    for change in ({"version": "0.1.0 (format 9)"}, {"module": "0"}):
        state.write_text(json.dumps({**body, "identity": {**body["identity"], **change}}))
        told = refused()
        assert "another version, 0.1.0 (format 9)" in told or "a module that was edited" in told
    state.write_bytes(kept[: len(kept) // 2])
    assert "is no search state" in refused()
    for change in ({"identity": []}, {"state": 1}, {"format": "other"}, {"more": 1}):
        state.write_text(json.dumps({**body, **change}))
        assert "is no search state: " in refused()
    shutil.rmtree(folder)
