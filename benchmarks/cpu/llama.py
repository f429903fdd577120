"""llama.cpp end to end: random models in its file format, run through its C interface.

Needs the package gguf to write a file, and llama_cpp (the bindings; see README.md) for the rest.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ggml import VARIABLE
from random_model import Shape

FILE_TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15}


def bindings() -> Any:
    """The module llama_cpp.llama_cpp without the rest of its package, or None with a message."""
    folder, spec = os.environ.get(VARIABLE), importlib.util.find_spec("llama_cpp")
    missing = [
        what
        for what, there in (
            (f"{VARIABLE} names no folder", folder),
            ("llama_cpp is not importable", spec),
            ("gguf is not installed", importlib.util.find_spec("gguf")),
        )
        if not there
    ]
    if missing or folder is None or spec is None:
        print(f"llama.cpp is left out: {'; '.join(missing)} (see README.md)")
        return None
    os.environ["LLAMA_CPP_LIB_PATH"] = folder
    package = ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["llama_cpp"] = package
    lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    lib.llama_log_set(_QUIET, None)
    lib.llama_backend_init()
    return lib


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _QUIET(*_: object) -> None:
    """llama.cpp tells a lot while it loads."""


def write_gguf(shape: Shape, path: Path) -> None:
    """A Llama of `shape` with random float16 weights and no vocabulary but its size."""
    gguf: Any = importlib.import_module("gguf")

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.limit)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.groups)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)
    for name, rows, cols in _tensors(shape):
        if rows:
            some = np.random.default_rng(0).normal(0, cols**-0.5, (min(rows, 64), cols))
            writer.add_tensor(name, np.resize(some.astype(np.float16), (rows, cols)))
        else:
            writer.add_tensor(name, np.ones(cols, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(shape: Shape) -> list[tuple[str, int, int]]:
    """Names, rows (0 for a vector) and columns."""
    hidden, inner, narrow = shape.hidden, shape.inner, shape.groups * shape.head_dim
    found = [
        ("token_embd.weight", shape.vocab, hidden),
        ("output_norm.weight", 0, hidden),
        ("output.weight", shape.vocab, hidden),
    ]
    for layer in range(shape.layers):
        parts = (
            ("attn_norm", 0, hidden), ("attn_q", hidden, hidden), ("attn_k", narrow, hidden),
            ("attn_v", narrow, hidden), ("attn_output", hidden, hidden), ("ffn_norm", 0, hidden),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        )  # fmt: skip
        found += [(f"blk.{layer}.{name}.weight", rows, cols) for name, rows, cols in parts]
    return found


def quantize(lib: Any, source: Path, out: Path, file_type: int) -> None:
    """Store a float16 file by one of llama.cpp's own mixes."""
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, file_type
    failed = lib.llama_model_quantize(bytes(source), bytes(out), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama.cpp could not quantise {source} to {out}")


class LlamaModel:
    """One file, opened with its weights mapped."""

    def __init__(self, lib: Any, path: Path, threads: int, positions: int) -> None:
        self._lib = lib
        self._model = lib.llama_model_load_from_file(bytes(path), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = positions, positions, positions
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp could not open {path}")

    def prefill(self, ids: np.ndarray) -> None:
        """Forget what was before and take in ids i64[tokens]."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._decode(ids)

    def decode(self, token: int) -> None:
        """Take in one more token and compute the logits after it."""
        self._decode(np.array([token]))

    def _decode(self, ids: np.ndarray) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not decode")
