"""The same two-layer Llama as our IR, as TVM's Relax and as torch-mlir print it, and their sizes.

    python benchmarks/listings.py --out out/listings

Needs apache-tvm for Relax and torch-mlir for MLIR; what is not installed is left out and said.
docs/ir-listings.md shows excerpts of what this writes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scalebits_compiler.driver.compile import evaluator
from scalebits_compiler.frontend.hf import SourceModel, trace
from scalebits_compiler.frontend.lower_fx import lower
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.passes.base import PassContext
from scalebits_compiler.passes.canonicalize.canonicalize import Canonicalize
from scalebits_compiler.tasks import CAUSAL


@dataclass(frozen=True)
class Listing:
    """A text form: what prints it, the package it needs (None: ours), the file it goes to."""

    name: str
    package: str | None
    file: str
    text: Callable[[LlamaForCausalLM, torch.export.ExportedProgram], str]


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, hidden 32, 4 query and 2 key-value heads; random weights."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    # torch-mlir finds persistent buffers only.
    for module in model.modules():
        module._non_persistent_buffers_set.clear()
    return model


def ours(model: LlamaForCausalLM, exported: torch.export.ExportedProgram) -> str:
    """The module after `canonicalize`."""
    source = SourceModel(Path(), "llama", model.config.to_dict(), model, CAUSAL, {}, {}, ())
    module = lower(exported, source)
    return print_module(Canonicalize().run(module, PassContext(evaluate=evaluator)))


def relax(model: LlamaForCausalLM, exported: torch.export.ExportedProgram) -> str:
    """TVMScript of the Relax module that TVM's importer makes."""
    importer: Any = import_module("tvm.relax.frontend.torch")
    made = importer.from_exported_program(exported, keep_params_as_input=True)
    return made.script()


def mlir(dialect: str) -> Callable[[LlamaForCausalLM, torch.export.ExportedProgram], str]:
    """torch-mlir's text in a dialect, weights elided."""

    def text(model: LlamaForCausalLM, exported: torch.export.ExportedProgram) -> str:
        fx: Any = import_module("torch_mlir.fx")
        made = fx.export_and_import(exported, output_type=dialect)
        # The blobs of the weights follow the module; they are no part of what is compared.
        return made.operation.get_asm(large_elements_limit=4).partition("{-#")[0]

    return text


LISTINGS = (
    Listing("scalebits", None, "llama.sbir", ours),
    Listing("Relax (TVMScript)", "apache-tvm", "llama.relax.py", relax),
    Listing("torch-mlir, torch dialect", "torch-mlir", "llama.torch.mlir", mlir("torch")),
    Listing(
        "torch-mlir, linalg on tensors",
        "torch-mlir",
        "llama.linalg.mlir",
        mlir("linalg-on-tensors"),
    ),
)


def main() -> None:
    """Write the listings and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/listings"), help="folder to write")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = tiny_llama()
    exported = trace(model)
    print("| listing | version | lines | characters |\n|---|---|---|---|")
    for listing in LISTINGS:
        try:
            told = version(listing.package or "scalebits-compiler")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = listing.text(model, exported)
        except ImportError:
            print(f"| {listing.name} | not installed: pip install {listing.package} | | |")
            continue
        (out / listing.file).write_text(text, encoding="utf-8")
        print(f"| {listing.name} | {told} | {len(text.splitlines())} | {len(text):,} |")


if __name__ == "__main__":
    main()
