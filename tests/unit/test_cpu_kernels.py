"""The CPU kernels against float64 on dequantized weights, in every mode this processor can run."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalebits_compiler.errors import ArtifactError, TargetError
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime.cpu import library as kernels
from scalebits_compiler.runtime.cpu import thread_gating as team
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cpu.library import KernelLibrary, PackedLinear

pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")
from scalebits_compiler.codegen.tvm import spec
from scalebits_compiler.codegen.tvm.build import (
    compile_kernels,
)
from scalebits_compiler.codegen.tvm.spec import (
    AVX2,
    VNNI,
    host_variants,
    select_specs,
    variant_record,
)

TOLERANCE = {"int16": 5e-5, "int8": 2e-2, "float32": 1e-5}
KERNELS = ["vnni int16", "vnni int8", "avx2 int16", "float32"]
ALL = tuple(range(1, 9))
X86 = platform.machine() in ("x86_64", "AMD64")

# Layout and widths; together every panel height, ragged rows and columns, and small blocks.
CASES = {
    "panel128": (BlockLayout(256, 300, 128, 128, 128), ALL),
    "panel64": (BlockLayout(192, 200, 64, 64, 32), (2, 3, 4)),
    "panel32": (BlockLayout(96, 100, 32, 32, 32), (1, 5, 7)),
    "panel16": (BlockLayout(65, 130, 16, 64, 32), ALL),
    "one": (BlockLayout(1, 1, 16, 64, 32), (3,)),
}


@dataclass
class Matrix:
    layout: BlockLayout
    arena: np.ndarray
    bits: np.ndarray
    weights: np.ndarray


def make_matrix(layout, widths, seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.choice(np.array(widths, np.uint8), size=layout.grid)
    # Every width must occur, so that the kernels know it.
    bits.flat[: len(widths)] = np.array(widths, np.uint8)[: bits.size]
    wide = bits.repeat(layout.block_rows, 0)[: layout.rows]
    wide = wide.repeat(layout.block_cols, 1)[:, : layout.cols].astype(np.uint32)
    codes = rng.integers(0, 1 << wide, dtype=np.uint32).astype(np.uint8)
    shape = (layout.rows, layout.groups)
    # The bytes of 0.01 to 0.1, see numerics/layout.py.
    scales = (rng.integers(66, 93, shape).astype(np.uint16) << 7).view(np.float16)
    arena = layout.pack(codes, scales, bits)
    return Matrix(layout, arena, bits, layout.dequantize(arena, bits).astype(np.float64))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(bytes of the kernel library, dispatch table) for all cases and all widths in them."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    grids = [(layout, np.array([widths], np.uint8)) for layout, widths in CASES.values()]
    specs, dispatch = select_specs(grids, gathered=(layout.group for layout, _ in grids))
    sources = compile_kernels(specs, path)
    kernels = {spec.key for group in specs.values() for spec in group}
    runs = {variant_record(name, group).run for name, group in specs.items()}
    assert set(sources) == kernels | runs
    assert all("T.prim_func" in source for source in sources.values())
    return path.read_bytes(), dispatch


@pytest.fixture(scope="module")
def compiled_float32(tmp_path_factory):
    """The same for the arithmetic that is there without integer kernels, or for large groups."""
    path = tmp_path_factory.mktemp("kernels") / "float32.so"
    grids = [(layout, np.array([widths], np.uint8)) for layout, widths in CASES.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "JOINED_GROUP", 0)
        specs, dispatch = select_specs(grids, gathered=(layout.group for layout, _ in grids))
    dispatch["variants"] = [v for v in dispatch["variants"] if v["modes"] == ["float32"]]
    (name,) = (variant["name"] for variant in dispatch["variants"])
    compile_kernels({name: specs[name]}, path)
    return path.read_bytes(), dispatch


def open_kernels(request, which):
    """The library of an entry of KERNELS; skips where this processor cannot run it."""
    if which == "float32":
        return KernelLibrary.open(*request.getfixturevalue("compiled_float32"))
    name, mode = which.split()
    needed = {"vnni": VNNI, "avx2": AVX2}[name]
    missing = set(needed.features) - cpu_features()
    if not X86 or missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing)) or 'x86'}")
    activations = "exact" if mode == "int16" else mode
    library = KernelLibrary.open(
        *request.getfixturevalue("compiled"), frozenset(needed.features), activations
    )
    assert (library.variant, library.mode) == (name, mode)
    return library


@pytest.fixture(params=KERNELS)
def library(request):
    return open_kernels(request, request.param)


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(library, matrix, tokens, seed=1):
    shape = (tokens, matrix.layout.cols)
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    found = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)(x)
    assert found.dtype == np.float32
    assert found.shape == (tokens, matrix.layout.rows)
    # Against the size that outputs have for random x: a single output may happen to cancel.
    typical = np.linalg.norm(matrix.weights) * np.sqrt((x.astype(np.float64) ** 2).mean() * tokens)
    assert np.linalg.norm(found - x @ matrix.weights.T) < TOLERANCE[library.mode] * typical


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 33, 70])
@pytest.mark.parametrize("case", CASES)
def test_mixed_widths(library, case, tokens):
    check(library, make_matrix(*CASES[case]), tokens)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_a_gather_reads_the_columns_that_its_index_names(library, case, tokens):
    """The same bits as of an x whose columns lie in that order."""
    layout, rng = CASES[case][0], np.random.default_rng(2)
    x = rng.normal(size=(tokens, layout.cols)).astype(np.float32)
    index = rng.permutation(layout.cols).astype(np.uint16)
    found = library.quantize(x, layout.group, index)
    expected = library.quantize(x[:, index], layout.group)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("width", ALL)
def test_uniform_width(library, width, tokens):
    for case in ("panel128", "panel16"):
        layout, widths = CASES[case]
        matrix = make_matrix(layout, (width,), seed=width)
        assert width in widths
        check(library, matrix, tokens)


@pytest.mark.parametrize("case", CASES)
def test_a_token_gives_the_same_bits_alone_and_among_others(library, case):
    """Whatever the kernel, and wherever the token stands in its tile and chunk."""
    matrix = make_matrix(*CASES[case])
    linear = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)
    x = np.random.default_rng(6).normal(size=(70, matrix.layout.cols)).astype(np.float32)
    together = linear(x)
    for count in (1, 3, 13):
        for first in (0, 5, 57):
            part = linear(x[first : first + count])
            np.testing.assert_array_equal(part, together[first : first + count])


@pytest.mark.parametrize("which", KERNELS)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 300),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17, 66]),
    widths=st.sets(st.integers(1, 8), min_size=1),
    offset=st.integers(0, 63),
    seed=st.integers(0, 1000),
)
def test_any_shape(request, which, rows, cols, tokens, widths, offset, seed):
    """16-row blocks have 16-row panels at every size, so one kernel serves them all.

    The packed bytes may begin at any address.
    """
    library = open_kernels(request, which)
    matrix = make_matrix(BlockLayout(rows, cols, 16, 64, 32), tuple(sorted(widths)), seed)
    room = np.empty(matrix.arena.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    room[start : start + matrix.arena.nbytes] = matrix.arena
    matrix.arena = room[start : start + matrix.arena.nbytes]
    check(library, matrix, tokens, seed)


@pytest.mark.parametrize("tokens", [1, 16])
def test_extreme_activations(library, tokens):
    """Zero groups, very large, very small and offset values keep the relative error."""
    matrix = make_matrix(*CASES["panel64"])
    linear = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)
    rng = np.random.default_rng(2)
    base = rng.normal(size=(tokens, 200)).astype(np.float32)
    assert not linear(np.zeros_like(base)).any()
    half = base * (np.arange(200) >= 64)
    cases = [half, base * np.float32(1e30), base * np.float32(1e-20), base + np.float32(100)]
    for x in cases:
        expected = x.astype(np.float64) @ matrix.weights.T
        assert error(linear(x.astype(np.float32)), expected) < 2 * TOLERANCE[library.mode]


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_activations_show(library, value, tokens):
    """A NaN or an infinity makes its token not finite, and no other."""
    matrix = make_matrix(*CASES["panel64"])
    x = np.ones((tokens, 200), np.float32)
    x[-1, 77] = value
    y = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)(x)
    assert not np.isfinite(y[-1]).any()
    assert np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("group", [256, 2048])
def test_large_group(tmp_path, group):
    """Few groups a row, the largest sums, and a dispatch table that went through JSON."""
    matrix = make_matrix(BlockLayout(48, 1100, 16, group, group), (8,))
    specs, dispatch = select_specs([(matrix.layout, matrix.bits)])
    compile_kernels(specs, tmp_path / "k.so")
    dispatch = json.loads(json.dumps(dispatch))
    modes = []
    for features in (cpu_features(), cpu_features() - {"avx512_vnni"}):
        library = KernelLibrary.open((tmp_path / "k.so").read_bytes(), dispatch, features)
        modes.append(library.mode)
        check(library, matrix, 1)
        check(library, matrix, 9)
        x = np.full((1, 1100), 3, np.float32)  # every product has the same sign
        found = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)(x)
        assert error(found, x @ matrix.weights.T) < TOLERANCE[library.mode]
    if X86:
        assert modes[-1] == ("int16" if group == 256 else "float32")


def test_vnni_and_avx2_give_the_same_bits(request):
    libraries = [open_kernels(request, which) for which in ("vnni int16", "avx2 int16")]
    for case in CASES.values():
        matrix = make_matrix(*case)
        for tokens in (1, 5, 40):
            shape = (tokens, matrix.layout.cols)
            x = np.random.default_rng(7).normal(size=shape).astype(np.float32)
            one, other = (
                PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)(x)
                for library in libraries
            )
            np.testing.assert_array_equal(one, other)


def test_shared_input_and_threads(library, monkeypatch):
    """One quantised input serves siblings; threads give the same bits as one thread."""
    matrix = make_matrix(*CASES["panel16"])
    linear = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)
    for tokens in (1, 9):
        x = np.random.default_rng(3).normal(size=(tokens, 130)).astype(np.float32)
        alone = linear(x)
        np.testing.assert_array_equal(linear(library.quantize(x, 32)), alone)
        monkeypatch.setattr(kernels, "THREAD_WORK", 1)
        monkeypatch.setattr(team, "MOST_WAITING", 1.0)  # also where no core is free
        library.threads = 3
        np.testing.assert_array_equal(linear(x), alone)
        library.threads = 1


def test_unaligned_read_only_map(library, tmp_path):
    matrix = make_matrix(*CASES["panel64"])
    path = tmp_path / "arena.bin"
    path.write_bytes(b"x" + matrix.arena.tobytes())
    matrix.arena = np.memmap(path, np.uint8, mode="r", offset=1)
    check(library, matrix, 1)
    check(library, matrix, 12)


def test_wrong_input(library):
    matrix = make_matrix(*CASES["panel64"])
    linear = PackedLinear(library, matrix.layout, matrix.arena, matrix.bits)
    for bad in (np.zeros((1, 200)), np.zeros(200, np.float32), np.zeros((0, 200), np.float32)):
        with pytest.raises(TargetError, match="float32"):
            linear(bad)
    with pytest.raises(TargetError, match="do not fit"):
        linear(np.zeros((1, 199), np.float32))
    with pytest.raises(TargetError, match="do not fit"):
        linear(library.quantize(np.zeros((1, 200), np.float32), 128))
    with pytest.raises(ArtifactError, match="bytes"):
        PackedLinear(library, matrix.layout, matrix.arena[1:], matrix.bits)


def test_kernels_that_are_not_there(library):
    strange = make_matrix(BlockLayout(192, 200, 64, 64, 64), (2,))
    with pytest.raises(ArtifactError, match=r"group 64.*\n.*compile the model again"):
        PackedLinear(library, strange.layout, strange.arena, strange.bits)
    wider = make_matrix(CASES["panel64"][0], (8,))
    with pytest.raises(ArtifactError, match=r"formats \[8\]"):
        PackedLinear(library, wider.layout, wider.arena, wider.bits)


def test_refuses_a_processor_without_the_features(compiled):
    code, dispatch = compiled
    if not X86:
        pytest.skip("needs x86: elsewhere there is one variant, without features")
    only = {**dispatch, "variants": [v for v in dispatch["variants"] if v["name"] == "vnni"]}
    with pytest.raises(ArtifactError, match="avx512_vnni") as caught:
        KernelLibrary.open(code, only, frozenset())
    assert "--target reference" in caught.value.help
    assert KernelLibrary.open(code, dispatch, frozenset(VNNI.features)).variant == "vnni"
    older = KernelLibrary.open(code, dispatch, frozenset(VNNI.features) - {"avx512_vnni"})
    assert (older.variant, older.mode) == ("avx2", "int16")


def test_refuses_another_architecture_version_mode_and_file(compiled):
    code, dispatch = compiled
    other = [{**variant, "arch": "sparc"} for variant in dispatch["variants"]]
    with pytest.raises(ArtifactError, match="sparc"):
        KernelLibrary.open(code, {**dispatch, "variants": other})
    with pytest.raises(ArtifactError, match="version 0"):
        KernelLibrary.open(code, {**dispatch, "version": 0})
    with pytest.raises(ArtifactError, match="missing required field 'variants'"):
        KernelLibrary.open(code, {"version": dispatch["version"]})
    with pytest.raises(TargetError, match=r"int4.*\n.*exact or int8"):
        KernelLibrary.open(code, dispatch, activations="int4")
    last = dispatch["variants"][-1]
    only = rf"\({last['name']}\) have no int8 arithmetic, only {last['modes'][0]}"
    with pytest.raises(TargetError, match=only):
        KernelLibrary.open(code, {**dispatch, "variants": [last]}, activations="int8")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        KernelLibrary.open(b"not an object", dispatch)


def edits(variant):
    """A variant's record with one thing changed."""
    kernels = variant["kernels"]
    yield {**variant, "kernels": kernels[::-1]}
    yield {**variant, "kernels": [kernels[1], kernels[0], *kernels[2:]]}
    yield {**variant, "kernels": kernels[:-1]}
    yield {**variant, "kernels": [*kernels, kernels[0]]}
    yield {**variant, "kernels": [{**kernels[0], "group": 256}, *kernels[1:]]}
    yield {**variant, "gemv_tokens": variant["gemv_tokens"] + 1}
    yield {**variant, "modes": variant["modes"][::-1] * 2}
    yield {**variant, "threads": not variant["threads"]}


def test_a_table_that_is_not_the_librarys(compiled):
    code, dispatch = compiled
    for edited in edits(dispatch["variants"][-1]):
        with pytest.raises(ArtifactError, match=r"cannot be loaded: .*undefined symbol"):
            KernelLibrary.open(code, {**dispatch, "variants": [edited]})


@pytest.mark.skipif(not X86, reason="the features of other processors are not known")
def test_features_are_those_of_the_variant(compiled):
    code, dispatch = compiled
    last = dispatch["variants"][-1]
    for features in ([], last["features"][1:], [*last["features"], "avx512_vnni"]):
        with pytest.raises(ArtifactError, match=r"variants\[0\]\.features"):
            KernelLibrary.open(code, {**dispatch, "variants": [{**last, "features": features}]})


STANDALONE = """
import sys
sys.modules.update(dict.fromkeys(["tvm", "tvm_ffi", "torch", "transformers", "lark"]))
import json, numpy as np
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime.cpu.library import KernelLibrary, PackedLinear
from pathlib import Path
folder = Path(sys.argv[1])
data = np.load(folder / "case.npz")
layout = BlockLayout(*json.loads((folder / "layout.json").read_text()))
dispatch = json.loads((folder / "dispatch.json").read_text())
for features in (None, frozenset(json.loads(sys.argv[2]))):
    library = KernelLibrary.open((folder / "k.so").read_bytes(), dispatch, features)
    linear = PackedLinear(library, layout, data["arena"], data["bits"])
    for tokens in (1, 5, 40):
        x = np.random.default_rng(0).standard_normal((tokens, layout.cols)).astype(np.float32)
        expected = x @ data["weights"].T
        assert np.abs(linear(x) - expected).max() < 1e-3 * np.abs(expected).max()
"""


def test_kernels_run_without_the_compiler(tmp_path):
    """Where only numpy can be imported."""
    matrix = make_matrix(*CASES["panel128"])
    specs, dispatch = select_specs([(matrix.layout, matrix.bits)])
    compile_kernels(specs, tmp_path / "k.so")
    (tmp_path / "dispatch.json").write_text(json.dumps(dispatch))
    sizes = (getattr(matrix.layout, f.name) for f in fields(matrix.layout))
    (tmp_path / "layout.json").write_text(json.dumps(list(sizes)))
    arrays = {"arena": matrix.arena, "bits": matrix.bits, "weights": matrix.weights}
    np.savez(tmp_path / "case.npz", **arrays)
    least = json.dumps(sorted([*host_variants().values()][-1].features))
    command = [sys.executable, "-W", "error", "-c", STANDALONE, str(tmp_path), least]
    subprocess.run(command, check=True)
