"""Manifests with every field edited and the digest made right again: refused, or they run soundly.

What the checks accept is run in a process of its own, since what they miss may crash it.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.numerics.layout import BlockLayout
from scalebits_compiler.runtime import manifest as m
from scalebits_compiler.runtime.artifact import Artifact

spec = pytest.importorskip("scalebits_compiler.codegen.tvm.spec", reason="needs apache-tvm")

WORKER = Path(__file__).with_name("manifest_worker.py")
NUMBERS = (0, -1, 0.5, 2**31, 2**63, "x", True)
STRINGS = ("", "x", 1, None)
REMOVED = object()


def children(value):
    """(key, value) of everything in a container."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def paths(body, path=()):
    """The paths of everything in a manifest, once for things that are alike.

    Of steps the first of every op is taken, of weights the first of every kind, and of other lists
    and tables of records the first two and the last.
    """
    for key, value in picked(body, path):
        yield (*path, key), value
        yield from paths(value, (*path, key))


def picked(value, path):
    items = children(value)
    if path[-1:] == ("steps",):
        return list({step["op"]: (key, step) for key, step in reversed(items)}.values())
    if path == ("weights",):
        return list({(w["kind"], len(w["shape"])): (key, w) for key, w in reversed(items)}.values())
    records = isinstance(value, list) or path[-1:] in (("matrices",), ("files",))
    return items[:2] + items[2:][-1:] if records and path else items


def edits(body, path, value):
    """What may be in place of a value."""
    if isinstance(value, bool):
        return [not value, 0, "x", None, REMOVED]
    if isinstance(value, (int, float)):
        return [*NUMBERS, 2 * value, value + 1, REMOVED]
    if isinstance(value, str):
        return [*STRINGS, value + "x", REMOVED]
    if isinstance(value, list):
        return [[], value[::-1], value[1:], value[:-1], value * 2, {}, [None], REMOVED]
    if isinstance(value, dict):
        swapped = dict(zip(value, list(value.values())[::-1], strict=True))
        return [{}, swapped, {**value, "x": 1}, [], None, REMOVED]
    return [0, "x", {}, [], REMOVED]


def edited(body, path, value):
    """A copy of a manifest with another value at a path."""
    key, *rest = path
    copy = body.copy()
    if rest:
        copy[key] = edited(body[key], rest, value)
    elif value is REMOVED:
        del copy[key]
    else:
        copy[key] = value
    return copy


def signed(body):
    """The text of a manifest whose digest is right."""
    body = {key: value for key, value in body.items() if key != "digest"}
    return json.dumps({**body, "digest": m._digest(body)})


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, build_module, module_shape):
    """(module, kernels and files of the artifact), with every matrix read through an index."""
    from scalebits_compiler.codegen.tvm.build import compile_kernels

    module = build_module(module_shape(layers=1, qk_norm=True, bias=True, gather=True))
    grids = [
        (BlockLayout(*w.type.static_shape(), *w.block, w.group), module.bits(w))  # type: ignore[call-arg]
        for w in module.quantized()
    ]
    groups = [layout.group for layout, _ in grids]
    specs, dispatch = spec.select_specs(grids, ["bfloat16", "float16"], groups)
    path = tmp_path_factory.mktemp("kernels") / "cpu.so"
    compile_kernels(specs, path)
    return module, m.Kernels("kernels/cpu.so", dispatch), {"kernels/cpu.so": path}


@pytest.fixture
def folder(kernels, write):
    module, table, files = kernels
    return write(module, kernels=table, files=files)


@pytest.fixture
def body(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def run(folder):
    """`run(body)`: what the worker answers."""
    command = [sys.executable, str(WORKER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None

        def run(body):
            worker.stdin.write(json.dumps([str(folder), signed(body)]) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            assert line, f"the process has died with {worker.wait()}"
            return json.loads(line)

        yield run
        worker.stdin.close()


def names(body, op):
    """The number of the first step of an op."""
    return next(i for i, s in enumerate(body["plan"]["steps"]) if s["op"] == op)


def directed(body):
    """(name, manifest, message): what once crashed or took gigabytes."""

    def steps(op, *path):
        return "plan", "steps", names(body, op), *path

    wide = next(w for w, r in body["weights"].items() if r["shape"] == [104, 72])
    down = next(w for w, r in body["weights"].items() if r["shape"] == [72, 104])
    variant = ("kernels", "dispatch", "variants", 0)
    tall = edited(body, ("weights", wide, "shape", 0), 2**32)
    return [
        ("cache", edited(body, steps("attention", "attrs", "cache"), 5), "cache is 5"),
        ("heads", edited(body, steps("split_heads", "attrs", "heads"), 8), r"is \[16\], not \[8\]"),
        ("rope", edited(body, steps("rope", "weights"), ["norm"]), r"is \[72\], heads have 16"),
        ("ids", edited(body, steps("embedding", "inputs"), ["v1"]), "not defined"),
        ("columns", edited(body, steps("gather_qlinear", "weights", 0), down), "104 columns"),
        ("order", edited(body, (*variant, "kernels"), body["kernels"]["dispatch"]["variants"][0]
                         ["kernels"][::-1]), "cannot be loaded"),
        ("features", edited(body, (*variant, "features"), []), r"variants\[0\]\.features"),
        ("tile", edited(body, (*variant, "tile_tokens"), 0), "unknown field 'tile_tokens'"),
        ("rows", tall, r"hidden\[4294967296\] and hidden\[104\], not alike"),
        ("block", edited(body, ("weights", wide, "block", 0), 2**31 - 16), "not those of a packed"),
        ("group", edited(body, ("weights", wide, "group"), 48), "group = 48 is not a multiple"),
    ]  # fmt: skip


def test_what_once_crashed(body, run):
    sound = run(body)["logits"]
    assert sound[0] == sound[1]
    for name, changed, message in directed(body):
        found = run(changed).get("refused", "")
        assert re.search(message, found), (name, found)


def refusal(body):
    """The error that the checks of the manifest give, None if they pass."""
    try:
        m.Manifest.from_json(signed(body))
    except ArtifactError as error:
        return error
    return None


def matters(path):
    """Whether the runtime may read what lies there; what it does not read is not run."""
    return path[0] in ("plan", "weights", "kernels", "target") or path == ("summary", "task")


def test_every_field(body, run):
    """Manifests that are refused by the checks alone are not run."""
    sound, accepted = run(body)["logits"], []
    for path, value in paths(body):
        if path[0] in ("format", "version", "digest"):
            continue
        for other in edits(body, path, value):
            changed = edited(body, path, other)
            error = refusal(changed)
            if error is None:
                if matters(path) and changed != body:
                    accepted.append((path, other, changed))
                continue
            assert error.message.startswith("manifest.json: ")
            assert error.help
    for path, other, changed in accepted:
        found = run(changed)
        assert "traceback" not in found, (path, other, found["traceback"])
        if "logits" not in found:
            continue
        first, second = found["logits"]
        assert first == second, (path, other)
        if path[0] not in ("plan", "weights"):
            assert first == sound[0], (path, other)


def test_an_index_that_names_a_channel_twice(folder, body):
    symbol = next(name for name in body["weights"] if name.startswith("gather:"))
    stored = Artifact.open(folder).tensors[symbol].data
    path = folder / "model.safetensors"
    data = path.read_bytes()
    at = data.index(stored.tobytes())
    path.write_bytes(data[:at] + data[at + 2 : at + 4] + data[at + 2 :])
    body["files"]["model.safetensors"]["sha256"] = m.sha256_of(path)
    (folder / "manifest.json").write_text(signed(body))
    with pytest.raises(ArtifactError, match=f"{symbol} is no order of {len(stored)} channels"):
        Artifact.open(folder)
