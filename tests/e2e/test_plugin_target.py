"""Targets and ops of a plugin file, through compile, inspect, run and eval."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLUGIN = """
    from __future__ import annotations

    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar

    from scalebits_compiler.codegen.plan import make_plan
    from scalebits_compiler.codegen.target import Built, Target
    from scalebits_compiler.errors import TargetError
    from scalebits_compiler.ir.module import Module
    from scalebits_compiler.ir.printer import print_module
    from scalebits_compiler.runtime.manifest import Kernels

    @dataclass(frozen=True)
    class PlanOnly(Target):
        \"\"\"No kernels: the runtime runs the plan with dequantized matrices.\"\"\"

        name: ClassVar[str] = "plan-only"
        level: int = 2

        def build(self, module: Module, folder: Path) -> Built:
            return Built(plan=make_plan(module))

    @dataclass(frozen=True)
    class Listing(Target):
        \"\"\"Kernels that only a runtime of its own can load.\"\"\"

        name: ClassVar[str] = "listing"

        def build(self, module: Module, folder: Path) -> Built:
            path = folder / "listing.txt"
            path.write_text(print_module(module))
            kernels = Kernels("kernels/listing.txt", {"format": "text"})
            return Built(make_plan(module), kernels, {kernels.library: path})

    @dataclass(frozen=True)
    class Picky(Target):
        \"\"\"Refuses every module.\"\"\"

        name: ClassVar[str] = "picky"

        def check_module(self, module: Module) -> None:
            raise TargetError("picky takes no rms_norm", help="use --target reference")

        def build(self, module: Module, folder: Path) -> Built:
            return Built()
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "targets.py"
    path.write_text(textwrap.dedent(PLUGIN))
    return path


@pytest.fixture
def build(compiled: Any, compile_small: Any, plugin: Path, tmp_path: Path) -> Callable[[str], Any]:
    """`build(target)`: (what compile said, the artifact), from the last dump: no search."""

    def build(target: str, dump: str = "*-pack-blocks.sbir") -> Any:
        (start,) = compiled.dump.glob(dump)
        options = ("--target", target, "--plugin", plugin, "--from", start)
        return compile_small(compiled.model, tmp_path / target, *options), tmp_path / target

    return build


def test_a_target_with_a_plan_runs(cli: Any, build: Callable[..., Any]) -> None:
    ran, out = build("plan-only")
    assert ran.code == 0, ran.err
    assert "(target plan-only)" in ran.out
    assert json.loads((out / "manifest.json").read_text())["target"] == {
        "kind": "plan-only",
        "level": 2,
    }
    assert "target plan-only" in cli("inspect", out).out
    ran = cli("run", out, "--prompt", "The city", "-n", 3)
    assert ran.code == 0, ran.err


def test_kernels_of_its_own_are_refused_by_name(cli: Any, build: Callable[..., Any]) -> None:
    ran, out = build("listing")
    assert ran.code == 0, ran.err
    assert (out / "kernels" / "listing.txt").read_text().startswith("module @")
    assert cli("inspect", out).code == 0
    ran = cli("run", out, "--prompt", "The city")
    assert ran.code == 1
    assert "was compiled for the target 'listing', whose kernels this runtime cannot" in ran.err
    ran = cli("run", out, "--prompt", "The city", "-n", 1, "--target", "reference")
    assert ran.code == 0, ran.err


def test_a_target_may_refuse_a_module(build: Callable[..., Any]) -> None:
    ran, out = build("picky", "01-canonicalize.sbir")
    assert ran.code == 1
    assert ran.err.endswith("error: picky takes no rms_norm\nhelp: use --target reference\n")
    assert not out.exists()


def test_an_unknown_target_lists_those_of_plugins(build: Callable[..., Any]) -> None:
    ran, _ = build("tpu")
    assert ran.code == 2
    assert "there is no target 'tpu'" in ran.err
    assert "the targets are cpu, reference, plan-only, listing, picky" in ran.err
