"""Artifacts: byte-identical, atomic, and every damage is noticed and named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec.structs import replace as change
from safetensors import safe_open

from scalebits_compiler.errors import ArtifactError, OutputError, TargetError, UsageError
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify as verify_module
from scalebits_compiler.runtime import artifact as artifact_module
from scalebits_compiler.runtime.artifact import Artifact, StoredTensor, map_tensors, verify
from scalebits_compiler.runtime.manifest import FileRecord, Manifest, sha256_of
from scalebits_compiler.runtime.plan import Step, WeightRecord


@pytest.fixture
def module(build_module, module_shape):
    return build_module(module_shape(layers=1))


def test_equal_arguments_give_equal_bytes(module, write, tmp_path):
    first, second = write(module, tmp_path / "a"), write(module, tmp_path / "b")
    names = sorted(p.relative_to(first) for p in first.rglob("*"))
    assert names == sorted(p.relative_to(second) for p in second.rglob("*"))
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_no_path_of_the_machine_is_stored(module, write, tmp_path):
    for path in write(module).rglob("*"):
        assert str(tmp_path).encode() not in path.read_bytes()


def test_official_library_reads_the_tensors(module, write):
    path = write(module) / "model.safetensors"
    mapped = map_tensors(path)
    with safe_open(path, framework="pt") as handle:
        assert set(handle.keys()) == set(mapped)
        for key, stored in mapped.items():
            tensor = handle.get_tensor(key)
            assert tuple(tensor.shape) == stored.data.shape
            np.testing.assert_array_equal(tensor.to(torch.float32).numpy(), stored.float32())
            assert stored.data.ctypes.data % stored.data.itemsize == 0


def test_an_index_names_every_channel_once(module, write):
    opened = Artifact.open(write(module))
    for places, right in (([2, 0, 1], True), ([2, 0, 2], False), ([1, 2, 3], False)):
        stored = StoredTensor(np.array(places, np.uint16), "U16")
        changed = replace(opened, tensors={"gather:x": stored})
        if right:
            changed._check_index("gather:x")
            assert changed.index("gather:x") is stored.data
            continue
        with pytest.raises(ArtifactError, match="gather:x is no order of 3 channels"):
            changed._check_index("gather:x")


def test_sizes_are_checked_before_anything_is_made(module, write):
    """2**32 rows took gigabytes."""
    opened = Artifact.open(write(module))
    symbol = "layers.0.q"
    record = opened.manifest.weights[symbol]
    grid_rows, _ = opened.tensors[f"{symbol}.bits"].data.shape
    rows, columns = 2**32, record.shape[1]
    block_rows = -(-rows // grid_rows // 16) * 16
    assert -(-rows // block_rows) == grid_rows
    for changes, message in (
        ({"shape": (rows, columns)}, "are not those of a packed matrix"),
        ({"block": (2**31 - 16, 64)}, "are not those of a packed matrix"),
        ({"shape": (rows, columns), "block": (block_rows, 64)}, r"too few for 4294967296 x 72"),
        ({"shape": (2**60, columns), "block": (2**31 - 16, 64)}, "are not those of a packed"),
        ({"shape": (0, columns)}, "are not those of a packed"),
    ):
        with pytest.raises(ArtifactError, match=message):
            opened._check_weight(symbol, change(record, **changes))


def test_configs_have_the_types_that_the_runtime_reads(module, write):
    for name, text, message in (
        ("config.json", '{"max_position_embeddings": "64"}', r"max_position_embeddings: Expected"),
        ("config.json", "[]", "expected an object"),
        ("config.json", '{"eos_token_id": [0, "1"]}', r"eos_token_id\[1\]: Expected 'int'"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id: Expected"),
        ("generation_config.json", '{"a": 1, "a": 2}', "'a' twice"),
    ):
        out = write(module, force=True)
        (out / name).write_text(text)
        path = out / "manifest.json"
        read = Manifest.from_json(path.read_text())
        files = {**read.files, name: FileRecord(sha256_of(out / name), len(text))}
        path.write_text(change(read, files=files).to_json())
        with pytest.raises(ArtifactError, match=f"{name}: .*{message}"):
            Artifact.open(out)


def test_sequences_are_no_longer_than_a_table_of_positions(module, write):
    """Whatever the config says: a kernel would read behind the table."""
    opened = Artifact.open(write(module))
    assert opened.limit == 64
    manifest = opened.manifest
    assert manifest.plan is not None
    positions = next(step.out for step in manifest.plan.steps if step.op == "positions")
    look_up = Step("embedding", (positions,), ("places",), {}, "place", ())
    for rows in (40, 100):
        places = WeightRecord.dense("F32", (rows, 8))
        changed = change(
            manifest,
            plan=change(manifest.plan, steps=(*manifest.plan.steps, look_up)),
            weights={**manifest.weights, "places": places},
        )
        assert replace(opened, manifest=changed).limit == min(rows, 64)


def test_weights_are_mapped_not_copied(module, write):
    opened = Artifact.open(write(module))
    matrix = opened.matrix("layers.0.q")
    base = matrix.arena
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not matrix.arena.flags.writeable


def test_module_text_reads_back_with_its_tensors(module, write):
    again, source = read_module(write(module) / "module.sbir")
    verify_module(again, source)
    assert again.function == module.function
    weight = again.weight("layers.0.q")
    expected = module.resources.torch(module.weight("layers.0.q").data.key)
    assert weight.data is not None
    assert torch.equal(again.resources.torch(weight.data.key), expected)


def test_not_packed_is_refused(module, write, tmp_path):
    from dataclasses import replace

    with pytest.raises(TargetError, match="pack-blocks"):
        write(replace(module, facts=frozenset({"bits"})))
    assert list(tmp_path.iterdir()) == []


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_every_damaged_file_is_named(module, write):
    out = write(module)
    for name in files_of(out):
        path, good = out / name, (out / name).read_bytes()
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for bad in (good[:-2], good[:middle], b"", flipped, good + b" {"):
            path.write_bytes(bad)
            with pytest.raises(ArtifactError, match=name) as caught:
                Artifact.open(out)
            assert caught.value.help
        path.unlink()
        with pytest.raises(ArtifactError, match=name):
            Artifact.open(out)
        path.write_bytes(good)
    assert verify(out).summary["code_bits"] == 4.5


def test_large_files_are_hashed_by_verify(module, write, monkeypatch):
    out = write(module)
    path = out / "model.safetensors"
    good = path.read_bytes()
    first_code = 8 + int.from_bytes(good[:8], "little")
    path.write_bytes(good[:first_code] + bytes([good[first_code] ^ 1]) + good[first_code + 1 :])
    monkeypatch.setattr(artifact_module, "LARGEST_HASHED_AT_OPEN", 100)
    Artifact.open(out)
    with pytest.raises(ArtifactError, match=r"model\.safetensors was changed"):
        verify(out)


def test_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no folder"):
        Artifact.open(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        Artifact.open(tmp_path)


def test_force_is_needed_and_replaces(module, write, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(module)
    (out / "extra").write_text("x")
    with pytest.raises(UsageError, match="--force"):
        write(module)
    write(module, force=True)
    assert not (out / "extra").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failure_leaves_nothing_and_keeps_the_old(module, write, tmp_path):
    out = write(module)
    before = files_of(out)
    with pytest.raises(OutputError, match="cannot write the output"):
        write(module, force=True, files={"tokenizer.json": tmp_path / "missing"})
    assert files_of(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
