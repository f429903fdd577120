"""Lines of kernels that walk the groups of a panel, and that add up what the splits found."""

from __future__ import annotations

from collections.abc import Iterator

from scalebits_compiler.numerics.layout import slots
from scalebits_compiler.runtime.cuda.spec import KernelSpec

TYPES = {"fp16": "tl.float16", "bf16": "tl.bfloat16"}
HALF_ONES = 0x64006400  # twice 1024 in float16


def hidden(name: str, constant: int) -> str:
    """Sets a name to a constant that the compiler cannot see, so that it stays in a register.

    An operation `(a & mask) | constant` is one instruction only if no more than one of the two is
    part of it. There are always groups, so `count` is never 0.
    """
    return f"{name} = tl.where(count > 0, {constant:#x}, 0).to(tl.uint32)"


def step_name(spec: KernelSpec, number: int) -> str:
    """The function that handles a group of a format."""
    return f"{spec.key}_step{number}"


def extra(spec: KernelSpec) -> str:
    """Arguments of such functions that only some kernels need."""
    return f"{', cols, stored' if spec.ragged else ''}{', index' if spec.gather else ''}"


def loops(spec: KernelSpec, call: str) -> Iterator[str]:
    """One loop per format over the groups low..high of a panel; `call` handles one group.

    All that the loops need to know of a panel is loaded before the first: one wait instead of one
    for each format. Which columns a group has is loaded while the group before it is handled.
    """
    row = f"panel * {slots(spec.bits)}"
    for number in spec.bits:
        yield f"first{number} = tl.load(starts + {row} + {number - 1})"
        yield f"end{number} = tl.minimum(tl.load(starts + {row} + {number}), high)"
        yield f"base{number} = arena + tl.load(offsets + {row} + {number - 1}).to(tl.int64) * 16"
    yield "place = groups + panel * count"
    yield "following = tl.load(place + low)"
    for number in spec.bits:
        yield f"for group in tl.range(tl.maximum(first{number}, low), end{number}):"
        yield f"    column = following * {spec.group}"
        yield "    following = tl.load(place + tl.minimum(group + 1, count - 1))"
        size = spec.group_bytes(number)
        yield f"    data = base{number} + (group - first{number}).to(tl.int64) * {size}"
        yield f"    {call.format(step=step_name(spec, number))}"


def store(spec: KernelSpec, shape: str, together: int) -> Iterator[str]:
    """Stores `acc` at `out` where `kept`, or adds it to what the other splits of a tile found.

    together: splits whose sums are loaded at once.
    """
    kind = TYPES[spec.dtype]
    yield "if splits == 1:"
    yield f"    tl.store(y + out, acc.to({kind}), mask=kept)"
    yield "else:"
    yield "    # The last split of a tile to finish adds up all of them, always in the same order."
    yield "    size = tl.cast(tokens, tl.int64) * rows"
    yield "    tl.store(partial + tl.program_id(2) * size + out, acc, mask=kept)"
    yield "    tl.debug_barrier()"
    yield "    ticket = tickets + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)"
    yield "    if tl.atomic_add(ticket, 1, sem='acq_rel') == splits - 1:"
    yield f"        total = tl.full({shape}, 0, tl.float32)"
    yield f"        end = tl.full({shape}, 0, tl.int32) + splits  # the interpreter's & needs tiles"
    yield f"        for split in tl.range(0, splits, {together}):"
    yield "            at = partial + split * size + out"
    for other in range(together):
        guard = f"kept & (split + {other} < end)" if other else "kept"
        load = f"tl.load(at + {other} * size, mask={guard}, other=0, cache_modifier='.cg')"
        yield f"            p{other} = {load}"
    for other in range(together):
        yield f"            total += p{other}"
    yield f"        tl.store(y + out, total.to({kind}), mask=kept)"
    yield "        tl.store(ticket, 0)"
