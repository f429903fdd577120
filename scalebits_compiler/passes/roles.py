"""What part a weight plays in the function: the head's matrix, the tables of embeddings."""

from __future__ import annotations

from scalebits_compiler.ir.attrs import Value
from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.ops import Embedding, Linear


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
