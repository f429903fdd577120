"""The few calls of the CUDA driver that load and start a binary (ctypes; no compiler, no Triton).

The device's primary context must be current, as it is once torch has been initialised on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scalebits_compiler.errors import ArtifactError

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES; more than 48 KiB must be asked for.
_MAX_DYNAMIC_SHARED = 8
_PLAIN_SHARED = 48 << 10


@dataclass(frozen=True)
class Function:
    """A loaded kernel: its handle, bytes of shared memory, threads of a program.

    scratch: how many pointers Triton appends to the parameters; our kernels leave them unused.
    """

    handle: ctypes.c_void_p
    shared: int
    threads: int
    scratch: int


class Driver:
    """libcuda, loaded. Raises `ArtifactError` if there is none."""

    def __init__(self) -> None:
        try:
            self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ArtifactError(
                f"the CUDA driver cannot be loaded: {error}",
                help="install the NVIDIA driver, or run with --target reference",
            ) from None

    def load(self, image: bytes, name: str, shared: int, threads: int, scratch: int) -> Function:
        """The kernel `name` of a binary. Raises OSError with the driver's reason."""
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), image))
        symbol = name.encode()
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(handle), module, symbol))
        if shared > _PLAIN_SHARED:
            self._check(self._cuda.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared))
        return Function(handle, shared, threads, scratch)

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        stream: int,
        arguments: Sequence[tuple[int, bool]],
    ) -> None:
        """Start a kernel. arguments: (value, whether it is a pointer); numbers are int32."""
        values: list[Any] = [
            ctypes.c_void_p(value) if pointer else ctypes.c_int32(value)
            for value, pointer in arguments
        ]
        values += [ctypes.c_void_p(0)] * function.scratch
        places = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        threads = (function.threads, 1, 1)
        tail = (function.shared, ctypes.c_void_p(stream), places, None)
        self._check(self._cuda.cuLaunchKernel(function.handle, *grid, *threads, *tail))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise OSError(f"CUDA error {status}: {(text.value or b'unknown').decode()}")
