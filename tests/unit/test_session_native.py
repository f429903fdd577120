"""A plan on native kernels: every family against float64, bit-equal rows, threads, what is said."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.ops import Aten, Silu
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime.cpu import library as kernels
from scalebits_compiler.runtime.cpu import native
from scalebits_compiler.runtime.cpu import thread_gating as team
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cpu.native_ops import RULES, NotNative
from scalebits_compiler.runtime.cpu.native_ops import Value as Rows
from scalebits_compiler.runtime.kernel_files import shipped_kernels
from scalebits_compiler.runtime.manifest import Kernels, Manifest
from scalebits_compiler.runtime.plan import Step
from scalebits_compiler.runtime.session import Session, open_kernels
from scalebits_compiler.sessions.open import load, open_session
from scalebits_compiler.sessions.reference import load_reference

pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")
from scalebits_compiler.codegen.tvm.build import compile_kernels
from scalebits_compiler.codegen.tvm.spec import select_specs

NO_VNNI = cpu_features() - {"avx512_vnni"}
SHAPES = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "qwen2": {"bias": True, "groups": 1},
    "mistral": {"window": 5, "groups": 4},
    "gather": {"gather": True, "bias": True},
    # Sizes that no vector fits, and many queries for one key-value head.
    "odd": {"heads": 7, "groups": 1, "head_dim": 38, "hidden": 75, "vocab": 61},
}


def close(found, expected, tolerance):
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, error


@pytest.fixture(scope="module")
def built(tmp_path_factory, build_module, module_shape):
    """(modules and shapes by name, kernels, files): one library for all of them."""
    shapes = {name: module_shape(**changes) for name, changes in SHAPES.items()}
    modules = {name: build_module(shape) for name, shape in shapes.items()}
    matrices = [
        (BlockLayout(*w.type.static_shape(), *w.block, w.group), module.bits(w))  # type: ignore[call-arg]
        for module in modules.values()
        for w in module.quantized()
    ]
    gathered = [layout.group for layout, _ in matrices]
    specs, dispatch = select_specs(matrices, ["bfloat16", "float16"], gathered)
    path = tmp_path_factory.mktemp("native") / "cpu.so"
    compile_kernels(specs, path)
    return modules, shapes, Kernels("kernels/cpu.so", dispatch), {"kernels/cpu.so": path}


@pytest.fixture(params=SHAPES)
def case(built, float64, write, request):
    """(artifact, the same model in float64)."""
    modules, shapes, table, files = built
    module = modules[request.param]
    return write(module, kernels=table, files=files), float64(module, shapes[request.param])


@pytest.fixture(params=["best", "without vnni"])
def session(case, request):
    found = load(case[0], features=None if request.param == "best" else NO_VNNI)
    assert found.execution == "native"
    return found


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(0, 61, (3, 45))


def test_forward_equals_float64(case, session, ids):
    close(session.forward(ids[:2]), np.stack([case[1](row) for row in ids[:2]]), 3e-4)


def test_a_row_is_the_same_bit_for_bit_however_it_is_computed(session, ids):
    """Alone, in a batch, padded, in one pass, token by token."""
    session.limit = 1000  # the cache grows while it is used, over several blocks of keys
    expected = session.forward(ids)
    pad = np.array([0, 3, 37])
    padded = np.zeros_like(ids)
    for row, count in enumerate(pad):
        padded[row, count:] = ids[row, : 45 - count]
    found = session.forward(padded, pad)
    logits, cache = session.prefill(padded[:, :40], pad)
    for row, count in enumerate(pad):
        np.testing.assert_array_equal(session.forward(ids[row : row + 1])[0], expected[row])
        np.testing.assert_array_equal(found[row, count:], expected[row, : 45 - count])
        np.testing.assert_array_equal(logits[row], expected[row, 39 - count])
    assert np.isfinite(found).all()
    for position in range(40, 45):
        logits = session.decode(padded[:, position], cache)
        np.testing.assert_array_equal(logits, found[:, position])


def test_a_cache_goes_back(session, ids):
    _, cache = session.prefill(ids[:, :6])
    first = [session.decode(ids[:, position], cache) for position in range(6, 10)]
    cache.truncate(7)
    again = [session.decode(ids[:, position], cache) for position in range(7, 10)]
    np.testing.assert_array_equal(again, first[1:])


def test_threads_change_nothing(case, ids, monkeypatch):
    monkeypatch.setattr(kernels, "THREAD_WORK", 0)
    monkeypatch.setattr(team, "MOST_WAITING", 1.0)  # also where no core is free
    alone = load(case[0], threads=1)
    for threads in (2, 3):
        session = load(case[0], threads=threads)
        np.testing.assert_array_equal(session.forward(ids), alone.forward(ids))
        logits, cache = session.prefill(ids[:, :3])
        other_logits, other = alone.prefill(ids[:, :3])
        np.testing.assert_array_equal(logits, other_logits)
        for position in range(3, 12):
            found = session.decode(ids[:, position], cache)
            np.testing.assert_array_equal(found, alone.decode(ids[:, position], other))


@pytest.fixture
def llama(built, write):
    modules, _, table, files = built
    return write(modules["llama"], kernels=table, files=files)


def test_two_threads_get_what_each_would_get_alone(llama, ids, two_threads, generate_in_threads):
    """All calls of one shape work on the same arrays; they wait for each other."""
    session = load(llama, threads=1)
    calls = [lambda: session.forward(ids), lambda: session.forward(ids[::-1])]
    expected = [call() for call in calls]

    def pause_in(pause):
        session.on_step = pause

    np.testing.assert_array_equal(two_threads(*calls, pause_in), expected)
    session.on_step = None
    prompts = [[3, 1, 4], [1, 5, 9]]
    alone = [session.generate(prompt, 40)[0].tokens for prompt in prompts]
    assert generate_in_threads(session, prompts, 40) == alone


def test_two_threads_share_the_helpers_of_one_library(llama, monkeypatch, generate_in_threads):
    """Also where two sessions have one library."""
    monkeypatch.setattr(kernels, "THREAD_WORK", 0)
    alone = load(llama, threads=1)
    artifact, prompts = alone.artifact, [[3, 1, 4], [1, 5, 9]]
    expected = [alone.generate(prompt, 12)[0].tokens for prompt in prompts]
    library = open_kernels(shipped_kernels(artifact), "exact", 2)
    session, other = Session(artifact, library), Session(artifact, library)
    assert generate_in_threads(session, prompts, 12) == expected
    assert session.calls is other.calls


def test_wrong_caches_and_rows_never_reach_a_kernel(llama, ids):
    session, other = load(llama), load(llama)
    _, cache = session.prefill(ids[:2, :4])
    with pytest.raises(UsageError, match="of another session"):
        other.decode(ids[:2, 4], cache)
    with pytest.raises(UsageError, match="there are 3 next token ids, the cache has rows: 2"):
        session.decode(ids[:3, 4], cache)
    expected = session.forward(ids[:2, :5])[:, -1]
    np.testing.assert_array_equal(session.decode(ids[:2, 4], cache), expected)


@pytest.mark.parametrize("failing", range(5))
def test_a_cache_that_gets_no_memory_stays_as_it_is(llama, ids, monkeypatch, failing):
    """Kernels write where the state says: to arrays that are there."""
    session = load(llama)
    session.limit = None
    ids = np.tile(ids[:1], 2)
    expected = session.forward(ids[:, :65])[:, -1]
    _, cache = session.prefill(ids[:, :64])
    before, left = cache.state.copy(), [failing]

    def zeros(*arguments):
        if left[0] == 0:
            raise MemoryError("no more")
        left[0] -= 1
        return np.zeros(*arguments)

    with monkeypatch.context() as patch:
        numpy = SimpleNamespace(zeros=zeros, float32=np.float32)
        patch.setattr("scalebits_compiler.runtime.cache.np", numpy)
        with pytest.raises(MemoryError):
            session.decode(ids[:, 64], cache)
    np.testing.assert_array_equal(cache.state, before)
    np.testing.assert_array_equal(session.decode(ids[:, 64], cache), expected)


def test_what_is_not_native_runs_step_by_step_and_says_so(case, ids, monkeypatch):
    fast = load(case[0])

    def refuse(*_):
        raise NotNative("gelu")

    monkeypatch.setattr(native, "NativeModel", refuse)
    slow = load(case[0])
    assert slow.execution == "step by step: no native kernel for gelu"
    close(slow.forward(ids), fast.forward(ids), 3e-4)
    logits, cache = slow.prefill(ids[:, :4])
    close(logits, fast.forward(ids[:, :4])[:, -1], 3e-4)
    close(slow.decode(ids[:, 4], cache), fast.forward(ids[:, :5])[:, -1], 3e-4)


def test_many_programs_and_long_texts(case):
    """Shapes come and go; the table of rotations grows under a live cache."""
    session = load(case[0])
    session.limit = None
    ids = np.random.default_rng(1).integers(0, 61, (1, 600))
    expected = session.forward(ids)
    logits, cache = session.prefill(ids[:, :250])
    np.testing.assert_array_equal(logits[0], expected[0, 249])
    for count in (1, 2, 3, 4, 5, 6, 7):
        session.forward(ids[:, :count])
    for position in range(250, 262):
        found = session.decode(ids[:, position], cache)
        np.testing.assert_array_equal(found[0], expected[0, position])


UNEVEN = """module @m {{facts = ["bits", "packed"]}} {{
  perm @p : i32[6] {{data = [2, 0, 1, 5, 3, 4]}}
  weight @embed : f32[9, 6] {{data = resource("embed")}}
  func @forward(%ids: i64[?, ?]) -> f32[?, ?, 6] {{
    %0 = embedding %ids, @embed : f32[?, ?, 6]
    %1 = {op}
    return %1
  }}
}}
"""


@pytest.mark.parametrize(
    ("op", "dtype", "why"),
    [
        ('permute %0 {axis = 2, order = "6@p"} : f32[?, ?, 6@p]', np.float32, "permute"),
        ("silu %0 : f32[?, ?, 6]", np.float64, "F64"),
    ],
)
def test_a_plan_that_is_not_native_is_named(built, write, op, dtype, why):
    torch = pytest.importorskip("torch")
    _, _, table, files = built
    store = ResourceStore({"embed": torch.from_numpy(np.ones((9, 6), dtype))})
    module = replace(parse_module(UNEVEN.format(op=op))[0], resources=store)
    session = load(write(module, kernels=table, files=files))
    assert session.execution.startswith("step by step: no native kernel for ")
    assert why in session.execution
    assert session.forward([[1, 2]]).shape == (1, 2, 6)


def turned(module):
    """Calls swap the axes of what MLPs multiply, and swap them back after an op that needs memory.

    In between torch alone has the value, in memory of the program unless it is copied.
    """
    swapped, ops = TensorType.of("f32", None, 104, None), []
    for op in module.function.ops:
        if op.name != "mul":
            ops.append(op)
            continue
        whole, there, other, back = (Value(f"{op.result.name}.{i}") for i in range(4))
        call = Aten(result=there, type=swapped, target="aten.transpose.int", args=(whole, 1, 2))
        ops += [
            replace(op, result=whole),
            call,
            Silu(result=other, type=op.type, x=op.b),
            replace(call, result=back, type=op.type, args=(there, 1, 2)),
            replace(op, a=back, b=other),
        ]
    made = replace(module, function=replace(module.function, ops=tuple(ops)))
    verify(made)
    return made


@pytest.fixture
def partly(built, write):
    """An artifact with ops that torch runs between the steps of the native program."""
    modules, _, table, files = built
    return write(turned(modules["llama"]), kernels=table, files=files)


def test_torch_runs_its_ops_and_the_program_the_rest(partly, ids, monkeypatch):
    """As by definition; the same bits in one pass, token by token, padded and on threads."""
    session = open_session(partly, threads=1)
    told = "native: torch runs aten.transpose.int"
    assert session.execution == told
    found = session.forward(ids)
    expected = load_reference(partly).forward(ids)
    assert np.linalg.norm(found - expected) < 3e-4 * np.linalg.norm(expected)
    padded, pad = np.pad(ids[:, :9], ((0, 0), (4, 0))), np.array([4, 4, 4])
    logits, cache = session.prefill(padded, pad)
    for place in range(9, 21):
        np.testing.assert_array_equal(logits, found[:, place - 1])
        logits = session.decode(ids[:, place], cache)
    monkeypatch.setattr(kernels, "THREAD_WORK", 0)
    monkeypatch.setattr(team, "MOST_WAITING", 1.0)  # also where no core is free
    np.testing.assert_array_equal(open_session(partly, threads=3).forward(ids), found)
    seen = Counter()
    session.on_step = lambda name, _: seen.update([name])
    np.testing.assert_array_equal(session.forward(ids), found)
    assert seen["torch"] == 4


def signed_plan(folder, change):
    """The artifact with another plan, and the digest made right."""
    path = folder / "manifest.json"
    manifest = Manifest.from_json(path.read_text())
    path.write_text(structs.replace(manifest, plan=change(manifest.plan)).to_json())


def test_a_plan_whose_calls_are_not_those_of_the_module_is_refused(partly):
    """A call is run by the number of its op, so an edited one would run another op."""

    def edited(plan):
        first, *others = plan.calls
        return structs.replace(plan, calls=(structs.replace(first, index=first.index + 1), *others))

    signed_plan(partly, edited)
    with pytest.raises(ArtifactError, match=r"the plan is not that of module\.sbir"):
        open_session(partly)


@pytest.mark.parametrize(
    "made", [np.zeros((3, 21, 5), np.float32), np.zeros((3, 21, 104), np.int64), 7]
)
def test_what_torch_gives_must_be_what_the_plan_says(partly, ids, made):
    session = open_session(partly)
    plan = session.artifact.manifest.plan
    assert plan is not None
    assert [call.channels for call in plan.calls] == [0, 104] * 2
    run = session.call_runner
    assert run is not None
    session.call_runner = lambda call, *rest: made if call.channels else run(call, *rest)
    with pytest.raises(ArtifactError, match=r"torch gave .* the plan says 104 channels of no"):
        session.forward(ids)


@pytest.mark.parametrize("op", ["linear", "qlinear", "bias"])
def test_products_and_biases_of_heads_are_not_native(op):
    """Their kernels would take the heads of a token for one row."""
    heads = SimpleNamespace(values={"x": Rows(np.zeros((2, 8), np.float32), 2)})
    with pytest.raises(NotNative, match=f"{op} of heads"):
        RULES[op](heads, Step(op, ("x",), ("w",), {}, "y", ()))  # type: ignore[arg-type]


def test_without_torch_the_op_is_named(partly, ids):
    session = load(partly)
    assert session.execution.startswith("native: torch runs aten.transpose.int")
    with pytest.raises(ArtifactError, match=r"has no op for aten\.transpose\.int, it needs torch"):
        session.forward(ids)
