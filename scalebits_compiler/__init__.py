"""scalebits_compiler: compiles large language models to mixed 1..8-bit blocks under a byte budget.

Importing the package is cheap: `compile` and `load` resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "compile", "load"]

if TYPE_CHECKING:
    from scalebits_compiler.driver.compile import compile_model as compile
    from scalebits_compiler.sessions.open import load

_LAZY = {
    "compile": ("scalebits_compiler.driver.compile", "compile_model"),
    "load": ("scalebits_compiler.sessions.open", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
