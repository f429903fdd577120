"""The generated Triton source as text, against golden files; which kernels a model gets."""

from pathlib import Path

import numpy as np
import pytest

from scalebits_compiler.codegen.triton.emit import emit_module
from scalebits_compiler.codegen.triton.spec import BUCKETS, KernelSpec, select_specs
from scalebits_compiler.errors import TargetError
from scalebits_compiler.numerics.tiles import TileLayout

GOLDEN = Path(__file__).parents[1] / "golden"
SPECS = [
    KernelSpec("matmul", "fp16", 128, 128, (2, 3), False, 16),
    KernelSpec("matmul", "bf16", 128, 64, (6,), False, 64),
    KernelSpec("matmul", "bf16", 16, 32, (5, 7), True, 16),
    KernelSpec("dequantize", "fp16", 32, 128, (1, 4, 8), True),
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
    assert [spec.kind for spec in found] == ["matmul", "matmul", "dequantize"]
    (table,) = dispatch["matrices"]
    assert [bucket["tokens"] for bucket in table["buckets"]] == [tokens for tokens, *_ in BUCKETS]
    assert {bucket["kernel"] for bucket in table["buckets"]} | {table["beyond"]} == {
        spec.key for spec in found
    }


def test_ragged_matrices_get_kernels_of_their_own():
    found, _ = select_specs(matrices((256, 256, 128, 128, 128), (256, 200, 128, 128, 128)), "bf16")
    assert len({spec.key for spec in found}) == 6
    assert sorted({spec.ragged for spec in found}) == [False, True]


def test_a_model_without_matrices_is_refused():
    with pytest.raises(TargetError, match="no packed matrix"):
        select_specs([], "fp16")
