"""A model that torch.export refuses -> IR: one `host` op with the matrices of its linear layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from scalebits_compiler.errors import FrontendError
from scalebits_compiler.frontend.hf import PROBE, EmptyModel, SourceModel
from scalebits_compiler.frontend.lower_fx import DTYPES, short_name
from scalebits_compiler.ir.attrs import Resource, Symbol, Value
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.module import Argument, Function, Module, Weight
from scalebits_compiler.ir.resources import ResourceStore
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.pretrained import call, config_text, linear_layers, quiet, start_token
from scalebits_compiler.tasks import SEQ2SEQ


def capture(source: SourceModel | EmptyModel, reason: str) -> Module:
    """The module of a model by its layers. Weights share memory with it, but for Conv1D's.

    reason: why it is not traced. The products of linear layers that a run on a few tokens comes
    to are products of the module; all else is left to the model's own code. Raises FrontendError
    if it does not run, or gives no tensor [batch, sequence, n].
    """
    layers = linear_layers(source.model)
    called, result = _probe(source, layers)
    if result.dim() != 3 or result.shape[:2] != PROBE.shape:
        raise FrontendError(f"{source.name} does not give one tensor [batch, sequence, channels]")
    found = _Tensors()
    for name, tensor in source.model.state_dict(keep_vars=True).items():
        found.add(name, tensor.detach(), turned=name in called and _is_turned(layers[name]))
    shared = {name for name in called if found.count(name) > 1}
    products = tuple(name for name in layers if name in called and name not in shared)
    two, out = source.task == SEQ2SEQ, Value("0")
    texts = [Value("ids"), Value("decoder_ids")][: 1 + two]
    kind = TensorType.of("f32", None, None, result.shape[2])
    op = Host(
        result=out,
        type=kind,
        loc=type(source.model).__name__,
        ids=texts[0],
        decoder_ids=texts[1] if two else None,
        weights=tuple(found.symbols.values()),
        names=tuple(found.symbols),
        products=products,
        dense=tuple(_dense(source.model, found, products).items()),
        config=config_text(source.model),
        reason=reason,
    )
    arguments = tuple(Argument(ids, TensorType.of("i64", None, None)) for ids in texts)
    return Module(
        source.name,
        Function("forward", arguments, (op,), out, kind),
        found.weights,
        task=source.task,
        start_token=start_token(source.model) if two else None,
        resources=ResourceStore(found.tensors),
    )


def _probe(
    source: SourceModel | EmptyModel, layers: dict[str, nn.Module]
) -> tuple[set[str], torch.Tensor]:
    """The linear layers that a run comes to, and what it gives."""
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    hooks = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    ids = PROBE.to(next(source.model.parameters()).device)
    try:
        with torch.no_grad(), quiet():
            return called, call(source.model, source.task, ids)
    except Exception as error:  # a model's own code, which may raise anything
        raise FrontendError(
            f"{source.name} does not run on {list(ids.shape)} token ids: {error}",
            help="a model must give logits or states for token ids alone",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _is_turned(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


@dataclass
class _Tensors:
    """The tensors of a state dict as weights; those that share memory are one."""

    symbols: dict[str, Symbol] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _by_place: dict[tuple[object, ...], Symbol] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, turned: bool) -> None:
        """Add one; `turned` stores a matrix [inputs, outputs] as [outputs, inputs]."""
        if tensor.dtype not in DTYPES:
            raise FrontendError(f"the tensor {name} is of {tensor.dtype}, which the IR has not")
        storage = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        place = (*storage, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in self._by_place:
            self.symbols[name] = self._by_place[place]
            return
        symbol = short_name(name) if short_name(name) not in self.weights else name
        stored = tensor.t().contiguous() if turned else tensor
        kind = TensorType.of(DTYPES[tensor.dtype], *stored.shape)
        self.weights[symbol] = Weight(symbol=symbol, type=kind, data=Resource(symbol), loc=name)
        self.tensors[symbol] = stored
        self.symbols[name] = self._by_place[place] = Symbol(symbol)

    def count(self, name: str) -> int:
        """How many tensors of the state dict are this one."""
        return list(self.symbols.values()).count(self.symbols[name])


def _dense(model: nn.Module, found: _Tensors, products: tuple[str, ...]) -> dict[str, str]:
    """Symbol -> why, of the matrices that stay dense."""
    module: Any = model
    head = module.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    reasons: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        symbol = found.symbols[name].name
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        if id(tensor) in tables:
            reasons[symbol] = "table of an embedding"
        elif head is not None and tensor is getattr(head, "weight", None):
            reasons.setdefault(symbol, "head")
        elif name not in products:
            told = "not recognised: no layer x Wᵀ + b that a run comes to reads it"
            reasons.setdefault(symbol, told)
    return reasons
