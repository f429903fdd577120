"""A cuda artifact, loaded: prefill op by op, decoding as a captured CUDA graph."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.call_lock import CallLock
from scalebits_compiler.runtime.cuda.cache import DeviceCache
from scalebits_compiler.runtime.cuda.kernels import Kernels
from scalebits_compiler.runtime.cuda.launchers import BinaryLauncher, SourceLauncher
from scalebits_compiler.runtime.cuda.meter import DeviceMeter
from scalebits_compiler.runtime.cuda.ops import OPS, UNCAPTURED, Frame
from scalebits_compiler.runtime.cuda.weights import DeviceWeights
from scalebits_compiler.runtime.kernel_files import KernelFiles
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN
from scalebits_compiler.runtime.plan import PRODUCTS, Step
from scalebits_compiler.runtime.session import Session, runnable

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def check_gpu(artifact: Artifact) -> None:
    """Raise `ArtifactError` where there is no GPU to run a cuda artifact on."""
    if not torch.cuda.is_available():
        raise ArtifactError(
            f"{artifact.path} was compiled for the target 'cuda', and {missing_gpu()}",
            help=f"`scalebitsc retarget {artifact.path} --target cpu -o NEW` makes an artifact"
            " that runs here; `scalebitsc run --target reference` runs this one, slowly",
        )


def gpu_arch() -> str:
    """The architecture of the current GPU, as `--arch` names it."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def load_cuda(artifact: Artifact, kernels: KernelFiles) -> CudaSession:
    """A session on the current GPU, with the kernels' binaries where they fit.

    Standard error gets a line for every kernel whose source has to be compiled. Raises
    `ArtifactError` where there is no GPU.
    """
    check_gpu(artifact)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.init()
    table = _kernel_table(artifact, kernels)
    launcher = BinaryLauncher(kernels.read, table["kernels"], _sources(kernels, table))
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaSession(artifact, DeviceWeights(artifact, Kernels(table, launcher, device, count)))


def missing_gpu() -> str:
    """Why torch has no GPU here, as part of a sentence."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no NVIDIA GPU and driver here"


def _kernel_table(artifact: Artifact, kernels: KernelFiles) -> dict:
    if "kernels" not in kernels.dispatch:
        raise ArtifactError(f"{artifact.path} has no table of CUDA kernels", help=COMPILE_AGAIN)
    return dict(kernels.dispatch)


def _sources(kernels: KernelFiles, table: dict) -> SourceLauncher:
    """Runs kernels from their Triton source."""
    return SourceLauncher(kernels.read(kernels.library), table["kernels"])


def interpreted(artifact: Artifact, kernels: KernelFiles, multiprocessors: int = 2) -> CudaSession:
    """A session on the CPU under TRITON_INTERPRET=1, which must be set before Triton is imported.

    The same code as on a GPU but for the captured graph; far too slow for more than tests.
    """
    device = torch.device("cpu")
    table = _kernel_table(artifact, kernels)
    interpreter = Kernels(table, _sources(kernels, table), device, multiprocessors)
    return CudaSession(artifact, DeviceWeights(artifact, interpreter))


class CudaSession(Session):
    """Session whose activations, weights and cache stay on a device.

    All sessions of a process wait for each other: they share the device's current stream, and while
    one captures a graph no other may touch the device.

    captured: whether decoding is a captured graph, where the device is a GPU.
    """

    calls = CallLock()

    def __init__(self, artifact: Artifact, weights: DeviceWeights) -> None:
        self.artifact = artifact
        self.variant = "cuda"
        self.arithmetic = weights.arithmetic
        self.device = weights.device
        self.on_step = None
        self._plan = runnable(artifact)
        for step in self._plan.steps:
            if step.op not in OPS:
                raise ArtifactError(
                    f"{artifact.path}: the cuda target has no op {step.op}",
                    help="run it with --target reference",
                )
        self.captured = not any(step.op in UNCAPTURED for step in self._plan.steps)
        self.execution = "decoding as a CUDA graph" if self.captured else _UNCAPTURED
        self._weights = weights  # type: ignore[assignment]
        self.vocabulary = self._vocabulary()
        self.limit = artifact.limit

    def meter(self) -> DeviceMeter:
        """See `Session.meter`."""
        return DeviceMeter(self.device)

    def _forward(self, tokens: I64, pad: I64 | None) -> F32:
        padding = None if pad is None else torch.from_numpy(pad).to(self.device)
        frame = self._frame(torch.from_numpy(tokens).to(self.device), None, padding)
        return _host(self._steps(frame, last=False))

    def _prefill(self, tokens: I64, pad: I64 | None, room: int) -> tuple[F32, DeviceCache]:
        batch, count = tokens.shape
        cache = DeviceCache(batch, room, pad, self.device)
        frame = self._frame(torch.from_numpy(tokens).to(self.device), cache, cache.pad)
        logits = self._steps(frame, last=True)
        cache.advance(count)
        return _host(logits[:, -1]), cache

    def _decode(self, tokens: I64, cache: DeviceCache) -> F32:
        cache.ids.copy_(torch.from_numpy(tokens))
        logits = self.decode_step(cache)
        cache.advance(1)
        return _host(logits[:, -1])

    def decode_step(self, cache: DeviceCache) -> torch.Tensor:
        """Logits [batch, 1, vocabulary] on the device of the token ids in `cache.ids`.

        On a GPU the first step of a cache is captured, and the later ones replay it, but for
        mixtures of experts. The cache stays as long as it is until `advance`. What `decode` calls;
        by itself it is for one thread, and checks nothing.
        """
        cache.reserve(cache.length + 1)
        if self.device.type != "cuda" or self.on_step is not None or not self.captured:
            return self._steps(self._frame(cache.ids, cache, cache.pad, decoding=True), last=True)
        if cache.graph is None:
            self._capture(cache)
        assert cache.graph is not None
        assert cache.logits is not None
        cache.graph.replay()
        return cache.logits

    def _capture(self, cache: DeviceCache) -> None:
        """Record a decode step. It is run once before, on a stream of its own as capturing asks,
        so that weights, workspaces and kernels are there: a capture must not load or grow them.
        """

        def step() -> torch.Tensor:
            return self._steps(self._frame(cache.ids, cache, cache.pad, decoding=True), last=True)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                step()
        finally:  # whatever was started, if interrupted too, has the workspace until it ends
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.logits = step()
        cache.graph = graph

    def _frame(
        self,
        ids: torch.Tensor,
        cache: DeviceCache | None,
        pad: torch.Tensor | None,
        decoding: bool = False,
    ) -> Frame:
        weights: DeviceWeights = self._weights  # type: ignore[assignment]
        return Frame(weights, cache, pad, decoding, {self._plan.input: ids})

    @torch.no_grad()
    def _steps(self, frame: Frame, last: bool) -> torch.Tensor:
        """All steps; with `last` the final product is computed for the last position only."""
        for step in self._plan.steps[:-1]:
            self._step(frame, step)
        final = self._plan.steps[-1]
        if last and final.op in ("linear", *PRODUCTS):
            frame.values[final.inputs[0]] = frame.input(final)[:, -1:]
        self._step(frame, final)
        return frame.values[self._plan.output]

    def _step(self, frame: Frame, step: Step) -> None:  # type: ignore[override]
        if self.on_step is None:
            frame.run(step)
            return
        self._synchronize()
        start = time.perf_counter()
        frame.run(step)
        self._synchronize()
        self.on_step(step.op, time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


_UNCAPTURED = "step by step: a CUDA graph cannot hold experts, whose numbers of tokens vary"


def _host(logits: torch.Tensor) -> F32:
    return logits.float().cpu().numpy()
