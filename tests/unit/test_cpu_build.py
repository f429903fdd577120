"""What the CPU kernels are compiled to, and what stops their compilation."""

import platform

import pytest

from scalebits_compiler.errors import TargetError
from scalebits_compiler.runtime.cpu_features import cpu_features

pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")
from scalebits_compiler.codegen.tvm.build import (
    build_functions,
    build_module,
    compile_kernels,
    find_linker,
)
from scalebits_compiler.codegen.tvm.spec import KernelSpec, host_variants, select_specs

X86 = platform.machine() in ("x86_64", "AMD64")


def small_specs():
    return {
        name: [KernelSpec(name, "gemv", variant.modes[0], 32, 16, 32, (3, 4))]
        for name, variant in host_variants().items()
    }


def test_same_specs_same_bytes(tmp_path):
    compile_kernels(small_specs(), tmp_path / "a" / "k.so")
    compile_kernels(small_specs(), tmp_path / "b" / "other.so")
    first = (tmp_path / "a" / "k.so").read_bytes()
    assert first == (tmp_path / "b" / "other.so").read_bytes()
    assert b"scalebits-" not in first  # the temporary folder


@pytest.mark.skipif(not X86, reason="x86 assembly")
def test_instructions():
    assembly = {}
    for name, specs in small_specs().items():
        module = build_module(name, build_functions(name, specs))
        assembly[name] = module.inspect_source("asm")
    assert "vpdpbusd" in assembly["vnni"]
    assert "vpmaddwd" in assembly["avx2"]
    assert "zmm" not in assembly["avx2"]


def test_compile_errors(monkeypatch, tmp_path):
    with pytest.raises(TargetError, match="cannot be compiled on this machine"):
        build_module("quantum", {})
    with pytest.raises(TargetError, match="no packed matrix"):
        select_specs([])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match="no linker found"):
        find_linker()


def test_cpu_features(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2  fma\n\nflags\t: other\n")
    assert cpu_features(path) == {"fpu", "avx2", "fma"}
    path.write_text("processor\t: 0\nFeatures\t: asimd\n")
    assert cpu_features(path) == {"asimd"}
    assert cpu_features(tmp_path / "none") == frozenset()
