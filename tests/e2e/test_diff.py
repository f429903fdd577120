"""`scalebitsc diff` tells what was changed, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example.sbir"


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """The example with texts replaced, each of which it has once."""

    def edit(*pairs: tuple[str, str], source: Path = EXAMPLE, count: int = 1) -> Path:
        text = source.read_text()
        for old, new in pairs:
            assert text.count(old) == count, old
            text = text.replace(old, new)
        path = tmp_path / "edited.sbir"
        path.write_text(text)
        return path

    return edit


def found(cli: Any, a: Path, b: Path) -> dict[str, Any]:
    ran = cli("diff", a, b, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_a_module_is_the_same_as_itself(cli: Any, compiled: Any) -> None:
    for path in (EXAMPLE, compiled.path, compiled.dump / "05-assign-bits.sbir"):
        ran = cli("diff", path, path, "--exit-code")
        assert ran.code == 0, ran.err
        assert ran.out.endswith("no difference\n")
        assert found(cli, path, path)["same"]


def test_changed_bits(cli: Any, edited: Callable[..., Path]) -> None:
    other = edited(("bits = grid([[4], [3]])", "bits = grid([[6], [2]])"))
    told = found(cli, EXAMPLE, other)
    assert not told["same"]
    assert told["bits"] == {
        "l0.q": {
            "layer": "model.layers.0",
            "raised": 1,
            "lowered": 1,
            "changed": [[0, 0, 4, 6], [1, 0, 3, 2]],
            "histogram": [{"3": 1, "4": 1}, {"2": 1, "6": 1}],
            "order_changed": False,
        }
    }
    # Half of the 32 x 32 weights go up by 2, half down by 1: 512 code bits, 64 bytes.
    for name in ("all", "model.layers.0"):
        old, new = told["totals"][name]["bytes"]
        assert new - old == 64
    assert not any(told["ops"].values() or told["weights"].values())


def test_the_text_names_blocks_and_layers(cli: Any, edited: Callable[..., Path]) -> None:
    other = edited(("bits = grid([[4], [3]])", "bits = grid([[6], [2]])"))
    out = cli("diff", EXAMPLE, other).out
    assert "bits: matrices changed 1, blocks 2: 1 up, 1 down" in out
    assert "  ~ @l0.q  1 up, 1 down: [0, 0] 4->6, [1, 0] 3->2" in out
    assert re.search(r"^model\.layers\.0 +\d\.\d{3} -> +\d\.\d{3} ", out, re.MULTILINE)


def test_exit_codes(cli: Any, edited: Callable[..., Path], tmp_path: Path) -> None:
    other = edited(("[4], [3]]", "[4], [4]]"))
    assert cli("diff", EXAMPLE, other).code == 0
    assert cli("diff", EXAMPLE, other, "--exit-code").code == 3
    missing = cli("diff", EXAMPLE, tmp_path / "none.sbir", "--exit-code")
    assert (missing.code, "cannot read" in missing.err) == (1, True)
    folder = cli("diff", EXAMPLE, tmp_path)
    assert (folder.code, "a folder without module.sbir" in folder.err) == (2, True)


def test_permutations(cli: Any, edited: Callable[..., Path]) -> None:
    other = edited(("[7, 6, 5, 4,", "[6, 7, 5, 4,"), ("grid([[5]])", "grid([[6]])"))
    told = found(cli, EXAMPLE, other)
    assert told["permutations"]["changed"] == {"p.v": {"size": 8, "moved": 2}}
    assert not told["bits"]["l0.k"]["order_changed"]
    other = edited(("[7, 6, 5, 4,", "[6, 7, 5, 4,"), ("[[2], [3]]", "[[2], [4]]"))
    out = cli("diff", EXAMPLE, other).out
    assert "~ @p.v  2 of 8 places hold another channel" in out
    assert "~ @l0.o*  1 up, 0 down: [1, 0] 3->4" in out
    assert "a block does not hold the same weights" in out


def test_ops_and_weights(cli: Any, edited: Callable[..., Path]) -> None:
    other = edited(
        ("%21 = add %14, %20", "%21 = mul %14, %20"),
        ("@l0.norm1 : f32[32]", "@l0.norm1 : bf16[32]"),
    )
    told = found(cli, EXAMPLE, other)
    assert told["ops"]["removed"] == ['add %, % : f32[?, ?, 32] loc("model.layers.0")']
    assert told["ops"]["added"] == ['mul %, % : f32[?, ?, 32] loc("model.layers.0")']
    assert told["weights"]["changed"] == {"l0.norm1": {"type": ["f32[32]", "bf16[32]"]}}
    added = edited(("  weight @norm :", "  weight @extra : f32[3]\n  weight @norm :"))
    assert found(cli, EXAMPLE, added)["weights"]["added"] == ["extra"]
    assert found(cli, added, EXAMPLE)["weights"]["removed"] == ["extra"]


def test_values_that_are_read_elsewhere(cli: Any, edited: Callable[..., Path]) -> None:
    other = edited(("%21 = add %14, %20", "%21 = add %0, %20"))
    assert found(cli, EXAMPLE, other)["rewired"]
    assert "some read other values" in cli("diff", EXAMPLE, other).out


def test_stages_of_one_compile(cli: Any, compiled: Any) -> None:
    before, after = (compiled.dump / f"{n}.sbir" for n in ("04-fold-permutes", "05-assign-bits"))
    told = found(cli, before, after)
    old, new = (set(facts) for facts in told["header"]["facts"])
    assert (new - old, old - new) == ({"bits"}, set())
    assert told["bits"]
    assert all(change["histogram"][0] is None for change in told["bits"].values())
    assert told["totals"]["all"]["bytes"][0] is None
    # The search leaves its scores, and nothing else, beside the widths.
    changed = told["weights"]["changed"]
    assert set(changed) == set(told["bits"])
    assert {field for change in changed.values() for field in change} == {"move_scores"}
    assert "no bits -> blocks by width" in cli("diff", before, after).out


def test_an_artifact_and_its_last_dump(cli: Any, compiled: Any) -> None:
    """The same bits and ops; the text of the artifact leaves the codes out."""
    (last,) = compiled.dump.glob("*-pack-blocks.sbir")
    told = found(cli, last, compiled.path)
    assert told["bits"] == {}
    assert told["ops"] == {"added": [], "removed": [], "changed": {}}
    assert told["permutations"] == told["ops"]
    assert told["totals"]["all"]["bytes"][0] == told["totals"]["all"]["bytes"][1] > 0


def test_changed_tensors_of_an_artifact(
    cli: Any, compiled: Any, copy_of: Callable[[Path], Path]
) -> None:
    copy = copy_of(compiled.path)
    tensors = load_file(copy / "plan.safetensors")
    key = next(key for key in tensors if key.endswith("row_scores"))
    save_file({**tensors, key: tensors[key] + np.float32(1)}, copy / "plan.safetensors")
    told = found(cli, compiled.path, copy)
    assert list(told["weights"]["changed"].values()) == [{"row_scores": "other values"}]
    assert not told["same"]


def test_a_text_without_its_tensors_is_told(cli: Any, compiled: Any, tmp_path: Path) -> None:
    source = compiled.dump / "05-assign-bits.sbir"
    alone = Path(shutil.copy(source, tmp_path / "alone.sbir"))
    ran = cli("diff", source, alone)
    assert "tensors are not beside it and were not compared" in ran.out
    assert ran.out.endswith("no difference\n")
