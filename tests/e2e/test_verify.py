"""`scalebitsc verify` accepts what compile wrote, and names what is wrong in anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from scalebits_compiler.passes.pipeline import parse_passes
from scalebits_compiler.runtime.manifest import FileRecord, Manifest, sha256_of


def sign(folder: Path, change: Callable[[Manifest], Manifest] = lambda m: m) -> None:
    """Give the manifest the checksums of the files as they are now: a forger's work."""
    path = folder / "manifest.json"
    manifest = Manifest.from_json(path.read_text())
    files = {
        name: FileRecord(sha256_of(folder / name), (folder / name).stat().st_size)
        for name in manifest.files
    }
    path.write_text(change(replace(manifest, files=files)).to_json())


def test_what_compile_wrote(cli: Any, compiled: Any) -> None:
    ran = cli("verify", compiled.path, "-q")
    assert ran.code == 0, ran.err
    names = [line.split()[1] for line in ran.out.splitlines()]
    assert names == ["files", "module", "matrices", "summary", "plan"]
    told = json.loads(cli("verify", compiled.path, "-q", "--json").out)
    assert [check["name"] for check in told["checks"]] == names
    assert told["checks"][2]["detail"].startswith("14 unpack and pack to the same")


@pytest.mark.parametrize("name", ["model.safetensors", "module.sbir", "kernels/cpu.so"])
def test_a_changed_byte(
    cli: Any, compiled: Any, copy_of: Callable[[Path], Path], name: str
) -> None:
    copy = copy_of(compiled.path)
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    ran = cli("verify", copy, "-q")
    assert ran.code == 1
    assert f"{name} was changed after the build (checksum)" in ran.err


@pytest.mark.parametrize("line", ["rms_norm", "weight @rotary_emb.inv_freq"])
def test_a_module_that_lacks_what_it_reads(
    cli: Any, compiled: Any, copy_of: Callable[[Path], Path], line: str
) -> None:
    copy = copy_of(compiled.path)
    lines = (copy / "module.sbir").read_text().splitlines(keepends=True)
    lines.remove(next(text for text in lines if line in text))
    (copy / "module.sbir").write_text("".join(lines))
    sign(copy)
    for command in ("inspect", "verify"):
        ran = cli(command, copy)
        assert ran.code == 1
        assert f"{copy / 'module.sbir'}:" in ran.err


def test_a_module_of_another_plan(cli: Any, compiled: Any, copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(compiled.path)
    text = (copy / "module.sbir").read_text()
    (copy / "module.sbir").write_text(text.replace("eps = 1e-06", "eps = 1e-05"))
    assert (copy / "module.sbir").read_text() != text
    sign(copy)
    ran = cli("verify", copy, "-q")
    assert (ran.code, "the plan is not that of module.sbir" in ran.err) == (1, True)


def test_a_module_that_is_wrong(cli: Any, compiled: Any, copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(compiled.path)
    text = (copy / "module.sbir").read_text()
    (copy / "module.sbir").write_text(text.replace("= silu %", "= merge_heads %", 1))
    sign(copy)
    ran = cli("verify", copy, "-q")
    assert ran.code == 1
    assert "module.sbir:" in ran.err


def test_other_widths_and_sums(cli: Any, compiled: Any, copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(compiled.path)
    text = (copy / "module.sbir").read_text()
    start = text.index("grid([[") + len("grid([[")
    edited = f"{text[:start]}{9 - int(text[start])}{text[start + 1 :]}"
    # The digest of the widths at rounding shows the edit; without it, the bytes do.
    undigested = re.sub(r', rounded_at = "[0-9a-f]+"', "", edited)
    assert undigested != edited
    for module, told in (
        (edited, "the bits were changed after it was rounded"),
        (undigested, "has other widths than in module.sbir"),
    ):
        (copy / "module.sbir").write_text(module)
        sign(copy)
        ran = cli("verify", copy, "-q")
        assert (ran.code, told in ran.err) == (1, True), ran.err

    copy_path = copy / "module.sbir"
    copy_path.write_text(text)
    sign(copy, lambda m: replace(m, summary={**m.summary, "effective_bits": 1.5}))
    ran = cli("verify", copy, "-q")
    assert (ran.code, "the summary's effective_bits is not what" in ran.err) == (1, True)


def test_passes_as_json(cli: Any) -> None:
    told = json.loads(cli("passes", "--json").out)
    names = [item["name"] for item in told["passes"]]
    used = parse_passes(told["pipelines"]["default"])
    assert {item.name for item in used} <= {*names}
    (one,) = json.loads(cli("passes", "assign-bits", "--json").out)["passes"]
    assert one["requires"] == ["canonical"]
    assert one["origin"] == "scalebits_compiler itself"
    assert {"name": "avg-bits", "type": "float", "default": "3.0"}.items() <= (
        one["options"][0].items()
    )
