"""Tensors beside a text are what it says they are: element type and shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scalebits_compiler.errors import IRError, ParseError, VerifyError
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify

TEXT = """module @m {tensors = ["m.safetensors"], calibration = resource("text")} {
  perm @p : i32[32] {data = resource("p")}
  weight @w : f32[32@p, 64] {data = resource("d"), quantize = true, block = [16, 32], group = 32, \
bits = resource("b"), row_scores = resource("row"), column_scores = resource("column"), \
codes = resource("c"), scales = resource("s")}
  func @f(%x: f32[?, 64]) -> f32[?, 32@p] {
    %0 = linear %x, @w : f32[?, 32@p]
    return %0
  }
}
"""


def right() -> dict[str, torch.Tensor]:
    return {
        "text": torch.zeros(3, 8, dtype=torch.int32),
        "p": torch.arange(32, dtype=torch.int32).flip(0),
        "d": torch.zeros(32, 64),
        "b": torch.full((2, 2), 4, dtype=torch.uint8),
        "row": torch.zeros(32),
        "column": torch.zeros(64),
        "c": torch.zeros(32, 64, dtype=torch.uint8),
        "s": torch.ones(32, 2, dtype=torch.float16),
    }


def check(folder: Path, **changes: torch.Tensor) -> None:
    (folder / "m.sbir").write_text(TEXT)
    save_file({**right(), **changes}, folder / "m.safetensors")
    verify(*read_module(folder / "m.sbir"))


def test_tensors_that_fit(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, d=torch.zeros(32, 64, dtype=torch.bfloat16), p=torch.arange(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": torch.zeros(32, 63)}, "data of @w is the tensor F32[32, 63]"),
        ({"d": torch.zeros(32, 64, dtype=torch.int64)}, "data of @w is the tensor I64[32, 64]"),
        ({"p": torch.arange(32.0)}, "data of @p is the tensor F32[32], it must be I32|I64[32]"),
        ({"p": torch.arange(32).reshape(1, 32)}, "data of @p is the tensor I64[1, 32]"),
        ({"b": torch.full((2, 2), 4.7)}, "bits of @w is the tensor F32[2, 2], it must be U8"),
        ({"b": torch.full((2, 2), 260)}, "bits of @w is the tensor I64[2, 2], it must be U8"),
        ({"row": torch.zeros(31)}, "row_scores of @w is the tensor F32[31]"),
        ({"column": torch.zeros(64).half()}, "column_scores of @w is the tensor F16[64]"),
        ({"c": torch.zeros(32, 64)}, "codes of @w is the tensor F32[32, 64], it must be U8"),
        ({"s": torch.ones(31, 2).half()}, "it must be F16[32, 2]"),
        ({"s": torch.ones(32, 3).half()}, "scales of @w is the tensor F16[32, 3]"),
        ({"s": torch.ones(32, 2)}, "scales of @w is the tensor F32[32, 2], it must be F16[32, 2]"),
        ({"text": torch.zeros(3, 8)}, "calibration is the tensor F32[3, 8]"),
    ],
)
def test_tensors_that_do_not(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=r"m\.sbir:\d+:\d+") as caught:
        check(tmp_path, **changes)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../m.safetensors", "sub/m", "/dev/zero", "a\\u0000b", "m" * 5000]
)
def test_a_text_names_files_beside_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.sbir"
    path.write_text(TEXT.replace("m.safetensors", name))
    with pytest.raises(ParseError, match="no plain name of a file beside the text") as caught:
        read_module(path)
    assert "m.sbir:1:8" in caught.value.message


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "device"])
def test_a_text_is_led_to_no_other_files(tmp_path: Path, kind: str) -> None:
    check(tmp_path)
    path = tmp_path / "m.safetensors"
    path.rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    with pytest.raises(IRError, match=r"m\.safetensors: it is no regular file"):
        read_module(tmp_path / "m.sbir")


def test_files_that_hold_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.sbir"
    path.write_text(TEXT)
    (tmp_path / "m.safetensors").write_bytes(b"no tensors")
    with pytest.raises(IRError, match=r"cannot read the tensors in .*m\.safetensors"):
        read_module(path)
