"""Code of an artifact that this machine did not build runs only when it is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import scalebits_compiler as sb
from scalebits_compiler.codegen import kernel_cache as cache
from scalebits_compiler.runtime.manifest import MANIFEST, FileRecord, Manifest, sha256_of

LIBRARY = "kernels/cpu.so"
PROMPT = ("--prompt", "The river", "-n", 4)
FEW = ("--prompt-tokens", 2, "--new-tokens", 1, "--repeat", 1, "-q")
CONSTRUCTOR = """
#include <stdio.h>
__attribute__((constructor)) static void run_when_loaded(void) {
    FILE *file = fopen("MARKER", "w");
    if (file) fclose(file);
}
"""


@dataclass(frozen=True)
class Foreign:
    """A copy of the tiny Llama's artifact with another library; it leaves `marker` when loaded."""

    path: Path
    marker: Path


def publish(path: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """Write the manifest of an edited artifact anew: every digest fits, as an attacker's would."""
    manifest = change(Manifest.from_json((path / MANIFEST).read_text()))
    files = {
        name: FileRecord(sha256_of(path / name), (path / name).stat().st_size)
        for name in manifest.files
    }
    (path / MANIFEST).write_text(replace(manifest, files=files).to_json())


@pytest.fixture
def foreign(compiled: Any, copy_of: Callable[[Path], Path], tmp_path: Path) -> Foreign:
    """Its library has a constructor, and all kernels of the original one, which it links to."""
    if (compiler := shutil.which("gcc") or shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    path, marker, source = copy_of(compiled.path), tmp_path / "marker", tmp_path / "evil.c"
    source.write_text(CONSTRUCTOR.replace("MARKER", str(marker)))
    command = [compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", path / LIBRARY, source]
    subprocess.run([*map(str, command), str(compiled.path / LIBRARY)], check=True)
    publish(path)
    return Foreign(path, marker)


@pytest.fixture
def expected(compiled: Any, cli: Any) -> str:
    """The text of the original artifact."""
    ran = cli("run", compiled.path, *PROMPT)
    assert (ran.code, "note" in ran.err) == (0, False), ran.err
    return ran.out


def test_looking_at_an_artifact_loads_no_code(
    foreign: Foreign, compiled: Any, cli: Any, tmp_path: Path
) -> None:
    shown = cli("inspect", foreign.path)
    assert "not built on this machine" in shown.out
    assert "not built on this machine" not in cli("inspect", compiled.path).out
    ours, told = (
        json.loads(cli("inspect", path, "--json").out) for path in (compiled.path, foreign.path)
    )
    assert (ours["kernels_built_here"], told["kernels_built_here"]) == (True, False)
    assert told["kernels"] == ours["kernels"]  # the variants, and how they would run
    assert told["kernels"]["execution"] == "native"
    for words in (
        ("verify", foreign.path),
        ("explain", foreign.path, "layers.0.mlp.down_proj"),
        ("diff", foreign.path, compiled.path),
        ("retarget", foreign.path, "--target", "reference", "-o", tmp_path / "reference"),
        ("retarget", foreign.path, "--target", "cpu", "-o", tmp_path / "cpu"),
    ):
        ran = cli(*words)
        assert ran.code == 0, ran.err
    assert not foreign.marker.exists()
    # What was built here instead is what this machine built before.
    assert (tmp_path / "cpu" / LIBRARY).read_bytes() == (compiled.path / LIBRARY).read_bytes()


def test_foreign_kernels_are_built_anew(
    foreign: Foreign, expected: str, cli: Any, text: Path
) -> None:
    ran = cli("run", foreign.path, *PROMPT)
    assert (ran.code, ran.out) == (0, expected), ran.err
    assert ran.err.splitlines() == [
        f"note: the kernels of {foreign.path} were not built on this machine: building them from"
        " its module"
    ]
    for words in (
        ("run", foreign.path, *PROMPT),
        ("bench", foreign.path, *FEW),
        ("eval", foreign.path, "--text", text, "--windows", 1, "--seq-len", 16, "-q"),
        ("run", foreign.path, *PROMPT, "--target", "reference"),
    ):
        ran = cli(*words)
        assert (ran.code, ran.err) == (0, ""), ran.err  # built once
    assert sb.load(foreign.path).execution == "native"
    assert not foreign.marker.exists()


@pytest.mark.parametrize("command", ["run", "eval", "bench", "load"])
def test_trusted_kernels_are_run_as_they_are(
    command: str, foreign: Foreign, expected: str, cli: Any, text: Path
) -> None:
    if command == "load":
        sb.load(foreign.path, trust_kernels=True)
    else:
        options = {
            "run": PROMPT,
            "bench": FEW,
            "eval": ("--text", text, "--windows", 1, "--seq-len", 16, "-q"),
        }
        ran = cli(command, foreign.path, *options[command], "--trust-kernels")
        assert (ran.code, ran.err) == (0, ""), ran.err
        assert command != "run" or ran.out == expected
    assert foreign.marker.exists()
    foreign.marker.unlink()
    assert cli("run", foreign.path, *PROMPT).code == 0
    assert not foreign.marker.exists()  # it holds for one call


def test_our_kernels_with_another_table_are_foreign(
    compiled: Any, copy_of: Callable[[Path], Path], expected: str, cli: Any
) -> None:
    """A kernel's place in the table is its number: the wrong one would run."""
    path = copy_of(compiled.path)

    def reversed_kernels(manifest: Manifest) -> Manifest:
        assert manifest.kernels is not None
        dispatch = json.loads(json.dumps(manifest.kernels.dispatch))
        for variant in dispatch["variants"]:
            variant["kernels"].reverse()
        return replace(manifest, kernels=replace(manifest.kernels, dispatch=dispatch))

    publish(path, reversed_kernels)
    assert not json.loads(cli("inspect", path, "--json").out)["kernels_built_here"]
    ran = cli("run", path, *PROMPT)
    assert (ran.code, ran.out) == (0, expected), ran.err


def test_a_cache_that_cannot_be_written(
    compiled: Any, expected: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of it, and nothing can be kept: kernels are built at every start."""
    stored = Path(os.environ["SCALEBITS_CACHE"])
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / "file"))
    load = cache.load

    def load_compiled(name: str) -> bytes | None:
        """No kernel is compiled again: that takes long, and is not what this test is about."""
        assert load(name) is None
        if name.endswith(".o"):
            cache.store(name, (stored / name).read_bytes()[hashlib.sha256().digest_size :])
        return load(name)

    monkeypatch.setattr(cache, "load", load_compiled)
    ran = cli("run", compiled.path, *PROMPT)
    assert (ran.code, ran.out) == (0, expected), ran.err
    (line,) = ran.err.splitlines()
    assert "not built on this machine: building them from its module, again at every" in line
    assert f"the kernel cache {tmp_path / 'file'} is not a folder" in line


def test_without_the_compiler_the_remedies_are_named(
    foreign: Foreign, cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("scalebits_compiler.codegen.tvm.target.find_spec", lambda name: None)
    ran = cli("run", foreign.path, *PROMPT)
    assert ran.code == 1
    message, *remedies = ran.err.splitlines()
    assert message == (
        f"error: the kernels of {foreign.path} were not built on this machine, and cannot be built"
        " here: the cpu target needs TVM, which is not installed"
    )
    for remedy in ("--trust-kernels", "pip install", "--target reference"):
        assert remedy in "".join(remedies)
    assert not foreign.marker.exists()
