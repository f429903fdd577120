"""Which device the passes compute on, and whether a model is streamed to it (layer L3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.module import Module
from scalebits_compiler.numerics.device import Placement

DEVICES = ("cpu", "cuda")
# Float32 values for each weight that tuning holds, the most of all passes: codes, their places with
# gradient and two moments, the matrix and what its gradient needs, two evaluators' own.
HELD = 12
# Tokens of a batch of the passes (statistics.BATCH_TOKENS), and the values of an activation that a
# gradient needs: it, its gradient, and what is made of it on the way.
BATCH_TOKENS, ACTIVATIONS = 4096, 4


def check_device(device: str) -> None:
    """UsageError for a device that is unknown, or not there."""
    if device not in DEVICES:
        raise UsageError(f"there is no device {device!r}", help=f"use {' or '.join(DEVICES)}")
    if device == "cuda":
        import torch

        from scalebits_compiler.runtime.cuda.session import missing_gpu

        if not torch.cuda.is_available():
            raise UsageError(
                f"--device cuda: {missing_gpu()}",
                help="leave it out: the passes compute on the CPU, for every target",
            )


def place_for(device: str, module: Module) -> Placement:
    """Stream the module if what passes would hold of it is more than the memory has room for."""
    return Placement(device, streamed=bytes_held(module) > _free_bytes(device))


def bytes_held(module: Module) -> int:
    """About how many bytes the passes hold of a module that is not streamed."""
    # A text that is still to be verified may state a matrix without fixed sizes.
    kinds = [w.type for w in module.weights.values() if None not in w.type.shape]
    matrices = [kind.static_shape() for kind in kinds if kind.rank == 2]
    weights = sum(rows * columns for rows, columns in matrices)
    channels = sum(rows + columns for rows, columns in matrices)
    return 4 * (HELD * weights + ACTIVATIONS * BATCH_TOKENS * channels)


def _free_bytes(device: str) -> int:
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import torch

    return torch.cuda.mem_get_info()[0]


@contextmanager
def computing_on(device: str) -> Iterator[None]:
    """On a GPU, torch is asked for algorithms that give the same results every time.

    The caller's settings are restored. PassError where the GPU's memory does not suffice.
    """
    if device == "cpu":
        yield
        return
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PassError(
            "the memory of the GPU does not suffice, although the model is streamed where it must",
            help="end other programs on it, give fewer or shorter windows, or --device cpu",
            notes=str(error).splitlines()[:1],
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
