"""KernelSpecs -> binaries for GPUs that need not be here, kept in a cache by their content."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scalebits_compiler.codegen import kernel_cache as cache
from scalebits_compiler.codegen.children import Children
from scalebits_compiler.codegen.triton import worker
from scalebits_compiler.codegen.triton.emit import emit_module, parameters
from scalebits_compiler.errors import TargetError
from scalebits_compiler.runtime.cuda.spec import KernelSpec

POINTERS = {
    "x": "*{dtype}", "y": "*{dtype}", "arena": "*u8", "offsets": "*i32", "starts": "*i32",
    "groups": "*i32", "partial": "*fp32", "tickets": "*i32", "index": "*u16",
}  # fmt: skip

# What the binaries depend on besides their source and the options in the key. Line numbers would
# bring the path of a temporary file into them; fusing multiply and add is stated, since Triton
# means to change its default.
SETTINGS = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: the file's bytes, its shared memory in bytes, and how many pointers the
    compiler has added to its parameters.
    """

    image: bytes
    shared: int
    scratch: int


def compile_specs(
    specs: Sequence[KernelSpec], archs: Sequence[str], folder: Path
) -> dict[str, dict[str, Binary]]:
    """Key of each spec -> architecture (sm_XY) -> binary. The same specs give the same bytes.

    Kernels are compiled side by side, one for each core; what the cache has is not compiled.
    folder: for temporary files. Raises `TargetError` if Triton is missing or fails.
    """
    cores = len(os.sched_getaffinity(0))
    # Threads of a pool do not inherit the context, in which the cache may be a temporary one.
    context = copy_context()
    # The children end before the pool waits for its threads, which wait for them.
    with ThreadPoolExecutor(cores) as pool, Children() as children:
        # The kernels with the most widths take longest: they come first.
        order = sorted(specs, key=lambda spec: (-len(spec.bits), -spec.tile_m))
        work = partial(_binaries, archs=archs, folder=folder, children=children)
        results = pool.map(lambda spec: context.copy().run(work, spec), order)
        made = dict(zip(order, results, strict=True))
    return {spec.key: made[spec] for spec in specs}


def _binaries(
    spec: KernelSpec, archs: Sequence[str], folder: Path, children: Children
) -> dict[str, Binary]:
    names = {arch: f"{_content(spec, arch)}.kernel" for arch in archs}
    kept = {arch: cache.load(name) for arch, name in names.items()}
    found = {arch: _parse(stored) for arch, stored in kept.items() if stored is not None}
    missing = [arch for arch in archs if arch not in found]
    if missing:
        for arch, binary in _compile(spec, missing, folder, children).items():
            cache.store(names[arch], _print(binary))
            found[arch] = binary
    return {arch: found[arch] for arch in archs}


def job_of(spec: KernelSpec, archs: Sequence[str], folder: Path) -> dict[str, Any]:
    """The job of `worker` for a spec; `folder` holds kernels.py and gets the binaries."""
    names = parameters(spec).split(", ")
    signature = {name: POINTERS.get(name, "i32").format(dtype=spec.dtype) for name in names}
    # Torch aligns what it allocates. x may be a row inside of that, which is aligned too where rows
    # are a multiple of the group, and that of 32.
    aligned = [name for name in names if name in POINTERS and not (spec.ragged and name == "x")]
    if not spec.ragged:
        aligned.append("cols")
    return {
        "module": str(folder / "kernels.py"),
        "kernel": spec.key,
        "signature": signature,
        "aligned": aligned,
        "archs": list(archs),
        "warps": spec.warps,
        "stages": spec.stages,
        "folder": str(folder),
    }


def _content(spec: KernelSpec, arch: str) -> str:
    """The cache key: everything that the bytes depend on."""
    job = job_of(spec, [arch], Path())
    parts = [emit_module([spec]), json.dumps(job, sort_keys=True), version("triton")]
    return cache.content_key(*parts, json.dumps(SETTINGS))


def _compile(
    spec: KernelSpec, archs: Sequence[str], beside: Path, children: Children
) -> dict[str, Binary]:
    with tempfile.TemporaryDirectory(dir=beside) as name:
        folder = Path(name)
        (folder / "kernels.py").write_text(emit_module([spec]))
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {**SETTINGS, "TRITON_CACHE_DIR": str(folder / "cache"), "TMPDIR": name}
        job = json.dumps(job_of(spec, archs, folder))
        done = children.run([sys.executable, worker.__file__], job, environment)
        if done.returncode:
            raise TargetError(
                f"Triton could not compile the kernel {spec.key} for {', '.join(archs)}",
                help="compile for another arch, or with --target cpu or reference",
                notes=done.stderr.strip().splitlines()[-3:],
            )
        told: Mapping[str, Mapping[str, int]] = json.loads(done.stdout.splitlines()[-1])
        return {
            arch: Binary((folder / f"{arch}.cubin").read_bytes(), **told[arch]) for arch in archs
        }


def _print(binary: Binary) -> bytes:
    """A line of JSON, and the bytes."""
    head = json.dumps({"shared": binary.shared, "scratch": binary.scratch})
    return head.encode() + b"\n" + binary.image


def _parse(stored: bytes) -> Binary:
    head, _, image = stored.partition(b"\n")
    return Binary(image, **json.loads(head))
