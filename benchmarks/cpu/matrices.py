"""Packed matrices with random codes, and our kernels for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from measure import Case, copies
from numpy.typing import NDArray

from scalebits_compiler.codegen.tvm.build import compile_kernels
from scalebits_compiler.codegen.tvm.spec import select_specs
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime.cpu.isa import (
    ACTIVATIONS,
    choose_mode,
    choose_variant,
    offered_activations,
)
from scalebits_compiler.runtime.cpu.library import KernelLibrary, PackedLinear
from scalebits_compiler.runtime.cpu.program import Program, Rows
from scalebits_compiler.runtime.dispatch import cpu_dispatch

BLOCK, GROUP = 128, 128
MIXES: dict[str, Mapping[int, int]] = {
    "uniform 2": {2: 1},
    "uniform 3": {3: 1},
    "uniform 4": {4: 1},
    "mixed 2,3,4": {2: 1, 3: 2, 4: 1},
    "mixed 1..8": {1: 6, 2: 3, 3: 2, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1},
    "uniform 5": {5: 1},
    "uniform 6": {6: 1},
    "uniform 7": {7: 1},
}
"""Widths by share of the blocks. The mean of the mixed ones is 3 bits: the bytes of uniform 3."""


@dataclass(frozen=True)
class Packed:
    """A packed matrix: its layout, copies of its bytes, its widths."""

    layout: BlockLayout
    arenas: list[NDArray[np.uint8]]
    bits: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.arenas[0].nbytes


def random_matrix(rows: int, cols: int, mix: Mapping[int, int], cold: bool = False) -> Packed:
    """Uniformly random codes, widths shuffled over the blocks; outputs are of the size of x."""
    rng = np.random.default_rng(0)
    layout = BlockLayout(rows, cols, BLOCK, BLOCK, GROUP)
    cycle = np.repeat(list(mix), list(mix.values())).astype(np.uint8)
    bits = rng.permutation(np.resize(cycle, layout.grid[0] * layout.grid[1])).reshape(layout.grid)
    wide = bits.repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, :cols]
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8) >> (8 - wide)
    # Powers of two are among the scales that the format can hold.
    unit = 2 ** round(np.log2(4 / np.sqrt(cols)))
    step = np.ldexp(np.float32(unit), -bits.astype(np.int32))
    scales = step.repeat(BLOCK, 0)[:rows].astype(np.float16)
    arena = layout.pack(codes, scales, bits)
    return Packed(layout, [arena.copy() for _ in range(copies(arena.nbytes, cold))], bits)


class OurKernels:
    """The kernels of one set of widths, in each of the activation modes.

    libraries: by activations, in the order of ACTIVATIONS.
    """

    def __init__(
        self,
        mix: Mapping[int, int],
        folder: Path,
        activations: Sequence[str] | None,
        threads: int,
        features: frozenset[str],
    ) -> None:
        """features: processor flags; the first variant of kernels that they allow is taken.

        activations: None for all that this variant has. `TargetError` if one is asked for that it
        has not.
        """
        folder.mkdir()
        layout = BlockLayout(BLOCK, BLOCK, BLOCK, BLOCK, GROUP)
        specs, dispatch = select_specs(
            [(layout, np.array([list(mix)], np.uint8))], gathered=[GROUP]
        )
        table = cpu_dispatch(dispatch, "k.so")
        self.variant = variant = choose_variant(table.variants, features)
        names = offered_activations(variant) if activations is None else activations
        for name in names:
            choose_mode(variant, name)
        here = variant.name
        compile_kernels({here: specs[here]}, folder / "k.so")
        code = (folder / "k.so").read_bytes()
        self.libraries: dict[str, KernelLibrary] = {}
        for name in names:
            self.libraries[name] = KernelLibrary.open(code, dispatch, features, name)
            self.libraries[name].threads = threads

    def describe(self) -> str:
        """The variant and its arithmetic, and what it does not have, for the head of a table."""
        modes = [f"{name} ({library.mode})" for name, library in self.libraries.items()]
        offered = offered_activations(self.variant)
        absent = [f"no {name}" for name in ACTIVATIONS if name not in offered]
        return f"{self.variant.name} kernels, activations {', '.join((*modes, *absent))}"

    def case(
        self,
        name: str,
        packed: Packed,
        activations: str,
        x: NDArray,
        rounded: bool = False,
        index: NDArray[np.uint16] | None = None,
    ) -> Case:
        """y = x W^T from float32 to float32, as a program of two steps; `rounded`: the second.

        index: x is gathered by it as it is rounded.
        """
        library, calls = self.libraries[activations], []
        # The cases of a matrix share its copies, and each begins elsewhere: the copies that one
        # has just read are still in the cache.
        other = rounded or index is not None
        quarter = 2 * list(self.libraries).index(activations) + other
        first = len(packed.arenas) * quarter // 4
        y = np.empty((len(x), packed.layout.rows), np.float32)
        for arena in packed.arenas[first:] + packed.arenas[:first]:
            linear = PackedLinear(library, packed.layout, arena, packed.bits)
            program = Program()
            rows = Rows(x, 0, 1, len(x))
            source = library.add_quantize(program, rows, packed.layout.group, index)
            linear.add_product(program, source, y)
            library.run(program)
            calls.append(partial(library.run, program, int(rounded)))
        return Case(name, calls)
