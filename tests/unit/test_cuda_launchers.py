"""Which binary a GPU gets, and what happens where none fits; the driver is a stand-in."""

import pytest
import torch

from scalebits_compiler.runtime.cuda import launchers
from scalebits_compiler.runtime.cuda.driver import Function
from scalebits_compiler.runtime.cuda.launchers import BinaryLauncher, best_binary


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
     ((10, 0), None), ((7, 5), None), ((12, 0), None)],
)  # fmt: skip
def test_a_gpu_gets_the_newest_binary_of_its_major_version(capability, arch):
    assert best_binary(dict.fromkeys(("sm_80", "sm_89", "sm_90")), capability) == arch


class FakeDriver:
    def __init__(self):
        self.launched = []

    def load(self, image, name, shared, threads, scratch):
        if image == b"refused":
            raise OSError("CUDA error 218: a PTX JIT compilation failed")
        return Function(name, shared, threads, scratch)

    def launch(self, function, grid, stream, arguments):
        self.launched.append((function, grid, stream, arguments))


class FakeSource:
    def __init__(self):
        self.launched = []

    def launch(self, kernel, grid, arguments):
        self.launched.append(kernel)


@pytest.fixture
def launcher(monkeypatch, tmp_path):
    """A launcher on a GPU of capability 9.0 with a binary that loads, one that does not, and none
    for the third kernel; with the lines that it tells.
    """
    monkeypatch.setattr(launchers, "Driver", FakeDriver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stream = type("Stream", (), {"cuda_stream": 77})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    table = {}
    for name, image, arch in (
        ("good", b"image", "sm_90"), ("bad", b"refused", "sm_90"), ("old", b"image", "sm_80"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(image)
        entry = {"file": name, "shared": 1024, "scratch": 2}
        table[name] = {"warps": 4, "stages": 3, "binaries": {arch: entry}}
    entry = {"file": "gone", "shared": 1024, "scratch": 2}
    table["gone"] = {"warps": 4, "stages": 3, "binaries": {"sm_90": entry}}
    lines = []
    made = BinaryLauncher(
        lambda name: (tmp_path / name).read_bytes(), table, FakeSource(), lines.append
    )
    return made, lines


def test_a_binary_is_started_through_the_driver(launcher):
    made, lines = launcher
    x = torch.zeros(3)
    made.launch("good", (1, 2, 3), (x, 5))
    made.launch("good", (1, 2, 3), (x, 6))
    (first, second) = made._driver.launched
    assert first == (
        Function("good", 1024, 128, 2), (1, 2, 3), 77, [(x.data_ptr(), True), (5, False)],
    )  # fmt: skip
    assert second[0] is first[0]  # loaded once
    assert not lines
    assert not made._fallback.launched


@pytest.mark.parametrize(
    ("kernel", "why"), [("bad", "CUDA error 218"), ("old", "for sm_90"), ("gone", "No such file")]
)
def test_an_unusable_binary_is_replaced_by_its_source_with_one_line(kernel, why, launcher):
    made, lines = launcher
    for _ in range(2):
        made.launch(kernel, (1, 1, 1), ())
    assert made._fallback.launched == [kernel, kernel]
    assert len(lines) == 1
    assert why in lines[0]
    assert "compiling its source with Triton" in lines[0]
