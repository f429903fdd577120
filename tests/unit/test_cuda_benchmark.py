"""benchmarks/cuda without a GPU: what it imports, its checks, how it goes on, its tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the cuda target's kernels need Triton")
ROOT = Path(__file__).resolve().parents[2]

# Only torch, Triton and numpy can be imported. Kernels run in Triton's interpreter.
BARE = """
import sys
from pathlib import Path

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "tvm_ffi", "transformers", "safetensors", "lark"):
            raise ImportError(name + " is not on a bare machine")

sys.meta_path.insert(0, Refused())
folder = Path(sys.argv[1])
import torch, bench, check, decode, matrices, products, report
from scalebits_compiler.runtime.cuda import cache as cache_of
from scalebits_compiler.runtime.cuda.kernels import Kernels
from scalebits_compiler.runtime.cuda.launchers import SourceLauncher
"""
CHECK = """
from dataclasses import replace
from triton.runtime.interpreter import interpreter_builder

# As in the fixture triton_interpreter.
options = replace(interpreter_builder.options, sanitize_overflow=False)
interpreter_builder.options = options

def on_the_host(given, dtype, launcher, gathered=()):
    specs, dispatch = matrices.select_specs(given, dtype, gathered)
    table = {spec.key: {"warps": spec.warps, "stages": spec.stages} for spec in specs}
    launcher = SourceLauncher(matrices.emit_module(specs).encode(), table)
    return Kernels(dispatch, launcher, torch.device("cpu"), 2)

check.build_kernels = on_the_host
check.CHECKED = {"ragged": matrices.TileLayout(32, 136, 16, 32, 32)}
check.TOKENS = (3,)
print(check.check("fp16", "interpreter"))
decode.build_kernels = on_the_host
decode.HIDDEN = decode.INNER = decode.HEAD = 128
decode.HEADS = decode.GROUPS = 1
decode.VOCABULARY = 16
decode.MATRICES = dict.fromkeys(decode.MATRICES, (128, 128))
torch.manual_seed(1)  # of 12 seeds two are above the bound below, by chance
session = decode.our_session("interpreter", 1)
ids = torch.tensor([[1, 5, 3]])
_, cache = session.prefill(ids[:, :2].numpy(), capacity=4)
cache.ids.fill_(3)
step = session.decode_step(cache)[:, -1].float().numpy()
print(abs(step - session.forward(ids.numpy())[:, -1]).max() / step.std())
cache_of.LEAST_ROOM = 1  # rounds that do not start at the prompt's end would leave the buffers
cache_of.DeviceCache.reserve = lambda cache, capacity: None
torch.cuda.synchronize = lambda: None
decode.PROMPT, decode.NEW = 2, 2
assert decode.ours("interpreter", 1) > 0

check.TOLERANCE = {"fp16": 1e-9, "bf16": 1e-9}
check.check("fp16", "interpreter")
"""
RESUME = """
done = []
def part(name, value):
    return lambda: done.append(name) or value

names = ("cuBLAS bf16", "uniform 3 bf16", *report.COLUMNS[:8])
times = {name: [30.0, 10.0, 12.0] for name in names}
times |= {"mixed 2/3/4 fp16": [10.0, 4.0, 4.0], "uniform 3 fp16": [10.0, 4.0, 5.0]}
measured = {"microseconds": times, "bytes": {"mixed 2/3/4 fp16": 4_000_000}}
wanted = {"check fp16": part("check", 1e-4), "check bf16": part("check", 2e-3)}
wanted |= {"bandwidth": part("bandwidth", 2e12), "8192x8192 1": part("product", measured)}
wanted |= {"decode ours": part("ours", 5.0), "decode transformers dynamic": part("theirs", 15.0)}
wanted |= {"decode transformers static": part("theirs", None)}
machine = {"device": "G", "torch": "2", "triton": "3", "launcher": "binary", "quick": False}
calls = 0
while not bench.run(wanted, bench.opened(folder / "out.json", machine), folder / "out.json", 0):
    calls += 1
    assert calls < 20
assert len(done) == 7, done
print(calls)
print(report.as_markdown(bench.opened(folder / "out.json", machine)))
bench.opened(folder / "out.json", machine | {"device": "H"})
"""


def run(script, tmp_path):
    path = os.pathsep.join([str(ROOT / "benchmarks" / "cuda"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", BARE + script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_checks_see_what_the_kernels_give_and_decoding_runs(tmp_path):
    done = run(CHECK, tmp_path)
    assert done.stdout, done.stderr
    errors = [float(line) for line in done.stdout.splitlines()]
    assert max(errors) < 2e-3, errors
    assert (done.returncode, "WRONG: ragged, 1 bits, 3 tokens" in done.stderr) == (1, True)


def test_parts_are_done_once_and_end_in_tables(tmp_path):
    done = run(RESUME, tmp_path)
    assert (done.returncode, "name another file" in done.stderr) == (1, True), done.stderr
    printed = done.stdout
    assert "A copy moves 2000 GB/s." in printed
    assert "| 8192x8192 | 1 | 12.0 | 1.00 | 2.50 | 1.00 | 1.00 | 3.00 |" in printed
    assert "| 1.000 | 0.50 |\n" in printed
    assert "at least 2.5 times cuBLAS bf16 | 3.00 | met |" in printed
    assert "| 16 tokens, mixed: at least 1.5 times cuBLAS bf16 | - | not measured |" in printed
    assert "| decoding: at least 2.5 times the faster transformers | 3.00 | met |" in printed
    assert "| transformers bf16, static cache, CUDA graphs | - | not measured |" in printed
