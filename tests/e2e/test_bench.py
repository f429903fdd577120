"""`scalebitsc bench` on the tiny artifact: what it counts, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from safetensors import safe_open

from scalebits_compiler.runtime import meter
from scalebits_compiler.sessions.open import load

FEW = ("--prompt-tokens", "5", "--new-tokens", "3", "--repeat", "3")


@pytest.fixture(autouse=True)
def small_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MOVED_BYTES", 1 << 20)


@pytest.fixture
def measured(cli: Any, compiled: Any) -> dict[str, Any]:
    ran = cli("bench", compiled.path, *FEW, "--threads", "2", "--json")
    assert ran.code == 0, ran.err
    assert "measuring" in ran.err
    return json.loads(ran.out)


def test_rates(measured: dict[str, Any]) -> None:
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second", "read_bandwidth")
    for name in (*rates, "first_decode_seconds"):
        found = measured[name]
        assert 0 < found["low"] <= found["median"] <= found["high"]
    # the median of the shares lies between those of the slowest and the fastest round
    needed = measured["bytes_per_token"]
    decode, memory = measured["decode_tokens_per_second"], measured["read_bandwidth"]
    least, most = decode["low"] / memory["high"], decode["high"] / memory["low"]
    assert needed * least <= measured["bandwidth_share"] <= needed * most
    assert measured["peak_memory_bytes"] > 10 << 20


def test_what_ran(compiled: Any, measured: dict[str, Any]) -> None:
    session = load(compiled.path)
    assert measured["variant"] == session.variant
    kernels = json.loads((compiled.path / "manifest.json").read_text())["kernels"]["dispatch"]
    modes = {variant["name"]: variant["modes"] for variant in kernels["variants"]}
    assert measured["arithmetic"] == modes[session.variant][0]
    assert (measured["prompt_tokens"], measured["new_tokens"], measured["threads"]) == (5, 3, 2)


def test_bytes_are_those_of_the_file(compiled: Any, measured: dict[str, Any]) -> None:
    """All tensors but the tables of widths and what no op reads; of the embedding one row."""
    manifest = json.loads((compiled.path / "manifest.json").read_text())
    steps = manifest["plan"]["steps"]
    total = 0
    with safe_open(compiled.path / "model.safetensors", "np") as file:
        for step in steps:
            for symbol in step["weights"]:
                packed = manifest["weights"][symbol]["kind"] == "packed"
                tensor = file.get_tensor(f"{symbol}.packed" if packed else symbol)
                total += tensor[0].nbytes if step["op"] == "embedding" else tensor.nbytes
    assert measured["bytes_per_token"] == total


def test_every_op_is_timed(compiled: Any, measured: dict[str, Any]) -> None:
    manifest = json.loads((compiled.path / "manifest.json").read_text())
    # On native kernels heads lie side by side in a row: splitting and merging them is no work.
    ops = {step["op"] for step in manifest["plan"]["steps"]} - {"split_heads", "merge_heads"}
    ops = ops - {"silu", "mul"} | {"silu_mul"}  # one kernel for both
    for phase in ("prefill", "decode"):
        seconds = measured["seconds_by_op"][phase]
        assert set(seconds) == ops
        assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
        assert min(seconds.values()) > 0


def test_for_people(cli: Any, compiled: Any) -> None:
    ran = cli("bench", compiled.path, *FEW, "-q")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    starts = ("kernels", "prefill", "decode", "first decode", "bytes per token")
    for start in (*starts, "read bandwidth", "peak memory"):
        assert f"\n{start} " in f"\n{ran.out}"
    assert "GB/s measured," in ran.out
    assert "  qlinear " in ran.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repeat", "0"), "--repeat 0 must be at least 1"),
        (("--new-tokens", "-1"), "--new-tokens -1 must be at least 1"),
        (("--prompt-tokens", "100000"), "positions"),
    ],
)
def test_bad_options(cli: Any, compiled: Any, options: tuple[str, ...], message: str) -> None:
    ran = cli("bench", compiled.path, *options)
    assert ran.code == 2
    assert message in ran.err


def test_needs_no_torch(compiled: Any) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['tvm', 'torch', 'transformers']))\n"
        "from scalebits_compiler.cli.main import main\n"
        f"sys.exit(main(['bench', {str(compiled.path)!r}, '-q', *{FEW!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tokens/s" in done.stdout
