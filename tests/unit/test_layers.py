"""The layer law: which room may import which; see docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "scalebits_compiler"
NAME = "scalebits_compiler"
LOW = {"errors", "files", "progress", "tasks"}
IR = {*LOW, "numerics", "numerics/formats", "ir"}
PASSES = {*IR, "analysis", "passes"}
COMPILER = {*PASSES, "pretrained", "frontend", "interpreter", "codegen", "artifact", "plugins"}
RUNTIME = {"runtime", "runtime/cpu", "runtime/cuda"}
# Room (a folder, or a module beside the folders) -> the rooms that it may import. A room not named
# here, its own parent included, may import nothing: there is no default.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "progress": set(),
    "tasks": set(),
    "pretrained": {*LOW},
    "numerics": {"errors", "numerics/formats"},
    "numerics/formats": {"errors"},
    "ir": {*LOW, "numerics", "numerics/formats"},
    "analysis": {*IR},
    "interpreter": {*IR, "pretrained"},
    "frontend": {*IR, "pretrained"},
    "passes": {*IR},
    "passes/canonicalize": {*PASSES},
    "passes/sensitivity": {*PASSES},
    "passes/reorder": {*PASSES},
    "passes/rounding": {*PASSES, "passes/sensitivity"},
    "passes/search": {*PASSES, "passes/sensitivity", "passes/rounding"},
    "runtime": {*LOW, "numerics", "numerics/formats", *RUNTIME},
    "runtime/cpu": {*LOW, "numerics", "numerics/formats", "runtime"},
    "runtime/cuda": {*LOW, "numerics", "numerics/formats", "runtime"},
    "codegen": {*IR, "analysis", "interpreter", "runtime"},
    "codegen/tvm": {*IR, "codegen", "runtime", "runtime/cpu"},
    "codegen/triton": {*IR, "codegen", "runtime", "runtime/cuda"},
    "artifact": {*IR, "codegen", "interpreter", "runtime"},
    "plugins": {*IR, "passes", "codegen", "interpreter"},
    "sessions": {*IR, "analysis", "interpreter", "codegen", "artifact", "plugins", *RUNTIME},
    "driver": {*COMPILER, "passes/canonicalize", "passes/search", "passes/rounding", *RUNTIME},
    "tools": {*COMPILER, "passes/canonicalize", "driver", "sessions", *RUNTIME},
    "cli": {*COMPILER, "passes/sensitivity", "driver", "sessions", "tools", *RUNTIME},
}
# What a running artifact must not need, nor a text-only command.
HEAVY = ("torch", "transformers", "tvm")
EXAMPLE = ROOT.parent / "docs" / "example.sbir"
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            # `from package.sub import name`: the name may be a module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """The folder of a file, or the module itself if it lies beside the folders."""
    folder = path.parent.relative_to(ROOT).as_posix()
    return path.stem if folder == "." else folder


def arrows() -> dict[str, dict[str, list[str]]]:
    """Room -> imported room -> the imports, as `file: module`."""
    rooms = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): room_of(path) for path in FILES
    }
    graph: dict[str, dict[str, list[str]]] = {room: {} for room in rooms.values()}
    for path in FILES:
        for line in imported(ast.parse(path.read_text())):
            target = rooms.get(line.removeprefix(f"{NAME}."))
            if target not in (None, room_of(path)):
                where = f"{path.relative_to(ROOT)}: {line}"
                graph[room_of(path)].setdefault(target, []).append(where)
    return graph


def test_every_room_has_a_row_of_its_own() -> None:
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


def test_imports_keep_to_the_law() -> None:
    wrong = [
        line
        for room, targets in arrows().items()
        for target, lines in targets.items()
        if target not in MAY_IMPORT[room]
        for line in lines
    ]
    assert not wrong, "\n".join(wrong)


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh process has after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_runtime_needs_no_compiler() -> None:
    files = [path for folder in ("runtime", "runtime/cpu") for path in (ROOT / folder).glob("*.py")]
    names = (".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in files)
    forbidden = {"lark", f"{NAME}.ir", f"{NAME}.passes", f"{NAME}.codegen", "tvm_ffi", *HEAVY}
    assert not loaded_by("import " + ", ".join(names)) & forbidden


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
        f"import {NAME}.sessions.open, {NAME}.plugins, {NAME}.tools.bench, {NAME}.runtime.session\n"
        "parser().parse_args(['run', 'out', '--prompt', 'a'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
