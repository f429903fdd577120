"""Runs the ops that the small runtime has not by their torch definitions (layer L3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalebits_compiler.analysis.sequence_axis import numbers_positions
from scalebits_compiler.codegen.plan import make_plan
from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.interpreter.executor import Executor
from scalebits_compiler.ir.ops import Aten
from scalebits_compiler.ir.parser import read_module
from scalebits_compiler.ir.verifier import verify
from scalebits_compiler.plugins import Registry
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN, MODULE_FILE
from scalebits_compiler.runtime.plan import TorchCall

I64 = NDArray[np.int64]


class TorchCalls:
    """The calls of an artifact's plan; called as `runtime.ops.CallRunner` says.

    Raises `ArtifactError` for a plan that is not that of module.sbir, whose ops are run.
    """

    def __init__(self, artifact: Artifact, registry: Registry) -> None:
        module, source = read_module(artifact.path / MODULE_FILE, registry.ops)
        verify(module, source)
        registry.install_rules()
        if make_plan(module) != artifact.manifest.plan:
            raise ArtifactError(
                f"{artifact.path}: the plan is not that of {MODULE_FILE}", help=COMPILE_AGAIN
            )
        self._executor = Executor(module)

    def __call__(self, call: TorchCall, inputs: Sequence[Any], past: int, pad: I64 | None) -> Any:
        """What the op gives; a call that numbers positions starts behind those that are past."""
        op = self._executor.module.function.ops[call.index]
        values = dict(zip(op.operands(), map(_tensor, inputs), strict=True))
        with torch.no_grad():
            result = self._executor.apply(op, values, _tensor(pad))
            if past and isinstance(op, Aten) and numbers_positions(op):
                result = result + past
        return _array(result)


def _tensor(value: Any) -> Any:
    """A value of the runtime as torch has it, in the same memory if it may be written to."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return tuple(map(_tensor, value)) if isinstance(value, tuple) else value


def _array(value: Any) -> Any:
    """The result of an op as the runtime has it; numbers stay.

    So do tensors of bfloat16, which numpy has not: only other calls read them.
    """
    if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:
        return value.numpy()
    return tuple(map(_array, value)) if isinstance(value, (tuple, list)) else value
