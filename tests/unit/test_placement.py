"""Passes on a device that is not the host, and streamed to it: the device is a stand-in.

The stand-in is a tensor that says it is on another device (torch's `lazy`, which computes nothing
here), and holds values. Like a GPU it refuses operations whose tensors are not all on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from scalebits_compiler.driver import inputs
from scalebits_compiler.driver.device import bytes_held, computing_on, place_for
from scalebits_compiler.errors import PassError
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.numerics.device import Placement
from scalebits_compiler.passes.base import PassContext, TextSplit
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.table import PASSES

THERE = "lazy"
SCORING = "canonicalize{block = [16, 32], group = 32},annotate-sensitivity"
PIPELINE = (
    f"{SCORING},reorder-channels,fold-permutes,assign-bits{{rounds = 1}},"
    'round-weights,tune-scales{epochs = 1},tune-scales{scope = "layer", epochs = 1},pack-blocks'
)
IDS = torch.from_numpy(np.random.default_rng(9).integers(0, 64, (4, 10)))
TEXT = TextSplit(IDS[:2], IDS[2:3], IDS[3:])
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Compiled(NamedTuple):
    """A module after all passes, and what they report."""

    module: Module
    report: dict[str, Any]


class Held(torch.Tensor):
    """A tensor on the stand-in; `content` has its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Held:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(THERE),
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.content = inner

    def tolist(self) -> list[Any]:
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the stand-in after the test has put it away")


class StandIn(TorchDispatchMode):
    """Computes; `peak` is the most bytes that tensors of two axes and more have taken at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.taken = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, Held) for x in tensors)
        if there and func not in MOVES:
            for x in tensors:
                assert isinstance(x, Held) or not x.dim(), f"{func} of the device and the host"
        if given.get("device") is not None:
            there = torch.device(given["device"]).type == THERE
            given["device"] = torch.device("cpu")
        if func is MOVES[1]:
            there = isinstance(args[0], Held)
        out = func(*tree_map(_values, args), **tree_map(_values, given))
        if there:
            out = tree_map(lambda x: self._on(x) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs or {}, out)

    def _on(self, inner: torch.Tensor) -> Held:
        storage = inner.untyped_storage()
        if inner.dim() > 1 and storage._cdata not in self.live:
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.taken += storage.nbytes()
            if self.taken > self.peak:
                self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
                self.taken = sum(size for _, size in self.live.values())
                self.peak = max(self.peak, self.taken)
        return Held(inner)


def _values(x: Any) -> Any:
    return x.content if isinstance(x, Held) else x


class Literals(TorchFunctionMode):
    """torch.tensor(numbers, device): made on the host and moved, as torch does it for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        device = given.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **given)
        return made if device is None else made.to(device)


@pytest.fixture(autouse=True)
def few_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitting the levels is most of the work here; two scales to choose from will do."""
    few = dict.fromkeys(range(2, 9), 1)
    monkeypatch.setattr("scalebits_compiler.numerics.formats.uniform.NARROWER", few)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The device, while a test runs."""
    # It looks for the device's module in torch, for the state of a random generator.
    monkeypatch.setattr("torch.utils.checkpoint._infer_device_type", lambda *args: "cpu")
    with StandIn() as made, Literals():
        yield made


@pytest.fixture
def traced(tiny_llama: Callable[..., Path]) -> Callable[[int], Module]:
    """`traced(layers)`: a small model."""

    def make(layers: int) -> Module:
        size = {"hidden_size": 32, "intermediate_size": 40, "vocab_size": 64}
        source = load_model(tiny_llama(**size, num_hidden_layers=layers))
        return inputs.traced_module(source)

    return make


def compiled(module: Module, place: Placement, pipeline: str = PIPELINE) -> Compiled:
    ctx = PassContext(evaluate=Executor, place=place, text=TEXT)
    done = run_pipeline(module, parse_passes(pipeline, PASSES), ctx)
    return Compiled(done, ctx.report)


def same(a: Module, b: Module) -> bool:
    """Whether two modules have the same texts and bytes, all on the host."""
    assert {type(a.resources[key]) for key in a.resources} == {torch.Tensor}
    return print_module(a) == print_module(b) and all(
        torch.equal(a.resources.torch(key), b.resources.torch(key)) for key in a.resources
    )


def test_streaming_changes_no_byte(traced):
    lowered = traced(2)
    kept, streamed = (compiled(lowered, Placement("cpu", s)) for s in (False, True))
    assert same(streamed.module, kept.module)
    assert streamed.report == kept.report


def test_all_passes_run_on_another_device(traced, stand_in):
    lowered = traced(1)
    host = compiled(lowered, Placement())
    made = {s: compiled(lowered, Placement(THERE, streamed=s)) for s in (False, True)}
    assert same(made[True].module, made[False].module)
    assert made[True].report == made[False].report
    # Attention is summed in another order there.
    losses = [run.report["assign-bits"]["full_precision_loss"] for run in (made[True], host)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_streamed_model_takes_the_room_of_a_layer(traced, stand_in):
    peaks = {}
    for streamed in (False, True):
        for layers in (1, 2):
            stand_in.peak = 0
            compiled(traced(layers), Placement(THERE, streamed), SCORING)
            peaks[streamed, layers] = stand_in.peak
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40)
    # Not streamed: the matrices, rounded, and the evaluator's.
    assert peaks[False, 2] - peaks[False, 1] > 3 * layer
    # Streamed: what lives between layers, and the sums over blocks.
    assert peaks[True, 2] - peaks[True, 1] < layer / 4


def test_the_stand_in_refuses_what_a_gpu_refuses(stand_in):
    there = torch.ones(2, device=THERE)
    assert (there + torch.ones(())).cpu().tolist() == [2, 2]
    with pytest.raises(AssertionError, match="of the device and the host"):
        _ = there + torch.ones(2)
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()


def test_only_a_model_beyond_the_memory_is_streamed(traced, monkeypatch):
    module = traced(1)
    monkeypatch.setattr("scalebits_compiler.driver.device._free_bytes", lambda device: limit)
    limit = bytes_held(module)
    assert place_for("cpu", module) == Placement("cpu", streamed=False)
    limit -= 1
    assert place_for("cpu", module) == Placement("cpu", streamed=True)


def test_memory_that_does_not_suffice_is_one_error():
    before = torch.are_deterministic_algorithms_enabled()

    @computing_on("cuda")
    def work() -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(PassError, match="memory of the GPU does not suffice"):
        work()
    assert torch.are_deterministic_algorithms_enabled() == before
