"""benchmarks/granularity.py: a case with a known answer, and what holds on any model."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "granularity.py"


@pytest.fixture
def granularity():
    spec = importlib.util.spec_from_file_location("granularity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["granularity"] = module  # its dataclass looks for its module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["granularity"]


def test_two_rows_of_known_loss(granularity):
    """16 and 1 nats, a quarter for every bit: 4 and 2 bits are best, twice 1/16 for 17/64."""
    curve = torch.tensor([16.0, 1.0]) * 4.0 ** -torch.arange(1.0, 9.0)[:, None]
    groups = [granularity.Groups(curve[..., None].double(), torch.full((2, 1), 128.0))]
    assert granularity.gain(groups, 1, 3.0) == pytest.approx(2 / 16 / (17 / 64))
    assert granularity.gain(groups, 0, 3.0) == pytest.approx(1)
    # Between two widths uniform ones lie on the line of the logarithm, and whole matrices above.
    assert granularity.gain(groups, 0, 3.5) == pytest.approx((1 + 1 / 4) / 2 / (1 / 2))


def test_smaller_blocks_are_never_worse(granularity, tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A few words, again and again, in another order: again a few. " * 400)
    small = "--calib-windows 2 --seq-len 32 --rows 1 16 0 --widths 2 2.5"
    options = granularity.arguments(["--calib", str(text), *small.split()])
    rows = list(granularity.measure(tiny_llama(hidden_size=64), options))
    assert len(rows) == 6
    for width in options.widths:
        found = [row["of_uniform"] for row in rows if row["width"] == width]
        assert found == sorted(found)  # from single rows to whole matrices
        assert found[0] > 0
        if width == int(width):
            assert found[-1] <= 1
