"""Which functions the text of an `aten` op can reach, and with which arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverload

from scalebits_compiler.errors import TargetError, VerifyError
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.interpreter.rules import aten_callable
from scalebits_compiler.ir import calls
from scalebits_compiler.ir.calls import EQUATION, NUMBER_CALLS, STRINGS, SWITCHES, is_call
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.verifier import verify

LIST = Path(calls.__file__).with_name("aten_calls.txt")
HEAD = """\
# The functional operators of ATen that a text may call: results depend on the arguments alone, and
# nothing is changed. The rule that makes the list is in test_aten_targets.py; for another torch
# write it anew with  pytest tests/unit/test_aten_targets.py --update-golden
"""
_KINDS = {
    "Tensor", "int", "bool", "float", "number", "List[int]", "List[Tensor]", "List[bool]",
    "List[float]", "List[number]", "Optional[int]", "Optional[Tensor]", "Optional[float]",
    "Optional[bool]", "Optional[List[int]]", "Optional[List[float]]", "Optional[number]",
    "List[Optional[Tensor]]", "Optional[Device]",
}  # fmt: skip
_STRINGS = {"str", "Optional[str]"}
_RESULTS = {"Tensor", "int", "bool", "float", "number", "List[Tensor]"}
_DENIED = re.compile(
    # derivatives and losses
    r"backward|_loss|cross_entropy|^kl_div|_jvp"
    # other tensors and memory than plain ones, and what one device alone has
    r"|quantiz|qparams|^q_|^qscheme|^int_repr|sparse|csr|csc|bsr|bsc|^c?(col|row)_indices|coalesce"
    r"|hspmm|smm|spmm|spadd|^(indices|values)(_copy)?$|_dense|dense_dim|fbgemm|mkldnn|miopen|cudnn"
    r"|mps|vulkan|nested|to_padded|empty|^resize|^set$|pin_|pinned|overrideable|storage|^lift$"
    r"|(?<!as_)stride|^data$|^output_nr|^retains_grad|^is_(leaf|set_to|inference|distributed)|^get_"
    # random numbers, and running means that are changed
    r"|^rand|^rrelu|^fractional|^batch_norm_|^native_batch_norm|gather_stats|^instance_norm"
    # the inside of others
    r"|^conv_depthwise3d|^slow_conv|^thnn|^lstm_cell|^gru_cell|^rnn_.*_cell|^slice_inverse|dense_tensors"
    # indices and lengths that are not checked, and loops as long as a number says
    r"|lu_solve|lu_unpack|ldl_solve|ormqr|segment_reduce|embedding_|max_unpool|histogramdd"
    r"|polynomial|combinations|mvlgamma|multigammaln|polygamma"
)
_PRIVATE = frozenset(
    (
        "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d", "_cdist_forward", "_convolution", "_convolution_mode",
        "_fused_rms_norm", "_grouped_mm", "_is_all_true",
        "_is_any_true", "_local_scalar_dense", "_log_softmax", "_logcumsumexp",
        "_native_batch_norm_legit_no_training", "_pad_circular", "_prelu_kernel", "_reshape_copy",
        "_safe_softmax", "_scaled_dot_product_flash_attention_for_cpu", "_shape_as_tensor",
        "_softmax", "_stack", "_to_copy", "_unsafe_index", "_unsafe_index_put",
        "_unsafe_masked_index", "_unsafe_view", "_weight_norm", "_weight_norm_interface",
    )
)  # fmt: skip


def functional() -> Iterator[str]:
    """The operators of the installed torch that a text may call."""
    for full in torch._C._dispatch_get_all_op_names():
        if not full.startswith("aten::"):
            continue
        base, _, overload = full.removeprefix("aten::").partition(".")
        name = f"aten.{base}.{overload or 'default'}"
        found = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if isinstance(found, OpOverload) and _is_functional(name, base, found):
            yield name


def _is_functional(name: str, base: str, found: OpOverload) -> bool:
    schema, tags = found._schema, found.tags
    private = base.startswith("_") and base not in _PRIVATE
    random = torch.Tag.nondeterministic_seeded in tags and name not in SWITCHES
    mutable = schema.is_mutable or (base == "batch_norm" and name not in SWITCHES)
    if private or random or mutable or _DENIED.search(base):
        return False
    results = [str(result.type) for result in schema.returns]
    if not results or not _RESULTS.issuperset(results):
        return False
    strings = {a.name for a in schema.arguments if str(a.type) in _STRINGS}
    kinds = {str(a.type) for a in schema.arguments if a.name not in strings}
    return _KINDS.issuperset(kinds) and {*STRINGS, EQUATION}.issuperset(strings)


def test_the_list_is_that_of_the_rule(golden: Callable[[Path, str], None]) -> None:
    golden(LIST, HEAD + "".join(f"{name}\n" for name in sorted(functional())))


def test_switches_are_where_the_schema_has_them() -> None:
    for name, (index, argument, needed) in SWITCHES.items():
        found = aten_callable(name)
        assert isinstance(found, OpOverload)
        schema = found._schema
        assert schema.arguments[index].name == argument
        assert schema.arguments[index].default_value in (None, needed)


def test_every_number_call_is_there() -> None:
    assert all(callable(aten_callable(name)) for name in NUMBER_CALLS)


@pytest.mark.parametrize(
    "target", ["aten.linear.default", "aten.add.Tensor", "aten.einsum.default", "operator.add",
               "math.floor", "torch.sym_max", "aten.sym_size.int", "aten.lstm.input",
               "aten.as_strided.default", "aten.inverse.default"]
)  # fmt: skip
def test_operators_are_found(target: str) -> None:
    assert callable(aten_callable(target))


NO_CALLS = [
    "aten.nothing.default", "nothing.add.default", "torch.load", "torch.sym_nothing",
    "torch.sym_fresh_size", "load_library", "import_module", "operator.attrgetter",
    "operator.call", "operator.setitem", "math.__loader__", "math.__loader__.load_module",
    "aten._dir", "", "aten.add", "__class__.load_library", "aten.add.Tensor.__class__",
    "aten.__class__.default", "torch.sym_max.__globals__", "torch.ops.load_library",
    "aten.from_file.default", "aten.add_.Tensor", "aten.add.out", "aten.fill_.Scalar",
    "aten.rand.default", "aten.randn_like.default", "aten.bernoulli.p", "aten.multinomial.default",
    "aten.native_dropout.default", "aten.empty.memory_format", "aten.empty_like.default",
    "aten.new_empty.default", "aten.set_.source_Storage", "aten.set.source_Storage",
    "aten.resize.default", "aten.record_stream.default", "aten._print.default",
    "aten._foobar.default", "aten.pin_memory.default", "aten._cudnn_rnn.default",
    "aten.sparse_coo_tensor.size", "aten.quantize_per_tensor.default", "math.factorial",
    "math.comb", "math.perm", "operator.lshift", "prim.device.default", "quantized.add.default",
]  # fmt: skip


@pytest.mark.parametrize("target", NO_CALLS)
def test_nothing_else_is(target: str) -> None:
    assert not is_call(target)
    with pytest.raises(TargetError, match="operator"):
        aten_callable(target)


TEXT = """module @m {{
  func @f(%x: i64[?, ?]) -> f32[1] {{
    %n = aten {{target = "aten.sym_size.int", args = [%x, 0]}} : index[]
    %y = {op}
    return %y
  }}
}}
"""


def aten(target: str, args: str, kind: str = "f32[1]", kwargs: str = "{}") -> str:
    return f'aten {{target = "{target}", args = {args}, kwargs = {kwargs}}} : {kind}'


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (aten("__class__.load_library", '[0, "evil.so"]'), "is no call that a text may make"),
        (aten("aten.from_file.default", '["f", true, 1]'), "is no call that a text may make"),
        (aten("aten.ones.default", "[[1]]", kwargs='{dtype = "torch.load"}'), "'torch.load'"),
        (aten("aten.ones.default", "[[1]]", kwargs='{dtype = "torch.qint8"}'), "'torch.qint8'"),
        (aten("aten.ones.default", "[[1]]", kwargs='{device = "cuda"}'), "argument 'cuda'"),
        (aten("aten.ones.default", "[[1]]", kwargs='{a = resource("k")}'), "a resource among"),
        (aten("aten.ones.default", "[[1]]", kwargs="{a = {b = 1}}"), "a dict among"),
        (aten("aten.ones.default", f"[[{2**63}]]"), "more than 64 bits"),
        (aten("aten.div.Tensor_mode", "[%x, %x]", kwargs='{rounding_mode = "up"}'), "'up'"),
        (aten("aten.einsum.default", '["/etc/passwd", [%x]]'), "'/etc/passwd'"),
        (aten("aten.dropout.default", "[%x, 0.5, true]"), "train must be false"),
        (aten("aten.dropout.default", "[%x, 0.5, %n]"), "train must be false"),
        (
            aten("aten.scaled_dot_product_attention.default", "[%x, %x, %x, none, 0.1]"),
            "dropout_p must be 0.0",
        ),
        (aten("operator.mul", '["a", 1000000000000]', "index[]"), "argument 'a'"),
        (aten("operator.mul", "[[1], 1000000000000]", "index[]"), "operator.mul takes numbers"),
        (aten("operator.add", "[1, 2]", "index[]", "{a = 1}"), "operator.add takes numbers"),
        (aten("operator.getitem", "[[1, 2], 0]", "index[]"), "takes a value and a number"),
        (aten("operator.getitem", "[%x, %n]", "index[]"), "takes a value and a number"),
        (aten("math.factorial", "[1000000000]", "index[]"), "is no call that a text may make"),
    ],
)
def test_what_is_refused_at_the_op(op: str, message: str) -> None:
    module, source = parse_module(TEXT.format(op=op), "m.sbir")
    with pytest.raises(VerifyError, match=r"m\.sbir:4:5") as caught:
        verify(module, source)
    assert message in caught.value.message
    with pytest.raises(VerifyError, match=re.escape(message)):  # as after `opt --no-verify`
        Executor(module)


def test_a_tensor_is_no_number() -> None:
    module, source = parse_module(
        TEXT.format(op=aten("operator.mul", "[%x, 2]", "index[]")), "m.sbir"
    )
    with pytest.raises(VerifyError, match=r"%x is none\n  --> m\.sbir:4:5"):
        verify(module, source)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (aten("aten.full.default", f"[[{2**40}], 1.0]", f"f32[{2**40}]"), "bytes, this machine"),
        (aten("aten.full.default", f"[[{2**40}], 1.0]"), "it gives the sizes"),
        (aten("aten.arange.default", f"[{2**62}]"), "cannot be computed"),
        (aten("aten.ones.default", "[[2, 2]]"), r"it gives the sizes \[2, 2\]"),
        (aten("aten.repeat.default", f"[%x, [{2**40}, {2**20}]]"), "cannot be computed"),
        (aten("operator.pow", "[10, 1000000000]", "index[]"), "more than 64 bits"),
        (aten("operator.mul", f"[{2**62}, 2]", "index[]"), "no number of 64 bits"),
        (aten("operator.mul", "[%x, 2]", "index[]"), "no number of 64 bits"),
        (aten("operator.truediv", "[1, 0]", "index[]"), "division by zero"),
        (aten("math.exp", "[1e6]", "index[]"), "math range error"),
        (aten("operator.pow", "[-2.5, 0.5]", "index[]"), "no number of 64 bits"),
        (aten("aten.linear.default", "[%x]"), "cannot be computed"),
        (aten("aten.view.default", "[%x]"), "cannot be computed"),
        (aten("aten.select.int", "[%x, 7, 0]"), "Dimension out of range"),
        (aten("operator.getitem", "[%x, 7]"), "cannot be computed"),
        (aten("aten.copy.default", "[1, 2]"), "cannot be computed"),
    ],
)
def test_what_is_refused_as_it_runs(op: str, message: str) -> None:
    module, _ = parse_module(TEXT.format(op=op))
    with pytest.raises(TargetError, match=message):
        Executor(module).run(torch.zeros(1, 2, dtype=torch.long))


def test_a_plugin_names_the_operators_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_added", set())
    module, source = parse_module(TEXT.format(op=aten("sbtest.twice.default", "[%x]")))
    with pytest.raises(VerifyError, match="no call that a text may make"):
        verify(module, source)
    with torch.library._scoped_library("sbtest", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        calls.add_calls(["sbtest.twice.default"])
        verify(module, source)
        result = Executor(module).run(torch.ones(1, 2, dtype=torch.long))
    assert result.tolist() == [[2, 2]]
