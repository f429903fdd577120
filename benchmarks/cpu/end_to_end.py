"""A 1.1B model end to end beside llama.cpp and transformers: `python benchmarks/cpu/end_to_end.py`.

Random weights in the shape of TinyLlama: ours with widths {2, 3, 4} and 3 bits on average.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from llama import FILE_TYPES, LlamaModel, bindings, quantize, write_gguf
from measure import Cores, pin, ratio, spread
from numpy.typing import NDArray
from random_model import Shape, write_random_artifact

from scalebits_compiler.runtime.artifact import Artifact
from scalebits_compiler.runtime.cpu.features import cpu_features
from scalebits_compiler.runtime.cpu.isa import (
    ACTIVATIONS,
    choose_variant,
    offered_activations,
)
from scalebits_compiler.runtime.dispatch import cpu_dispatch

BASE = "ours exact"
PHASES = ("prefill", "decode")


class Model(Protocol):
    """What is timed."""

    def prefill(self, ids: NDArray[np.int64]) -> None: ...

    def decode(self, token: int) -> None: ...


def main() -> None:
    args = _arguments()
    pin(args.threads)
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    args.folder.mkdir(parents=True, exist_ok=True)
    models = dict(_models(shape, args))
    ids = np.random.default_rng(0).integers(0, shape.vocab, args.prompt_tokens + args.new_tokens)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for model in models.values():  # reads the files
        _seconds(model, ids[: args.prompt_tokens + 1], args.prompt_tokens, clock)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    cores, scaling = Cores(args.threads), []
    for _ in range(args.rounds):
        for name, model in models.items():
            rounds[name].append(_seconds(model, ids, args.prompt_tokens, clock))
        scaling.append(cores.scaling())
    print(report(rounds, args), flush=True)
    if args.threads > 1:
        read, exps = (spread(np.array(values)) for values in zip(*scaling, strict=True))
        print(
            f"\nWhat {args.threads} cores do of what one does, in the same rounds: memory read"
            f" {read}, exponentials in the cache {exps}"
        )
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for models of about 8 GB; kept and used again")
    add("--threads", type=int, default=1, metavar="N", help="and as many pinned cores")
    add("--prompt-tokens", type=int, default=128, metavar="N")
    add("--new-tokens", type=int, default=16, metavar="N")
    add("--rounds", type=int, default=15, metavar="N", help="default 15")
    add("--json", type=Path, metavar="FILE", help="also write all seconds to this file")
    for name, value in asdict(Shape()).items():
        add(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    return parser.parse_args()


def _seconds(
    model: Model, ids: NDArray[np.int64], prompt: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds a token of the prefill, and of decoding."""
    start = clock()
    model.prefill(ids[:prompt])
    middle = clock()
    for token in ids[prompt:].tolist():
        model.decode(token)
    return (middle - start) / prompt, (clock() - middle) / (len(ids) - prompt)


def _models(shape: Shape, args: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    positions = args.prompt_tokens + args.new_tokens
    name = "-".join(map(str, asdict(shape).values()))
    artifact = args.folder / f"ours-{name}"
    if not artifact.exists():
        write_random_artifact(shape, artifact)
    if args.threads > 1:
        yield f"{BASE}, one core", OurModel(artifact, "exact", 1, positions)
    offered = _offered(artifact)
    for activations in offered:
        yield f"ours {activations}", OurModel(artifact, activations, args.threads, positions)
    for activations in (name for name in ACTIVATIONS if name not in offered):
        print(f"ours {activations} is left out: the kernels of this processor do not have it")
    lib = bindings()
    if lib is not None:
        source = args.folder / f"{name}.gguf"
        _once(source, partial(write_gguf, shape))
        for kind, number in FILE_TYPES.items():
            path = args.folder / f"{name}-{kind}.gguf"
            _once(path, partial(quantize, lib, source, file_type=number))
            yield f"llama.cpp {kind}", LlamaModel(lib, path, args.threads, positions)
    yield "transformers bfloat16", TorchModel(shape, args.threads)


def _offered(artifact: Path) -> list[str]:
    """The activations of the artifact's kernels on this processor."""
    kernels = Artifact.open(artifact).manifest.kernels
    assert kernels is not None
    variants = cpu_dispatch(kernels.dispatch, str(artifact)).variants
    return offered_activations(choose_variant(variants, cpu_features()))


def _once(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file unless it is there; under another name until it is complete."""
    if not path.exists():
        part = path.with_suffix(".part")
        write(part)
        part.rename(path)


class OurModel:
    """The artifact in our runtime."""

    def __init__(self, path: Path, activations: str, threads: int, positions: int) -> None:
        from scalebits_compiler import load

        self._session = load(path, activations=activations, threads=threads)
        self._positions = positions

    def prefill(self, ids: NDArray[np.int64]) -> None:
        _, self._cache = self._session.prefill(ids[None], capacity=self._positions)

    def decode(self, token: int) -> None:
        self._session.decode([token], self._cache)


class TorchModel:
    """The same shape in transformers."""

    def __init__(self, shape: Shape, threads: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.bfloat16)
        config = {key: value for key, value in shape.config.items() if key != "model_type"}
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**config))
        self._model = model.to_empty(device="cpu").eval()
        torch.set_default_dtype(torch.float32)
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            tensor.data.fill_(0.01)

    def prefill(self, ids: NDArray[np.int64]) -> None:
        self._past: Any = None
        self._forward(ids)

    def decode(self, token: int) -> None:
        self._forward(np.array([token]))

    def _forward(self, ids: NDArray[np.int64]) -> None:
        import torch

        with torch.no_grad():
            out = self._model(
                input_ids=torch.from_numpy(ids)[None],
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        self._past = out.past_key_values


def report(rounds: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> str:
    """Tokens per second, and how many times faster ours is: medians over the rounds."""
    lines = [
        f"### {args.prompt_tokens} tokens prefill, {args.new_tokens} decoded,"
        f" {args.threads} core(s), {args.rounds} rounds\n",
        "| | prefill, tokens/s | ours exact is | decode, tokens/s | ours exact is |",
        "|---|---|---|---|---|",
    ]
    base = np.array(rounds[BASE])
    for name, values in rounds.items():
        seconds, cells = np.array(values), []
        for phase in range(len(PHASES)):
            faster = ratio(seconds[:, phase], base[:, phase])
            cells += [spread(1 / seconds[:, phase]), f"{faster:.2f}x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
