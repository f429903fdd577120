"""The table of CUDA kernels: every number is what the named kernel was compiled for, or refused."""

import copy

import numpy as np
import pytest

from scalebits_compiler.codegen.triton.spec import select_specs
from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.dispatch import cuda_dispatch

PLAIN = TileLayout(256, 256, 128, 128, 128)
RAGGED = TileLayout(96, 200, 32, 64, 32)


def bits_of(layout, *widths):
    return np.resize(np.array(widths, np.uint8), layout.grid)


@pytest.fixture
def table():
    specs, table = select_specs(
        [(PLAIN, bits_of(PLAIN, 2, 3)), (RAGGED, bits_of(RAGGED, 4))],
        "fp16",
        [(PLAIN, bits_of(PLAIN, 2))],
    )
    table["kernels"] = {
        spec.key: {
            "warps": spec.warps,
            "stages": spec.stages,
            "binaries": {
                "sm_90": {"file": f"kernels/{spec.key}.sm_90.cubin", "shared": 0, "scratch": 2}
            },
        }
        for spec in specs
    }
    return table


def files_of(table):
    return {
        binary["file"]
        for kernel in table["kernels"].values()
        for binary in kernel["binaries"].values()
    }


def test_what_the_target_writes(table):
    dispatch = cuda_dispatch(table, files_of(table), "here")
    assert dispatch.knows(PLAIN, bits_of(PLAIN, 2, 3), False)
    assert dispatch.knows(PLAIN, bits_of(PLAIN, 2), True)
    assert not dispatch.knows(PLAIN, bits_of(PLAIN, 3), True)
    assert not dispatch.knows(PLAIN, bits_of(PLAIN, 4), False)
    assert not dispatch.knows(RAGGED, bits_of(RAGGED, 4), True)


def entry(number, **changes):
    return lambda table: table["matrices"][number].update(changes)


def bucket(number, **changes):
    return lambda table: table["matrices"][0]["buckets"][number].update(changes)


def kernel(**changes):
    return lambda table: next(iter(table["kernels"].values())).update(changes)


def binary(**changes):
    return lambda table: next(iter(table["kernels"].values()))["binaries"]["sm_90"].update(changes)


EDITS = {
    "version": (lambda table: table.update(version=9), "kernel table of version 9"),
    "dtype": (lambda table: table.update(dtype="fp32"), "dtype: Invalid enum value 'fp32'"),
    "other dtype": (lambda table: table.update(dtype="bf16"), "is not its kernel"),
    "no entries": (lambda table: table.update(matrices=[], kernels={}), "matrices: none"),
    "entry twice": (lambda table: table["matrices"].append(table["matrices"][0]), "two for"),
    "panel": (entry(0, panel=48), "panels of 48 rows"),
    "other panel": (entry(0, panel=64), "is not its kernel"),
    "group": (entry(0, group=0), "group: Expected 'int' >= 1"),
    "large group": (entry(0, group=256), "groups of 256"),
    "ragged": (entry(0, ragged=False), "is not its kernel"),
    "widths": (entry(0, bits=[2]), "is not its kernel"),
    "no widths": (entry(0, bits=[]), r"formats \[\]"),
    "width 9": (entry(0, bits=[2, 9]), r"formats \[2, 9\]"),
    "beyond": (entry(0, beyond="x"), "'x' is not its kernel"),
    "no tile": (bucket(1, tile_m=0), "tile_m: Expected 'int' >= 1"),
    "tile": (bucket(1, tile_m=32), "is not 'matmul_fp16_"),
    "tile rows": (bucket(1, tile_n=16), "with tiles of 16 x 16 is not"),
    "tokens of matvec": (bucket(0, tokens=4), "is for one token"),
    "falling tokens": (bucket(2, tokens=8), "do not rise"),
    "programs": (bucket(1, programs=0), "programs: Expected 'int' >= 1"),
    "many programs": (bucket(1, programs=2**31), "programs: Expected 'int' <= 64"),
    "kernel": (bucket(1, kernel="matvec"), "'matvec' with tiles"),
    "warps": (kernel(warps=1), "other warps or stages"),
    "stages": (kernel(stages=7), "other warps or stages"),
    "extra": (kernel(x=1), "unknown field 'x'"),
    "architecture": (kernel(binaries={"sm_": {"file": "", "shared": 0, "scratch": 0}}), "'sm_'"),
    "file": (binary(file="kernels/cpu.so"), "is not its binary for sm_90"),
    "shared": (binary(shared=2**31), "shared: Expected 'int' <= "),
    "scratch": (binary(scratch=-1), "scratch: Expected 'int' >= 0"),
    "a kernel less": (lambda table: table["kernels"].popitem(), "not the kernels of the matrices"),
    "a kernel more": (lambda table: table["kernels"].update(
        x={"warps": 4, "stages": 1, "binaries": {}}), "not the kernels of the matrices"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_table(name, table):
    edit, message = EDITS[name]
    changed = copy.deepcopy(table)
    edit(changed)
    assert changed != table
    with pytest.raises(ArtifactError, match=message) as caught:
        cuda_dispatch(changed, files_of(table), "OUT/manifest.json: kernels.dispatch")
    assert caught.value.message.startswith("OUT/manifest.json: kernels.dispatch: ")


def test_a_binary_that_the_artifact_does_not_list(table):
    with pytest.raises(ArtifactError, match="is not its binary for sm_90"):
        cuda_dispatch(table, {}, "here")
