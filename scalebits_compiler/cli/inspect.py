"""`scalebitsc inspect`: what is in an artifact."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from scalebits_compiler.runtime.artifact import Artifact

# Of the members of a class, so many are named; --json has all.
MOST_NAMED = 6
NOT_BUILT_HERE = "trust           not built on this machine: built anew to run, or --trust-kernels"
BY_TORCH = "by torch as a whole, but for the products; there is no key-value cache"


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `inspect`."""
    parser = subparsers.add_parser("inspect", help="sizes and widths of an artifact")
    parser.add_argument(
        "artifact",
        type=Path,
        metavar="OUT",
        help="a folder that compile wrote, or a model's (its config.json is enough)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the summary of an artifact, or what the config of a model tells."""
    from scalebits_compiler.runtime.artifact import Artifact

    if _is_model(args.artifact):
        from scalebits_compiler.tools.inspect import analyse

        found = analyse(args.artifact)
        print(json.dumps(found, indent=2) if args.json else "\n".join(analysis_lines(found)))
        return 0
    described = describe(Artifact.open(args.artifact))
    print(json.dumps(described, indent=2) if args.json else as_text(described))
    return 0


def _is_model(folder: Path) -> bool:
    """Whether a folder is a model's. An artifact that lost its manifest is a damaged artifact."""
    from scalebits_compiler.runtime.manifest import MANIFEST, MODULE_FILE

    config = (folder / "config.json").is_file()
    return config and not any((folder / name).exists() for name in (MANIFEST, MODULE_FILE))


def describe(artifact: Artifact) -> dict[str, Any]:
    """Everything `inspect` tells, for programs. No code of the artifact is loaded."""
    from scalebits_compiler.sessions.trust import built_here

    manifest = artifact.manifest
    found = {
        "target": manifest.target["kind"],
        **manifest.summary,
        "file_bytes": manifest.file_bytes,
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "pipeline": manifest.provenance.pipeline,
        "seed": manifest.provenance.seed,
        "model": manifest.provenance.model,
    }
    found |= _classes(artifact)
    if manifest.kernels is not None:
        dispatch = manifest.kernels.dispatch
        on_gpu = found["target"] == "cuda"
        found["kernels"] = _binaries(dispatch) if on_gpu else _kernels(dispatch)
        if found["kernels"].get("chosen"):
            found["kernels"] |= _execution(artifact)
        found["kernels_built_here"] = built_here(manifest)
    return found


def _kernels(dispatch: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of a dispatch table, and what a session on this machine would use of them."""
    from scalebits_compiler.errors import ArtifactError
    from scalebits_compiler.runtime.cpu.features import cpu_features
    from scalebits_compiler.runtime.cpu.isa import (
        choose_mode,
        choose_variant,
        offered_activations,
    )
    from scalebits_compiler.runtime.dispatch import cpu_dispatch

    variants = ()
    if "variants" in dispatch:  # else the table is that of a plugin's target
        variants = cpu_dispatch(dispatch, "kernels.dispatch").variants
    named = [{"name": v.name, "arch": v.arch, "modes": list(v.modes)} for v in variants]
    try:
        chosen = choose_variant(variants, cpu_features())
    except ArtifactError:
        return {"variants": named, "chosen": None, "activations": {}}
    activations = {name: choose_mode(chosen, name) for name in offered_activations(chosen)}
    return {"variants": named, "chosen": chosen.name, "activations": activations}


def _execution(artifact: Artifact) -> dict[str, Any]:
    """How a session on this machine runs a step, and on how many threads."""
    from scalebits_compiler.errors import ArtifactError
    from scalebits_compiler.runtime.cpu.features import default_threads
    from scalebits_compiler.runtime.session import execution

    if artifact.manifest.plan is None:
        return {"execution": BY_TORCH, "threads": default_threads()}
    try:
        how, threads = execution(artifact)
    except ArtifactError as error:
        return {"execution": f"none: {error.message}", "threads": 0}
    return {"execution": how, "threads": threads}


def _binaries(dispatch: Mapping[str, Any]) -> dict[str, Any]:
    """The architectures that every CUDA kernel was compiled for, and the activations' type."""
    archs = [set(kernel["binaries"]) for kernel in dispatch["kernels"].values()]
    return {"arch": sorted(set.intersection(*archs)), "dtype": dispatch["dtype"]}


def as_text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"model {found['model']}, target {found['target']}",
        f"code bits       {found['code_bits']:.3f}",
        f"effective bits  {found['effective_bits']:.3f}",
        f"file bytes      {found['file_bytes']:,}",
    ]
    if "kernels" in found:
        lines += _kernel_lines(found["kernels"])
        if not found["kernels_built_here"]:
            lines.append(NOT_BUILT_HERE)
    lines += _kept_lines(found)
    width = max(map(len, found["matrices"]))
    lines.append(f"{'matrix':<{width}}  {'shape':>13}  {'block':>9}  group  bits   blocks by width")
    for name, matrix in found["matrices"].items():
        shape, block = ("x".join(map(str, matrix[key])) for key in ("shape", "block"))
        counts = " ".join(f"{b}:{n}" for b, n in matrix["histogram"].items())
        lines.append(
            f"{name:<{width}}  {shape:>13}  {block:>9}  {matrix['group']:>5}"
            f"  {matrix['code_bits']:.3f}  {counts}"
        )
    return "\n".join([*lines, *_class_lines(found)])


def _classes(artifact: Artifact) -> dict[str, Any]:
    """The permutation classes of the artifact's module; none where a plugin's op is in it."""
    from scalebits_compiler.analysis.order_classes import describe
    from scalebits_compiler.errors import ParseError
    from scalebits_compiler.ir.parser import read_module
    from scalebits_compiler.ir.verifier import verify
    from scalebits_compiler.runtime.manifest import MODULE_FILE

    try:
        module, source = read_module(artifact.path / MODULE_FILE)
    except ParseError as error:
        return {"classes_unknown": error.message}
    verify(module, source)
    return describe(module)


def analysis_lines(found: dict[str, Any]) -> Iterator[str]:
    """What `analyse` found, for people."""
    yield f"model {found['model']}, by its config alone"
    yield f"quantized       {len(found['matrices'])} matrices"
    yield from _kept_lines({**found, "not_recognised": found["aten"]})
    yield from _class_lines(found)


def _kept_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What is not quantized or not ours, and why; nothing is left out in silence."""
    if found.get("not_traced"):
        yield f"not traced      {found['not_traced']}: its code runs it, channels keep their order"
    if found.get("not_recognised"):
        yield f"not recognised  {calls(found['not_recognised'])}: left to torch"
    for symbol, why in found.get("dense", {}).items():
        yield f"dense           {symbol}: {why}"


def _class_lines(found: dict[str, Any]) -> Iterator[str]:
    """Each permutation class with what it binds, and why other axes keep their order."""
    if "classes_unknown" in found:
        yield f"orders          unknown: {found['classes_unknown']}"
        return
    yield f"orders          {len(found['classes'])} classes of channels that move together"
    for entry in found["classes"]:
        stored = f"stored as @{entry['order']}" if entry["order"] else "in natural order"
        stays = f", the first {entry['kept']} stay" if entry["kept"] else ""
        yield f"  {entry['size']:>6} {stored}{stays}: {_places(entry['members'])}"
    for entry in found["frozen"]:
        yield f"  fixed, {entry['why']}: {_places(entry['members'])}"
    for entry in found["gathers"]:
        yield (
            f"  gathered at run time: the input of {entry['matrix']}, into {entry['order']};"
            f" {entry['index_bits']} bits of index"
        )
    for why in found["permutes_left"]:
        yield f"  permuted at run time, {why}"


def calls(found: Mapping[str, int]) -> str:
    """`3 x aten.softmax.int, ...`: the most frequent first, of many kinds a few."""
    ranked = sorted(found, key=lambda name: (-found[name], name))
    named = ", ".join(f"{found[name]} x {name}" for name in ranked[:MOST_NAMED])
    more = f" and {len(ranked) - MOST_NAMED} more kinds" if ranked[MOST_NAMED:] else ""
    return named + more


def _places(members: Sequence[Mapping[str, Any]]) -> str:
    """`symbol rows (inside 4)`, the first few."""
    named = []
    for member in members[:MOST_NAMED]:
        axis = (
            ("rows", "columns")[member["axis"]] if member["axis"] < 2 else f"axis {member['axis']}"
        )
        inside = f" inside {member['outer']}" if member["outer"] > 1 else ""
        named.append(f"{member['symbol']} {axis}{inside}")
    more = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
    return ", ".join(named) + more


def _kernel_lines(kernels: Mapping[str, Any]) -> Iterator[str]:
    if "arch" in kernels:
        yield f"kernels         {', '.join(kernels['arch'])}; {kernels['dtype']} activations"
        return
    for variant in kernels["variants"]:
        chosen = ": runs on this machine" if variant["name"] == kernels["chosen"] else ""
        modes = ", ".join(variant["modes"])
        yield f"kernels         {variant['name']} ({variant['arch']}; {modes}){chosen}"
    for name, mode in kernels["activations"].items():
        yield f"activations     {name}: {mode} arithmetic"
    if "execution" in kernels:
        yield f"execution       {kernels['execution']}, up to {kernels['threads']} thread(s)"
    if kernels["chosen"] is None:
        yield "kernels         none of them runs on this machine"
