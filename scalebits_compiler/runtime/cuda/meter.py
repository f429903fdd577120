"""What the device of a session gives at most; see `runtime.meter`."""

from __future__ import annotations

import time
from functools import cached_property

import torch

from scalebits_compiler.runtime import meter

COPIES = 16
"""Of one measurement: one alone would be over before the host has waited for it."""


class DeviceMeter:
    """Copies a large buffer on the device."""

    moves = "copy"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self.device = torch.cuda.get_device_name(device) if on_gpu else "interpreter"

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = meter.MOVED_BYTES
        source = torch.ones(size, dtype=torch.uint8, device=self._device)
        return source, torch.zeros_like(source)

    def bandwidth(self) -> float:
        """See `Meter`."""
        source, target = self._buffers
        self._synchronize()
        start = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        self._synchronize()
        return COPIES * 2 * source.numel() / (time.perf_counter() - start)

    def peak_memory(self) -> int:
        """Bytes in tensors on the device; the driver and the kernels' code are not counted."""
        return torch.cuda.max_memory_allocated(self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
