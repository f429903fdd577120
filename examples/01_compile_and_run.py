"""Compile a model and generate text with it, from Python.

python examples/01_compile_and_run.py [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import scalebits_compiler as sb
from scalebits_compiler.driver.compile import CompileOptions, TextOptions

ROOT = Path(__file__).resolve().parents[1]


def main(out: Path) -> None:
    """Compile the bundled model to the folder `out` and continue two prompts."""
    # Few and short windows, so that this takes seconds. Leave `text` out for a good result.
    text = TextOptions(
        file=ROOT / "data" / "wikitext2" / "calibration.txt",
        seq_len=64,
        calibration=8,
        acceptance=4,
    )
    options = CompileOptions(target="cpu", avg_bits=3.0, text=text, force=True)
    report = sb.compile(ROOT / "models" / "wikitext2-llama-1m", out, options)
    summary = report.manifest.summary
    print(f"{summary['effective_bits']:.3f} effective bits per weight, at most 3 were allowed")

    # The artifact describes itself: nothing about bits or blocks is repeated here.
    session = sb.load(out)
    prompts = ["The history of the city", "The song was"]
    # Greedy by default. Prompts of unequal length form one batch.
    for prompt, made in zip(prompts, session.generate(prompts, 24), strict=True):
        print(f"{prompt}{made.text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "example")
