"""The runtime where nothing is installed but what it needs: a virtual environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

import scalebits_compiler
from scalebits_compiler.sessions.open import load

# tokenizers also requires huggingface-hub, which it imports to download only.
INSTALLED = ("msgspec", "numpy", "safetensors", "tokenizers")
ABSENT = ("torch", "transformers", "tvm", "lark", "rich", "huggingface_hub")
PROMPT = "The river"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """`bare(argument, ..., NAME=value)` runs a new environment's Python outside of this tree.

    Names are environment variables.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    for name in INSTALLED:
        for file in distribution(name).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), site / file)
    package = Path(scalebits_compiler.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, site / package.name, ignore=ignored)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / "python"), *map(str, arguments)]
        env = clean | {name: str(value) for name, value in variables.items()}
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )

    return run


def test_run_needs_four_packages(compiled: Any, bare: Callable[..., Any]) -> None:
    """`scalebitsc run` gives the text that it gives here, on the same kernels."""
    found = bare("-c", f"import importlib.util as u; print([*map(u.find_spec, {ABSENT})])")
    assert found.stdout.strip() == str([None] * len(ABSENT)), found.stderr
    ran = bare(
        *("-m", "scalebits_compiler.cli.main", "run", compiled.path),
        *("--prompt", PROMPT, "-n", 5, "--json"),
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    session = load(compiled.path)
    assert (said["variant"], said["execution"]) == (session.variant, "native")
    (generation,) = session.generate(PROMPT, 5)
    assert said["generations"][0]["tokens"] == list(generation.tokens)


def test_kernels_of_another_machine_need_trust(
    compiled: Any, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """There is no compiler to build them anew."""
    words = ("-m", "scalebits_compiler.cli.main", "run", compiled.path, "--prompt", PROMPT, "-n", 2)
    elsewhere = {"SCALEBITS_CACHE": tmp_path / "empty"}
    ran = bare(*words, **elsewhere)
    assert ran.returncode == 1
    message, remedies = ran.stderr.splitlines()
    assert message.startswith(f"error: the kernels of {compiled.path} were not built on this")
    assert "and cannot be built here: " in message
    assert message.endswith(" is not installed")
    for remedy in ("--trust-kernels", "pip install", "--target reference"):
        assert remedy in remedies
    ran = bare(*words, "--trust-kernels", **elsewhere)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == bare(*words).stdout


def test_what_is_absent_is_named(compiled: Any, bare: Callable[..., Any], tmp_path: Path) -> None:
    ran = bare(
        *("-m", "scalebits_compiler.cli.main", "compile", compiled.model, "-o", tmp_path / "out")
    )
    assert ran.returncode == 1
    first, second = ran.stderr.splitlines()
    assert first in [f"error: this command needs {name}, which is not installed" for name in ABSENT]
    assert second.startswith("help: ")
