"""What a kernel set is, what is read of it, and CUDA kernels that this machine did not build."""

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from scalebits_compiler.artifact.repack import repack
from scalebits_compiler.codegen import kernel_cache as cache
from scalebits_compiler.codegen.triton.aot import Binary
from scalebits_compiler.codegen.triton.target import CudaTarget
from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cuda.session import interpreted
from scalebits_compiler.runtime.kernel_files import kernels_digest, shipped_kernels
from scalebits_compiler.runtime.manifest import (
    MANIFEST,
    FileRecord,
    Kernels,
    Manifest,
    sha256_of,
)
from scalebits_compiler.sessions.reference import load_reference
from scalebits_compiler.sessions.trust import built_here, trusted_kernels

SOURCE = "kernels/cuda.py"


@pytest.fixture
def asked(monkeypatch):
    """The architectures that kernels were compiled for: none are; this GPU is an sm_89."""
    asked = []

    def compiled(specs, archs, folder):
        asked.append(tuple(archs))
        return {spec.key: {arch: Binary(b"not run", 0, 2) for arch in archs} for spec in specs}

    monkeypatch.setattr("scalebits_compiler.codegen.triton.aot.compile_specs", compiled)
    monkeypatch.setattr("scalebits_compiler.runtime.cuda.session.gpu_arch", lambda: "sm_89")
    return asked


@pytest.fixture
def artifact(asked, build_module, module_shape, write, tmp_path):
    """A cuda artifact that this machine built."""
    small = module_shape(layers=1, hidden=56, inner=72, heads=2, groups=1)
    module = repack(build_module(small), CudaTarget.order)
    built = CudaTarget().build(module, tmp_path)
    asked.clear()
    return Artifact.open(write(module, kernels=built.kernels, files=built.files))


@pytest.fixture
def cubin(artifact):
    """The name of one of its binaries, for another GPU."""
    return next(name for name in artifact.manifest.files if name.endswith(".sm_80.cubin"))


def test_the_digest_is_of_all_code_and_of_the_table(artifact, cubin):
    manifest = artifact.manifest
    digest = kernels_digest(manifest)
    assert kernels_digest(Manifest.from_json(manifest.to_json())) == digest
    other = FileRecord("0" * 64, 6)

    def changed(**fields):
        return kernels_digest(structs.replace(manifest, **fields)) != digest

    assert changed(files={**manifest.files, cubin: other})
    assert changed(files={**manifest.files, SOURCE: other})
    assert not changed(files={**manifest.files, "config.json": other})
    assert changed(kernels=Kernels(SOURCE, {**manifest.kernels.dispatch, "dtype": "bf16"}))
    assert changed(kernels=Kernels(cubin, manifest.kernels.dispatch))


def test_what_is_read_is_what_was_checked(artifact, cubin):
    kernels = shipped_kernels(artifact)
    assert kernels.read(cubin) == b"not run"
    assert kernels.read(SOURCE) == (artifact.path / SOURCE).read_bytes()
    (artifact.path / cubin).write_bytes(b"evil!!!")
    with pytest.raises(ArtifactError, match="changed after the build"):
        kernels.read(cubin)
    for name in ("config.json", "kernels/../kernels/cuda.py", "../out/kernels/cuda.py"):
        with pytest.raises(ArtifactError, match="no kernel file of the manifest"):
            kernels.read(name)
    (artifact.path / cubin).unlink()
    with pytest.raises(FileNotFoundError):  # as for binaries that were left out
        kernels.read(cubin)


def test_the_cache_remembers_what_was_written(artifact, monkeypatch, tmp_path):
    assert built_here(artifact.manifest)
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / "other"))
    assert not built_here(artifact.manifest)
    assert not (tmp_path / "other").exists()  # asking writes nothing


def test_a_temporary_cache_takes_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / "cache"))
    with cache.temporary_cache():
        folder = cache.cache_folder()
        cache.store("name", b"data")
        assert (cache.load("name"), folder.parent == tmp_path) == (b"data", False)
    assert cache.load("name") is None
    assert (cache.cache_folder(), folder.exists()) == (tmp_path / "cache", False)


@pytest.fixture
def foreign(artifact, tmp_path):
    """(artifact, file): its source makes the file when it is imported; all digests fit."""
    marker, source = tmp_path / "marker", artifact.path / SOURCE
    evil = source.read_bytes() + f"\nopen({str(marker)!r}, 'w').close()\n".encode()
    source.write_bytes(evil)
    files = {**artifact.manifest.files, SOURCE: FileRecord(sha256_of(source), len(evil))}
    target = {"kind": "cuda", "arch": "sm_80,sm_90", "dtype": "fp16"}
    edited = structs.replace(artifact.manifest, files=files, target=target)
    (artifact.path / MANIFEST).write_text(edited.to_json())
    return Artifact.open(artifact.path), marker


def test_foreign_cuda_source_is_not_imported(foreign, cubin, asked, triton_interpreter):
    artifact, marker = foreign
    lines, ids = [], np.array([[1]])
    kernels = trusted_kernels(artifact, tell=lines.append)
    assert asked == [("sm_89",)]  # for this GPU alone
    (line,) = lines
    assert "were not built on this machine: building them from its module" in line
    table = artifact.manifest.kernels.dispatch["kernels"]
    assert kernels.dispatch["kernels"].keys() == table.keys()
    for kernel in kernels.dispatch["kernels"].values():
        assert kernels.read(kernel["binaries"]["sm_89"]["file"]) == b"not run"
    with pytest.raises(FileNotFoundError):
        kernels.read(cubin)
    logits = interpreted(artifact, kernels, 1).forward(ids)
    expected = load_reference(artifact.path).forward(ids)
    assert np.abs(logits - expected).max() < 5e-3 * expected.std()
    again = trusted_kernels(artifact, tell=lines.append)
    assert again.read(SOURCE) == kernels.read(SOURCE) != (artifact.path / SOURCE).read_bytes()
    assert (len(lines), len(asked)) == (1, 1)  # from the cache
    assert not marker.exists()
    interpreted(artifact, trusted_kernels(artifact, trust_kernels=True), 1).forward(ids)
    assert marker.exists()


def with_target(artifact, **target):
    return replace(artifact, manifest=structs.replace(artifact.manifest, target=target))


@pytest.mark.parametrize("option", [{"arch": "sm_1"}, {"dtype": ["fp16"]}, {"evil": 1}])
def test_options_that_no_target_has_are_refused(option, foreign, asked, monkeypatch):
    artifact, _ = foreign
    arch = option.get("arch", "sm_90")
    monkeypatch.setattr("scalebits_compiler.runtime.cuda.session.gpu_arch", lambda: arch)
    edited = with_target(artifact, **{**artifact.manifest.target, **option})
    with pytest.raises(ArtifactError, match="cannot be built here") as error:
        trusted_kernels(edited, tell=lambda line: None)
    assert "--trust-kernels" in error.value.help
    assert not asked


def test_a_target_without_kernels_builds_none(foreign):
    artifact, _ = foreign
    with pytest.raises(ArtifactError, match="its target has no kernels"):
        trusted_kernels(with_target(artifact, kind="reference"), tell=lambda line: None)
    with pytest.raises(ArtifactError, match="there is no target 'evil:module'") as error:
        trusted_kernels(with_target(artifact, kind="evil:module"), tell=lambda line: None)
    (note,) = error.value.notes
    assert note.startswith("to build them, ")
