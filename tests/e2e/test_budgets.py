"""Several budgets in one run, and a cap on the bytes of all files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.sessions.reference import load_reference
from scalebits_compiler.tools.verify import verify_artifact

REFERENCE = ("--target", "reference", "--json")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_frontier(compile_small: Any, tiny_llama: Any, cli: Any, tmp_path: Path) -> None:
    out, dump = tmp_path / "out", tmp_path / "dump"
    ran = compile_small(
        tiny_llama(), out, *REFERENCE, "--avg-bits", "2.5,4,3", "--loss", "kl", "--dump-ir", dump
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in out.iterdir()) == [
        "2.5", "3", "4", "frontier.json", "frontier.txt",
    ]  # fmt: skip
    points = json.loads((out / "frontier.json").read_text())["points"]
    assert [point["folder"] for point in points] == ["2.5", "3", "4"]
    told = json.loads(ran.out)
    assert told["points"] == points
    for point in points:
        folder = out / point["folder"]
        verify_artifact(folder)
        assert point["effective_bits"] <= point["avg_bits"]
        assert point["file_bytes"] == bytes_of(folder)
        assert point["held_loss"] <= point["uniform_held_loss"]
        assert point["predicted_loss"] >= point["full_precision_loss"]
        assert point["full_precision_loss"] == pytest.approx(0, abs=1e-6)  # of the divergence
        assert load_reference(folder).forward([[1, 2, 3]]).shape == (1, 3, 256)
        assert point["folder"] in (out / "frontier.txt").read_text()
    # The widest budget is used. (In between, uniform widths that win may leave some of theirs.)
    assert max(point["effective_bits"] for point in points) == points[-1]["effective_bits"]
    # What does not depend on the budget was done once, and the history says what was done.
    assert sum(path.name.endswith("fold-permutes.sbir") for path in dump.iterdir()) == 1
    history = read_module(out / "2.5" / "module.sbir")[0].history
    searches = [item for item in history if item.startswith("assign-bits")]
    assert len(searches) == 3
    assert "rounds = 0" in searches[-1]
    assert all('loss = "kl"' in item for item in searches)
    assert 'loss = "kl"' in next(item for item in history if item.startswith("annotate"))
    # One round and the scores of what comes out; the first search measures the curves as well.
    least, more, most = (
        told["artifacts"][name]["passes"]["assign-bits"] for name in ("2.5", "3", "4")
    )
    assert max(least["scorings"], more["scorings"]) <= 2
    assert most["gradient_passes"] > max(least["gradient_passes"], more["gradient_passes"])
    assert not out.with_name("out.search").exists()
    ran = cli("inspect", out)
    assert ran.code == 1
    assert "holds several artifacts" in ran.err
    assert "2.5, 3, 4" in ran.err


def test_the_frontier_before_the_artifacts(
    compile_small: Any, tiny_llama: Any, cli: Any, tmp_path: Path
) -> None:
    """Widths alone; an artifact made of them has the bytes of one made in the same run as them."""
    model, whole, out = tiny_llama(), tmp_path / "whole", tmp_path / "out"
    options = (*REFERENCE, "--avg-bits", "2.5,4")
    assert compile_small(model, whole, *options).code == 0
    ran = compile_small(model, out, *options, "--search-only")
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in out.iterdir()) == [
        "2.5.safetensors", "2.5.sbir", "4.safetensors", "4.sbir",
        "before-search.safetensors", "before-search.sbir", "frontier.json", "frontier.txt",
    ]  # fmt: skip
    shared = (out / "before-search.safetensors").stat().st_size
    assert (out / "4.safetensors").stat().st_size < shared / 10
    points = json.loads((out / "frontier.json").read_text())["points"]
    made = json.loads((whole / "frontier.json").read_text())["points"]
    beside = ("folder", "file_bytes")
    assert [{k: v for k, v in point.items() if k != "dump"} for point in points] == [
        {k: v for k, v in point.items() if k not in beside} for point in made
    ]
    ran = cli("inspect", out)
    assert ran.code == 1
    assert "not made yet" in ran.err
    chosen = tmp_path / "chosen"
    ran = compile_small(
        model, chosen, *REFERENCE, "--avg-bits", "2.5", "--from", out / points[0]["dump"]
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for path in filter(Path.is_file, (whole / "2.5").rglob("*")):
        name = path.relative_to(whole / "2.5")
        assert (chosen / name).read_bytes() == path.read_bytes(), name
    # Another budget goes on from what was done before the searches.
    ran = compile_small(
        model, chosen, *REFERENCE, "--avg-bits", "3", "--force",
        "--from", out / "before-search.sbir",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "trace" not in json.loads(ran.out)["seconds"]


def test_a_killed_frontier_goes_on(
    compile_small: Any, tiny_llama: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped when the first of two artifacts is being packed: its search is not done again."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = (*REFERENCE, "--avg-bits", "3,4", "--no-tuning")
    assert compile_small(tiny_llama(), whole, *options).code == 0

    def progress(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        if label == "write":
            raise KeyboardInterrupt
        return iter(items)

    monkeypatch.setattr("scalebits_compiler.cli.compile.progress_for", lambda quiet: progress)
    assert compile_small(tiny_llama(), out, *options).code == 130
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.search", "whole"]
    ran = compile_small(tiny_llama(), out, *options, "--resume")
    assert ran.code == 0, ran.err
    searches = [a["passes"]["assign-bits"] for a in json.loads(ran.out)["artifacts"].values()]
    assert [search["resumed_at_round"] > 0 for search in searches] == [True, False]
    history = read_module(out / "3" / "module.sbir")[0].history
    assert any("warm = true" in item for item in history)  # with swaps, the next starts where 4 was
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    for name in files:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_frontier_is_replaced_by_force_only(
    compile_small: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", (*REFERENCE, "--avg-bits", "3,4")
    assert compile_small(tiny_llama(), out, *options).code == 0
    ran = compile_small(tiny_llama(), out, *options)
    assert ran.code == 2
    assert "exists and is not empty" in ran.err
    assert compile_small(tiny_llama(), out, *REFERENCE, "--force").code == 0
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("3,3.0", 2, "the budget 3 is given 2 times"),
        ("3,x", 2, "is no budget"),
        ("3,0.5", 1, "smallest feasible is"),
    ],
)
def test_bad_budgets(
    compile_small: Any, tiny_llama: Any, tmp_path: Path, given: str, code: int, words: str
) -> None:
    ran = compile_small(tiny_llama(), tmp_path / "out", *REFERENCE, "--avg-bits", given)
    assert ran.code == code
    assert words in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_cap_below_the_matrices_is_refused_before_any_score(
    compile_small: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    """As 24 for 24MiB."""
    ran = compile_small(tiny_llama(), tmp_path / "out", "--fit", "24")
    assert ran.code == 1
    assert "its searched matrices alone have at least" in ran.err
    assert "24MiB" in ran.err
    assert "gradients" not in ran.err


def test_a_cap_on_bytes(compile_small: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """The cap holds for everything in the folder, is used, and the least that is named is right."""
    model, out = tiny_llama(), tmp_path / "out"
    ran = compile_small(model, out, *REFERENCE, "--fit", "10KB")
    assert ran.code == 1
    assert "cannot be made: the smallest feasible has" in ran.err
    least = int(ran.err.split("smallest feasible has ")[1].split(" ")[0].replace(",", ""))
    assert list(tmp_path.iterdir()) == []
    sizes = []
    for cap in (least, least + 20_000):
        ran = compile_small(model, out, *REFERENCE, "--fit", cap, "--force")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["file_bytes"] == bytes_of(out) <= cap
        sizes.append(bytes_of(out))
        verify_artifact(out)
    assert sizes[1] > least + 20_000 - 4_000


def test_bad_sizes(compile_small: Any, tiny_llama: Any, tmp_path: Path) -> None:
    for options in (
        ("--fit", "24XB"),
        ("--fit", "1MiB", "--avg-bits", "3"),
        ("--fit", "1MiB", "--search-only"),
        ("--avg-bits", "3", "--search-only", "--tuning-epochs", "4"),
    ):
        assert compile_small(tiny_llama(), tmp_path / "out", *options).code == 2
