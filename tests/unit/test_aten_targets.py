"""Which functions the text of an `aten` op can reach."""

from __future__ import annotations

import pytest

from scalebits_compiler.errors import TargetError
from scalebits_compiler.interpreter.rules import aten_callable


@pytest.mark.parametrize(
    "target", ["aten.linear.default", "aten.add", "operator.add", "math.floor", "torch.sym_max"]
)
def test_operators_are_found(target: str) -> None:
    assert callable(aten_callable(target))


@pytest.mark.parametrize(
    "target",
    [
        "aten.nothing.default", "nothing.add.default", "torch.load", "torch.sym_nothing",
        "load_library", "import_module", "operator.attrgetter", "operator.call", "operator.setitem",
        "math.__loader__", "math.__loader__.load_module", "aten._dir", "",
    ],
)  # fmt: skip
def test_nothing_else_is(target: str) -> None:
    with pytest.raises(TargetError, match="operator"):
        aten_callable(target)
