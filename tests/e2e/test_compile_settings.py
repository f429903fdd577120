"""`compile -p PIPELINE`, `--set PASS.OPTION=VALUE` and the flags that set options of passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

REFERENCE = ("--target", "reference", "--avg-bits", "3.5")


def test_settings_and_flags_reach_their_passes(
    compiled: Any, compile_small: Any, tmp_path: Path
) -> None:
    pipeline = "canonicalize,annotate-sensitivity,assign-bits,round-weights,pack-blocks"
    ran = compile_small(
        compiled.model,
        tmp_path / "out",
        *REFERENCE,
        *("-p", pipeline, "--loss", "kl"),
        *("--set", "assign-bits.whole-blocks=true", "--set", "round-weights.method=rtn"),
        *("--set", "assign-bits.rounds=0"),
    )
    assert ran.code == 0, ran.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    history = manifest["provenance"]["pipeline"]
    assert 'annotate-sensitivity{loss = "kl"}' in history
    assert 'assign-bits{avg-bits = 3.5, rounds = 0, loss = "kl", whole-blocks = true}' in history
    assert 'round-weights{method = "rtn"}' in history
    assert "reorder-channels" not in history
    assert "tune-scales" not in history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "rounds"), "'rounds' is not of the form PASS.OPTION=VALUE"),
        (("--set", "asign-bits.z=2"), "did you mean 'assign-bits'?"),
        (("--set", "assign-bits.zz=2"), "assign-bits has no option 'zz'"),
        (("--set", "assign-bits.rounds=many"), "expected int"),
        (("-p", "default", "--no-tuning"), "--passes and --no-tuning both choose the passes"),
        (
            ("-p", "untuned", "--tuning-epochs", "1"),
            "no pass of the pipeline reads --tuning-epochs",
        ),
        (("-p", "no-such-pass"), "there is no pass 'no-such-pass'"),
        (("-p", "canonicalize,assign-bits"), "the pipeline does not pack the module"),
        (("-p", "canonicalize,round-weights"), "round-weights needs the fact `bits`"),
    ],
)
def test_refusals(
    compiled: Any, compile_small: Any, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    ran = compile_small(compiled.model, tmp_path / "out", *REFERENCE, *options)
    assert ran.code in (1, 2)
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
