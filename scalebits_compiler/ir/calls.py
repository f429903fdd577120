"""Which calls an `aten` op may hold. A text may come from anywhere: nothing else is ever called."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from scalebits_compiler.errors import VerifyError
from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.types import DTYPES
from scalebits_compiler.numerics.safetensors import ELEMENT_TYPES

GETITEM = "operator.getitem"
SUM = "torch.sym_sum"
_OPERATORS = (
    "add", "and_", "eq", "floordiv", "ge", "gt", "le", "lt", "mod", "mul", "ne", "neg", "not_",
    "or_", "pos", "pow", "sub", "truediv", "xor",
)  # fmt: skip
# No math.factorial and the like, whose results may have any number of digits.
_MATH = (
    "acos", "asin", "atan", "ceil", "cos", "cosh", "exp", "fabs", "floor", "log", "log10", "log2",
    "pow", "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
_SYMBOLIC = ("float", "int", "ite", "max", "min", "not", "sum")
NUMBER_CALLS = frozenset(
    (
        *(f"operator.{name}" for name in _OPERATORS),
        *(f"math.{name}" for name in _MATH),
        *(f"torch.sym_{name}" for name in _SYMBOLIC),
    )
)
"""Calls on numbers, as traces have them for sizes."""
# What traces of models with experts contain; canonicalize raises it.
_EXPERTS = "transformers.grouped_mm_fallback.default"
STRINGS: Mapping[str, tuple[str, ...]] = {
    "UPLO": ("L", "U"),
    "approximate": ("none", "tanh"),
    "indexing": ("ij", "xy"),
    "interpolation": ("linear", "lower", "higher", "midpoint", "nearest"),
    "mode": ("constant", "reflect", "replicate", "circular"),
    "norm": ("forward", "backward", "ortho"),
    "padding": ("same", "valid"),
    "padding_side": ("left", "right"),
    "reduce": ("sum", "prod", "mean", "amax", "amin", "add", "multiply"),
    "rounding_mode": ("trunc", "floor"),
    "side": ("left", "right"),
}
"""Parameter -> the strings that it takes."""
TORCH_NAMES = frozenset(
    (
        *(f"torch.{kind.torch}" for name, kind in ELEMENT_TYPES.items() if name.lower() in DTYPES),
        *(f"torch.{name}_format" for name in ("contiguous", "preserve")),
        *(f"torch.channels_last{suffix}" for suffix in ("", "_3d")),
        "torch.strided",
    )
)
"""Element types, memory formats and layouts, which stand in arguments as strings."""
SWITCHES: Mapping[str, tuple[int, str, object]] = {
    "aten.batch_norm.default": (5, "training", False),
    "aten.dropout.default": (2, "train", False),
    "aten.gru.input": (6, "train", False),
    "aten.lstm.input": (6, "train", False),
    "aten.rnn_relu.input": (6, "train", False),
    "aten.rnn_tanh.input": (6, "train", False),
    "aten.scaled_dot_product_attention.default": (4, "dropout_p", 0.0),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (3, "dropout_p", 0.0),
}
"""Call -> (position, name, value) of the argument that must have this value, else the result is
random or an operand is changed."""
EQUATION = "equation"
_EQUATION = re.compile(r"[A-Za-z., ]{1,200}(->[A-Za-z. ]{0,100})?")
_ANY_WORD = frozenset(word for words in STRINGS.values() for word in words) | TORCH_NAMES
# Sizes and numbers of torch have 64 bits.
INT_LIMIT = 2**63
# Of a name that is refused, so much stands in the message.
_MOST_SHOWN = 60
_added: set[str] = set()


def add_calls(names: Iterable[str]) -> None:
    """Allow operators that a plugin names, such as `torchvision.nms.default`, in this process."""
    _added.update(names)


@functools.cache
def _listed() -> frozenset[str]:
    lines = Path(__file__).with_name("aten_calls.txt").read_text(encoding="utf-8").splitlines()
    return frozenset((_EXPERTS, *(line for line in lines if not line.startswith("#"))))


def is_call(target: str) -> bool:
    """Whether a text may call this: a listed functional operator, or one that a plugin names."""
    numbers = target == GETITEM or target in NUMBER_CALLS
    return numbers or target in _listed() or target in _added


def check_call(target: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Raise VerifyError unless a text may make this call, as far as its types do not matter."""
    shown = repr(target[:_MOST_SHOWN])
    if not is_call(target):
        raise VerifyError(
            f"{shown} is no call that a text may make",
            help="functional ATen operators are allowed, e.g. aten.linear.default, and those that a"
            " plugin names in its `calls`",
        )
    for index, leaf in enumerate(_leaves((*args, *kwargs.values()), target)):
        if isinstance(leaf, str):
            equation = target == "aten.einsum.default" and index == 0
            if leaf not in _ANY_WORD and not (equation and _EQUATION.fullmatch(leaf)):
                raise VerifyError(f"{target} has the argument {leaf[:_MOST_SHOWN]!r}")
        elif isinstance(leaf, int) and not -INT_LIMIT <= leaf < INT_LIMIT:
            raise VerifyError(f"{target} has an argument of more than 64 bits")
    if target in SWITCHES:
        index, name, needed = SWITCHES[target]
        given = args[index] if index < len(args) else kwargs.get(name, needed)
        if isinstance(given, (Value, Symbol)) or given != needed:
            raise VerifyError(f"{target}: {name} must be {str(needed).lower()}")
    if target == GETITEM:
        one = len(args) == 2 and isinstance(args[0], Value) and type(args[1]) is int
        if not one or kwargs:
            raise VerifyError(f"{GETITEM} takes a value and a number")
    elif target in NUMBER_CALLS:
        _check_numbers(target, args, kwargs)


def _leaves(value: object, target: str) -> Iterator[object]:
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item, target)
    elif value is None or isinstance(value, (bool, int, float, str, Value, Symbol)):
        yield value
    else:
        raise VerifyError(f"{target} has a {type(value).__name__.lower()} among its arguments")


def _check_numbers(target: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    numbers = args
    if target == SUM and len(args) == 1 and isinstance(args[0], tuple):
        numbers = args[0]
    if kwargs or not all(isinstance(item, (bool, int, float, Value)) for item in numbers):
        raise VerifyError(f"{target} takes numbers")
