"""Which compiled kernels run on this processor, and in which arithmetic (layer L1).

`activations` is what a user asks for: "exact" is the most exact arithmetic of the kernels that run
here, "int8" rounds activations to 8 bits for speed. A variant lists its arithmetics as `modes`, the
most exact first: "int16" (activations rounded to 16 bits, about 3e-5 relative error), "float32",
and "int8" (to 8 bits, about 6e-3).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalebits_compiler.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    from scalebits_compiler.runtime.dispatch import VariantRecord

EXACT = "exact"
X86_64 = "x86_64"
_X86_64_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_X86_64_V4 = (*_X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
FEATURES: dict[str, tuple[str, ...]] = {
    "vnni": (*_X86_64_V4, "avx512_vnni"),
    "avx2": _X86_64_V3,
}
"""Variant for x86-64 -> the processor flags, as Linux names them, without which its kernels crash.
"""
ACTIVATIONS = (EXACT, "int8")


def choose_variant(variants: Sequence[VariantRecord], flags: frozenset[str]) -> VariantRecord:
    """The first variant of a dispatch table that a processor with `flags` can run.

    Raises `ArtifactError` if there is none.
    """
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    notes = []
    for variant in variants:
        missing = sorted(set(variant.features) - flags)
        if variant.arch == machine and not missing:
            return variant
        why = f"lacks {', '.join(missing)}" if variant.arch == machine else f"is {machine}"
        notes.append(f"kernels {variant.name!r} are for {variant.arch}; this machine {why}")
    raise ArtifactError(
        "this machine can run none of the compiled kernels",
        help="compile the model on this machine, or with --target reference",
        notes=notes,
    )


def offered_activations(variant: VariantRecord) -> list[str]:
    """What `choose_mode` takes for a variant, of ACTIVATIONS."""
    return [name for name in ACTIVATIONS if name == EXACT or name in variant.modes]


def choose_mode(variant: VariantRecord, activations: str) -> str:
    """The arithmetic of a variant for what the user asked; `TargetError` if it has no such one."""
    if activations not in ACTIVATIONS:
        raise TargetError(
            f"unknown activations {activations!r}", help=f"use {' or '.join(ACTIVATIONS)}"
        )
    modes = variant.modes
    if activations not in offered_activations(variant):
        raise TargetError(
            f"the kernels for this processor ({variant.name}) have no {activations} arithmetic,"
            f" only {', '.join(modes)}",
            help="leave --activations out",
        )
    return modes[0] if activations == EXACT else activations
