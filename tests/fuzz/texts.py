"""Typed edits of IR texts: a word becomes another of the same kind, or an extreme one."""

from __future__ import annotations

import random
import re
from functools import cache

from scalebits_compiler.ir.ops import OPS
from tests.fuzz.bases import Base
from tests.fuzz.edits import Edit

_WORD = re.compile(
    r'(?P<string>"(?:\\.|[^"\\\n])*")|(?P<value>%[\w.]+)|(?P<symbol>@[\w.\-]+)'
    r"|(?P<number>-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][\w.\-]*)|(?P<mark>[?\[\]{}(),*=:])"
)
_NUMBERS = (
    "0", "1", "-1", "2", "3", "7", "8", "9", "16", "31", "33", "64", "255", "256", "4096", "65536",
    "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
    "1000000000000", "-9223372036854775809", "99999999999999999999999999", "0.0", "-0.0", "0.5",
    "1e-45", "1e39", "1e308", "1e999", "inf", "-inf", "nan", "true", "?", "[]", "none",
)  # fmt: skip
_STRINGS = (
    "", "x", "..", "../model.safetensors", "/dev/zero", "/dev/null", "/etc/hostname", "torch.int8",
    "torch.float64", "torch.load", "torch.complex64", "torch.Tensor", "a/b", "module.sbir", "é",
    "x" * 300, "256@p0", "64@p0", "64", "ids", "{}", '{\\"model_type\\": \\"llama\\"}', "%s", "\\n",
    "manifest.json", "model.safetensors", "plan.safetensors",
)  # fmt: skip
_NAMES = (
    "f32", "f16", "bf16", "f64", "i64", "i32", "i8", "u8", "bool", "index", "packed", "c64",
    "resource", "grid", "true", "false", "none", "inf", "nan", "x", "module", "weight", "func",
)  # fmt: skip
# What an ATen call must not reach, or must not do with these arguments.
TARGETS = (
    "__class__.load_library", "aten.__class__.load_library", "_dir.x", "loaded_libraries.add",
    "aten.from_file.default", "aten.save", "aten.load", "prim.device", "profiler._record_function",
    "torch.load", "torch.sym_max", "torch.sym_sqrt", "operator.getitem", "operator.pow",
    "operator.lshift", "operator.mul", "math.factorial", "math.comb", "math.sqrt", "math.__loader__",
    "aten.empty.memory_format", "aten.zeros.default", "aten.ones.default", "aten.full.default",
    "aten.arange.default", "aten.rand.default", "aten.randn.default", "aten.eye.default",
    "aten.as_strided.default", "aten.set_.source_Storage", "aten.resize_.default",
    "aten.empty_strided.default", "aten.repeat.default", "aten.expand.default", "aten.view.default",
    "aten.index.Tensor", "aten.embedding.default", "aten.gather.default", "aten.unfold.default",
    "aten.repeat_interleave.self_int", "aten.one_hot.default", "aten.constant_pad_nd.default",
    "aten.bincount.default", "aten.tril_indices.default", "aten.softmax.int", "aten.add_.Tensor",
    "aten.fill_.Scalar", "aten.copy_.default", "aten.clone.default", "aten._to_copy.default",
    "aten.convolution.default", "aten.max_pool2d.default", "aten.fft_fft.default", "aten.linear",
    "aten._assert_async.msg", "aten._make_per_tensor_quantized_tensor.default", "aten.to.dtype",
    "aten.native_batch_norm.default", "aten.upsample_nearest1d.default", "aten.svd.default",
    "aten._embedding_bag.default", "aten._sparse_coo_tensor_unsafe.default", "aten.bmm.default",
    "aten._local_scalar_dense.default", "aten.item.default", "aten.index_put_.default",
    "aten.sym_size.int", "aten.scaled_dot_product_attention.default", "higher_order.while_loop",
    "quantized.linear", "mkldnn._linear_pointwise", "_c10d_functional.all_reduce", "inductor._alloc_from_pool",
)  # fmt: skip
_ARGUMENTS = (
    "%ids", "%0", "%1", "%2", "0", "1", "-1", "2", "1e308", "4294967296", "9223372036854775807",
    "[4, 4]", "[4294967296]", "[1048576, 1048576]", "[-1]", "[]", "[0]", '"torch.float32"', '"x.so"',
    '"torch.int64"', '"torch.load"', "none", "true", "[%ids, %0]", "[1, 1000000]", "[[%0]]", "1000000",
)  # fmt: skip


@cache
def _words(text: str) -> list[re.Match[str]]:
    return list(_WORD.finditer(text))


def _kind(word: re.Match[str]) -> str:
    assert word.lastgroup is not None
    return word.lastgroup


def edits(rng: random.Random, base: Base, file: str) -> list[Edit]:
    """One edit of an IR text."""
    text = base.read(file).decode()
    make = rng.choices(
        (_word, _line, _aten, _deep, _operation, _resource), (46, 14, 12, 2, 14, 12)
    )[0]
    return make(rng, text, file)


def _replaced(text: str, file: str, start: int, end: int, new: str, kind: str) -> list[Edit]:
    """The edit that puts `new` at start..end; as much context as tells the place by its text."""
    old = text[start:end]
    if not old:  # an insertion takes the text that follows with it
        old = text[start : start + 1]
        new += old
    nth = 0
    at = text.find(old)
    while at != start:
        nth, at = nth + 1, text.find(old, at + 1)
    edit = {"file": file, "do": "replace", "old": old, "new": new, "nth": nth}
    return [{**edit, "kind": f"text: {kind}"}]


def _word(rng: random.Random, text: str, file: str) -> list[Edit]:
    words = _words(text)
    kind = rng.choice(("string", "value", "symbol", "number", "number", "name", "mark"))
    same = [word for word in words if _kind(word) == kind]
    if not same:
        return _line(rng, text, file)
    word = rng.choice(same)
    pools = {
        "string": tuple(f'"{item}"' for item in _STRINGS),
        "value": ("%x", "%ids", "%0"),
        "symbol": ("@x", "@p0", "@forward"),
        "number": _NUMBERS,
        "name": _NAMES,
        "mark": ("?", "[", "]", "{", "}", "(", ")", ",", "*", "=", ":", "", "@p0", "//", '"'),
    }
    others = [other[0] for other in same]
    new = rng.choice(others) if rng.random() < 0.6 else rng.choice(pools[kind])
    return _replaced(text, file, *word.span(), new, kind)


def _line(rng: random.Random, text: str, file: str) -> list[Edit]:
    lines = text.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    start = sum(map(len, lines[:number]))
    end = start + len(lines[number])
    other = rng.choice(lines)
    new, kind = rng.choice((
        ("", "line dropped"), (lines[number] * 2, "line twice"), (other, "line of elsewhere"),
        (other + lines[number], "line moved"),
    ))  # fmt: skip
    return _replaced(text, file, start, end, new, kind)


def _ops(text: str) -> list[re.Match[str]]:
    return list(re.finditer(r"^    (%\w+) = ([\w.]+)(.*?)( : .*)\n", text, re.MULTILINE))


def _operation(rng: random.Random, text: str, file: str) -> list[Edit]:
    """Another op in place of one, or one attribute changed, dropped or added."""
    ops = _ops(text)
    if not ops:
        return _line(rng, text, file)
    op = rng.choice(ops)
    if rng.random() < 0.5:
        return _replaced(text, file, *op.span(2), rng.choice(list(OPS)), "op")
    attribute = rng.choice((
        "heads = 8", "heads = 0", "scale = nan", "window = -1", "window = 4294967296", "eps = -1.0",
        "softcap = inf", "causal = 3", "axis = 9", 'order = "x"', "factor = 1e39", "top = 0",
        "top = 100000", "expert = -1", 'gather = "64@p0"', "interleaved = true", "scaling = 1",
        "inverse = true", "x = 1", 'target = "aten.from_file.default"', "args = []", 'config = "{}"',
        "names = []", "products = []",
    ))  # fmt: skip
    rest = op[3]
    if "{" in rest and rng.random() < 0.6:
        new = (
            rest[: rest.index("{") + 1]
            + attribute
            + rng.choice(("}", ", " + rest[rest.index("{") + 1 :]))
        )
    else:
        new = f"{rest} {{{attribute}}}"
    return _replaced(text, file, *op.span(3), new, "attribute")


def _aten(rng: random.Random, text: str, file: str) -> list[Edit]:
    """An ATen call: its target another, or one in place of an op."""
    known = re.findall(r'target = "([^"]+)"', text)
    target = rng.choice(known) if known and rng.random() < 0.3 else rng.choice(TARGETS)
    targets = list(re.finditer(r'target = "([^"]+)"', text))
    if targets and rng.random() < 0.5:
        return _replaced(text, file, *rng.choice(targets).span(1), target, "aten target")
    ops = _ops(text)
    if not ops:
        return _line(rng, text, file)
    op = rng.choice(ops)
    values = re.findall(r"[%@][\w.]+", op[3])
    args = [
        rng.choice((*_ARGUMENTS, *values * 4)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))
    ]
    call = f'    {op[1]} = aten {{target = "{target}", args = [{", ".join(args)}]}}{op[4]}\n'
    return _replaced(text, file, *op.span(), call, "aten call")


def _deep(rng: random.Random, text: str, file: str) -> list[Edit]:
    """Something repeated very often."""
    at = rng.choice(_words(text)).start()
    piece = rng.choice(
        ("[", "(", "{", "9", "x", "?, ", "4*", "@p0", " ", "\n", "// x\n", '"', "-", "%")
    )
    edit = {"file": file, "do": "repeat", "at": at, "text": piece}
    return [{**edit, "times": rng.choice((3, 70, 5_000, 100_000)), "kind": "text: repeated"}]


def _resource(rng: random.Random, text: str, file: str) -> list[Edit]:
    """The name of a tensor, or of a tensor file, becomes another."""
    listed = re.search(r"tensors = \[(.*?)\]", text)
    if listed is not None and rng.random() < 0.3:
        own = re.findall(r'"([^"]+)"', listed[1])
        name = rng.choice(("../x.safetensors", "/dev/zero", "/etc/hostname", "", ".", "manifest.json",
                           "x.safetensors", "model.safetensors", "./" + (own or ["x"])[0], *own))  # fmt: skip
        new = rng.choice((f'"{name}"', "", listed[1] + f', "{name}"', f'"{name}", {listed[1]}'))
        return _replaced(text, file, *listed.span(1), new, "tensor file")
    found = list(re.finditer(r'resource\("([^"]*)"\)', text))
    if not found:
        return _word(rng, text, file)
    new = rng.choice(found)[1] if rng.random() < 0.8 else rng.choice(_STRINGS)
    return _replaced(text, file, *rng.choice(found).span(1), new, "resource")
