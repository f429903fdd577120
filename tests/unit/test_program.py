"""When the threads of a program wait for each other, and how many threads there are."""

import os

import numpy as np
import pytest
from msgspec.structs import replace

from scalebits_compiler.runtime.cpu import features as cpu_features
from scalebits_compiler.runtime.cpu.features import default_threads
from scalebits_compiler.runtime.cpu.lowering import _final_product_input
from scalebits_compiler.runtime.cpu.native_ops import together
from scalebits_compiler.runtime.cpu.program import ALONE, ALONE_NUMBERS, SYNC, Program
from scalebits_compiler.runtime.cpu.thread_gating import FIRST_PAUSE, LONGEST_PAUSE, Team
from scalebits_compiler.runtime.plan import Plan, Step


def steps(*sizes):
    """Each step adds an array to the one before it."""
    program = Program()
    x = np.zeros(sizes[0], np.float32)
    for size in sizes[1:]:
        y = np.zeros(size, np.float32)
        program.add(0, "add", 1, {"x": x, "z": x, "y": y, "size": size})
        x = y
    return program


def test_small_steps_are_done_alone_and_do_not_wait_for_each_other():
    table = steps(8, 8, 8, 8).table
    assert table[:, ALONE].tolist() == [1, 1, 1]
    assert table[:, SYNC].tolist() == [0, 0, 0]


def test_shared_steps_wait_for_what_they_read():
    large = ALONE_NUMBERS + 1
    table = steps(8, large, large, 8, 8).table
    assert table[:, ALONE].tolist() == [0, 0, 0, 1]
    assert table[:, SYNC].tolist() == [0, 1, 1, 1]


def test_a_small_step_waits_before_it_overwrites_what_others_read():
    program = Program()
    x, y, z = (np.zeros(size, np.float32) for size in (8, ALONE_NUMBERS + 1, 8))
    program.add(0, "silu", 1, {"x": x, "y": y, "size": 8})
    program.add(0, "silu", 1, {"x": z, "y": x, "size": 8})
    program.add(0, "silu", 1, {"x": x, "y": z, "size": 8})
    assert program.table[:, ALONE].tolist() == [0, 1, 1]
    assert program.table[:, SYNC].tolist() == [0, 1, 0]


def test_products_of_one_input_come_together_and_values_live_until_their_last_reader():
    def step(op, inputs, out, *free):
        return Step(op, inputs, (), {}, out, free)

    plan = (
        step("qlinear", ("x",), "q"),
        step("rope", ("q", "p"), "r", "q"),
        step("qlinear", ("x",), "k", "x"),
        step("add", ("r", "k"), "y", "k", "p", "r"),
    )
    found = [(s.op, s.out, s.free) for s in together(plan)]
    assert found == [
        ("qlinear", "q", ()),
        ("qlinear", "k", ("x",)),
        ("rope", "r", ("p", "q")),
        ("add", "y", ("k", "r")),
    ]


def test_logits_of_the_last_position_need_a_product_that_nothing_else_depends_on():
    """Its input is cut to the last position of each row: whatever else read it would be cut too."""

    def final(*steps):
        made = [Step(op, inputs, (), {}, out, ()) for op, out, *inputs in steps]
        made = [replace(step, inputs=tuple(step.inputs[0].split())) for step in made]
        return _final_product_input(Plan("ids", tuple(made), made[-1].out, (), "", ""))

    norm, head = ("rms_norm", "x", "h"), ("linear", "y", "x")
    assert final(norm, head) == "x"
    assert final(norm, head, ("tanh", "z", "y"), ("scale", "o", "z")) == "x"
    # The input, the product and what follows it have one reader each.
    assert final(norm, ("silu", "s", "x"), head) is None
    assert final(norm, head, ("tanh", "z", "y"), ("scale", "o", "y")) is None
    assert final(norm, head, ("add", "o", "y x")) is None
    # The last product in order does not make the result.
    assert final(norm, ("silu", "s", "x"), ("linear", "y", "h"), ("tanh", "o", "s")) is None


def test_a_team_pauses_after_waiting_and_longer_each_time():
    team = Team()
    assert [team.size(4) for _ in range(3)] == [4, 4, 4]
    for pause in (FIRST_PAUSE, 2 * FIRST_PAUSE):
        team.tell(0.6)
        assert [team.size(4) for _ in range(pause + 1)] == [1] * pause + [4]
    for _ in range(20):
        team.tell(0.6)
    assert [team.size(4) for _ in range(LONGEST_PAUSE + 1)] == [1] * LONGEST_PAUSE + [4]
    team.tell(0.05)
    assert team.size(4) == 4
    team.tell(0.6)
    assert [team.size(4) for _ in range(FIRST_PAUSE + 1)] == [1] * FIRST_PAUSE + [4]


def test_a_thread_that_waits_is_counted(tmp_path):
    """Of two threads one has all the work: one waits for the other, but not all of the time."""
    pytest.importorskip("tvm", reason="the kernel compiler needs apache-tvm")
    from scalebits_compiler.codegen.tvm.build import compile_kernels
    from scalebits_compiler.codegen.tvm.spec import select_specs
    from scalebits_compiler.numerics.layout import BlockLayout
    from scalebits_compiler.runtime.cpu.library import KernelLibrary

    grid = (BlockLayout(16, 32, 16, 32, 32), np.array([[3]], np.uint8))
    specs, dispatch = select_specs([grid])
    compile_kernels(specs, tmp_path / "k.so")
    library = KernelLibrary.open((tmp_path / "k.so").read_bytes(), dispatch)
    if not library.threads_meet:
        pytest.skip("one thread here")
    told = []
    library._team.tell = told.append  # type: ignore[method-assign]
    program, x, y = Program(), *np.zeros((2, 1 << 16), np.float32)
    number = library.op_number("gelu", "")
    for source, target in ((x, y), (y, x), (x, y)):
        fields = {"x": source, "y": target, "size": x.size}
        program.add(number, "gelu", 1 << 6, fields)
    program.table[:, ALONE] = 1
    library.run(program, threads=2)
    (waited,) = told
    assert 0 < waited < 1


def test_default_threads_are_physical_cores(tmp_path, monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    for allowed, cores in (({0}, 1), ({1, 5}, 1), ({0, 1, 2, 5}, 3), (range(8), 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: set(allowed))
        assert default_threads(tmp_path) == cores
    assert default_threads(tmp_path / "unknown") == 8
    monkeypatch.setattr(cpu_features, "MOST_THREADS", 2)
    assert default_threads(tmp_path) == 2
