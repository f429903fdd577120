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


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `inspect`."""
    parser = subparsers.add_parser("inspect", help="sizes and widths of an artifact")
    parser.add_argument("artifact", type=Path, metavar="OUT", help="a folder that compile wrote")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the summary of an artifact, each matrix on a line."""
    from scalebits_compiler.runtime.artifact import Artifact

    described = describe(Artifact.open(args.artifact))
    print(json.dumps(described, indent=2) if args.json else as_text(described))
    return 0


def describe(artifact: Artifact) -> dict[str, Any]:
    """Everything `inspect` tells, for programs."""
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
    if manifest.kernels is not None:
        dispatch = manifest.kernels.dispatch
        on_gpu = found["target"] == "cuda"
        found["kernels"] = _binaries(dispatch) if on_gpu else _kernels(dispatch.get("variants", ()))
    return found


def _kernels(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The variants of a dispatch table, and what a session on this machine would use of them."""
    from scalebits_compiler.errors import ArtifactError
    from scalebits_compiler.runtime.cpu_features import cpu_features
    from scalebits_compiler.runtime.variants import ACTIVATIONS, EXACT, choose_mode, choose_variant

    named = [{"name": v["name"], "arch": v["arch"], "modes": list(v["modes"])} for v in variants]
    try:
        chosen = choose_variant(variants, cpu_features())
    except ArtifactError:
        return {"variants": named, "chosen": None, "activations": {}}
    offered = [name for name in ACTIVATIONS if name == EXACT or name in chosen["modes"]]
    activations = {name: choose_mode(chosen, name) for name in offered}
    return {"variants": named, "chosen": chosen["name"], "activations": activations}


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
    width = max(map(len, found["matrices"]))
    lines.append(f"{'matrix':<{width}}  {'shape':>13}  {'block':>9}  group  bits   blocks by width")
    for name, matrix in found["matrices"].items():
        shape, block = ("x".join(map(str, matrix[key])) for key in ("shape", "block"))
        counts = " ".join(f"{b}:{n}" for b, n in matrix["histogram"].items())
        lines.append(
            f"{name:<{width}}  {shape:>13}  {block:>9}  {matrix['group']:>5}"
            f"  {matrix['code_bits']:.3f}  {counts}"
        )
    return "\n".join(lines)


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
    if kernels["chosen"] is None:
        yield "kernels         none of them runs on this machine"
