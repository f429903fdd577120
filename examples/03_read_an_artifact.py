"""Open an artifact, count its bytes, and unpack a matrix: what docs/artifact-format.md describes.

    python examples/03_read_an_artifact.py ARTIFACT

Only numpy is needed: no torch, no transformers, no TVM.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from scalebits_compiler.runtime.artifact import Artifact


def main(folder: Path) -> None:
    """Print what is in the artifact, and check its own statement of effective bits."""
    artifact = Artifact.open(folder)  # checks sizes and checksums
    manifest = artifact.manifest
    for name, record in manifest.files.items():
        print(f"{record.bytes:>12,}  {name}")

    stored = weights = 0
    for symbol, record in manifest.weights.items():
        if record.kind != "packed":
            continue
        told = manifest.summary["matrices"][symbol]
        if "fixed_bits" in told:
            continue  # head or embedding: its width was given, not searched
        packed = artifact.matrix(symbol)
        # Codes, scales and padding, and the table of widths: everything counts.
        stored += packed.arena.nbytes + packed.bits.nbytes + told.get("index_bytes", 0)
        weights += record.shape[0] * record.shape[1]
    effective = 8 * stored / weights
    stated = manifest.summary["effective_bits"]
    print(f"{effective:.4f} effective bits by counting, {stated:.4f} by the manifest")

    # One matrix in full: a code, its width and a scale give back a weight.
    symbol = next(s for s, record in manifest.weights.items() if record.kind == "packed")
    layout, arena, bits = artifact.matrix(symbol)
    codes, scales = layout.unpack(arena, bits)
    middle = (2.0 ** bits[0, 0] - 1) / 2
    first = scales[0, 0] * (codes[0, 0] - middle)
    whole = layout.dequantize(arena, bits)
    print(f"{symbol} {whole.shape}: widths {np.unique(bits).tolist()} over {bits.size} blocks")
    print(f"first weight: {first:.6f} by hand, {whole[0, 0]:.6f} by the library")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
