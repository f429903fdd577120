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
    ran, out = build("plan-only{level = 3}")
    assert ran.code == 0, ran.err
    assert "(target plan-only)" in ran.out
    assert json.loads((out / "manifest.json").read_text())["target"] == {
        "kind": "plan-only",
        "level": 3,
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
    assert "the targets are cpu, cuda, reference, plan-only, listing, picky" in ran.err


OP = """
    from __future__ import annotations

    from dataclasses import dataclass, replace
    from typing import Any, ClassVar

    from scalebits_compiler.ir.attrs import Value
    from scalebits_compiler.ir.module import Module
    from scalebits_compiler.ir.op import Op, Typing
    from scalebits_compiler.ir.ops import Silu
    from scalebits_compiler.ir.types import Type
    from scalebits_compiler.passes.base import Pass, PassContext
    from scalebits_compiler.plugins import Plugin

    @dataclass(frozen=True, kw_only=True)
    class Swish(Op):
        name: ClassVar[str] = "mine.swish"
        x: Value
        beta: float = 1.0

        def infer(self, t: Typing) -> Type:
            return t.type(self.x)

    def swish(op: Swish, scope: Any) -> Any:
        x = scope.value(op.x)
        return x * (op.beta * x).sigmoid()

    @dataclass(frozen=True)
    class UseSwish(Pass):
        \"\"\"Every silu as mine.swish.\"\"\"

        name: ClassVar[str] = "use-swish"
        beta: float = 1.0

        def run(self, module: Module, ctx: PassContext) -> Module:
            ops = tuple(
                Swish(x=op.x, beta=self.beta, result=op.result, type=op.type, loc=op.loc)
                if isinstance(op, Silu) else op
                for op in module.function.ops
            )
            return replace(module, function=replace(module.function, ops=ops))

    PLUGIN = Plugin(ops=(Swish,), passes=(UseSwish,), rules={Swish: swish})
"""


@pytest.fixture
def swish(tmp_path: Path) -> Path:
    path = tmp_path / "swish.py"
    path.write_text(textwrap.dedent(OP))
    return path


def test_an_op_of_a_file_from_pass_to_artifact(
    cli: Any, compiled: Any, compile_small: Any, swish: Path, tmp_path: Path, text: Path
) -> None:
    (packed,) = compiled.dump.glob("*-pack-blocks.sbir")
    changed, out, plugin = tmp_path / "swish.sbir", tmp_path / "out", ("--plugin", swish)
    ran = cli("opt", packed, *plugin, "-p", "use-swish{beta = 1.5}", "-o", changed)
    assert ran.code == 0, ran.err
    assert cli("opt", changed, *plugin).out == changed.read_text()
    ran = cli("opt", changed)
    assert (ran.code, "unknown op 'mine.swish'" in ran.err) == (1, True)

    start = ("--from", changed, *plugin)
    ran = compile_small(compiled.model, tmp_path / "kernels", *start)
    assert ran.code == 0, ran.err
    ran = cli("run", tmp_path / "kernels", *plugin, "--prompt", "The city", "-n", 2)
    assert ran.code == 0, ran.err
    assert "note: runs step by step: torch runs mine.swish (model.layers.0.mlp" in ran.err
    assert "decoding runs all tokens again, mine.swish" in ran.err
    ran = compile_small(compiled.model, out, *start, "--target", "reference")
    assert ran.code == 0, ran.err
    ran = cli("run", out, *plugin, "--prompt", "The city", "-n", 2)
    assert ran.code == 0, ran.err

    scores = []
    for path in (out, compiled.path):
        few = ("--text", text, "--windows", 2, "--seq-len", 32, "-q", "--json")
        ran = cli("eval", path, *plugin, "--target", "reference", *few)
        assert ran.code == 0, ran.err
        scores.append(json.loads(ran.out)["perplexity"])
    assert scores[0] != scores[1]
