"""The runtime against an independent float64 computation; caches, padding, limits, errors."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.runtime.cache import KVCache
from scalebits_compiler.runtime.ops import OPS, attend
from scalebits_compiler.runtime.plan import STEP_RULES
from scalebits_compiler.sessions.open import load
from scalebits_compiler.sessions.reference import load_reference

VARIANTS = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "qwen2": {"bias": True, "groups": 1},
    "mistral": {"window": 5, "groups": 4},
}


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(0, 90, (3, 12))


@pytest.fixture
def loaded(build_module, module_shape, float64, write):
    def _loaded(**changes):
        shape = module_shape(**changes)
        module = build_module(shape)
        return load(write(module)), float64(module, shape)

    return _loaded


def close(found, expected, tolerance):
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, error


def test_every_rule_has_a_function():
    assert OPS.keys() == STEP_RULES.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_float64(loaded, ids, name):
    session, exact = loaded(**VARIANTS[name])
    close(session.forward(ids), np.stack([exact(row) for row in ids]), 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_equals_forward(loaded, ids, name):
    session, _ = loaded(**VARIANTS[name])
    expected = session.forward(ids)
    logits, cache = session.prefill(ids[:, :4], capacity=8)
    close(logits, expected[:, 3], 1e-5)
    for position in range(4, ids.shape[1]):
        close(session.decode(ids[:, position], cache), expected[:, position], 1e-5)
    assert cache.length == ids.shape[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(loaded, ids, name):
    session, _ = loaded(**VARIANTS[name])
    pad = np.array([0, 3, 7])
    padded = np.zeros((3, 12), np.int64)
    for row, count in enumerate(pad):
        padded[row, count:] = ids[row, : 12 - count]
    found = session.forward(padded, pad)
    logits, cache = session.prefill(padded[:, :9], pad)
    for row, count in enumerate(pad):
        alone = session.forward(ids[row : row + 1, : 12 - count])[0]
        close(found[row, count:], alone, 1e-5)
        close(logits[row], alone[8 - count], 1e-5)
    for position in range(9, 12):
        close(session.decode(padded[:, position], cache), found[:, position], 1e-5)


def test_a_cache_goes_back(loaded, ids):
    session, _ = loaded(window=5)
    pad = [0, 3, 2]
    _, cache = session.prefill(ids[:, :6], pad)
    first = [session.decode(ids[:, position], cache) for position in range(6, 12)]
    session.decode(ids[:, 0], cache)
    cache.truncate(8)
    again = [session.decode(ids[:, position], cache) for position in range(8, 12)]
    np.testing.assert_array_equal(again, first[2:])
    for length in (3, 13):  # the second row would keep no token; more than there are
        with pytest.raises(UsageError, match=f"of 12 positions cannot go back to {length}"):
            cache.truncate(length)
    assert cache.length == 12


def test_long_attention_is_cut_into_pieces():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 2, 600, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 1, 700, 8)).astype(np.float32)
    for window in (0, 40):
        whole = attend(q, k, v, 0.5, window, None)
        pieces = [
            attend(q[:, :, i : i + 1], k[:, :, : 101 + i], v[:, :, : 101 + i], 0.5, window, None)
            for i in range(600)
        ]
        np.testing.assert_allclose(whole, np.concatenate(pieces, 2), atol=2e-6)


PERMUTED = """module @m {facts = ["bits", "packed"]} {
  perm @p : i32[3] {data = [2, 0, 1]}
  weight @embed : f32[9, 6] {data = resource("embed")}
  weight @head : f32[9, 2*3@p] {data = resource("head")}
  func @forward(%ids: i64[?, ?]) -> f32[?, ?, 9] {
    %0 = embedding %ids, @embed : f32[?, ?, 6]
    %1 = permute %0 {axis = 2, order = "2*3@p"} : f32[?, ?, 2*3@p]
    %2 = permute %1 {axis = 2, order = "2*3@p", inverse = true} : f32[?, ?, 6]
    %3 = permute %2 {axis = 2, order = "2*3@p"} : f32[?, ?, 2*3@p]
    %4 = linear %3, @head : f32[?, ?, 9]
    return %4
  }
}
"""


def test_permutes_that_stayed(write):
    embed, head = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)
    store = ResourceStore({"embed": torch.from_numpy(embed), "head": torch.from_numpy(head)})
    module = replace(parse_module(PERMUTED)[0], resources=store)
    session = load(write(module))
    expected = embed[[4, 8]][:, [2, 0, 1, 5, 3, 4]] @ head.T
    np.testing.assert_allclose(session.forward([[4, 8]])[0], expected, atol=1e-5)
    np.testing.assert_allclose(session.prefill([[4, 8]])[0][0], expected[1], atol=1e-5)


def test_same_ids_same_logits(loaded, ids):
    session, _ = loaded()
    np.testing.assert_array_equal(session.forward(ids), session.forward(ids))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[]], "integers"),
        ([1, 2], "integers"),
        ([[1.5]], "integers"),
        ([[90]], "token id 90 is not in the model's vocabulary of 90"),
        ([[-1]], "token id -1"),
        ([[1] * 65], "65 tokens, the model knows 64 positions"),
        ([[2**63]], "token id 9223372036854775808 is not in"),
        ([[2**70]], r"must be integers \[batch, sequence\], found object"),
        ([[-1, 2**63]], "must be integers"),
        ([[1, 2], [3]], "must be integers .*: .* inhomogeneous"),
        ([[1, None]], "found object"),
        ("text", "found <U4"),
        ([["a"]], "found <U1"),
        ([[True]], "found bool"),
        (None, "found object"),
        ({1: 2}, "found object"),
    ],
)
def test_bad_ids(loaded, bad, message):
    session = loaded(layers=1)[0]
    for call in (session.forward, session.prefill):
        with pytest.raises(UsageError, match=message):
            call(bad)


class Unreadable:
    def __array__(self, *_, **__):
        raise AttributeError("no numbers here")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1], "there are 1 next token ids, the cache has rows: 2"),
        ([1, 2, 3], "there are 3 next"),
        ([1, 90], "token id 90"),
        ([1, 2**62], "token id 4611686018427387904"),
        ([2**63, 2**63], "token id 9223372036854775808"),
        ([1, 2**63], "found float64"),
        ([1, -(2**70)], "found object"),
        ([[1], [2]], r"must be integers \[batch\], found int64\[2, 1\]"),
        ([1.0, 2.0], "found float64"),
        ([[1], [2, 3]], "inhomogeneous"),
        (1, "found int64"),
        ("ab", "found <U2"),
        (None, "found object"),
        (Unreadable(), "must be integers .*: no numbers here"),
    ],
)
def test_bad_next_ids_leave_the_cache_as_it_is(loaded, ids, bad, message):
    session, _ = loaded(layers=1)
    _, cache = session.prefill(ids[:2, :4])
    with pytest.raises(UsageError, match=message):
        session.decode(bad, cache)
    assert cache.length == 4
    close(session.decode(ids[:2, 4], cache), session.forward(ids[:2, :5])[:, -1], 1e-5)


def test_a_cache_of_another_session_is_refused(loaded, ids):
    session, _ = loaded(layers=1)
    _, cache = load(session.artifact.path).prefill(ids[:2, :4])
    for other in (cache, None, KVCache(2), "cache"):
        with pytest.raises(UsageError, match="the cache is of another session, or is none"):
            session.decode(ids[:2, 4], other)
    assert cache.length == 4


HUGE = pytest.param(10**5000, id="huge")


@pytest.mark.parametrize("capacity", [-1, 1.5, "8", None, True, [8], 2**31, HUGE])
def test_bad_capacity(loaded, ids, capacity):
    with pytest.raises(UsageError, match=r"capacity is .*, it must be a whole number, 0 to 2147"):
        loaded(layers=1)[0].prefill(ids, capacity=capacity)


def test_capacity_beyond_what_the_model_knows_takes_no_memory(loaded, ids):
    _, cache = loaded(layers=1)[0].prefill(ids[:, :4], capacity=2**31 - 1)
    assert cache._layers[0][0].shape[2] == 64


@pytest.mark.parametrize(
    "pad",
    [
        [1],
        [0, 0, 12],
        [-1, 0, 0],
        [0.5, 0, 0],
        [[0], [1, 2]],
        "abc",
        1,
        [2**70] * 3,
        [True] * 3,
        {},
    ],
)
def test_bad_pad(loaded, ids, pad):
    with pytest.raises(UsageError, match="pad must"):
        loaded()[0].forward(ids, pad)


def test_the_cache_ends_at_the_last_position(loaded):
    session, _ = loaded()
    _, cache = session.prefill([[1] * 64])
    with pytest.raises(UsageError, match="65 tokens"):
        session.decode([1], cache)


def test_bad_options(build_module, module_shape, write):
    out = write(build_module(module_shape(layers=1)))
    with pytest.raises(UsageError, match="activations"):
        load(out, activations="fp8")
    for threads in (0, "2", 1.0, True, 10**9):
        with pytest.raises(UsageError, match=r"threads is .*, it must be .* 1 to 1024"):
            load(out, threads=threads)


def test_damaged_config(build_module, module_shape, write):
    out = write(build_module(module_shape(layers=1)))
    (out / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load(out)


def test_threads_take_turns(loaded, ids, two_threads):
    """A call waits for the one that another thread is in the middle of."""
    session, _ = loaded(layers=1)
    expected = session.forward(ids), session.forward(ids[::-1])

    def pause_in(pause):
        session.on_step = pause

    found = two_threads(lambda: session.forward(ids), lambda: session.forward(ids[::-1]), pause_in)
    np.testing.assert_array_equal(found, expected)


def test_threads_take_turns_in_a_session_of_definitions(loaded, ids, two_threads, monkeypatch):
    session = load_reference(loaded(layers=1)[0].artifact.path)
    expected = session.forward(ids), session.forward(ids[::-1])
    run = session.executor.run

    def pause_in(pause):
        monkeypatch.setattr(session.executor, "run", lambda *a, **k: (pause(), run(*a, **k))[1])

    found = two_threads(lambda: session.forward(ids), lambda: session.forward(ids[::-1]), pause_in)
    np.testing.assert_array_equal(found, expected)
    _, cache = session.prefill(ids)
    with pytest.raises(UsageError, match="there are 1 next token ids, the cache has rows: 3"):
        session.decode([1], cache)
    with pytest.raises(UsageError, match="the cache is of another session"):
        load_reference(session.artifact.path).decode([1, 2, 3], cache)


def test_a_cache_that_threads_share_grows_one_call_after_the_other(loaded, ids, two_threads):
    session, _ = loaded(layers=1)
    row = ids[:1]
    _, cache = session.prefill(row[:, :4])

    def pause_in(pause):
        session.on_step = pause

    first, second = two_threads(
        lambda: session.decode(row[:, 4], cache), lambda: session.decode(row[:, 5], cache), pause_in
    )
    expected = session.forward(row)
    close(first, expected[:, 4], 1e-5)
    close(second, expected[:, 5], 1e-5)

    _, cache = session.prefill(row[:, :4])
    two_threads(lambda: session.decode(row[:, 4], cache), lambda: cache.truncate(5), pause_in)
    assert cache.length == 5


def test_a_call_inside_a_call_is_refused(loaded, ids):
    session, _ = loaded(layers=1)
    expected, cache = session.prefill(ids)
    for inner in (lambda: session.forward(ids), lambda: cache.truncate(4)):
        session.on_step = lambda *_, inner=inner: inner()
        with pytest.raises(UsageError, match="from inside one of its own calls"):
            session.forward(ids)
    session.on_step = None
    np.testing.assert_array_equal(session.prefill(ids)[0], expected)


def test_the_compiler_is_not_imported(build_module, module_shape, write):
    code = (
        "import sys\n"
        "from scalebits_compiler.runtime.artifact import Artifact\n"
        "from scalebits_compiler.runtime.session import make_session\n"
        "session = make_session(Artifact.open(sys.argv[1]), None)\n"
        "print(session.generate([1, 2], 3)[0].tokens)\n"
        "for name in ('torch', 'tvm', 'lark', 'transformers', 'scalebits_compiler.ir',\n"
        "             'scalebits_compiler.codegen', 'scalebits_compiler.passes'):\n"
        "    assert name not in sys.modules, name\n"
    )
    out = write(build_module(module_shape(layers=1)))
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, capture_output=True)
