"""Cases from a seed and a number: random and directed edits of JSON, tensors, bytes and files."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Iterator
from typing import Any

from scalebits_compiler.runtime.plan import STEP_RULES
from tests.fuzz import texts
from tests.fuzz.bases import Base, suffixes
from tests.fuzz.edits import BECOMES, ITEM_SIZES, MANIFEST, Case, Edit, split_tensors
from tests.fuzz.entries import ENTRIES, PASSES, choose

EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 8, 16, 31, 64, 255, 256, 65535, 65536, 2**31 - 1,
    2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**40, 0.0, -0.0,
    0.5, 1.0, -1.5, 1e-45, 1e-300, 1e38, 1e39, 1e308, math.inf, -math.inf, math.nan, "", "x", "ids",
    "..", "../x", "/dev/null", "a/b", "a\\b", "\0", "\ud800", "é", "x" * 5000, "0", "-1", "nan",
    "torch", "reference", "cuda", "cpu", "dense", "packed", "U8", "F32", "BF16", "I64", [], [[]],
    [0], [-1], [2**32, 2**32], [2**62, 4], [0, 0], ["x"], [None], {}, {"": 0}, {"x": {}},
)  # fmt: skip
_DTYPES = (*ITEM_SIZES, "F8_E4M3", "F4", "C64", "f32", "")
# How often a part of the manifest is taken; all others 1.
_PARTS = {"plan": 14, "weights": 6, "kernels": 6, "files": 3}
# How often a file is edited, by the end of its name; all others 1.
_FILES = {
    MANIFEST: 24, "model.safetensors": 10, ".sbir": 14, "config.json": 3, "tokenizer.json": 3,
    "plan.safetensors": 4, "cpu.so": 2, ".json": 6, ".safetensors": 4, ".cubin": 0.1,
}  # fmt: skip
_WEIGHTS = {
    "cpu": 40, "no-kernels": 12, "dump": 20, "frontier": 1, "search": 0.3, "experts": 6,
    "unrecognised": 6, "encoder": 5, "not-traced": 5, "gather": 6, "cuda": 4, "reference": 2,
}  # fmt: skip


def generate(seed: int, index: int, known: dict[str, Base], full: bool) -> Case:
    """The case of this number; equal arguments give equal cases. `full`: slow entries, too."""
    rng = random.Random(f"{seed}/{index}")
    names = list(known)
    base = known[rng.choices(names, [_WEIGHTS[name] for name in names])[0]]
    edits: list[Edit] = []
    wanted = rng.choices((1, 2, 4), (80, 15, 5))[0]
    while len(edits) < wanted:
        file = _file(rng, base)
        edits += _edits(rng, base, file)
    entry, subject = _entry(rng, base, edits[0]["file"], full)
    return Case(base.name, entry, subject, rng.random() < 0.8, tuple(edits))


def _file(rng: random.Random, base: Base) -> str:
    def weight(name: str) -> float:
        return next((w for end, w in _FILES.items() if name.endswith(end)), 1)

    return rng.choices(base.files, [weight(name) for name in base.files])[0]


def _entry(rng: random.Random, base: Base, edited: str, full: bool) -> tuple[str, str]:
    """An entry that can read the edited file, and what it is given."""
    fitting = [
        name
        for name, entry in ENTRIES.items()
        if entry.what == base.what and (full or not entry.slow)
    ]
    if base.what == "artifact":
        subject = rng.choice(["layers.0.mlp.down_proj", "q_proj", "self_attn.o_proj"])
        if edited.endswith(".sbir") and rng.random() < 0.6:
            fitting = [name for name in fitting if not ENTRIES[name].call or "ref" in name]
        if edited in (MANIFEST, "model.safetensors") and rng.random() < 0.6:
            fitting = [name for name in fitting if ENTRIES[name].call or name.startswith("run")]
        return choose(rng, fitting), subject
    named = suffixes(base.files, ".sbir")
    subject = rng.choice(named) if named else ""
    if edited.endswith(".sbir"):
        subject = edited
    elif edited.endswith(".safetensors"):
        readers = [name for name in named if f'"{edited}"'.encode() in base.read(name)]
        subject = rng.choice(readers or named)
    entry = choose(rng, fitting)
    if entry.startswith("opt -p") and rng.random() < 0.7:
        entry = f"opt -p {PASSES[int(subject[:2])][0]}"
    return entry, subject


def _edits(rng: random.Random, base: Base, file: str) -> list[Edit]:
    pick = rng.random()
    if pick < 0.06:
        return _become(rng, base, file)
    if pick < 0.12:
        return _bytes(rng, base, file)
    if file.endswith(".sbir"):
        return texts.edits(rng, base, file)
    if file.endswith(".safetensors"):
        return rng.choices((_header, _values, _tensor), (5, 3, 4))[0](rng, base, file)
    if file == MANIFEST and rng.random() < 0.5:
        return rng.choices((_plan, _dispatch), (3, 1))[0](rng, base)
    if file.endswith(".json"):
        return _json(rng, base, file)
    return _bytes(rng, base, file)


# Files and bytes


def _become(rng: random.Random, base: Base, file: str) -> list[Edit]:
    whats = [*BECOMES, f"copy of {rng.choice(base.files)}"]
    # A pipe or a device that the user names is read as such.
    if file.endswith(".sbir"):
        whats = [what for what in whats if what not in ("fifo", "device")]
    what = rng.choice(whats)
    return [{"file": file, "do": "become", "what": what, "kind": f"file: {what.split(' of')[0]}"}]


def _bytes(rng: random.Random, base: Base, file: str) -> list[Edit]:
    content = base.read(file)
    at = int(len(content) * rng.random() ** rng.choice((1, 3)))  # headers more often
    size = rng.choice((1, 1, 2, 4, 8, 64))
    how = rng.choice(("flip", "cut", "remove", "insert", "zero", "random", "append"))
    drop, new = size, b""
    if how == "flip":
        old = content[at : at + 1] or b"\0"
        drop, new = 1, bytes([old[0] ^ 1 << rng.randrange(8)])
    elif how == "cut":
        drop = len(content)
    elif how == "zero":
        new = bytes(size)
    elif how == "random":
        new = rng.randbytes(size)
    elif how in ("insert", "append"):
        drop, new = 0, rng.choice((bytes(size), rng.randbytes(size), content[:size]))
        at = len(content) if how == "append" else at
    edit = {"file": file, "do": "splice", "at": at, "drop": drop, "hex": new.hex()}
    return [{**edit, "kind": f"bytes: {how}"}]


# JSON


def _walk(rng: random.Random, body: Any) -> list[Any]:
    """A random path: parts with more in them are more likely, those with little not rare."""
    path: list[Any] = []
    stop = 0.02
    while isinstance(body, (dict, list)) and body and rng.random() > stop:
        keys = list(body) if isinstance(body, dict) else list(range(len(body)))
        weights = [_PARTS.get(key, 1) * _size(body[key]) ** 0.5 for key in keys]
        key = rng.choices(keys, weights)[0]
        path.append(key)
        body, stop = body[key], 0.1
    return path


def _size(body: Any) -> int:
    if not isinstance(body, (dict, list)):
        return 1
    return 1 + sum(map(_size, body.values() if isinstance(body, dict) else body))


def _at(body: Any, path: list[Any]) -> Any:
    for key in path:
        body = body[key]
    return body


def _alike(body: Any, path: list[Any]) -> list[Any]:
    """The values that stand where this one does in other places: those of keys of its name, or of
    keys beside it, or the items of lists of its name."""
    name = next((key for key in reversed(path) if isinstance(key, str)), None)
    found = [value for key, value in _entries(body) if key == name]
    if path[-1] != name:
        found = [item for value in found if isinstance(value, list) for item in value]
    parent = _at(body, path[:-1])
    beside = list(parent.values()) if isinstance(parent, dict) else list(parent)
    same = [value for value in beside if type(value) is type(_at(body, path))]
    return [*(found or beside), *same[:8]]


def _entries(body: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in body.items() if isinstance(body, dict) else enumerate(body):
        yield key, value
        if isinstance(value, (dict, list)):
            yield from _entries(value)


def _json(rng: random.Random, base: Base, file: str, do: str = "json") -> list[Edit]:
    content = base.read(file)
    body = split_tensors(content)[0] if do == "header" else json.loads(content)
    path = _walk(rng, body)
    change = _change(rng, body, path)
    how = change.pop("how")
    return [{"file": file, "do": do, "path": path, **change, "kind": f"{do}: {how}"}]


def _change(rng: random.Random, body: Any, path: list[Any]) -> Edit:
    """What to do at a path, and how it is called. Most changes keep the type."""
    if not path:
        return {"how": "extreme", "to": rng.choice(EXTREMES)}
    old = _at(body, path)
    roll = rng.random()
    if roll < 0.08:
        return {"how": "extreme", "to": rng.choice(EXTREMES)}
    if roll < 0.11:
        return {"how": "drop", "drop": True}
    if roll < 0.14 and isinstance(path[-1], str):
        return {"how": "rename", "name": rng.choice(("x", "", *_names(body)))}
    if roll < 0.17 and isinstance(path[-1], str):
        return {"how": "twice", "twice": rng.choice((old, None, rng.choice(EXTREMES)))}
    if roll < 0.19:
        raw, close = rng.choice((("[", "]"), ('{"x":', "}"), ("9", ""), ("", "")))
        times = rng.choice((60, 400, 5_000, 100_000))
        return {"how": "raw", "raw": raw, "close": close, "times": times}
    if roll < 0.55 or isinstance(old, str):
        return {"how": "alike", "to": rng.choice(_alike(body, path))}
    if isinstance(old, list):
        return {"how": "list", "to": _list(rng, old, body)}
    if isinstance(old, dict):
        return {"how": "object", "to": _object(rng, old, body)}
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        return {"how": "number", "to": _number(rng, old)}
    return {"how": "extreme", "to": rng.choice(EXTREMES)}


def _names(body: Any) -> list[str]:
    found: dict[str, None] = {}

    def visit(value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                found[key] = None
            if isinstance(item, (dict, list)):
                visit(item)

    visit(body)
    return list(found)


def _number(rng: random.Random, old: float) -> float:
    near = (old + 1, old - 1, old * 2, -old, old * 1.0, 0, 1, old + 2**32, old * 1000)
    if rng.random() < 0.5:
        return rng.choice(near)
    same = [x for x in EXTREMES if isinstance(x, type(old)) and not isinstance(x, bool)]
    return rng.choice(same)


def _list(rng: random.Random, old: list[Any], body: Any) -> list[Any]:
    new = list(old)
    how = rng.choice(("drop", "repeat", "swap", "reverse", "empty", "insert", "cut"))
    if how == "empty":
        return []
    if how == "insert" or not new:
        new.insert(rng.randint(0, len(new)), rng.choice(EXTREMES))
    elif how == "drop":
        del new[rng.randrange(len(new))]
    elif how == "repeat":
        new.insert(rng.randint(0, len(new)), rng.choice(new))
    elif how == "swap":
        one, two = rng.randrange(len(new)), rng.randrange(len(new))
        new[one], new[two] = new[two], new[one]
    elif how == "reverse":
        new.reverse()
    else:
        del new[rng.randint(0, len(new)) :]
    return new


def _object(rng: random.Random, old: dict[str, Any], body: Any) -> dict[str, Any]:
    new = dict(old)
    how = rng.choice(("drop", "add", "swap", "empty", "add"))
    keys = list(new)
    if how == "empty":
        return {}
    if how == "add" or not keys:
        new[rng.choice(("x", "", "__class__", *_names(body)))] = rng.choice(EXTREMES)
    elif how == "drop":
        del new[rng.choice(keys)]
    else:
        one, two = rng.choice(keys), rng.choice(keys)
        new[one], new[two] = new[two], new[one]
    return new


# Plans and tables of kernels that keep to their schema


def _plan(rng: random.Random, base: Base) -> list[Edit]:
    """A plan whose names are all defined, but whose steps do not fit each other."""
    body = json.loads(base.read(MANIFEST))
    if not body["plan"]:
        return _json(rng, base, MANIFEST)
    steps = body["plan"]["steps"]
    index = rng.randrange(len(steps))
    step = steps[index]
    makes = (_attribute, _input, _weight, _operation, _bypass, _order, _free)
    make = rng.choices(makes, (4, 4, 3, 5, 3, 2, 1))[0]
    how = make(rng, steps, index, body["weights"])
    path: list[Any] = ["plan", "steps"]
    edit: Edit = {"file": MANIFEST, "do": "json", "kind": f"plan: {how}"}
    if how in ("order", "bypass"):
        return [{**edit, "path": path, "to": steps}]
    return [{**edit, "path": [*path, index], "to": step}]


def _attribute(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    named = [step for step in steps if step["attrs"]]
    attrs = steps[index]["attrs"] or rng.choice(named)["attrs"]
    if attrs is not steps[index]["attrs"]:
        return _operation(rng, steps, index, weights)
    key = rng.choice(list(attrs))
    attrs[key] = _number(rng, attrs[key])
    return "attribute"


def _live(steps: list[Any], index: int) -> list[str]:
    """The values that a step may read."""
    freed = {name for step in steps[:index] for name in step["free"]}
    return [name for step in steps[:index] if (name := step["out"]) not in freed] or ["ids"]


def _input(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    known = _live(steps, index)
    inputs = steps[index]["inputs"]
    if inputs:
        inputs[rng.randrange(len(inputs))] = rng.choice(known)
    return "input"


def _weight(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    own = steps[index]["weights"]
    if not own:
        return _input(rng, steps, index, weights)
    at = rng.randrange(len(own))
    kind = weights.get(own[at], {}).get("kind")
    own[at] = rng.choice([name for name, record in weights.items() if record["kind"] == kind])
    return "weight"


def _operation(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    """Another op, with the attributes and as many operands as its rule asks for."""
    step = steps[index]
    like = [name for name, rule in STEP_RULES.items() if rule.inputs == len(step["inputs"])]
    step["op"] = op = rng.choice(like if like and rng.random() < 0.8 else list(STEP_RULES))
    rule = STEP_RULES[op]
    step["inputs"] = [*step["inputs"], *rng.choices(_live(steps, index), k=8)][: rule.inputs]
    step["attrs"] = {name: _number(rng, rng.choice((1, 4, 0.5))) for name in rule.attrs}
    dense = [name for name, record in weights.items() if record["kind"] == "dense"]
    packed = [name for name, record in weights.items() if record["kind"] == "packed"]
    count = rng.randint(rule.weights[0], rule.weights[1] or rule.weights[0])
    step["weights"] = [
        rng.choice(packed if op.endswith("qlinear") and not at and packed else dense)
        for at in range(count)
    ]
    return "op"


def _bypass(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    """Leave a step out: who read its result reads its input."""
    step = steps[index]
    if not step["inputs"] or index == len(steps) - 1:
        _input(rng, steps, index, weights)
        return "bypass"
    del steps[index]
    for later in steps[index:]:
        later["inputs"] = [step["inputs"][0] if x == step["out"] else x for x in later["inputs"]]
        later["free"] = [x for x in later["free"] if x != step["out"]]
    for earlier in steps[:index]:
        earlier["free"] = [x for x in earlier["free"] if x != step["inputs"][0]]
    return "bypass"


def _order(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    other = rng.randrange(len(steps))
    how = rng.choice(("swap", "twice", "renamed"))
    if how == "swap":
        steps[index], steps[other] = steps[other], steps[index]
    elif how == "twice":
        steps.insert(other, json.loads(json.dumps(steps[index])))
    else:  # two steps define one value
        steps[index]["out"] = steps[other]["out"]
    return "order"


def _free(rng: random.Random, steps: list[Any], index: int, weights: Any) -> str:
    known = ["ids", *(step["out"] for step in steps)]
    steps[index]["free"] = rng.choice(([], [rng.choice(known)], rng.sample(known, 3)))
    return "free"


def _dispatch(rng: random.Random, base: Base) -> list[Edit]:
    """A number, a name or the order of kernels in the table of kernels."""
    body = json.loads(base.read(MANIFEST))
    dispatch = (body["kernels"] or {}).get("dispatch", {})
    if not dispatch.get("variants"):
        return _plan(rng, base)
    edit: Edit = {"file": MANIFEST, "do": "json", "kind": "kernels: table"}
    at = rng.randrange(len(dispatch["variants"]))
    variant = dispatch["variants"][at]
    path: list[Any] = ["kernels", "dispatch", "variants", at]
    how = rng.choice(("number", "order", "kernel", "kernel", "features"))
    if how == "number":
        key = rng.choice([key for key, value in variant.items() if isinstance(value, (int, str))])
        values = [value for value in EXTREMES if isinstance(value, type(variant[key]))]
        return [{**edit, "path": [*path, key], "to": rng.choice(values)}]
    if how == "features":
        new = rng.choice(([], ["avx"], ["x"], ["avx512f", "amx_tile"], ["sse2"]))
        return [{**edit, "path": [*path, "features"], "to": new}]
    kernels = variant["kernels"]
    if how == "order":
        return [{**edit, "path": [*path, "kernels"], "to": _list(rng, kernels, None)}]
    number = rng.randrange(len(kernels))
    key = rng.choice(list(kernels[number]))
    same = [kernel[key] for kernel in kernels if key in kernel]
    return [{**edit, "path": [*path, "kernels", number, key], "to": rng.choice(same)}]


# Tensors


def _header(rng: random.Random, base: Base, file: str) -> list[Edit]:
    roll = rng.random()
    length = struct.unpack_from("<Q", base.read(file))[0]
    if roll < 0.1:
        new = rng.choice((0, 1, length - 1, length + 1, length + 8, 2**31, 2**62, 2**64 - 1, 10**8))
        return [{"file": file, "do": "header length", "to": new, "kind": "header: length"}]
    header, body = split_tensors(base.read(file))
    names = [name for name in header if name != "__metadata__"]
    if roll < 0.5 and names:
        name = rng.choice(names)
        start, end = header[name]["data_offsets"]
        size = len(body)
        if roll < 0.2:
            return [_in_header(file, [name, "dtype"], rng.choice(_DTYPES), "dtype")]
        if roll < 0.3:
            shape = header[name]["shape"]
            return [_in_header(file, [name, "shape"], _shape(rng, shape), "shape")]
        offsets = rng.choice((
            [start, end + 1], [start + 1, end + 1], [end, start], [-1, end], [0, end - start],
            [size, size + end - start], [start, 2**63], [2**64, 2**64 + 8], [start], [start, start],
            header[rng.choice(names)]["data_offsets"], [float(start), end], [start, True],
        ))  # fmt: skip
        return [_in_header(file, [name, "data_offsets"], offsets, "offsets")]
    return _json(rng, base, file, "header")


def _in_header(file: str, path: list[Any], value: Any, how: str) -> Edit:
    return {"file": file, "do": "header", "path": path, "to": value, "kind": f"header: {how}"}


def _shape(rng: random.Random, old: list[int]) -> list[Any]:
    """Other shapes: of as many elements, of fewer and more, of impossible ones."""
    count = math.prod(old)
    near = [length + rng.choice((-1, 1, 8, 64)) for length in old]
    return rng.choice((
        [count], old[::-1], [*old, 1], [1, *old], old[1:], [*old, 2], near, [0, *old], [],
        [length * 2 for length in old], [max(1, length // 2) for length in old],
        [2**32, 2**32], [2**33, *old], [-1, *old], [-1, -count], [2**61, 8],
        [*old[:-1], 0], [1.0, *old], ["1"],
    ))  # fmt: skip


_FLOATS = {"F32": "<f", "F64": "<d", "F16": "<e"}
_RARE = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1.0, 6e4)
_WHOLE = (0, 1, -1, 2, 7, 8, 9, 15, 16, 127, 128, 255, 256, 2**15, 2**31 - 1, 2**63 - 1)


def _values(rng: random.Random, base: Base, file: str) -> list[Edit]:
    """Some elements of a tensor: rare numbers, or those of another place."""
    header, body = split_tensors(base.read(file))
    named = [name for name in header if name != "__metadata__"]
    small = [name for name in named if name.endswith((".bits", "p0", "p1", ".index"))]
    name = rng.choice(small if small and rng.random() < 0.4 else named)
    dtype, (start, end) = header[name]["dtype"], header[name]["data_offsets"]
    size = ITEM_SIZES[dtype]
    count = (end - start) // size
    if not count:
        return _header(rng, base, file)
    many = min(count, rng.choice((1, 1, 2, 16, count)))
    at = rng.randrange(count - many + 1)
    if rng.random() < 0.3:
        other = rng.randrange(0, max(1, len(body) - many * size))
        new = body[other : other + many * size]
    else:
        new = _element(rng, dtype) * many
    edit = {"file": file, "do": "values", "name": name, "at": at * size, "hex": new.hex()}
    return [{**edit, "kind": "tensor: values"}]


def _element(rng: random.Random, dtype: str) -> bytes:
    if dtype in _FLOATS:
        return struct.pack(_FLOATS[dtype], rng.choice(_RARE))
    if dtype == "BF16":
        return struct.pack("<f", rng.choice(_RARE))[2:]
    size = ITEM_SIZES[dtype]
    return (rng.choice(_WHOLE) % 256**size).to_bytes(size, "little")


def _tensor(rng: random.Random, base: Base, file: str) -> list[Edit]:
    """A tensor of another type or shape, in a file that is otherwise in order.

    In an artifact the manifest, where it lists the tensor, says so, too."""
    header = split_tensors(base.read(file))[0]
    name = rng.choice([name for name in header if name != "__metadata__"])
    dtype, shape = header[name]["dtype"], header[name]["shape"]
    if rng.random() < 0.4:
        dtype = rng.choice(list(ITEM_SIZES))
    else:
        shape = [n for n in _shape(rng, shape) if isinstance(n, int)]
        if not 0 <= math.prod(shape) <= 1 << 20 or min(shape, default=0) < 0:
            shape = [3, *shape[:1]] if rng.random() < 0.5 and shape[:1] < [4096] else [5]
    new = rng.choice((None, None, _element(rng, dtype).hex()))
    edit = {"file": file, "do": "tensor", "name": name, "dtype": dtype, "shape": shape, "hex": new}
    edits: list[Edit] = [{**edit, "kind": "tensor: anew"}]
    if MANIFEST in base.files and rng.random() < 0.8:
        record = json.loads(base.read(MANIFEST))["weights"].get(name)
        if record is not None:
            for key, value in (("dtype", dtype), ("shape", shape)):
                path = ["weights", name, key]
                edit = {"file": MANIFEST, "do": "json", "path": path, "to": value}
                edits.append({**edit, "kind": "tensor: anew"})
    return edits
