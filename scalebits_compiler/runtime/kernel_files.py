"""The code of an artifact as bytes, with the table that describes it (layer L1).

Nothing here decides whether the code may run: `sessions/trust.py` does, and gives what
sessions are made with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN, Manifest

KERNEL_FOLDER = "kernels/"
"""Where the code of an artifact lies: what is in it belongs to its target."""

Tell = Callable[[str], None]


def say(line: str) -> None:
    """Print a line where it does not mix with results."""
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class KernelFiles:
    """Kernels and the dispatch table that belongs to them.

    library: the name of the shared library (cpu) or of the Triton source (cuda). read: the bytes
    of the library, or of another file that the table names; these very bytes have been checked, so
    they are what must be loaded, not the file. It raises ArtifactError for a file that is not one
    of the kernels' or was changed, OSError for one that cannot be read.
    """

    library: str
    dispatch: Mapping[str, Any]
    read: Callable[[str], bytes]


def kernel_digests(manifest: Manifest) -> dict[str, str]:
    """Name -> sha256 of every file of an artifact that holds code."""
    library = "" if manifest.kernels is None else manifest.kernels.library
    return {
        name: record.sha256
        for name, record in manifest.files.items()
        if name == library or name.startswith(KERNEL_FOLDER)
    }


def kernels_digest(manifest: Manifest) -> str:
    """The sha256 (hex) of an artifact's kernels: of all their files and of their dispatch table.

    Both, since the right code with a table that was edited reads and writes the wrong memory.
    """
    assert manifest.kernels is not None
    described = {
        "library": manifest.kernels.library,
        "dispatch": manifest.kernels.dispatch,
        "files": kernel_digests(manifest),
    }
    # Through JSON once: a manifest that is written and one that is read then agree on key types.
    text = json.dumps(json.loads(json.dumps(described)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def shipped_kernels(artifact: Artifact) -> KernelFiles | None:
    """The kernels that lie in an artifact, None if it has none. They may be anyone's code."""
    kernels, digests = artifact.manifest.kernels, kernel_digests(artifact.manifest)
    if kernels is None:
        return None

    def read(name: str) -> bytes:
        path = artifact.path / name
        if name not in digests:
            raise ArtifactError(f"{path} is no kernel file of the manifest", help=COMPILE_AGAIN)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digests[name]:
            raise ArtifactError(
                f"{path} was changed after the build (checksum)", help=COMPILE_AGAIN
            )
        return data

    return KernelFiles(kernels.library, kernels.dispatch, read)
