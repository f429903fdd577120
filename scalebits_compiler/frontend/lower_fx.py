"""torch.export graph -> IR: every call becomes an `aten` op, every parameter a weight."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import OutputKind

from scalebits_compiler.errors import FrontendError, VerifyError
from scalebits_compiler.frontend.hf import EmptyModel, SourceModel
from scalebits_compiler.ir.attrs import AttrValue, Resource, Symbol, Value
from scalebits_compiler.ir.calls import check_call
from scalebits_compiler.ir.module import Argument, Function, Module, Weight
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.resources import ResourceStore, torch_dtype
from scalebits_compiler.ir.types import DTYPES as IR_DTYPES
from scalebits_compiler.ir.types import TensorType, TupleType, Type
from scalebits_compiler.numerics.safetensors import ELEMENT_TYPES
from scalebits_compiler.pretrained import linear_layers, start_token
from scalebits_compiler.tasks import SEQ2SEQ

DTYPES = {torch_dtype(name): name.lower() for name in ELEMENT_TYPES if name.lower() in IR_DTYPES}
_INDEX = TensorType("index", ())
# Where the tensor lives and how it is laid out is no part of what is computed.
_DROPPED_KWARGS = ("device", "pin_memory", "layout")
# What memory holds before it is written is no value: 0 is as good, and the same in every run.
_ZEROS = {
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
}


def lower(
    exported: torch.export.ExportedProgram,
    source: SourceModel | EmptyModel,
) -> Module:
    """The module of a traced model. Weights share memory with the traced model.

    Of an `EmptyModel` the parameters are on the meta device, without data.

    Calls that only check something are dropped, gradient-mode regions are inlined, tied tensors
    become one weight, and dead calls and unused buffers are left out. Raises FrontendError for
    control flow and constants that the IR cannot hold.
    """
    lowering = _Lowering(exported, source.buffers if isinstance(source, EmptyModel) else {})
    result = lowering.walk_top()
    ops = _live(lowering.ops, result)
    for op in ops:
        try:
            if isinstance(op, Aten):
                check_call(op.target, op.args, op.kwargs)
        except VerifyError as error:
            raise FrontendError(f"the model cannot be traced: {error.message}") from error
    used = {symbol.name for op in ops for symbol in op.symbols()}
    weights = {name: w for name, w in lowering.weights.items() if name in used}
    tensors = {key: t for key, t in lowering.tensors.items() if key in used}
    final = next((op.type for op in ops if op.result == result), None)
    if not isinstance(final, TensorType):
        raise FrontendError(f"{source.name} does not give one tensor of logits")
    function = Function("forward", tuple(lowering.arguments), tuple(ops), result, final)
    return Module(
        source.name,
        function,
        weights,
        task=source.task,
        start_token=start_token(source.model) if source.task == SEQ2SEQ else None,
        unread=_unread(source.model, weights),
        resources=ResourceStore(tensors),
    )


def _unread(model: nn.Module, weights: Mapping[str, Weight]) -> tuple[str, ...]:
    """The matrices of linear layers that the result does not depend on."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    read = {weight.loc for weight in weights.values()}
    tied = (names for names in paths.values() if read.isdisjoint(names))
    free = {path for names in tied for path in names}
    return tuple(short_name(path) for path in linear_layers(model) if path in free)


def _live(ops: list[Op], result: Value) -> list[Op]:
    wanted, kept = {result}, []
    for op in reversed(ops):
        if op.result in wanted:
            wanted.update(op.operands())
            kept.append(op)
    return kept[::-1]


class _Lowering:
    """Walks the graph and its inlined regions once."""

    def __init__(
        self, exported: torch.export.ExportedProgram, buffers: Mapping[str, torch.Tensor]
    ) -> None:
        self.exported = exported
        self.buffers = buffers
        self.ops: list[Op] = []
        self.arguments: list[Argument] = []
        self.weights: dict[str, Weight] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._by_tensor: dict[tuple[Any, ...], Symbol] = {}

    def walk_top(self) -> Value:
        """Lower the whole graph; gives the value of the logits."""
        signature = self.exported.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        graph = self.exported.graph
        bound: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                full = names.get(node.name)
                bound[node] = self._argument(node) if full is None else self._weight(full)
        outputs = self._walk(self.exported.graph_module, bound, "")
        kinds = [spec.kind for spec in signature.output_specs]
        result = outputs[kinds.index(OutputKind.USER_OUTPUT)]
        if not isinstance(result, Value):
            raise FrontendError("the model's logits do not depend on its input")
        return result

    def _argument(self, node: fx.Node) -> Value:
        value = Value(node.name)
        kind = type_of(node.meta["val"])
        assert isinstance(kind, TensorType)
        self.arguments.append(Argument(value, kind))
        return value

    def _weight(self, full: str) -> Symbol:
        tensor = self.exported.state_dict.get(full, self.exported.constants.get(full))
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            raise FrontendError(f"the constant {_path(full)} is no tensor of a known dtype")
        tensor = self.buffers.get(_path(full), tensor).detach()
        # The storage, not its address: without data all addresses are the same.
        storage = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        place = (*storage, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in self._by_tensor:
            return self._by_tensor[place]
        name = short_name(_path(full))
        name = _path(full) if name in self.weights else name
        dtype = DTYPES[tensor.dtype]
        self.weights[name] = Weight(
            symbol=name,
            type=TensorType.of(dtype, *tensor.shape),
            data=Resource(name),
            loc=_path(full),
        )
        self.tensors[name] = tensor
        return self._by_tensor.setdefault(place, Symbol(name))

    def _walk(
        self, graph: fx.GraphModule, bound: dict[fx.Node, Any], loc: str
    ) -> tuple[AttrValue, ...]:
        """Lower one graph; `bound` maps its nodes to values, symbols or tuples of them."""
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return tuple(_convert(leaf, bound.__getitem__) for leaf in node.args[0])
            if node.op == "get_attr":
                bound[node] = getattr(graph, str(node.target))
                continue
            here = _module_path(node) or loc
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                bound[node] = self._inline(node, bound, here)
            elif node.target is operator.getitem and isinstance(bound[node.args[0]], tuple):
                bound[node] = bound[node.args[0]][node.args[1]]
            elif node.meta.get("val") is not None:
                bound[node] = self._call(node, bound, here)
        raise FrontendError("the traced graph has no output")

    def _inline(self, node: fx.Node, bound: dict[fx.Node, Any], loc: str) -> tuple[Any, ...]:
        name = str(node.target)
        args: tuple[Any, ...] = node.args
        at = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
        if at is None or (name == "wrap_with_autocast" and args[2]):
            raise FrontendError(
                f"the model uses {name}, which the IR cannot hold", notes=[f"in {loc}"]
            )
        region = bound[args[at]]
        inner = [n for n in region.graph.nodes if n.op == "placeholder"]
        given = [_convert(arg, bound.__getitem__) for arg in args[at + 1 :]]
        return self._walk(region, dict(zip(inner, given, strict=True)), loc)

    def _call(self, node: fx.Node, bound: dict[fx.Node, Any], loc: str) -> Value:
        result = Value(str(len(self.ops)))
        target, args = _target(node), node.args
        if target == "aten.to.device":
            # Positional device; without it the other arguments are those of to.dtype.
            target, args = "aten.to.dtype", (args[0], *args[2:])
        dropped = (*_DROPPED_KWARGS, "memory_format") if target in _ZEROS else _DROPPED_KWARGS
        target = _ZEROS.get(target, target)
        converted = tuple(_convert(arg, bound.__getitem__) for arg in args)
        first, *others = (argument.value for argument in self.arguments)
        if target == "aten.sym_size.int" and converted[0] in others and converted[1] == 0:
            # Two texts are one batch: how many there are does not depend on the second.
            converted = (first, 0)
        kwargs = {
            key: _convert(value, bound.__getitem__)
            for key, value in node.kwargs.items()
            if key not in dropped and value is not None
        }
        self.ops.append(
            Aten(
                result=result,
                type=type_of(node.meta["val"]),
                loc=loc,
                target=target,
                args=converted,
                kwargs=kwargs,
            )
        )
        return result


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = {"_operator": "operator"}.get(target.__module__, target.__module__)
    return f"{module}.{target.__name__}"


def _convert(arg: Any, bound: Callable[[fx.Node], Any]) -> AttrValue:
    """An fx argument as an attribute value."""
    if isinstance(arg, fx.Node):
        return bound(arg)
    if isinstance(arg, (list, tuple)):
        return tuple(_convert(item, bound) for item in arg)
    if isinstance(arg, (torch.dtype, torch.memory_format)):
        return str(arg)
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return arg
    raise FrontendError(f"a traced call has the argument {arg!r}, which the IR cannot hold")


def type_of(value: Any) -> Type:
    """The IR type of a traced value; symbolic sizes are dynamic, size numbers are `index[]`."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in DTYPES:
            raise FrontendError(
                f"the model computes with {value.dtype}, which the IR does not have"
            )
        sizes: Iterable[Any] = value.shape
        dims = [size if isinstance(size, int) else None for size in sizes]
        return TensorType.of(DTYPES[value.dtype], *dims)
    if isinstance(value, (list, tuple)):
        return TupleType(tuple(type_of(item) for item in value))
    if isinstance(value, (bool, torch.SymBool)):
        return TensorType("bool", ())
    if isinstance(value, (float, torch.SymFloat)):
        return TensorType("f64", ())
    return _INDEX


def _path(full: str) -> str:
    return full.removeprefix("hf.")


def short_name(path: str) -> str:
    """`model.layers.0.mlp.gate_proj.weight` -> `layers.0.mlp.gate_proj`."""
    return path.removeprefix("model.").removesuffix(".weight")


def _module_path(node: fx.Node) -> str:
    """The innermost module a node comes from, as a path in the original model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry[0].startswith(("hf", "L['self'].hf"))]
    return paths[-1].removeprefix("L['self'].").removeprefix("hf").lstrip(".") if paths else ""
