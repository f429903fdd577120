"""The law of the layers: what may import what, and how long files and functions may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "scalebits_compiler"
NAME = "scalebits_compiler"
LOW = {"errors", "tasks", "pretrained", "numerics", "ir"}
# Layer 3 is every module that lies beside the folders: the driver, the plugins and their kin.
DRIVERS = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "errors", "tasks", "pretrained"}
BELOW_CLI = {*LOW, "runtime", "frontend", "passes", "codegen", *DRIVERS}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "tasks": set(),
    "pretrained": {"errors", "tasks"},
    "numerics": {"errors", "numerics"},
    "ir": {"errors", "tasks", "ir"},
    "runtime": {"errors", "tasks", "numerics.layout", "numerics.tiles", "runtime"},
    "frontend": {*LOW, "frontend"},
    "passes": {*LOW, "passes"},
    "codegen": {*LOW, "codegen", "runtime.manifest", "runtime.plan", "runtime.program"},
    **dict.fromkeys(DRIVERS, BELOW_CLI),
    "cli": {*BELOW_CLI, "cli"},
}
# What a running artifact must not need, nor a text-only command.
HEAVY = ("torch", "transformers", "tvm")
EXAMPLE = ROOT.parent / "docs" / "example.sbir"
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that is imported anywhere in a file, as a path below the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            # `from package.sub import name`: the name may be a module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def allowed(layer: str, target: str) -> bool:
    parts = target.split(".")
    return any(parts[: len(may.split("."))] == may.split(".") for may in MAY_IMPORT[layer])


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_keep_to_the_layers(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return  # resolves `compile` and `load` on first use
    layer = layer_of(path)
    assert layer in MAY_IMPORT, f"{path.name} belongs to no layer"
    lines = list(imported(ast.parse(path.read_text())))
    ours = [line.removeprefix(f"{NAME}.") for line in lines if line.startswith(f"{NAME}.")]
    ours = [line for line in ours if line.split(".")[0] in MAY_IMPORT]  # the rest are plain names
    # `from scalebits_compiler.runtime import manifest` is also seen as `runtime.manifest`
    wrong = [
        line
        for line in ours
        if not allowed(layer, line)
        and not any(other.startswith(f"{line}.") and allowed(layer, other) for other in ours)
    ]
    assert not wrong, f"{layer} must not import {', '.join(sorted(set(wrong)))}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path.name} has more than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 50, f"{node.name} in {path.name} has {length} lines"


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh process has after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_runtime_needs_no_compiler() -> None:
    files = [path.stem for path in (ROOT / "runtime").glob("*.py") if path.stem != "__init__"]
    statement = f"import {NAME}.runtime, " + ", ".join(f"{NAME}.runtime.{name}" for name in files)
    forbidden = {"lark", "transformers", "tvm", f"{NAME}.ir", f"{NAME}.passes", f"{NAME}.codegen"}
    # tvm_ffi imports torch itself where torch is installed; the next test sees to our own imports.
    assert not loaded_by(statement) & forbidden
    assert not loaded_by(f"import {NAME}.runtime") & {*forbidden, *HEAVY}


def test_the_runtime_imports_only_what_it_may() -> None:
    forbidden = {"torch", "transformers", "tvm", "lark"}
    for path in (ROOT / "runtime").rglob("*.py"):
        if path.parent.name == "cuda":
            continue  # what runs on a GPU needs torch; nothing else imports it before it runs
        roots = {line.split(".")[0] for line in imported(ast.parse(path.read_text()))}
        assert not roots & forbidden, path.name


@pytest.mark.parametrize(
    "statement",
    [
        f"import {NAME}",
        f"import {NAME}.ir.parser, {NAME}.ir.verifier, {NAME}.ir.save",
        f"from {NAME}.passes.pipeline import parse_passes; parse_passes('default')",
        f"import {NAME}.plugins, {NAME}.cli.opt, {NAME}.cli.passes",
        f"from {NAME}.cli.main import main; main(['passes'])",
        f"from {NAME}.cli.main import main; main(['opt', {str(EXAMPLE)!r}])",
        f"from {NAME}.cli.main import main; main(['diff', *[{str(EXAMPLE)!r}] * 2])",
    ],
)
def test_text_needs_no_torch(statement: str) -> None:
    assert not loaded_by(statement) & set(HEAVY)


def test_running_needs_no_parser_and_no_compiler() -> None:
    """`scalebitsc run`, `inspect`, `bench` where lark, torch, transformers and TVM are absent."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['lark', 'torch', 'transformers', 'tvm']))\n"
        f"from {NAME}.cli.main import parser\n"
        f"import {NAME}.sessions, {NAME}.plugins, {NAME}.benchmark, {NAME}.runtime.session\n"
        "parser().parse_args(['run', 'out', '--prompt', 'a'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
