"""Tensor files: what the safetensors library writes is read, and every malformed header refused."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.ir.resources import ResourceStore, tensor_entry, torch_dtype
from scalebits_compiler.numerics.safetensors import (
    ELEMENT_TYPES,
    MOST_HEADER_BYTES,
    SafetensorsError,
    map_tensors,
    read_header,
    write_tensors,
)
from scalebits_compiler.runtime import artifact


def entry(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: object, body: int = 0, length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(body))
    return path


U8 = entry("U8", [1], 0, 1)
ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def opened_by_the_library(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as handle:
            handle.keys()
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": U8, "b": entry("U8", [1], 2, 3)}, 3, "'b' begins at byte"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, 3, "'b' begins at byte"),
        ({"a": U8, "b": U8}, 1, "'b' begins at byte"),
        ({"a": entry("U8", [1], 1, 2)}, 2, "'a' begins at byte"),
        ({"a": U8}, 2, "its tensors end at"),
        ({"a": U8}, 0, "its tensors end at"),
        ({"a": entry("F32", [1], 0, 3)}, 3, "has 3 bytes"),
        ({"a": entry("U8", [2**32, 2**32], 0, 1)}, 1, "too large"),
        ({"a": entry("U8", [2**63, 2**63, 0], 0, 0)}, 0, "no shape"),
        ({"a": entry("U8", [True], 0, 1)}, 1, "no shape"),
        ({"a": entry("U8", [1.0], 0, 1)}, 1, "no shape"),
        ({"a": entry("U8", [-1], 0, 1)}, 1, "no shape"),
        ({"a": entry("U8", 1, 0, 1)}, 1, "no shape"),
        ({"a": entry("U8", [0], 1, 0)}, 1, "no data_offsets"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, 1, "no data_offsets"),
        ({"a": entry("U9", [1], 0, 1)}, 1, "unknown element type 'U9'"),
        ({"a": entry("u8", [1], 0, 1)}, 1, "unknown element type 'u8'"),
        ({"a": [1]}, 1, "not described"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, "not described"),
        ('{"a":{"dtype":"U8",' + ONE[1:] + "}", 1, "'dtype' twice"),
        ('{"\\ud800":' + ONE + "}", 1, "no name of a tensor"),
        ('{"__metadata__":{"a":1}}', 0, "no table of strings"),
        ("[" * 100_000, 0, "nested"),
        ("[]", 0, "no JSON object"),
        ("{", 0, "no JSON"),
    ],
)
def test_what_the_library_refuses_is_refused(
    tmp_path: Path, header: object, body: int, message: str
) -> None:
    path = write(tmp_path / "m.safetensors", header, body)
    assert not opened_by_the_library(path)
    with pytest.raises(SafetensorsError, match=message):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":' + ONE + ',"a":' + ONE + "}", "'a' twice"),
        ({"": U8}, "no name of a tensor"),
        ({"a\n": U8}, "no name of a tensor"),
        ({"a": {**U8, "b": 1}}, "not described"),
        ({"a": entry("U8", [1] * 65, 0, 1)}, "at most 64 sizes"),
    ],
)
def test_what_only_we_refuse(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(SafetensorsError, match=message):
        read_header(write(tmp_path / "m.safetensors", header, 1))


@pytest.mark.parametrize("length", [3, MOST_HEADER_BYTES + 1, 2**63])
def test_a_header_beyond_the_file(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "m.safetensors", "{}", length=length)
    with pytest.raises(SafetensorsError, match="does not fit"):
        read_header(path)
    path.write_bytes(b"\0" * 7)
    with pytest.raises(SafetensorsError, match="too few"):
        read_header(path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(SafetensorsError, match="no regular file"):
            read_header(path)


def test_every_element_type_is_read_and_written(tmp_path: Path) -> None:
    bits = torch.arange(16, dtype=torch.uint8)
    tensors = {
        name: (bits > 3) if name == "BOOL" else bits.clone().view(torch_dtype(name))
        for name in ELEMENT_TYPES
    }
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(1.5)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    store = ResourceStore.from_files([path])
    entries = [(name, tensor_entry(name, lambda t=t: t)) for name, t in tensors.items()]
    file = io.BytesIO()
    write_tensors(file, entries, alignment=64)
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(file.getvalue())
    with safe_open(ours, framework="pt") as handle:
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1).view(torch.uint8)
            for read in (store.torch(name), handle.get_tensor(name)):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(read.reshape(-1).view(torch.uint8), flat)
    assert read_header(ours)["F64"].start % 64 == 0
    np.testing.assert_array_equal(
        map_tensors(ours)["BF16"].float32(), tensors["BF16"].float().numpy()
    )


def test_writes_to_a_tensor_do_not_reach_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    store = ResourceStore.from_files([path])
    store.torch("a").add_(1)
    assert not store.torch("a").any()
    assert not map_tensors(path)["a"].data.flags.writeable


def test_kernels_are_given_aligned_tensors(tmp_path: Path) -> None:
    header = {"a": U8, "b": entry("F32", [1], 1, 5)}
    path = write(tmp_path / "m.safetensors", json.dumps(header).ljust(256), 5)
    assert map_tensors(path).keys() == {"a", "b"}
    with pytest.raises(ArtifactError, match="'b' is not aligned"):
        artifact.map_tensors(path)
