"""Plugins: files, installed packages, names that clash."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scalebits_compiler.codegen.reference import ReferenceTarget
from scalebits_compiler.errors import UsageError
from scalebits_compiler.ir import calls
from scalebits_compiler.ir.parser import parse_module, read_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.save import save_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.plugins import Plugin, Registry, load_plugins

DEMO = Path(__file__).resolve().parents[1] / "plugins" / "demo_plugin"
MY_PASS = """
    from __future__ import annotations
    from dataclasses import dataclass, field, replace
    from typing import ClassVar

    from scalebits_compiler.ir.module import Module
    from scalebits_compiler.passes.base import Pass, PassContext

    @dataclass(frozen=True)
    class Rename(Pass):
        \"\"\"Give the module a new name.\"\"\"

        name: ClassVar[str] = "rename"
        to: str = field(metadata={"help": "the new name"})

        def run(self, module: Module, ctx: PassContext) -> Module:
            return replace(module, name=self.to)
"""
IMPORT = "\n    from scalebits_compiler.plugins import Plugin\n"
MODULE = """module @m {facts = ["canonical", "bits"]} {
  weight @a : f32[32, 64] {data = resource("a"), quantize = true, block = [16, 64], group = 32, bits = grid([[2], [6]])}
  weight @b : f32[64, 32] {data = resource("b"), quantize = true, block = [16, 64], group = 32, bits = grid([[1], [2], [3], [4]])}
  weight @c : f32[64, 64] {data = resource("c"), quantize = true, block = [16, 64], group = 32, bits = grid([[1], [1], [8], [1]])}
  func @f(%x: f32[?, 64]) -> f32[?, 64] {
    %0 = linear %x, @a : f32[?, 32] loc("model.layers.0.up")
    %1 = demo.gelu %0 {tanh = true} : f32[?, 32]
    %2 = linear %1, @b : f32[?, 64] loc("model.layers.1.down")
    %3 = linear %2, @c : f32[?, 64] loc("model.layers.2.up")
    return %3
  }
}
"""  # noqa: E501


def write_pass(folder: Path, name: str = "my_pass.py", text: str = MY_PASS) -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def test_a_file_brings_its_passes(tmp_path: Path) -> None:
    registry = load_plugins([write_pass(tmp_path)])
    assert registry.passes["rename"].__name__ == "Rename"  # type: ignore[union-attr]
    assert "Pass" not in registry.passes


def test_two_files_with_one_name_are_both_named(tmp_path: Path) -> None:
    one, two = write_pass(tmp_path), write_pass(tmp_path, "other.py")
    with pytest.raises(UsageError) as caught:
        load_plugins([one, two])
    assert caught.value.message == f"two plugins bring the pass 'rename': {one} and {two}"


@pytest.mark.parametrize("name", ["pack-blocks", "default"])
def test_our_own_names_are_taken(tmp_path: Path, name: str) -> None:
    path = write_pass(tmp_path, text=MY_PASS.replace('"rename"', f'"{name}"'))
    with pytest.raises(UsageError, match=f"pass '{name}': scalebits_compiler itself and"):
        load_plugins([path])


def test_ops_and_targets_clash_too() -> None:
    class Printer(ReferenceTarget):
        name = "printer"

    registry = Registry()
    registry.add(Plugin(targets=(Printer,)), "one")
    assert registry.targets == {"printer": Printer}
    with pytest.raises(UsageError, match="the target 'printer': one and two"):
        registry.add(Plugin(targets=(Printer,)), "two")
    with pytest.raises(UsageError, match="the target 'reference': scalebits_compiler itself and"):
        registry.add(Plugin(targets=(ReferenceTarget,)), "two")
    with pytest.raises(UsageError, match="the op 'silu': scalebits_compiler itself and three"):
        registry.add(Plugin(ops=(registry.ops["silu"],)), "three")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError"),
        ("x = 1", "brings nothing"),
        ("PLUGIN = 3", "PLUGIN is a int, not a Plugin"),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        (MY_PASS.replace('"rename"', '"re name"'), "Rename needs a name of .* it has 're name'"),
        (MY_PASS.replace('name: ClassVar[str] = "rename"', ""), "it has None"),
        (MY_PASS.replace("@dataclass(frozen=True)", ""), "states fields, but is no dataclass"),
        (MY_PASS.replace("to: str", "to: Nope"), "fields of Rename cannot be read: NameError"),
        (MY_PASS + f"{IMPORT}    PLUGIN = Plugin(passes=(Rename('x'),))", "no subclass of Pass"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_plugins([write_pass(tmp_path, text=text)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such Python file"):
        load_plugins([tmp_path / "no.py"])


@pytest.fixture(scope="module")
def installed() -> Iterator[dict[str, str]]:
    """An environment in which the demo plugin is installed, by pip, in a folder of its own."""
    pytest.importorskip("setuptools")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        copy.mkdir()
        for path in DEMO.rglob("*"):
            if path.suffix in (".py", ".toml") and "build" not in path.parts:
                made = copy / path.relative_to(DEMO)
                made.parent.mkdir(exist_ok=True)
                made.write_bytes(path.read_bytes())
        site = Path(folder) / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run(
            [*pip, "--no-build-isolation", "--target", str(site), str(copy)],
            check=True, capture_output=True,
        )  # fmt: skip
        yield {**os.environ, "PYTHONPATH": str(site)}


def scalebitsc(env: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scalebits_compiler.cli.main", *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_an_installed_plugin_is_listed(installed: dict[str, str]) -> None:
    done = scalebitsc(installed, "passes")
    assert done.returncode == 0, done.stderr
    assert "demo-keep-edges: Raise the blocks of the first and the last layer" in done.stdout
    assert "from the package scalebits-demo 0.1.0 (entry point 'demo')" in done.stdout
    assert "bits = 4  (int)  smallest width in the first and last layer" in done.stdout


def test_an_installed_plugin_runs(installed: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "m.sbir"
    source.write_text(MODULE)
    pipeline = "demo-keep-edges{bits = 5},demo-bit-histogram"
    done = scalebitsc(installed, "opt", str(source), "-p", pipeline, "--report")
    assert done.returncode == 0, done.stderr
    assert "bits = grid([[5], [6]])" in done.stdout
    assert "bits = grid([[1], [2], [3], [4]])" in done.stdout
    assert "bits = grid([[5], [5], [8], [5]])" in done.stdout
    assert '"1": {\n      "1": 1,' in done.stderr


def test_magnitude_scores_of_an_installed_plugin(installed: dict[str, str], tmp_path: Path) -> None:
    import torch

    text = MODULE.replace("demo.gelu %0 {tanh = true}", "silu %0")
    store = ResourceStore({"a": torch.ones(32, 64), "b": torch.ones(64, 32),
                           "c": torch.ones(64, 64)})  # fmt: skip
    save_module(replace(parse_module(text)[0], resources=store), tmp_path / "m.sbir")
    done = scalebitsc(
        installed, "opt", str(tmp_path / "m.sbir"), "-p", "demo-magnitude-sensitivity",
        "-o", str(tmp_path / "out.sbir"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    module, _ = read_module(tmp_path / "out.sbir")
    verify(module)
    assert "sensitivity" in module.facts
    assert module.resources.numpy("b.column_scores").tolist() == [64.0] * 32


def test_an_op_of_a_plugin_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from scalebits_compiler.interpreter import rules
    from scalebits_compiler.interpreter.executor import Executor

    monkeypatch.syspath_prepend(str(DEMO))
    from scalebits_demo import PLUGIN  # type: ignore[import-not-found]

    for op in PLUGIN.rules:
        monkeypatch.setitem(rules.RULES, op, None)  # taken out again after the test

    registry = Registry()
    registry.add(PLUGIN, "demo")
    registry.install_rules()
    text = (
        "module @m {\nfunc @f(%x: f32[?, 4]) -> f32[?, 4] {\n"
        "%0 = demo.gelu %x : f32[?, 4]\nreturn %0\n}\n}"
    )
    module, source = parse_module(text, ops=registry.ops)
    verify(module, source)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Executor(module).run(x), torch.nn.functional.gelu(x))


def test_calls_of_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_added", set())
    path = tmp_path / "calls.py"
    path.write_text(f"{IMPORT.strip()}\nPLUGIN = Plugin(calls=('torchvision.nms.default',))\n")
    assert not calls.is_call("torchvision.nms.default")
    load_plugins([path])
    assert calls.is_call("torchvision.nms.default")
    for name in ("aten.from_file.default", "os.system", "torch.load.x", "a.__class__.b", "a.b"):
        with pytest.raises(UsageError, match=f"{name}' is no operator of a torch library"):
            Registry().add(Plugin(calls=("torchvision.nms.default", name)), "one")
        assert not calls.is_call(name)
