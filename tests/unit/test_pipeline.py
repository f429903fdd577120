"""Pipelines: text, options, facts, observers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from scalebits_compiler.errors import IRError, PassError, UsageError, VerifyError
from scalebits_compiler.ir.attrs import Resource
from scalebits_compiler.ir.module import Module, Weight
from scalebits_compiler.ir.parser import parse_module, read_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.save import save_module
from scalebits_compiler.passes.base import Pass, PassContext
from scalebits_compiler.passes.observers import (
    DumpIR,
    PrintAfter,
    PrintBefore,
    RoundTrip,
    Timing,
    VerifyEach,
)
from scalebits_compiler.passes.pipeline import (
    Observer,
    parse_passes,
    pass_options,
    print_passes,
    run_pipeline,
)
from scalebits_compiler.passes.table import PIPELINES, PassTable

TEXT = """module @m {
  weight @g : f32[4] {data = resource("g")}
  func @f(%x: f32[?, 4]) -> f32[?, 4] {
    %0 = rms_norm %x, @g {eps = 1e-05} : f32[?, 4]
    return %0
  }
}
"""


@dataclass(frozen=True)
class Stretch(Pass):
    """Changes eps and writes the gain anew."""

    name: ClassVar[str] = "stretch"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})
    factor: float = field(default=2.0, metadata={"help": "what eps is multiplied by"})
    max_size: int = 8
    sizes: tuple[int, ...] = (1, 2)
    method: Literal["fast", "slow"] = "fast"

    def run(self, module: Module, ctx: PassContext) -> Module:
        import torch

        (op,) = module.function.ops
        op = replace(op, eps=op.eps * self.factor)  # type: ignore[attr-defined]
        changed = module.resources.with_({"g": torch.full((4,), self.factor)})
        return replace(module, function=replace(module.function, ops=(op,)), resources=changed)


@dataclass(frozen=True)
class Forget(Pass):
    """Takes a fact away and needs it."""

    name: ClassVar[str] = "forget"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, module: Module, ctx: PassContext) -> Module:
        return module


@dataclass(frozen=True)
class Break(Pass):
    """Returns a module that does not verify, or raises."""

    name: ClassVar[str] = "break"
    crash: bool = False

    def run(self, module: Module, ctx: PassContext) -> Module:
        if self.crash:
            raise ZeroDivisionError("oops")
        return module.with_weights([replace(module.weights["g"], bits=Resource("b"))])


@dataclass(frozen=True)
class Mute(Pass):
    """Changes nothing, and forgets to return the module."""

    name: ClassVar[str] = "mute"
    returns: bool = False

    def run(self, module: Module, ctx: PassContext) -> Module:
        return module if self.returns else None  # type: ignore[return-value]


@dataclass(frozen=True)
class Needy(Pass):
    """Has an option without default."""

    name: ClassVar[str] = "needy"
    budget: float

    def run(self, module: Module, ctx: PassContext) -> Module:
        return module


TABLE: PassTable = {cls.name: cls for cls in (Stretch, Forget, Break, Needy)}


def tiny() -> Module:
    return parse_module(TEXT)[0]


def test_options_come_from_the_fields() -> None:
    listed = [(o.name, o.type, o.default, o.help) for o in pass_options(Stretch)]
    assert listed == [
        ("factor", "float", "2.0", "what eps is multiplied by"),
        ("max-size", "int", "8", ""),
        ("sizes", "list of int", "[1, 2]", ""),
        ("method", '"fast" or "slow"', '"fast"', ""),
    ]


def test_text_to_passes_and_back() -> None:
    text = 'stretch{factor = 3.0, max-size = 9, sizes = [4], method = "slow"},forget,stretch'
    passes = parse_passes(text, TABLE)
    assert passes[0] == Stretch(factor=3.0, max_size=9, sizes=(4,), method="slow")
    assert print_passes(passes) == text
    assert parse_passes("stretch{factor = 3}", TABLE) == [Stretch(factor=3.0)]
    assert parse_passes("", TABLE) == []


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("strech", "there is no pass 'strech'", "did you mean 'stretch'?"),
        ("stretch{factr = 1}", "stretch has no option 'factr'", "did you mean 'factor'?"),
        ("stretch{max_size = 1}", "no option 'max_size'", "did you mean 'max-size'?"),
        ("stretch{zzz = 1}", "stretch has no option 'zzz'", "max-size (int)"),
        ("forget{zzz = 1}", "forget has no option 'zzz'", "it has no options"),
        ('stretch{factor = "a"}', "option 'factor' of stretch: expected float, got \"a\"", ""),
        ("stretch{max-size = 1.5}", "expected int, got 1.5", ""),
        ("stretch{max-size = true}", "expected int, got true", ""),
        ('stretch{method = "odd"}', 'expected "fast" or "slow"', ""),
        ("needy", "needy needs the option 'budget'", "needy{budget = ...}"),
        ("default{a = 1}", "'default' is a named pipeline", PIPELINES["default"]),
        ("stretch{", "the text ends too early", ""),
    ],
)
def test_wrong_pipelines_are_explained(text: str, message: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_passes(text, TABLE)
    assert message in caught.value.message
    assert remedy in caught.value.help


def test_facts_are_checked_before_anything_runs() -> None:
    ran: list[str] = []

    class Spy(Observer):
        def before(self, item: Pass, module: Module) -> None:
            ran.append(item.name)

    with pytest.raises(PassError, match="forget needs the fact `canonical`") as caught:
        run_pipeline(tiny(), [Stretch(), Forget(), Forget()], PassContext(), [Spy()], table=TABLE)
    assert ran == []
    assert caught.value.help == "run stretch before it"
    assert caught.value.notes == ["forget before it takes `canonical` away"]


def test_a_pass_refuses_what_it_cannot_work_on() -> None:
    @dataclass(frozen=True)
    class Early(Forget):
        refuses: ClassVar[frozenset[str]] = frozenset({"canonical"})

    with pytest.raises(PassError, match="does not work on a module with the fact `canonical`"):
        run_pipeline(tiny(), [Stretch(), Early()], PassContext(), table=TABLE)


@pytest.mark.parametrize("name", ["assign-bits", "round-weights", "tune-scales", "pack-blocks"])
def test_packed_modules_are_not_worked_on_again(name: str) -> None:
    packed = replace(tiny(), facts=frozenset({"canonical", "bits", "rounded", "packed"}))
    with pytest.raises(PassError, match=f"{name} does not work on .* `packed`") as caught:
        run_pipeline(packed, parse_passes(name), PassContext())
    assert caught.value.help == "go on from a dump of an earlier stage"


def test_facts_follow_the_passes() -> None:
    made = run_pipeline(tiny(), [Stretch()], PassContext(), table=TABLE)
    assert made.facts == {"canonical"}
    assert run_pipeline(made, [Forget()], PassContext(), table=TABLE).facts == frozenset()


def test_observers_print_time_and_check() -> None:
    out: list[str] = []
    timing = Timing()
    watch = [
        PrintBefore(out.append, frozenset({"stretch"})),
        PrintAfter(out.append, only_changes=True),
        RoundTrip(),
        VerifyEach(),
        timing,
    ]
    passes = [Stretch(), Forget(), Stretch(factor=1.0)]
    run_pipeline(tiny(), passes, PassContext(), watch, table=TABLE)
    heads = [text.splitlines()[0] for text in out]
    assert heads == [
        "// -----// IR before stretch //----- //",
        "// -----// IR after stretch //----- //",
        "// -----// IR after forget //----- //",
        "// -----// IR before stretch //----- //",
        "// -----// IR after stretch //----- //",
    ]
    assert [name for name, _ in timing.seconds] == ["stretch", "forget", "stretch"]
    assert timing.table().endswith("total")


def test_a_pass_that_changes_nothing_is_not_printed() -> None:
    out: list[str] = []
    watch = [PrintAfter(out.append, only_changes=True)]
    passes = [Stretch(), Forget(), Mute(returns=True)]
    made = run_pipeline(tiny(), passes, PassContext(), watch, table=TABLE)
    assert made.history == ("stretch", "forget", "mute{returns = true}")
    assert out[1].startswith("// -----// IR after forget")  # it takes a fact away
    assert out[2:] == ["// -----// IR not changed by mute //----- //\n"]


def test_new_tensors_are_a_change() -> None:
    import torch

    before = replace(tiny(), resources=ResourceStore({"g": torch.ones(4)}))
    after = replace(before, resources=ResourceStore({"g": torch.zeros(4)}))
    out: list[str] = []
    watch = PrintAfter(out.append, only_changes=True)
    watch.after(Stretch(factor=1.0), before, after)
    assert out[0].startswith("// -----// IR after stretch")


def test_a_pass_that_returns_no_module_is_named() -> None:
    with pytest.raises(PassError, match="returned a NoneType, not a Module") as caught:
        run_pipeline(tiny(), [Mute()], PassContext(), table={**TABLE, "mute": Mute})
    assert caught.value.notes[0] == "in pass mute"


def test_dumps_restart_and_hold_only_what_is_new(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "07-old.sbir").write_text("old")
    (folder / "notes.txt").write_text("mine")
    module = tiny()
    module = replace(module, resources=ResourceStore({"g": torch.ones(4)}))
    passes = [Stretch(), Forget(), Stretch(factor=3.0)]
    made = run_pipeline(module, passes, PassContext(), [DumpIR(folder)], table=TABLE)
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-input.safetensors", "00-input.sbir", "01-stretch.safetensors", "01-stretch.sbir",
        "02-forget.sbir", "03-stretch.safetensors", "03-stretch.sbir", "notes.txt",
    ]  # fmt: skip
    again, _ = read_module(folder / "02-forget.sbir")
    assert again.tensors == ("00-input.safetensors", "01-stretch.safetensors")
    assert again.resources.numpy("g").tolist() == [2.0] * 4
    restarted = run_pipeline(again, passes[2:], PassContext(), table=TABLE)
    assert print_module(replace(restarted, tensors=())) == print_module(made)
    with pytest.raises(UsageError, match="the input lies in the dump folder"):
        run_pipeline(again, passes, PassContext(), [DumpIR(folder)], table=TABLE)


def test_a_module_that_became_invalid_names_pass_and_last_dump(tmp_path: Path) -> None:
    watch = [DumpIR(tmp_path), VerifyEach()]
    with pytest.raises(VerifyError, match="must be a matrix") as caught:
        run_pipeline(tiny(), [Stretch(), Break()], PassContext(), watch, table=TABLE)
    text = str(caught.value)
    assert "the module became invalid in pass break" in text
    assert f"the last valid module is {tmp_path / '01-stretch.sbir'}" in text
    assert f"scalebitsc opt {tmp_path / '01-stretch.sbir'} -p break" in text
    assert not (tmp_path / "02-break.sbir").exists()


def test_a_crash_is_an_error_that_names_pass_and_place() -> None:
    with pytest.raises(PassError, match="break crashed: ZeroDivisionError: oops") as caught:
        run_pipeline(tiny(), [Break(crash=True)], PassContext(), table=TABLE)
    assert "in pass break{crash = true}" in caught.value.notes
    assert any("raised in run at" in note for note in caught.value.notes)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_save_keeps_files_that_are_there_and_adds_what_is_new(tmp_path: Path) -> None:
    import torch

    module = replace(tiny(), resources=ResourceStore({"g": torch.ones(4), "unused": torch.ones(9)}))
    save_module(module, tmp_path / "a.sbir")
    read, _ = read_module(tmp_path / "a.sbir")
    assert list(read.resources) == ["g"]
    more = read.with_weights([
        Weight(symbol="h", type=read.weights["g"].type, data=Resource("h")),
    ])  # fmt: skip
    more = replace(
        more, resources=more.resources.with_({"h": torch.zeros(4, dtype=torch.bfloat16)})
    )
    save_module(more, tmp_path / "b.sbir")
    again, _ = read_module(tmp_path / "b.sbir")
    assert again.tensors == ("a.safetensors", "b.safetensors")
    assert again.resources.torch("h").dtype == torch.bfloat16
    save_module(again, tmp_path / "c.sbir")
    assert not (tmp_path / "c.safetensors").exists()
    other = tmp_path / "other"
    other.mkdir()
    save_module(again, other / "d.sbir")
    moved, _ = read_module(other / "d.sbir")
    assert sorted(moved.resources) == ["g", "h"]
    save_module(again, tmp_path / "a.sbir")  # over the file that it reads from
    whole, _ = read_module(tmp_path / "a.sbir")
    assert whole.resources.numpy("g").tolist() == [1.0] * 4


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    import torch

    module = replace(tiny(), resources=ResourceStore({"g": torch.ones(5)}))
    with pytest.raises(IRError, match=r"data of @g is the tensor F32\[5\], it must be F32"):
        run_pipeline(module, [], PassContext(), [VerifyEach()])
