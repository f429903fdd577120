"""The cuda target's session on the CPU: kernels under Triton's interpreter, no captured graph."""

import numpy as np
import pytest

from scalebits_compiler.artifact.repack import repack
from scalebits_compiler.codegen.triton.aot import Binary
from scalebits_compiler.codegen.triton.target import CudaTarget
from scalebits_compiler.errors import UsageError
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cuda.session import interpreted
from scalebits_compiler.runtime.kernel_files import shipped_kernels
from scalebits_compiler.sessions.reference import load_reference

# Relative to the spread of the logits. Activations are rounded to 11 bits (fp16) or 8 (bf16) at
# every op of two layers.
TOLERANCE = {"fp16": 5e-3, "bf16": 4e-2}
SMALL = {"layers": 1, "hidden": 56, "inner": 72, "heads": 2, "groups": 1}


@pytest.fixture
def sessions(build_module, write, monkeypatch, tmp_path, triton_interpreter):
    """(cuda session, reference session) of one module."""

    def open_both(shape, dtype="fp16", seed=0):
        fake = {"sm_90": Binary(b"not run here", 0, 2)}
        monkeypatch.setattr(
            "scalebits_compiler.codegen.triton.aot.compile_specs",
            lambda specs, archs, folder: {spec.key: fake for spec in specs},
        )
        target = CudaTarget(dtype=dtype)
        module = repack(build_module(shape, seed), target.order)
        built = target.build(module, tmp_path)
        path = write(module, kernels=built.kernels, files=built.files)
        artifact = Artifact.open(path)
        ours = interpreted(artifact, shipped_kernels(artifact), multiprocessors=1)
        return ours, load_reference(path)

    return open_both


def close(found, expected, dtype="fp16"):
    return np.abs(found - expected).max() < TOLERANCE[dtype] * expected.std()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_are_those_of_the_reference(dtype, sessions, module_shape):
    ours, reference = sessions(module_shape(**SMALL), dtype)
    ids = np.random.default_rng(0).integers(0, 90, (2, 9))
    assert close(ours.forward(ids), reference.forward(ids), dtype)


def test_decoding_goes_on_where_prefill_ends(sessions, module_shape, monkeypatch):
    ours, reference = sessions(
        module_shape(**SMALL, window=4, qk_norm=True, bias=True, gather=True)
    )
    ids = np.random.default_rng(1).integers(0, 90, (2, 8))
    pad = [0, 3]
    whole = reference.forward(ids, pad)
    monkeypatch.setattr("scalebits_compiler.runtime.cuda.cache.LEAST_ROOM", 7)
    logits, cache = ours.prefill(ids[:, :6], pad)
    assert cache.capacity == 7  # so that decoding has to grow the buffers
    assert close(logits, whole[:, 5])
    for position in range(6, 8):
        logits = ours.decode(ids[:, position], cache)
        assert close(logits, whole[:, position]), position
    assert cache.length == 8 <= cache.capacity


def test_a_cache_goes_back_and_keeps_its_graph(sessions, module_shape, monkeypatch):
    ours, _ = sessions(module_shape(**SMALL))
    ids = np.random.default_rng(2).integers(0, 90, (1, 7))
    monkeypatch.setattr("scalebits_compiler.runtime.cuda.cache.LEAST_ROOM", 1)
    _, cache = ours.prefill(ids[:, :4], capacity=6)
    first = [ours.decode(ids[:, position], cache) for position in (4, 5)]
    cache.graph = graph = object()  # on a GPU the first step has captured one
    cache.truncate(4)
    again = [ours.decode(ids[:, position], cache) for position in (4, 5)]
    np.testing.assert_array_equal(again, first)
    assert cache.graph is graph
    with pytest.raises(UsageError, match="of 6 positions cannot go back to 7"):
        cache.truncate(7)
    with pytest.raises(AttributeError):
        cache.length = 4  # the device's count would stay as it is
    # A bare step makes room too: a store beyond the buffers would end the process's use of a GPU.
    ours.decode_step(cache)
    assert (cache.graph, cache.length, cache.capacity) == (None, 6, 12)


def test_generation_runs(sessions, module_shape):
    ours, reference = sessions(module_shape(**SMALL))
    prompts = [[5, 17, 3], [8, 2]]
    found = ours.generate(prompts, 3)
    expected = reference.generate(prompts, 3)
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_sessions_of_one_device_take_turns(sessions, module_shape, two_threads):
    ours, reference = sessions(module_shape(**SMALL))
    other = interpreted(ours.artifact, shipped_kernels(ours.artifact), multiprocessors=1)
    ids = np.array([[5, 17]])
    logits, cache = ours.prefill(ids)
    expected = ours.forward(ids)

    def pause_in(pause):
        ours.on_step = pause

    found = two_threads(lambda: ours.forward(ids), lambda: other.prefill(ids)[0], pause_in)
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], logits)
    for session in (other, reference):
        with pytest.raises(UsageError, match="of another session"):
            session.decode([1], cache)
    with pytest.raises(UsageError, match="there are 2 next token ids, the cache has rows: 1"):
        ours.decode([1, 2], cache)
