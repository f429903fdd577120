"""What a kernel set is, what is read of it, and CUDA kernels that this machine did not build."""

import json
from dataclasses import replace

import numpy as np
import pytest

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

SOURCE, CUBIN = "kernels/cuda.py", "kernels/a.sm_90.cubin"


@pytest.fixture
def artifact(build_module, module_shape, write):
    """An artifact with two files of code that nobody runs."""
    table = {"kernels": {"a": {"binaries": {"sm_90": {"file": CUBIN}}}}}
    files = {SOURCE: b"source", CUBIN: b"binary"}
    module = build_module(module_shape(layers=1))
    return Artifact.open(write(module, kernels=Kernels(SOURCE, table), files=files))


def test_the_digest_is_of_all_code_and_of_the_table(artifact):
    manifest = artifact.manifest
    digest = kernels_digest(manifest)
    assert kernels_digest(Manifest.from_json(manifest.to_json())) == digest
    other = FileRecord("0" * 64, 6)
    assert kernels_digest(replace(manifest, files={**manifest.files, CUBIN: other})) != digest
    assert kernels_digest(replace(manifest, files={**manifest.files, SOURCE: other})) != digest
    data = {**manifest.files, "config.json": other}
    assert kernels_digest(replace(manifest, files=data)) == digest
    assert manifest.kernels is not None
    table = Kernels(SOURCE, {"kernels": {}})
    assert kernels_digest(replace(manifest, kernels=table)) != digest
    assert kernels_digest(replace(manifest, kernels=replace(manifest.kernels, library=CUBIN))) != (
        digest
    )


def test_what_is_read_is_what_was_checked(artifact):
    kernels = shipped_kernels(artifact)
    assert (kernels.read(SOURCE), kernels.read(CUBIN)) == (b"source", b"binary")
    (artifact.path / CUBIN).write_bytes(b"b1nary")
    with pytest.raises(ArtifactError, match="changed after the build"):
        kernels.read(CUBIN)
    for name in ("config.json", "kernels/../kernels/cuda.py", "../out/kernels/cuda.py"):
        with pytest.raises(ArtifactError, match="no kernel file of the manifest"):
            kernels.read(name)
    (artifact.path / CUBIN).unlink()
    with pytest.raises(FileNotFoundError):  # as for binaries that were left out
        kernels.read(CUBIN)


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
def foreign(build_module, module_shape, write, monkeypatch, tmp_path, triton_interpreter):
    """(artifact, file): a cuda artifact whose source makes the file when it is imported."""
    asked = []

    def compiled(specs, archs):
        asked.append(tuple(archs))
        return {spec.key: {arch: Binary(b"not run", 0, 2) for arch in archs} for spec in specs}

    monkeypatch.setattr("scalebits_compiler.codegen.triton.aot.compile_specs", compiled)
    monkeypatch.setattr("scalebits_compiler.runtime.cuda.session.gpu_arch", lambda: "sm_89")
    small = module_shape(layers=1, hidden=56, inner=72, heads=2, groups=1)
    module = repack(build_module(small), CudaTarget.order)
    built = CudaTarget().build(module, tmp_path)
    marker = tmp_path / "marker"
    evil = built.files[SOURCE] + f"\nopen({str(marker)!r}, 'w').close()\n".encode()
    path = write(module, kernels=built.kernels, files=built.files)
    (path / SOURCE).write_bytes(evil)
    manifest = Manifest.from_json((path / MANIFEST).read_text())
    files = {**manifest.files, SOURCE: FileRecord(sha256_of(path / SOURCE), len(evil))}
    target = {"kind": "cuda", "arch": "sm_80,sm_90", "dtype": "fp16"}
    (path / MANIFEST).write_text(replace(manifest, files=files, target=target).to_json())
    asked.clear()
    return Artifact.open(path), marker, asked


def test_foreign_cuda_source_is_not_imported(foreign):
    artifact, marker, asked = foreign
    lines, ids = [], np.array([[1]])
    kernels = trusted_kernels(artifact, tell=lines.append)
    assert asked == [("sm_89",)]  # for this GPU alone
    (line,) = lines
    assert "were not built on this machine: building them from its module" in line
    assert (
        kernels.dispatch["kernels"].keys() == artifact.manifest.kernels.dispatch["kernels"].keys()
    )
    for kernel in kernels.dispatch["kernels"].values():
        assert kernels.read(kernel["binaries"]["sm_89"]["file"]) == b"not run"
    with pytest.raises(FileNotFoundError):
        kernels.read(CUBIN)
    logits = interpreted(artifact, kernels, 1).forward(ids)
    expected = load_reference(artifact.path).forward(ids)
    assert np.abs(logits - expected).max() < 5e-3 * expected.std()
    again = trusted_kernels(artifact, tell=lines.append)
    assert again.read(SOURCE) == kernels.read(SOURCE) != (artifact.path / SOURCE).read_bytes()
    assert (len(lines), len(asked)) == (1, 1)  # from the cache
    assert not marker.exists()
    interpreted(artifact, trusted_kernels(artifact, trust_kernels=True), 1).forward(ids)
    assert marker.exists()


@pytest.mark.parametrize("option", [{"arch": "sm_1"}, {"dtype": ["fp16"]}, {"evil": 1}])
def test_options_that_no_target_has_are_refused(option, foreign, monkeypatch):
    artifact, _, asked = foreign
    monkeypatch.setattr(
        "scalebits_compiler.runtime.cuda.session.gpu_arch", lambda: option.get("arch", "sm_90")
    )
    manifest = replace(artifact.manifest, target={**artifact.manifest.target, **option})
    with pytest.raises(ArtifactError, match="cannot be built here") as error:
        trusted_kernels(replace(artifact, manifest=manifest), tell=lambda line: None)
    assert "--trust-kernels" in error.value.help
    assert not asked


def test_a_target_without_kernels_builds_none(artifact, monkeypatch, tmp_path):
    monkeypatch.setenv("SCALEBITS_CACHE", str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match="its target has no kernels"):
        trusted_kernels(artifact_of_kind(artifact, "reference"), tell=lambda line: None)
    with pytest.raises(ArtifactError, match="there is no target 'evil:module'"):
        trusted_kernels(artifact_of_kind(artifact, "evil:module"), tell=lambda line: None)


def artifact_of_kind(artifact, kind):
    text = replace(artifact.manifest, target={"kind": kind}).to_json()
    assert json.loads(text)["target"] == {"kind": kind}
    return replace(artifact, manifest=Manifest.from_json(text))
