"""Models of several families on the cuda target: kernels under Triton's interpreter, on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scalebits_compiler.artifact.repack import repack
from scalebits_compiler.codegen.triton.aot import Binary
from scalebits_compiler.codegen.triton.target import CudaTarget
from scalebits_compiler.driver import inputs
from scalebits_compiler.frontend.hf import load_model
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.pipeline import parse_passes, run_pipeline
from scalebits_compiler.passes.table import PASSES
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cuda.session import interpreted
from scalebits_compiler.runtime.kernel_files import shipped_kernels

SMALL = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "gpt2": {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma2": {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "phi3": SMALL,
    "bert": SMALL,
    "gpt_neox": SMALL,
    "falcon": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "head_dim": 16, "num_experts": 4, **EXPERTS},
}
IDS = np.random.default_rng(3).integers(0, 64, (2, 7))


def packed(folder):
    """The model with widths 2 and 3 dealt out to its blocks, rounded to nearest, packed."""
    source, ctx = load_model(folder), PassContext(evaluate=Executor)
    module = inputs.traced_module(source)
    first = parse_passes("canonicalize{block = [16, 32], group = 32}", PASSES)
    module = run_pipeline(module, first, ctx)
    assert not any(op.name == "aten" for op in module.function.ops)
    rng = np.random.default_rng(0)
    grids = {w.symbol: rng.integers(2, 4, w.grid_shape()) for w in module.quantized()}
    module = replace(module.with_bits(grids), facts=module.facts | {"bits"})
    last = parse_passes('round-weights{method = "rtn"},pack-blocks', PASSES)
    return run_pipeline(module, last, ctx)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_its_definition_does(
    family, tiny_llama, write, monkeypatch, triton_interpreter
):
    module = packed(tiny_llama(family, **FAMILIES[family]))
    with torch.no_grad():
        expected = Executor(module).run(torch.from_numpy(IDS)).numpy()
    monkeypatch.setattr(
        "scalebits_compiler.codegen.triton.aot.compile_specs",
        lambda specs, archs, folder: {spec.key: {"sm_90": Binary(b"", 0, 2)} for spec in specs},
    )
    target = CudaTarget()
    target.check_module(module)
    module = repack(module, target.order)
    built = target.build(module, None)
    path = write(module, kernels=built.kernels, files=built.files)
    artifact = Artifact.open(path)
    session = interpreted(artifact, shipped_kernels(artifact), multiprocessors=1)
    assert session.captured == (family not in ("mixtral", "qwen3_moe"))
    assert session.execution.startswith("step by step: ") != session.captured
    if family == "bert":  # every token sees every other: nothing to generate
        assert close(session.forward(IDS), expected)
        return
    logits, cache = session.prefill(IDS[:, :6])
    assert close(logits, expected[:, 5])
    assert close(session.decode(IDS[:, 6], cache), expected[:, 6])


def close(found, expected):
    """Within what fp16 activations cost on a layer of random weights."""
    return np.abs(found - expected).max() < 5e-3 * expected.std()
