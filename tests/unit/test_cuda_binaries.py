"""What the CUDA binaries are made of, read with the cuobjdump of the triton package; no GPU."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scalebits_compiler.codegen.triton import aot
from scalebits_compiler.codegen.triton.aot import compile_specs
from scalebits_compiler.errors import TargetError
from scalebits_compiler.runtime.cuda.spec import KernelSpec

pytest.importorskip("triton", reason="the cuda target's kernels need Triton")

DECODE = KernelSpec("matvec", "fp16", 128, 128, (2, 3), False)
DECODE_ALL = KernelSpec("matvec", "bf16", 128, 128, tuple(range(1, 9)), False)
FEW = KernelSpec("matmul", "fp16", 128, 128, (2, 3), False, 16)
PREFILL = KernelSpec("matmul", "bf16", 128, 128, (3, 4), False, 64)
# Of all sets that were tried the one that needs most registers.
WORST = KernelSpec("matmul", "fp16", 128, 128, (3, 5, 6, 7), False, 64)
DENSE = KernelSpec("dequantize", "fp16", 128, 128, (3,), False)
DENSE_ALL = KernelSpec("dequantize", "bf16", 128, 128, tuple(range(1, 9)), False)
GATHER = KernelSpec("matmul", "fp16", 128, 128, (3,), False, 16, gather=True)
GATHER_DENSE = replace(DENSE, gather=True)
BUILT = [
    (DECODE, "sm_80"), (DECODE, "sm_89"), (DECODE, "sm_90"),
    (DECODE_ALL, "sm_90"), (FEW, "sm_80"), (FEW, "sm_89"), (FEW, "sm_90"), (PREFILL, "sm_90"),
    (WORST, "sm_89"), (DENSE, "sm_90"), (DENSE_ALL, "sm_90"),
    (GATHER, "sm_80"), (GATHER, "sm_89"), (GATHER, "sm_90"), (GATHER_DENSE, "sm_90"),
]  # fmt: skip
# What a program may use of each architecture's shared memory, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}


@dataclass(frozen=True)
class Listing:
    registers: int
    stack: int
    opcodes: Counter


def cuobjdump(path, option):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def listing(image, path):
    path.write_bytes(image)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(path, "-res-usage"))
    assert usage is not None
    lines = re.findall(
        r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", cuobjdump(path, "-sass")
    )
    return Listing(int(usage[1]), int(usage[2]), Counter(lines))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(spec, arch) -> binary, compiled once for all tests."""
    found, folder = {}, tmp_path_factory.mktemp("build")
    for spec in dict.fromkeys(spec for spec, _ in BUILT):
        archs = [arch for other, arch in BUILT if other == spec]
        made = compile_specs([spec], archs, folder)[spec.key]
        found |= {(spec, arch): made[arch] for arch in archs}
    return found


@pytest.mark.parametrize(("spec", "arch"), BUILT, ids=lambda item: getattr(item, "key", item))
def test_nothing_spills_and_nothing_is_converted(spec, arch, built, tmp_path):
    binary = built[spec, arch]
    found = listing(binary.image, tmp_path / "kernel.cubin")
    assert sum(found.opcodes.values()) > 200
    assert (found.stack, found.opcodes["LDL"], found.opcodes["STL"]) == (0, 0, 0)
    assert not [name for name in found.opcodes if name.startswith("I2F")]
    assert found.registers < 255
    assert binary.shared <= SHARED[arch]
    if spec.kind == "matmul":
        assert found.opcodes["HMMA"] + found.opcodes["HGMMA"] > 0
    if spec.stages > 1:
        assert found.opcodes["LDGSTS"] > 0  # tiles are loaded ahead


def test_a_conversion_would_be_seen(tmp_path, monkeypatch):
    """The check above can fail: with a plain conversion in the source there are I2F."""
    plain = aot.emit_module([DENSE]).replace(".to(kind, bitcast=True)", ".to(kind)")
    monkeypatch.setattr(aot, "emit_module", lambda specs: plain)
    binary = compile_specs([DENSE], ["sm_80"], tmp_path)[DENSE.key]["sm_80"]
    opcodes = listing(binary.image, tmp_path / "kernel.cubin").opcodes
    assert [name for name in opcodes if name.startswith("I2F")]


def test_the_cache_is_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path))
    calls = []
    compiled = {"sm_90": aot.Binary(b"\x00binary\n\xff", 48, 2)}
    monkeypatch.setattr(aot, "_compile", lambda spec, *_: calls.append(spec) or compiled)
    for _ in range(2):
        assert compile_specs([DENSE], ["sm_90"], tmp_path) == {DENSE.key: compiled}
    assert calls == [DENSE]
    compile_specs([DECODE], ["sm_90"], tmp_path)
    assert calls == [DENSE, DECODE]
    assert len(list(tmp_path.glob("*.kernel"))) == len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert compile_specs([DENSE], ["sm_90"], tmp_path) == {DENSE.key: compiled}
    assert calls == [DENSE, DECODE, DENSE]


def test_what_triton_refuses_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path))
    monkeypatch.setattr(aot, "emit_module", lambda specs: "import triton\n")
    with pytest.raises(TargetError, match="could not compile the kernel dequantize_fp16"):
        compile_specs([DENSE], ["sm_90"], tmp_path)
