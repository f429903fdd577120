"""The runtime on compiled kernels: both variants, against float64 of the dequantized weights."""

import hashlib

import numpy as np
import pytest

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cpu.program import CODE
from scalebits_compiler.runtime.manifest import Kernels
from scalebits_compiler.sessions.open import load

torch = pytest.importorskip("torch")
spec = pytest.importorskip("scalebits_compiler.codegen.tvm.spec", reason="needs apache-tvm")


def compile_module(module, folder):
    """(Kernels, files of the artifact) for all packed matrices of a module."""
    from scalebits_compiler.codegen.tvm.build import compile_kernels

    matrices = [
        (BlockLayout(*w.type.static_shape(), *w.block, w.group), module.bits(w))
        for w in module.quantized()
    ]
    specs, dispatch = spec.select_specs(matrices, ["float32", "bfloat16", "float16"])
    compile_kernels(specs, folder / "cpu.so")
    return Kernels("kernels/cpu.so", dispatch), {"kernels/cpu.so": folder / "cpu.so"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, build_module, module_shape):
    """(module, kernels, files), compiled once."""
    module = build_module(module_shape())
    return module, *compile_module(module, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def out(compiled, write):
    module, kernels, files = compiled
    return write(module, kernels=kernels, files=files)


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(0, 90, (3, 12))


def variants(out):
    """The variants of this artifact that this machine runs, with the features to ask for."""
    found = {}
    for features in (cpu_features(), cpu_features() - {"avx512_vnni"}):
        session = load(out, features=features)
        found[session.variant] = features
    return found


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_each_variant_equals_the_reference(out, ids):
    module, _ = read_module(out / "module.sbir")
    expected = Executor(module).run(torch.from_numpy(ids)).numpy()
    for features in variants(out).values():
        session = load(out, features=features)
        assert error(session.forward(ids), expected) < 3e-4
        assert error(session.forward(ids[:1, :1]), expected[:1, :1]) < 3e-4


def test_both_variants_run_where_the_processor_has_vnni(out):
    if "avx512_vnni" not in cpu_features():
        pytest.skip("this processor has no avx512_vnni; the others are tested alone")
    assert list(variants(out)) == ["vnni", "avx2"]


def test_decode_equals_forward_bit_for_bit(out, ids):
    """Token by token, in pieces, in a batch, on threads: the same operations in the same order."""
    for features in variants(out).values():
        session = load(out, features=features, threads=2)
        assert session.execution == "native"
        expected = session.forward(ids)
        logits, cache = session.prefill(ids[:, :5], capacity=7)
        np.testing.assert_array_equal(logits, expected[:, 4])
        for position in range(5, 12):
            found = session.decode(ids[:, position], cache)
            np.testing.assert_array_equal(found, expected[:, position])
        for row in range(3):
            np.testing.assert_array_equal(session.forward(ids[row : row + 1])[0], expected[row])


def test_int8_activations_are_close(out, ids):
    if "avx512_vnni" not in cpu_features():
        pytest.skip("these kernels have no int8 arithmetic")
    exact, fast = load(out).forward(ids), load(out, activations="int8").forward(ids)
    assert error(fast, exact) < 0.1


def test_generate(out):
    session = load(out)
    together = session.generate([[3], [5, 7, 9, 11, 2]], 6)
    alone = [session.generate(prompt, 6)[0] for prompt in ([3], [5, 7, 9, 11, 2])]
    assert together == alone


def test_siblings_share_one_quantised_input(out):
    session = load(out)
    number = session._weights.library.number("quantize", 32)
    table = session._native.lowered(1, 3, last=False).program.table
    # qkv, o, gate and up, down in each of two layers
    assert (table[:, CODE] == number).sum() == 8


def test_a_machine_without_the_features_is_told(out):
    with pytest.raises(ArtifactError, match="none of the compiled kernels") as caught:
        load(out, features=frozenset())
    assert "--target reference" in caught.value.help


def test_an_edited_library_is_never_loaded(out):
    path = out / "kernels/cpu.so"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"kernels/cpu\.so was changed"):
        load(out)


def test_equal_builds(compiled, write, tmp_path):
    module, kernels, files = compiled
    outs = [write(module, tmp_path / name, kernels=kernels, files=files) for name in "ab"]
    digests = [hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest() for out in outs]
    assert digests[0] == digests[1]
