"""Compiles one kernel for several architectures; run as a script, in a process of its own.

A process of its own because Triton reads its settings from the environment when it is imported, and
keeps them. Reads a job as JSON from standard input: module (path), kernel, signature (parameter ->
type), aligned (parameters that are multiples of 16), archs (sm_XY), warps, stages, folder. For
every architecture it leaves FOLDER/ARCH.cubin, and prints one JSON object arch -> {"shared": bytes,
"scratch": trailing pointers}.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def compile_job(job: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Compile; see the module's documentation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import cache

    # The version in the keys of Triton's own cache, which is in an empty folder here. A hash over
    # all of Triton's files takes as long as its import.
    cache.triton_key = lambda: ""
    spec = spec_from_file_location("kernels", job["module"])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    signature: dict[str, str] = job["signature"]
    aligned = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in job["aligned"]}
    source = ASTSource(getattr(module, job["kernel"]), signature, {}, aligned)
    found = {}
    for arch in job["archs"]:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        options = {"num_warps": job["warps"], "num_stages": job["stages"]}
        made = triton.compile(source, target=target, options=options)
        (Path(job["folder"]) / f"{arch}.cubin").write_bytes(made.asm["cubin"])
        parameters = len(re.findall(r"\.param \.", made.asm["ptx"]))
        found[arch] = {"shared": made.metadata.shared, "scratch": parameters - len(signature)}
    return found


if __name__ == "__main__":
    print(json.dumps(compile_job(json.load(sys.stdin))))
