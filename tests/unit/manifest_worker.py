"""Runs artifacts whose manifest was edited, in a process that may crash: see test_edited_manifests.

Reads lines of JSON, (folder, text of manifest.json), and answers each with a line of JSON: the
error that it was refused with, or the digests of its logits in two runs.
"""

import hashlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np

from scalebits_compiler.errors import ScalebitsError
from scalebits_compiler.sessions.open import load

IDS = np.random.default_rng(5).integers(0, 90, (2, 9))


def logits_of(folder):
    """All logits, and those of a step with a cache."""
    session = load(folder, threads=1, trust_kernels=True)
    first, cache = session.prefill(IDS[:, :6], [0, 2])
    parts = (session.forward(IDS), first, session.decode(IDS[:, 6], cache))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def answer(folder, text):
    (Path(folder) / "manifest.json").write_text(text)
    try:
        return {"logits": [logits_of(folder) for _ in range(2)]}
    except ScalebitsError as error:
        return {"refused": error.message}
    except Exception:
        return {"traceback": traceback.format_exc()}


if __name__ == "__main__":
    np.seterr(all="ignore")
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
