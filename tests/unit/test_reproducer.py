"""The bundle that a failing pass leaves, and `opt --reproduce`."""

from __future__ import annotations

import contextlib
import io
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from scalebits_compiler.errors import PassError, ScalebitsError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.parser import parse_module, read_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.save import save_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.passes.reproducer import synthetic

TEXT = """module @m {facts = ["canonical", "bits", "rounded"], calibration = resource("ids")} {
  perm @p : i32[64] {data = resource("p")}
  weight @table : f32[50, 64@p] {data = resource("table")}
  weight @gain : f32[64@p] {data = resource("gain")}
  weight @w : f32[2176, 64@p] {data = resource("w"), quantize = true, block = [16, 32], group = 32, bits = resource("w.bits"), hist = [[2, 200], [5, 72]], codes = resource("w.codes"), scales = resource("w.scales")}
  func @f(%ids: i64[?, ?]) -> f32[?, ?, 2176] {
    %0 = embedding %ids, @table : f32[?, ?, 64@p]
    %1 = rms_norm %0, @gain {eps = 1e-05} : f32[?, ?, 64@p]
    %2 = linear %1, @w : f32[?, ?, 2176]
    return %2
  }
}
"""  # noqa: E501
PLUGIN = """
    from dataclasses import dataclass, replace
    from typing import ClassVar
    from scalebits_compiler.errors import PassError
    from scalebits_compiler.passes.base import Pass

    @dataclass(frozen=True)
    class Fail(Pass):
        \"\"\"Fails in one of three ways.\"\"\"

        name: ClassVar[str] = "fail"
        how: str

        def run(self, module, ctx):
            if self.how == "refuse":
                raise PassError("cannot do it")
            if self.how == "break":
                return module.with_weights([replace(module.weights["w"], codes=None)])
            return 1 // 0
"""


def full_module() -> Module:
    import torch

    generator = torch.Generator().manual_seed(0)
    bits = torch.tensor([2] * 200 + [5] * 72, dtype=torch.uint8).reshape(136, 2)
    secret = torch.full((2176, 64), 7.25)
    store = {
        "p": torch.randperm(64, generator=generator).to(torch.int32),
        "table": torch.full((50, 64), 7.25, dtype=torch.bfloat16),
        "gain": torch.full((64,), 7.25), "w": secret, "w.bits": bits,
        "w.codes": torch.full((2176, 64), 3, dtype=torch.uint8),
        "w.scales": torch.full((2176, 2), 7.25, dtype=torch.float16),
        "ids": torch.full((3, 8), 49, dtype=torch.int32),
    }  # fmt: skip
    return replace(parse_module(TEXT)[0], resources=ResourceStore(store))


def test_made_up_tensors_fit_and_hold_nothing_of_the_user() -> None:
    module = full_module()
    verify(module)
    made = replace(module, resources=synthetic(module))
    verify(made)
    assert sorted(made.resources) == sorted(module.resources)
    for key in made.resources:
        assert made.resources.shape(key) == module.resources.shape(key)
        assert made.resources.dtype(key) == module.resources.dtype(key)
        if key not in ("w.bits", "p"):
            same = made.resources.torch(key) == module.resources.torch(key)
            assert same.float().mean() < 0.2, key
    assert int(made.resources.torch("ids").max()) < 50


def opt(*argv: str) -> tuple[ScalebitsError | None, str]:
    """Runs `scalebitsc opt`; (its error, standard output)."""
    import argparse

    from scalebits_compiler.cli import opt as command

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["opt", *argv])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            command.run(args)
        except ScalebitsError as error:
            return error, out.getvalue()
    return None, out.getvalue()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(module file, plugin file), in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_module(full_module(), tmp_path / "m.sbir")
    (tmp_path / "fail.py").write_text(textwrap.dedent(PLUGIN))
    return "m.sbir", "fail.py"


@pytest.mark.parametrize(("how", "message"), [("crash", "ZeroDivisionError"),
                                              ("break", "@w has no codes")])  # fmt: skip
def test_a_failing_pass_leaves_a_bundle_that_replays(
    files: tuple[str, str], how: str, message: str
) -> None:
    module, plugin = files
    pipeline = f'fail{{how = "{how}"}}'
    error, _ = opt(module, "-p", pipeline, "--plugin", plugin)
    assert message in str(error)
    command = "scalebitsc opt --plugin fail.py --reproduce scalebits-reproducer"
    assert f"a reproducer with made-up tensors: {command}" in str(error)
    bundle = Path("scalebits-reproducer")
    assert (bundle / "pipeline.txt").read_text() == pipeline + "\n"
    assert "Traceback" in (bundle / "error.txt").read_text()
    read, _ = read_module(bundle / "module.sbir")
    assert float(read.resources.torch("w").abs().max()) < 7.25
    again, _ = opt("--plugin", plugin, "--reproduce", str(bundle))
    assert message in str(again)


def test_a_plain_refusal_leaves_a_bundle_only_beside_dumps(files: tuple[str, str]) -> None:
    module, plugin = files
    pipeline = 'fail{how = "refuse"}'
    error, _ = opt(module, "-p", pipeline, "--plugin", plugin)
    assert isinstance(error, PassError)
    assert not Path("scalebits-reproducer").exists()
    error, _ = opt(module, "-p", pipeline, "--plugin", plugin, "--dump-ir", "dump")
    assert Path("dump/reproducer/module.sbir").exists()
    text = str(error)
    assert "the last valid module is dump/00-input.sbir" in text
    assert "scalebitsc opt --plugin fail.py dump/00-input.sbir -p 'fail{how = \"refuse\"}'" in text


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    error, _ = opt("--reproduce", str(tmp_path))
    assert f"{tmp_path} is no reproducer" in str(error)


def test_the_empty_pipeline_prints_the_file_back(files: tuple[str, str]) -> None:
    error, out = opt(files[0], "-p", "")
    assert error is None
    assert out == Path(files[0]).read_text()
    assert "m.safetensors" in out
