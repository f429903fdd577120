"""What the CPU kernels are compiled to, and what stops their compilation."""

import errno
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from scalebits_compiler.codegen import kernel_cache
from scalebits_compiler.codegen.triton.target import CudaTarget
from scalebits_compiler.errors import TargetError
from scalebits_compiler.runtime.cpu.features import cpu_features, prefetch_distance

pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")
import tvm

from scalebits_compiler.codegen.tvm import objects
from scalebits_compiler.codegen.tvm.build import (
    build_functions,
    compile_kernels,
    find_linker,
)
from scalebits_compiler.codegen.tvm.objects import lowered
from scalebits_compiler.codegen.tvm.spec import KernelSpec, OpSpec, host_variants, select_specs
from scalebits_compiler.codegen.tvm.target import CpuTarget

X86 = platform.machine() in ("x86_64", "AMD64")


def small_specs():
    return {
        name: [KernelSpec(name, "gemv", variant.modes[0], 32, 16, 32, (3, 4))]
        for name, variant in host_variants().items()
    }


def test_same_specs_same_bytes(tmp_path, monkeypatch):
    for name in "ab":
        monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / f"cache-{name}"))
        compile_kernels(small_specs(), tmp_path / name / f"{name}.so")
    first = (tmp_path / "a" / "a.so").read_bytes()
    assert first == (tmp_path / "b" / "b.so").read_bytes()
    assert b"scalebits-" not in first  # the temporary folder


def test_objects_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / "cache"))
    compiled = []
    monkeypatch.setattr(
        objects, "lowered", lambda *a, lower=objects.lowered: compiled.append(a) or lower(*a)
    )
    sources = compile_kernels(small_specs(), tmp_path / "first.so")
    assert len(compiled) == len(sources)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == len(sources)
    assert compile_kernels(small_specs(), tmp_path / "again.so") == sources
    assert len(compiled) == len(sources)

    (empty, cut, other), data = sorted(kept)[:3], sorted(kept.items())
    (tmp_path / "cache" / empty).write_bytes(b"")
    (tmp_path / "cache" / cut).write_bytes(kept[cut][:-1])
    (tmp_path / "cache" / other).write_bytes(kept[other][:-1] + b"?")
    compile_kernels(small_specs(), tmp_path / "damaged.so")
    assert len(compiled) == len(sources) + 3
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache").iterdir()) == data
    libraries = {path.read_bytes() for path in tmp_path.glob("*.so")}
    assert len(libraries) == 1


def test_what_an_object_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path))
    monkeypatch.setattr(objects, "lowered", lambda *_: Written())

    def kept(script="text"):
        objects._compiler.cache_clear()
        objects.object_of(next(iter(host_variants())), None, script)
        return len(list(tmp_path.iterdir()))

    assert (kept(), kept(), kept(script="other")) == (1, 1, 2)
    monkeypatch.setattr(objects, "version", lambda package: f"{package} of another time")
    assert kept() == 3
    monkeypatch.setattr(objects, "LOWERING", objects.LOWERING[1:])
    assert kept() == 4
    other = {name: replace(variant, mattr=("+x",)) for name, variant in host_variants().items()}
    monkeypatch.setattr(objects, "host_variants", lambda: other)
    assert kept() == 5
    monkeypatch.undo()
    objects._compiler.cache_clear()


class Written:
    def write_to_file(self, path, _):
        Path(path).write_bytes(b"object")


def test_a_script_is_the_whole_function():
    """What TVM reads back is the same, to the last digit of a constant."""
    name = next(iter(host_variants()))
    function = build_functions(name, [OpSpec(name, "gelu_tanh")])[OpSpec(name, "gelu_tanh").key]
    again = tvm.script.from_source(function.script())
    tvm.ir.assert_structural_equal(again, function)


@pytest.mark.parametrize("odd", ["file", "dangling link", "below a file"])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, odd):
    folder, reason = tmp_path / "cache", "is not a folder"
    if odd == "dangling link":
        folder.symlink_to(tmp_path / "nowhere" / "far")
    else:
        folder.write_bytes(b"")
    if odd == "below a file":
        folder, reason = folder / "inner", "cannot be written: Not a directory"
    monkeypatch.setenv("SCALEBITS_CACHE", str(folder))
    for target in (CpuTarget(), CudaTarget()):
        with pytest.raises(TargetError, match=f"the kernel cache {folder} {reason}") as error:
            target.check()
        assert "SCALEBITS_CACHE" in error.value.help


def test_no_home(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("SCALEBITS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert kernel_cache.load("name") is None
    assert not kernel_cache.remembers("digest")
    message = f"HOME is not set, and the user {os.getuid()} has no home folder"
    for target in (CpuTarget(), CudaTarget()):
        with pytest.raises(TargetError, match=message) as error:
            target.check()
        assert "set HOME" in error.value.help
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path))
    CudaTarget().check()
    with pytest.raises(TargetError, match=message):
        CpuTarget().check()  # TVM could not be imported
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    CpuTarget().check()


def test_odd_entries_of_the_cache(tmp_path, monkeypatch):
    """A pipe and a link to nowhere are replaced; a folder may hold something, and is named."""
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "far")
    for name in ("pipe", "link"):
        assert kernel_cache.load(name) is None
        kernel_cache.store(name, b"data")
        assert kernel_cache.load(name) == b"data"
    (tmp_path / "folder").mkdir()
    assert kernel_cache.load("folder") is None
    with pytest.raises(
        TargetError, match=f"{tmp_path / 'folder'} cannot be written: Is a"
    ) as error:
        kernel_cache.store("folder", b"data")
    remedy = f"remove {tmp_path / 'folder'}: it is in the place of something else, or name another"
    assert error.value.help == f"{remedy} folder in the environment variable SCALEBITS_CACHE"
    (tmp_path / "known").write_bytes(b"")
    assert not kernel_cache.remembers("digest")
    with pytest.raises(TargetError, match=f"{tmp_path / 'known'} cannot be written: File exists"):
        kernel_cache.remember("digest")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EMFILE, "ulimit -n 1024, or name another folder"),
        (errno.ENOSPC, "make room on that disk, or name another folder"),
        (errno.EACCES, "name another folder"),
    ],
)
def test_a_cache_at_a_limit(tmp_path, monkeypatch, code, remedy):
    def refuse(**_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(TargetError, match=f"cannot be written: {os.strerror(code)}") as error:
        CpuTarget().check()
    assert remedy in error.value.help


@pytest.mark.parametrize(
    ("script", "reason", "remedy"),
    [
        ("echo 'ld: cannot find a.o: Too many open files' >&2; exit 1", "Too many", "ulimit -n"),
        ("echo 'ld: final link failed: No space left on device' >&2; exit 1", "No space", "room"),
        ("kill -XFSZ $$", "signal SIGXFSZ has ended it", "ulimit -f"),
        ("echo 'ld: unknown target' >&2; echo more >&2; exit 1", "ld: unknown target", "machine"),
        ("exit 3", "exit code 3", "this linker is for this machine"),
    ],
)
def test_why_linking_failed(tmp_path, monkeypatch, script, reason, remedy):
    linker = tmp_path / "ld"
    linker.write_text(f"#!/bin/sh\n{script}\n")
    linker.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(linker))
    monkeypatch.setattr("scalebits_compiler.codegen.tvm.build.object_of", lambda *_: b"object")
    with pytest.raises(TargetError, match=f"could not link the kernels to .*: .*{reason}") as error:
        compile_kernels(small_specs(), tmp_path / "cpu.so")
    assert remedy in error.value.help
    assert error.value.notes == (["more"] if "more" in script else [])


@pytest.mark.skipif(not X86, reason="x86 assembly")
def test_instructions():
    assembly = {}
    for name, specs in small_specs().items():
        modules = [lowered(name, made) for made in build_functions(name, specs).values()]
        assembly[name] = "".join(module.inspect_source("asm") for module in modules)
    assert "vpdpbusd" in assembly["vnni"]
    assert "vpmaddwd" in assembly["avx2"]
    assert "zmm" not in assembly["avx2"]


def test_compile_errors(monkeypatch, tmp_path):
    with pytest.raises(TargetError, match="cannot be compiled on this machine"):
        lowered("quantum", None)
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


def test_prefetch_distance(tmp_path):
    path = tmp_path / "cpuinfo"
    for vendor, bytes_ahead in (("GenuineIntel", 4096), ("AuthenticAMD", 192)):
        path.write_text(f"processor : 0\nvendor_id\t: {vendor}\nflags\t\t: fpu\n")
        assert prefetch_distance(path) == bytes_ahead
    assert prefetch_distance(tmp_path / "none") == 192
