"""The plan of a model: the steps that a session executes, as data (layer L1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct

from scalebits_compiler.runtime.schema import Bytes, Count, Size

Number: TypeAlias = int | float
# Of a model that is not recognised at all, this many names tell enough.
MOST_NAMED = 3


class StepRule(NamedTuple):
    """What a step of one op holds: values read, weights read (least, most), attributes.

    more_inputs: it may read more values than `inputs`. most: None if it may read any number.
    """

    inputs: int
    weights: tuple[int, int | None]
    attrs: frozenset[str]
    more_inputs: bool = False


def _rule(inputs: int, least: int, most: int, *attrs: str) -> StepRule:
    return StepRule(inputs, (least, most), frozenset(attrs))


TORCH = "torch"
STEP_RULES: dict[str, StepRule] = {
    "positions": _rule(1, 0, 0),
    "embedding": _rule(1, 1, 1),
    "linear": _rule(1, 1, 2),
    "qlinear": _rule(1, 1, 2),
    "gather_qlinear": _rule(1, 2, 3),
    "rms_norm": _rule(1, 1, 1, "eps"),
    "layer_norm": _rule(1, 1, 2, "eps"),
    "silu": _rule(1, 0, 0),
    "gelu": _rule(1, 0, 0),
    "gelu_tanh": _rule(1, 0, 0),
    "relu": _rule(1, 0, 0),
    "tanh": _rule(1, 0, 0),
    "scale": _rule(1, 0, 0, "factor"),
    "bias": _rule(1, 1, 1),
    "add": _rule(2, 0, 0),
    "mul": _rule(2, 0, 0),
    "split_heads": _rule(1, 0, 0, "heads"),
    "merge_heads": _rule(1, 0, 0),
    "rope": _rule(2, 1, 1, "scaling", "interleaved"),
    "attention": _rule(3, 0, 1, "scale", "window", "softcap", "causal", "cache"),
    "route": _rule(1, 0, 0, "top", "normalize"),
    "dispatch": _rule(2, 0, 0, "expert"),
    "combine": StepRule(2, (0, 0), frozenset(), more_inputs=True),
    "permute": _rule(1, 1, 1, "axis"),
    TORCH: StepRule(0, (0, None), frozenset({"call"}), more_inputs=True),
}
"""The ops that the runtime executes; `runtime/ops.py` has one function for each. `torch` is an op
that the runtime has not: entry number `call` of the plan's `calls`."""
LARGEST_INTEGER, LARGEST_FLOAT = 2**31 - 1, float(2**128 - 2**104)


class Domain(NamedTuple):
    """The values of an attribute: from `least` to `most`, only integers if `whole`."""

    least: Number
    most: Number
    whole: bool

    def __str__(self) -> str:
        return f"{'an integer' if self.whole else 'a number'} from {self.least} to {self.most}"


_FLAG, _COUNT = Domain(0, 1, True), Domain(0, LARGEST_INTEGER, True)
_SIZE = Domain(1, LARGEST_INTEGER, True)
_FLOAT = Domain(-LARGEST_FLOAT, LARGEST_FLOAT, False)
_NOT_NEGATIVE = Domain(0.0, LARGEST_FLOAT, False)
ATTRIBUTES: dict[str, Domain] = {
    **dict.fromkeys(("interleaved", "causal", "normalize"), _FLAG),
    **dict.fromkeys(("window", "cache", "expert", "call"), _COUNT),
    **dict.fromkeys(("heads", "top"), _SIZE),
    **dict.fromkeys(("factor", "scaling", "scale"), _FLOAT),
    **dict.fromkeys(("eps", "softcap"), _NOT_NEGATIVE),
    "axis": Domain(-4, 3, True),
}
"""What an attribute may be, whichever op it belongs to. Real numbers are stored as float32."""
PRODUCTS = ("qlinear", "gather_qlinear")
"""With a packed matrix; the latter's second weight is the index that its input is read by."""


class WeightRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One weight. `dtype` is that of the file for kind `dense`, `packed` for kind `packed`.

    A packed matrix S lies in the tensors `S.packed` (numerics/layout.py) and `S.bits`; it alone
    has `block` (rows, columns) and `group` (columns per scale).
    """

    kind: Literal["dense", "packed"]
    dtype: str
    shape: tuple[Bytes, ...]
    block: tuple[Size, Size] | None
    group: Size | None

    @staticmethod
    def dense(dtype: str, shape: tuple[int, ...]) -> WeightRecord:
        """The record of a tensor that is stored as it is."""
        return WeightRecord("dense", dtype, shape, None, None)


class Step(Struct, frozen=True, forbid_unknown_fields=True):
    """One op of the plan: reads values and weights, defines `out`, then drops the values `free`."""

    op: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    attrs: Mapping[str, Number]
    out: str
    free: tuple[str, ...]


class TorchCall(Struct, frozen=True, forbid_unknown_fields=True):
    """An op that torch runs by its definition.

    op: its name. place: where it comes from in the original model, may be empty. index: its number
    among the ops of module.sbir. channels: of its result, if that is float32 and known to be
    [batch, sequence, channels], or with heads [batch, heads, sequence, channels / heads]; else 0.
    """

    op: str
    place: str
    index: Count
    heads: Count
    channels: Count

    def __str__(self) -> str:
        return f"{self.op} ({self.place})" if self.place else self.op


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """The model as a straight line of steps, from token ids `input` to logits `output`.

    calls: the ops that torch runs. replays: why a decode step runs all tokens again; empty where it
    runs the new ones alone, with a key-value cache. one_length: why the rows of a batch must have
    one length; empty where padding is skipped.
    """

    input: str
    steps: tuple[Step, ...]
    output: str
    calls: tuple[TorchCall, ...]
    replays: str
    one_length: str


def told_by_kind(calls: Iterable[TorchCall]) -> str:
    """One call of each kind with its place, those with a place first; of many kinds a few."""
    kinds: dict[str, TorchCall] = {}
    for call in calls:
        if not kinds.setdefault(call.op, call).place:
            kinds[call.op] = call
    named = sorted(kinds.values(), key=lambda call: not call.place)
    more = len(named) - MOST_NAMED
    told = ", ".join(map(str, named[:MOST_NAMED]))
    return f"{told} and {more} more kinds of op" if more > 0 else told
