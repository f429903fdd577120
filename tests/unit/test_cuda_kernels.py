"""The generated Triton kernels, run by Triton's interpreter, against dequantized weights."""

import numpy as np
import pytest
import torch

from scalebits_compiler.codegen.triton.emit import emit_module
from scalebits_compiler.codegen.triton.spec import select_specs
from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.cuda.kernels import DTYPES, Kernels, TiledLinear
from scalebits_compiler.runtime.cuda.launchers import SourceLauncher

# Relative error: weights and sums are exact to float32 but for the rounding of the result, and of
# the weights in the dequantize kernel.
TOLERANCE = {"fp16": 1e-3, "bf16": 8e-3}


def matrix(layout, bits, seed=0):
    """(arena, dense float64 matrix) with random codes and scales."""
    rng = np.random.default_rng(seed)
    wide = bits.repeat(layout.block_rows, 0)[: layout.rows]
    groups = wide.repeat(layout.block_cols // layout.group, 1)[:, : layout.groups]
    wide = wide.repeat(layout.block_cols, 1)[:, : layout.cols].astype(np.int64)
    codes = rng.integers(0, 1 << wide).astype(np.uint8)
    scales = (rng.integers(4, 16, groups.shape) * np.ldexp(0.125, -groups.astype(int))).astype("f2")
    spread = scales.astype(np.float64).repeat(layout.group, 1)[:, : layout.cols]
    return layout.pack(codes, scales, bits), spread * (codes - (2.0**wide - 1) / 2)


def linear(layout, bits, arena, dtype, folder, multiprocessors=2, order=None):
    """order: column k of the matrix belongs to channel order[k] of the input."""
    plain, gathered = ([(layout, bits)], []) if order is None else ([], [(layout, bits)])
    specs, dispatch = select_specs(plain, dtype, gathered)
    options = {spec.key: {"warps": spec.warps, "stages": spec.stages} for spec in specs}
    launcher = SourceLauncher(emit_module(specs).encode(), options)
    kernels = Kernels(dispatch, launcher, torch.device("cpu"), multiprocessors)
    index = None if order is None else torch.from_numpy(order.astype(np.uint16))
    return TiledLinear(kernels, layout, torch.from_numpy(arena), bits, index)


def error(layer, dense, tokens, mean=0.0):
    """Relative error of the product with random activations."""
    x = np.random.default_rng(tokens).normal(mean, size=(tokens, dense.shape[1]))
    x = torch.from_numpy(x).to(layer.kernels.dtype)
    expected = x.double() @ torch.from_numpy(dense).T
    return float((layer(x).double() - expected).norm() / expected.norm())


def dense_error(layer, dense):
    difference = layer.dense().double().T.numpy() - dense
    return float(np.linalg.norm(difference) / np.linalg.norm(dense))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_alone(width, dtype, tmp_path, triton_interpreter):
    layout = TileLayout(128, 128, 128, 128, 128)
    bits = np.full(layout.grid, width, np.uint8)
    arena, dense = matrix(layout, bits)
    layer = linear(layout, bits, arena, dtype, tmp_path)
    for tokens in (1, 5, 40):
        assert error(layer, dense, tokens) < TOLERANCE[dtype], tokens
    assert dense_error(layer, dense) < TOLERANCE[dtype]


SHAPES = {
    "whole": TileLayout(256, 384, 128, 128, 128),
    "small blocks": TileLayout(32, 192, 16, 64, 32),
    "ragged": TileLayout(70, 200, 32, 128, 128),
    "ragged groups of 96": TileLayout(33, 328, 16, 192, 96),
    "one ragged group": TileLayout(16, 40, 16, 64, 64),
    "half panel": TileLayout(192, 192, 128, 128, 64),
}


@pytest.mark.parametrize(("dtype", "gather"), [("bf16", False), ("fp16", True)])
@pytest.mark.parametrize("name", SHAPES)
def test_mixed_widths_in_every_bucket(name, dtype, gather, tmp_path, triton_interpreter):
    layout, rng = SHAPES[name], np.random.default_rng(3)
    bits = rng.integers(1, 9, layout.grid).astype(np.uint8)
    arena, stored = matrix(layout, bits)
    dense, order = stored.copy(), rng.permutation(layout.cols) if gather else None
    dense[:, order if gather else slice(None)] = stored
    layer = linear(layout, bits, arena, dtype, tmp_path, order=order)
    for tokens in (1, 5, 40, 70, 257):
        assert error(layer, dense, tokens) < TOLERANCE[dtype], tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_far_from_zero(dtype, tmp_path, triton_interpreter):
    """Sums hold 1024 times the activations until the end, which must not cost their accuracy."""
    layout = SHAPES["whole"]
    bits = np.random.default_rng(5).integers(1, 9, layout.grid).astype(np.uint8)
    arena, dense = matrix(layout, bits)
    layer = linear(layout, bits, arena, dtype, tmp_path)
    for tokens in (1, 5, 40):
        assert error(layer, dense, tokens, mean=50) < TOLERANCE[dtype], tokens


@pytest.mark.parametrize("multiprocessors", [1, 3, 100])
def test_the_number_of_splits_changes_nothing(multiprocessors, tmp_path, triton_interpreter):
    layout = SHAPES["whole"]
    bits = np.random.default_rng(4).integers(2, 5, layout.grid).astype(np.uint8)
    arena, dense = matrix(layout, bits)
    layer = linear(layout, bits, arena, "fp16", tmp_path, multiprocessors)
    for _ in range(2):  # the second run finds the tickets as the first has left them
        assert error(layer, dense, 3) < TOLERANCE["fp16"]
    assert not layer.kernels.workspace.tickets.any()


def test_an_outgrown_workspace_still_serves_a_captured_graph(tmp_path, triton_interpreter):
    layout = SHAPES["whole"]
    bits = np.full(layout.grid, 3, np.uint8)
    arena, dense = matrix(layout, bits)
    layer = linear(layout, bits, arena, "fp16", tmp_path, multiprocessors=100)
    space, launched = layer.kernels.workspace, []
    launch = layer.kernels.launcher.launch

    def record(*call):
        launched.append(call)
        launch(*call)

    layer.kernels.launcher.launch = record
    x = torch.randn(1, 384, dtype=torch.float16)
    y = layer(x)
    kept = y.clone()
    used, before = (space.partial, space.tickets), space.partial.numel()
    for tokens in range(17, 24):  # each needs more than the one before
        assert error(layer, dense, tokens) < TOLERANCE["fp16"]
    for outgrown, grown in zip(used, (space.partial, space.tickets), strict=True):
        assert grown is not outgrown
        assert any(outgrown is held for held in space.retired)  # else a graph's pointer dangles
    assert sum(held.numel() for held in space.retired) <= space.partial.numel() + before
    y.zero_()
    launch(*launched[0])  # as a graph: the arguments of then
    assert torch.equal(y, kept)
    assert not any(held.any() for held in (space.tickets, used[1]))


def test_a_wrong_byte_is_seen(tmp_path, triton_interpreter):
    layout = SHAPES["ragged"]
    bits = np.full(layout.grid, 3, np.uint8)
    arena, dense = matrix(layout, bits)
    arena[5] ^= 4
    assert error(linear(layout, bits, arena, "fp16", tmp_path), dense, 1) > TOLERANCE["fp16"]


def test_a_matrix_without_kernels_is_refused(tmp_path, triton_interpreter):
    layout = SHAPES["whole"]
    bits = np.full(layout.grid, 3, np.uint8)
    arena, _ = matrix(layout, bits)
    layer = linear(layout, bits, arena, "fp16", tmp_path)
    index = torch.arange(layout.cols).to(torch.uint16)
    for grid, order in ((np.full(layout.grid, 4, np.uint8), None), (bits, index)):
        with pytest.raises(ArtifactError, match="no kernel for a matrix 256 x 384"):
            TiledLinear(layer.kernels, layout, layer.arena, grid, order)
