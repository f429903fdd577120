"""`scalebitsc explain`: what it tells is what the search has left in the artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.passes.search.assign_bits import AssignBits, searched_costs

LAYER = "layers.1.mlp.down_proj"


@pytest.fixture
def told(cli: Any, compiled: Any) -> dict[str, Any]:
    ran = cli("explain", compiled.path, LAYER, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_blocks_are_those_of_the_module(told: dict[str, Any], compiled: Any) -> None:
    """Widths, predictions and ranks, computed here from module.sbir and its tensors."""
    module, _ = read_module(compiled.path / "module.sbir")
    scores = {
        weight.symbol: module.resources.torch(weight.move_scores.key).double().numpy()
        for weight in module.searched()
        if weight.move_scores is not None
    }
    costs = searched_costs(module, AssignBits())
    cost = costs.table[1] - costs.table[0]  # of a bit, whatever the width
    ups = np.concatenate([found.reshape(-1, 4)[:, 0] for found in scores.values()]) / cost
    bits = module.bits(module.weights[LAYER])
    assert len(told["blocks"]) == bits.size
    assert told["blocks_of_all_matrices"] == len(ups)
    for item in told["blocks"]:
        place = item["row"], item["column"]
        assert item["format"] == str(bits[place])
        for move, column in (("up", 0), ("down", 1)):
            change = scores[LAYER][place][column]
            if np.isinf(change):
                assert item[move] is None
                assert item["format"] in ("1", "8")
            else:
                assert item[move]["change"] == change
                step = 1 if move == "up" else -1
                assert item[move]["format"] == str(int(bits[place]) + step)
        if item["up"]:
            rate = item["up"]["per_stored_bit"]
            assert (ups < rate).sum() < item["up"]["rank"] <= (ups <= rate).sum()


def test_the_next_step_of_the_budget(told: dict[str, Any], compiled: Any, cli: Any) -> None:
    """Over all matrices, the blocks of +0.1 bits cost at most that, and one more would not fit."""
    module, _ = read_module(compiled.path / "module.sbir")
    budget = 0.1 * searched_costs(module, AssignBits()).weights
    spent, changes, moved = 0, 0.0, 0
    for weight in module.searched():
        found = json.loads(cli("explain", compiled.path, weight.symbol, "--json").out)
        assert found["price"] == told["price"]
        by_place = {(b["row"], b["column"]): b for b in found["blocks"]}
        for place in found["plus"]["blocks"]:
            block = by_place[tuple(place)]
            spent += block["up"]["stored_bits"]
            changes += block["up"]["change"]
            moved += 1
            assert block["up"]["per_stored_bit"] <= told["price"]["raise"]
    assert moved == told["plus"]["blocks_of_all_matrices"]
    assert changes == pytest.approx(told["plus"]["change_of_all_matrices"])
    largest = max(block["up"]["stored_bits"] for block in told["blocks"] if block["up"])
    assert budget - largest < spent <= budget


def test_text_and_one_block(cli: Any, compiled: Any) -> None:
    ran = cli("explain", compiled.path, f"model.{LAYER}", "--block", "1,0")
    assert ran.code == 0, ran.err
    assert f"{LAYER}  64x96" in ran.out
    assert "price of a stored bit" in ran.out
    assert ran.out.count("\nblock ") == 1
    assert "block 1,0: " in ran.out
    assert cli("explain", compiled.path, "1.mlp.down_proj").out.startswith(LAYER)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("layers.1.mlp.donw_proj",), 2, ("no matrix is called", "layers.1.mlp.down_proj")),
        (("down_proj",), 2, ("several matrices end in", "layers.0.mlp.down_proj")),
        (("lm_head",), 2, ("lm_head is dense",)),
        ((LAYER, "--block", "9,9"), 2, ("has no block 9,9", "its blocks are 0,0 to")),
        ((LAYER, "--block", "9"), 2, ("'9' is no block",)),
    ],
)
def test_bad_input(cli: Any, compiled: Any, options: Any, code: int, words: Any) -> None:
    ran = cli("explain", compiled.path, *options)
    assert ran.code == code
    for word in words:
        assert word in ran.err


def test_no_artifact(cli: Any, tmp_path: Path) -> None:
    ran = cli("explain", tmp_path, LAYER)
    assert ran.code == 1
    assert "is no scalebits artifact" in ran.err


def test_needs_no_torch(compiled: Any) -> None:
    code = (
        "import sys; from scalebits_compiler.cli.main import main;"
        f"assert main(['explain', {str(compiled.path)!r}, {LAYER!r}]) == 0;"
        "assert not {'torch', 'tvm', 'transformers'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
