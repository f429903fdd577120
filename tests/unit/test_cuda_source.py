"""The generated Triton source as text, against golden files; which kernels a model gets."""

from pathlib import Path

import numpy as np
import pytest

from scalebits_compiler.codegen.triton.emit import emit_module
from scalebits_compiler.codegen.triton.spec import BUCKETS, select_specs
from scalebits_compiler.codegen.triton.target import CudaTarget
from scalebits_compiler.errors import TargetError
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.spec import KernelSpec

GOLDEN = Path(__file__).parents[1] / "golden"
SPECS = [
    KernelSpec("matvec", "fp16", 128, 128, (2, 3), False),
    KernelSpec("matvec", "bf16", 16, 32, (5, 8), True, gather=True),
    KernelSpec("matmul", "fp16", 128, 128, (2, 3), False, 16),
    KernelSpec("matmul", "bf16", 128, 64, (6,), False, 64),
    KernelSpec("matmul", "bf16", 16, 32, (5, 7), True, 16),
    KernelSpec("dequantize", "fp16", 32, 128, (1, 4, 8), True),
    KernelSpec("matmul", "bf16", 16, 32, (3,), False, 16, gather=True),
    KernelSpec("dequantize", "fp16", 32, 128, (1,), True, gather=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_emitted_source(spec, golden):
    golden(GOLDEN / f"{spec.key}.py.txt", emit_module([spec]))


def matrices(*shapes):
    rng = np.random.default_rng(0)
    layouts = [TileLayout(*shape) for shape in shapes]
    return [(made, rng.integers(2, 5, made.grid).astype(np.uint8)) for made in layouts]


def test_matrices_of_one_shape_share_kernels():
    found, dispatch = select_specs(
        matrices((256, 256, 128, 128, 128), (512, 384, 128, 128, 128)), "fp16"
    )
    assert {spec.bits for spec in found} == {(2, 3, 4)}
    assert [spec.kind for spec in found] == ["matvec", "matmul", "matmul", "dequantize"]
    (table,) = dispatch["matrices"]
    assert [bucket["tokens"] for bucket in table["buckets"]] == [tokens for tokens, *_ in BUCKETS]
    assert {bucket["kernel"] for bucket in table["buckets"]} | {table["beyond"]} == {
        spec.key for spec in found
    }


def test_ragged_matrices_get_kernels_of_their_own():
    found, _ = select_specs(matrices((256, 256, 128, 128, 128), (256, 200, 128, 128, 128)), "bf16")
    assert len({spec.key for spec in found}) == 8
    assert sorted({spec.ragged for spec in found}) == [False, True]


TWO_READERS = """
module @m {facts = ["bits", "packed"]} {
  perm @p : i32[8] {data = [2, 0, 1, 7, 6, 5, 3, 4]}
  weight @w : packed[8, 8@p] {quantize = true, block = [16, 32], group = 32, bits = grid([[3]])}
  weight @v : packed[8, 8@p] {quantize = true, block = [16, 32], group = 32, bits = grid([[2]])}
  func @f(%ids: i64[?, ?]) -> f32[?, ?, 8] {
    %0 = embedding %ids, @w : f32[?, ?, 8@p]
    %1 = qlinear %0, @v : f32[?, ?, 8]
    %2 = qlinear %1, @w {gather = "8@p"} : f32[?, ?, 8]
    return %2
  }
}
"""


def test_a_matrix_gets_a_kernel_for_each_way_to_read_its_input(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "scalebits_compiler.codegen.triton.aot.compile_specs",
        lambda specs, archs, folder: {spec.key: {} for spec in specs},
    )
    built = CudaTarget().build(parse_module(TWO_READERS)[0], tmp_path)
    assert built.kernels is not None
    plain, gathered = built.kernels.dispatch["matrices"]
    assert (plain["bits"], "gather" in plain) == ([2, 3], False)
    assert (gathered["bits"], gathered["gather"]) == ([3], True)
    assert {plain["beyond"], gathered["beyond"]} < built.kernels.dispatch["kernels"].keys()


def test_a_model_without_matrices_is_refused():
    with pytest.raises(TargetError, match="no packed matrix"):
        select_specs([], "fp16")
