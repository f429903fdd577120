"""The ops that work on every element by itself. They tie no channels but those of one place."""

# ruff: noqa: D102  (`infer` is documented in Op; the docstring of the class says what it computes)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from scalebits_compiler.ir.attrs import Symbol, Value
from scalebits_compiler.ir.op import Op, Typing, channel_axis, check, check_float, vector_axis
from scalebits_compiler.ir.types import TensorType, Type

# ATen calls that read each element by itself: their operands of the result's shape may be stored
# in any common order.
ELEMENTWISE_CALLS = frozenset(
    f"aten.{name}"
    for name in (
        "abs.default", "add.Scalar", "add.Tensor", "clamp.default", "clone.default", "cos.default",
        "div.Scalar", "div.Tensor", "elu.default", "erf.default", "exp.default", "gelu.default",
        "hardtanh.default", "leaky_relu.default", "log.default", "mul.Scalar", "mul.Tensor",
        "neg.default", "pow.Tensor_Scalar", "relu.default", "rsqrt.default", "rsub.Scalar",
        "sigmoid.default", "silu.default", "sin.default", "softplus.default", "sqrt.default",
        "square.default", "sub.Scalar", "sub.Tensor", "tanh.default",
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unary(Op):
    """A function of each element of one tensor."""

    x: Value

    def infer(self, t: Typing) -> Type:
        check_float(t.type(self.x), str(self.x))
        return t.type(self.x)


@dataclass(frozen=True, kw_only=True)
class Silu(Unary):
    """x · sigmoid(x), elementwise."""

    name: ClassVar[str] = "silu"


@dataclass(frozen=True, kw_only=True)
class Gelu(Unary):
    """x · Φ(x), elementwise; Φ is the normal distribution function (by erf)."""

    name: ClassVar[str] = "gelu"


@dataclass(frozen=True, kw_only=True)
class GeluTanh(Unary):
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise: the tanh form of `gelu`."""

    name: ClassVar[str] = "gelu_tanh"


@dataclass(frozen=True, kw_only=True)
class Relu(Unary):
    """max(x, 0), elementwise."""

    name: ClassVar[str] = "relu"


@dataclass(frozen=True, kw_only=True)
class Tanh(Unary):
    """Hyperbolic tangent, elementwise."""

    name: ClassVar[str] = "tanh"


@dataclass(frozen=True, kw_only=True)
class Scale(Unary):
    """x · factor, elementwise."""

    name: ClassVar[str] = "scale"
    factor: float

    def infer(self, t: Typing) -> Type:
        check(math.isfinite(self.factor), f"factor is {self.factor}, it must be finite")
        return super().infer(t)


@dataclass(frozen=True, kw_only=True)
class Bias(Op):
    """x + bias, a vector that is added to the channels of every position."""

    name: ClassVar[str] = "bias"
    x: Value
    bias: Symbol

    def infer(self, t: Typing) -> Type:
        check_float(t.type(self.x), str(self.x))
        last = t.same(
            channel_axis(t, self.x), vector_axis(t, self.bias), f"channels of {self.bias}"
        )
        return t.type(self.x).with_dim(-1, last)


@dataclass(frozen=True, kw_only=True)
class Binary(Op):
    """A function of the elements at the same place of two tensors of one type."""

    a: Value
    b: Value

    def infer(self, t: Typing) -> Type:
        left, right = t.type(self.a), t.type(self.b)
        check(left.dtype == right.dtype, f"{self.name} of {left.dtype} and {right.dtype}")
        check(left.rank == right.rank, f"{self.name} of {left} and {right}")
        pairs = zip(left.dims, right.dims, strict=True)
        dims = tuple(t.same(x, y, f"axis {i} of {self.name}") for i, (x, y) in enumerate(pairs))
        return TensorType(left.dtype, dims)


@dataclass(frozen=True, kw_only=True)
class Add(Binary):
    """Elementwise sum of two tensors of one type."""

    name: ClassVar[str] = "add"


@dataclass(frozen=True, kw_only=True)
class Mul(Binary):
    """Elementwise product of two tensors of one type."""

    name: ClassVar[str] = "mul"
