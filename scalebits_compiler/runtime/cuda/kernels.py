"""The packed linear layer on a device: which kernel, which grid, which workspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.layout import FORMAT_VERSION
from scalebits_compiler.numerics.tiles import TileLayout
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Grid = tuple[int, int, int]


class Launcher(Protocol):
    """Starts kernels by name on the current stream."""

    def launch(self, kernel: str, grid: Grid, arguments: Sequence[torch.Tensor | int]) -> None:
        """Start `kernel` on `grid`; arguments in the order of the kernel's parameters."""
        ...


@dataclass
class Workspace:
    """Memory that all matrices share, grown on demand: kernels of one stream use it in turn.

    partial: sums of the splits. tickets: how many splits of a tile are done, zero between kernels.
    dense: a matrix as the library product wants it. retired: what was outgrown; a captured graph
    may still use it.
    """

    device: torch.device
    retired: list[torch.Tensor] = field(default_factory=list)
    partial: torch.Tensor = field(init=False)
    tickets: torch.Tensor = field(init=False)
    dense: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.partial = torch.empty(0, dtype=torch.float32, device=self.device)
        self.tickets = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.dense = torch.empty(0, dtype=torch.float16, device=self.device)

    def reserve(self, partial: int, tickets: int) -> None:
        """Room for so many partial sums and tickets.

        Doubled at least, so that what is retired is never more than what is in use.
        """
        if self.partial.numel() < partial:
            partial = max(partial, 2 * self.partial.numel())
            grown = torch.empty(partial, dtype=torch.float32, device=self.device)
            self.retired.append(self.partial)
            self.partial = grown
        if self.tickets.numel() < tickets:
            tickets = max(tickets, 2 * self.tickets.numel())
            zeros = torch.zeros(tickets, dtype=torch.int32, device=self.device)
            self.retired.append(self.tickets)
            self.tickets = zeros

    def matrix(self, cols: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """[cols, rows] to write a matrix into."""
        if self.dense.numel() < cols * rows:
            self.retired.append(self.dense)
            self.dense = torch.empty(cols * rows, dtype=torch.float16, device=self.device)
        return self.dense[: cols * rows].view(dtype).view(cols, rows)


class Kernels:
    """The kernels of an artifact on one device.

    dispatch: the manifest's table. multiprocessors: of the device; small products are split over K
    until there are several programs for each.
    """

    def __init__(
        self,
        dispatch: Mapping[str, Any],
        launcher: Launcher,
        device: torch.device,
        multiprocessors: int,
    ) -> None:
        if dispatch.get("version") != FORMAT_VERSION or dispatch.get("dtype") not in DTYPES:
            raise ArtifactError(
                f"kernel table of version {dispatch.get('version')} for {dispatch.get('dtype')},"
                f" this program reads version {FORMAT_VERSION}",
                help=COMPILE_AGAIN,
            )
        self.arithmetic: str = dispatch["dtype"]
        self.dtype = DTYPES[self.arithmetic]
        self.launcher = launcher
        self.device = device
        self.multiprocessors = multiprocessors
        self.workspace = Workspace(device)
        self._tables = {
            (table["panel"], table["group"], table["ragged"], table.get("gather", False)): table
            for table in dispatch["matrices"]
        }

    def table(self, layout: TileLayout, bits: NDArray[np.uint8], gather: bool) -> Mapping[str, Any]:
        """The entry of the dispatch table for a matrix, or `ArtifactError`.

        gather: its input is read through an index.
        """
        key = (layout.panel, layout.group, layout.cols % layout.group != 0, gather)
        found = self._tables.get(key)
        if found is None or not set(np.unique(bits).tolist()) <= set(found["bits"]):
            raise ArtifactError(
                f"the artifact has no kernel for a matrix {layout.rows} x {layout.cols} in panels"
                f" of {layout.panel} and groups of {layout.group}",
                help="compile the model again; its kernels and its weights do not belong together",
            )
        return found


class TiledLinear:
    """y = x W^T for one packed matrix W[N, K] on a device.

    arena: its bytes u8[n], on the device already; they are used as they are. index: u16[K] on the
    device; column k of W belongs to channel index[k] of x. Without it, to channel k.
    """

    def __init__(
        self,
        kernels: Kernels,
        layout: TileLayout,
        arena: torch.Tensor,
        bits: NDArray[np.uint8],
        index: torch.Tensor | None = None,
    ) -> None:
        self.kernels, self.layout, self.arena = kernels, layout, arena
        self._table = kernels.table(layout, bits, index is not None)
        self._index = () if index is None else (index,)
        self._walk = [
            torch.from_numpy(array).to(kernels.device)
            for array in layout.tables(bits, self._table["bits"])
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, N] for x [tokens, K], both of the kernels' dtype."""
        x = x.contiguous()
        if not x.shape[0]:  # an expert that no token is sent to
            return x.new_empty(0, self.layout.rows)
        for bucket in self._table["buckets"]:
            if x.shape[0] <= bucket["tokens"]:
                return self._multiply(x, bucket)
        return x @ self.dense()

    def dense(self) -> torch.Tensor:
        """The matrix as [K, N] of the kernels' dtype, its rows in the order of the channels of x.

        It is in the workspace: valid until the next.
        """
        layout, kernels = self.layout, self.kernels
        out = kernels.workspace.matrix(layout.cols, layout.rows, kernels.dtype)
        splits, span = self._split(layout.panels, 4)
        sizes = (layout.rows, layout.cols, layout.stored_cols, layout.groups, span)
        arguments = (*self._index, self.arena, *self._walk, out, *sizes)
        kernels.launcher.launch(self._table["beyond"], (layout.panels, splits, 1), arguments)
        return out

    def _multiply(self, x: torch.Tensor, bucket: Mapping[str, Any]) -> torch.Tensor:
        layout, kernels, tokens = self.layout, self.kernels, x.shape[0]
        tiles = -(-tokens // bucket["tile_m"])
        parts = layout.panels * layout.panel // bucket["tile_n"]
        splits, span = self._split(tiles * parts, bucket["programs"])
        space = kernels.workspace
        if splits > 1:
            space.reserve(splits * tokens * layout.rows, tiles * parts)
        y = torch.empty((tokens, layout.rows), dtype=kernels.dtype, device=kernels.device)
        sizes = (tokens, layout.rows, layout.cols, layout.stored_cols, layout.groups, span, splits)
        matrix = (self.arena, *self._walk)
        arguments = (*self._index, x, *matrix, y, space.partial, space.tickets, *sizes)
        kernels.launcher.launch(bucket["kernel"], (tiles, parts, splits), arguments)
        return y

    def _split(self, programs: int, wanted: int) -> tuple[int, int]:
        """(number of splits, groups of each) for `wanted` programs on every multiprocessor."""
        groups = self.layout.groups
        splits = min(groups, -(-wanted * self.kernels.multiprocessors // programs))
        span = -(-groups // splits)
        return -(-groups // span), span
