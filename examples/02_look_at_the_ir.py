"""Read a module, look at its ops and widths, and see the verifier refuse a mistake.

    python examples/02_look_at_the_ir.py

Nothing here needs torch: the IR and passes without data work on text alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from scalebits_compiler.errors import VerifyError
from scalebits_compiler.ir.parser import parse_module
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.ir.types import TensorType
from scalebits_compiler.ir.verifier import verify

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Look at the example module of docs/ir.md: a Llama of one layer."""
    text = (ROOT / "docs" / "example.sbir").read_text()
    module, source = parse_module(text)
    verify(module, source)
    # What is printed is what is parsed.
    assert print_module(module) == text

    print("ops:", dict(Counter(op.name for op in module.function.ops)))
    for weight in module.quantized():
        print(f"@{weight.symbol} {weight.type}: widths {module.bits(weight).tolist()}")

    # The rows of @l0.up are stored in the order @p.mlp. Suppose a pass forgot that: modules are
    # immutable, so we make a changed copy, and the verifier names the op where the orders clash.
    up = module.weight("l0.up")
    natural = TensorType.of("f32", *up.type.static_shape())
    try:
        verify(module.with_weights([replace(up, type=natural)]))
    except VerifyError as error:
        print(f"\nthe verifier refuses a forgotten order:\n{error}")


if __name__ == "__main__":
    main()
