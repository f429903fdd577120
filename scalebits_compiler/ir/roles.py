"""What part a weight plays in the function: the head's matrix, the tables of embeddings."""

from __future__ import annotations

from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.experts import Route
from scalebits_compiler.ir.host import Host
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import FLOATS, Op
from scalebits_compiler.ir.ops import Aten, Embedding, Linear


def head_value(module: Module) -> Value:
    """The result, or what it is made of one for one (scaled or capped logits)."""
    defs = {op.result: op for op in module.function.ops}
    value = module.function.result
    while (op := defs.get(value)) is not None and not isinstance(op, Linear):
        sources = set(op.operands())
        if len(sources) != 1:
            break
        value = sources.pop()
    return value


def head_matrix(module: Module) -> str | None:
    """The symbol of the matrix that gives the logits; None where no linear op does."""
    head = head_value(module)
    ops = [op for op in module.function.ops if isinstance(op, Linear) and op.result == head]
    return ops[0].weight.name if ops else None


def embedding_tables(module: Module) -> list[str]:
    """The symbols of the tables that embedding ops read, each once."""
    ops = (op for op in module.function.ops if isinstance(op, Embedding))
    return list(dict.fromkeys(op.table.name for op in ops))


def router_values(module: Module) -> set[Value]:
    """The scores of experts: what decides which of them see a token."""
    return {op.scores for op in module.function.ops if isinstance(op, Route)}


def untraced(module: Module) -> str | None:
    """Why the model's own code runs it, and its channels keep their order; None if it is traced."""
    return next((op.reason for op in module.function.ops if isinstance(op, Host)), None)


def dense_matrices(module: Module) -> dict[str, str]:
    """Symbol -> why, of every matrix (or stack of them) that is not quantized."""
    readers: dict[str, list[Op]] = {}
    for op in module.function.ops:
        for symbol in op.symbols():
            readers.setdefault(symbol.name, []).append(op)
    scores, head = router_values(module), head_value(module)
    unread = dict.fromkeys(module.unread, "the result does not depend on it")
    return unread | {
        name: _why_dense(name, readers.get(name, []), head, scores)
        for name, weight in module.weights.items()
        if not weight.quantize and weight.type.rank >= 2 and weight.type.dtype in FLOATS
    }


def _why_dense(name: str, readers: list[Op], head: Value, scores: set[Value]) -> str:
    calls = sorted({op.target for op in readers if isinstance(op, Aten)})
    if calls:
        return f"not recognised: read by {', '.join(calls)}"
    for op in readers:
        if isinstance(op, Host) and name in dict(op.dense):
            return dict(op.dense)[name]
    if any(isinstance(op, Embedding) for op in readers):
        return "table of an embedding"
    if any(op.result == head for op in readers):
        return "head"
    if any(op.result in scores for op in readers):
        return "scores experts"
    return "excluded as asked"
