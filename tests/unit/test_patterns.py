"""Matrices by pattern, pins, and what a module may say about the widths of a matrix."""

from __future__ import annotations

import pytest

from scalebits_compiler.errors import PassError, UsageError
from scalebits_compiler.ir.module import Weight
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.passes.selectors import Pin, matching, parse_pin

NAMES = [
    f"layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]
MATRICES = [
    Weight(symbol=name, type=TensorType.of("f32", 8, 8), loc=f"model.{name}") for name in NAMES
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*.down_proj", 12),
        ("re:.*down_proj", 12),
        ("layers.1.mlp.up_proj", 1),
        ("model.layers.1.mlp.up_proj", 1),
        ("layers.1.*", 3),
        ("re:layers\\.(1|11)\\.mlp\\..*", 4),
        ("re:model.layers.[0-3].self_attn.q_proj", 4),
    ],
)
def test_matching(pattern: str, count: int) -> None:
    assert len(matching(pattern, MATRICES)) == count


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("down_proj", "layers.0.mlp.down_proj"),
        ("*.donw_proj", "layers.0.mlp.down_proj"),
        ("re:.*down_prj", "layers.0.mlp.down_proj"),
        ("layers.3.mlp.upproj", "layers.3.mlp.up_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(pattern: str, near: str) -> None:
    with pytest.raises(PassError, match="matches no matrix") as caught:
        matching(pattern, MATRICES)
    assert near in caught.value.help


def test_pins() -> None:
    assert parse_pin("re:.*down_proj=4..8") == Pin("re:.*down_proj", 4, 8)
    assert parse_pin("*.q_proj=4") == Pin("*.q_proj", 4, 4)
    assert parse_pin("re:a=b=2..3") == Pin("re:a=b", 2, 3)


@pytest.mark.parametrize(
    "text",
    ["*.q_proj", "*.q_proj=", "=4", "*.q=0", "*.q=9", "*.q=5..4", "*.q=4-8", "re:(=4"],
)
def test_what_is_no_pin(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pin(text)
