"""What a number format is: everything the compiler and the runtime ask of one.

A matrix in stored form has a code of one byte for every weight and a scale of one byte for every
group (consecutive columns of a row). What they mean, how they are found, and how many bytes the
codes of a group take is the format's. This file and those of the formats import numpy only, so that
an artifact opens without torch; methods that take tensors call torch themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from scalebits_compiler.numerics.formats.learned import Learned

U8 = NDArray[np.uint8]

SCALE_SHIFT = 7  # bits of an fp16 scale below its stored byte
SUBS = 8  # sub-tiles that the codes of a unit are stored in


class Format(ABC):
    """One number format. `id` stands in the block grid, `name` in options and reports.

    bits: stored bits of a code where a group is large, which orders the ladder of the search.
    codes: how many codes there are, at most 256. decoders: target -> "module:object", what the
    kernel generator of the target emits to read codes.

    Groups reach every method below in the order of columns, and within a column of groups in the
    order of rows, without gaps inside a block. So a format may code neighbouring rows together.
    """

    id: int
    name: str
    bits: float
    codes: int
    decoders: Mapping[str, str]

    def __str__(self) -> str:
        """As messages name it."""
        return f"the format {self.name}"

    # Values in torch: groups [n, g], codes of the same shape as floats, scales [n].

    @abstractmethod
    def fit(self, groups: Tensor, weight: Tensor, clip: bool = True) -> Tensor:
        """Storable scales float16 [...] of groups [..., g].

        weight: importance of columns, broadcast to groups; 0 on padding. clip: search for the least
        weighted squared error; without it the levels reach the largest magnitude.
        """

    @abstractmethod
    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """The nearest codes for values [..., g] at positive scales [...], in the values' dtype."""

    @abstractmethod
    def decode(self, codes: Any, scales: Any) -> Any:
        """The weights that codes [..., g] and scales [...] stand for: of numpy or torch, in floats.

        Differentiable in the scales, and linear in them.
        """

    def round_columns(self, work: Tensor, factor: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Round a group with error feedback: codes uint8 and scaled errors, both like work.

        work: float64 [n, g], which is overwritten; factor: the part of the upper Cholesky factor of
        the inverse Hessian for these columns, [g, g]. A format that rounds several columns at once
        has its own loop here.
        """
        import torch

        scales = scales.double()
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        codes = torch.zeros_like(work, dtype=torch.uint8)
        errors = torch.zeros_like(work)
        for column in range(work.shape[1]):
            value = work[:, column : column + 1]
            code = self.nearest(value, divisors)
            error = (value - self.decode(code, scales)) / factor[column, column]
            codes[:, column : column + 1] = code.to(torch.uint8)
            errors[:, column : column + 1] = error
            work[:, column:] -= error * factor[column, column:].unsqueeze(0)
        return codes, errors

    def learnable(self, codes: Tensor, scales: Tensor, exact: Tensor | None) -> Learned:
        """What tuning moves: starts at stored codes (as floats) and scales (float32).

        exact: the original weights, where codes may change; None where they stay.
        """
        from scalebits_compiler.numerics.formats.learned import Learned

        return Learned.start(self, codes, scales, exact)

    # Storage, in numpy. The layout hands over the codes of n groups of one panel as
    # uint8 [n, units, SUBS, lanes], in the order in which the kernels of a target use them.

    @abstractmethod
    def nbytes(self, count: int) -> int:
        """Bytes that `count` codes of a group take, a multiple of 64; count is one of 512."""

    @abstractmethod
    def pack(self, codes: U8) -> U8:
        """Codes uint8 [n, units, SUBS, lanes] as uint8 [n, bytes]."""

    @abstractmethod
    def unpack(self, data: U8, units: int, lanes: int) -> U8:
        """The inverse of `pack`, for the same shape of codes."""


def stored_scale(scale: Tensor, up: bool = False) -> Tensor:
    """The nearest scale (or the next one `up`) that one byte holds, float16, at most 61440.

    The byte is an fp16 number of 5 bits of exponent, 3 of mantissa and no sign. Its steps of 6 to
    12 % are about those of the clip search: up to 4 bits the squared error is that of fp16 scales
    within 1 %, and a sixteenth of a bit per weight is saved at groups of 128.
    """
    import torch

    half = scale.clamp(min=0, max=61440).half().view(torch.int16)
    # The carry may cross into the exponent; it stays finite.
    carry = (1 << SCALE_SHIFT) - 1 if up else 1 << (SCALE_SHIFT - 1)
    return ((half + carry) >> SCALE_SHIFT << SCALE_SHIFT).view(torch.float16)
