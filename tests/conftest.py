"""Fixtures that all tests share: the shared models, and small random models made on the spot."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalebits_compiler.ir.module import Module
from scalebits_compiler.ir.op import Op
from scalebits_compiler.ir.printer import print_module
from scalebits_compiler.passes.observers import RoundTrip

# Before torch is loaded; see cli/main.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one worker for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is: its own functions, as tl.sum, are fixed then. Binaries are compiled in processes
# of their own, without it.
os.environ["TRITON_INTERPRET"] = "1"

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}


_SURVIVED: set[bytes] = set()
"""Digests of the texts, with the ops they were read with, that printed back as they were."""


def _once(module: Module, ops: Mapping[str, type[Op]], check: Callable[[], object]) -> None:
    """Check that a module prints as it is read, unless an equal text has been checked before."""
    known = sorted((name, op.__module__) for name, op in ops.items())
    digest = hashlib.sha256(f"{known} {print_module(module)}".encode()).digest()
    if digest not in _SURVIVED:
        check()
        _SURVIVED.add(digest)


@pytest.fixture(autouse=True)
def every_module_survives_printing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever module a test still holds at its end must read back as it prints."""
    made: list[weakref.ref[Module]] = []
    build = Module.__init__

    def noted(self: Module, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Module, "__init__", noted)
    yield
    monkeypatch.undo()
    for module in {id(m): m for ref in made if (m := ref()) is not None}.values():
        RoundTrip({op.name: type(op) for op in module.function.ops}).start(module)


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all workers of a run, and for the processes that tests start; empty at its start."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALEBITS_CACHE", str(folder / "kernels"))
        yield


@pytest.fixture(scope="session", autouse=True)
def texts_are_checked_once() -> Iterator[None]:
    """Compiles parse what every pass returns; those of one model return much of the same."""

    check = RoundTrip.start

    def start(self: RoundTrip, module: Module) -> None:
        _once(module, self.ops, lambda: check(self, module))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundTrip, "start", start)
        yield


@pytest.fixture(scope="session", autouse=True)
def models_are_traced_once() -> Iterator[None]:
    """A compile takes the trace of an earlier one whose model has the same files.

    torch.export takes more than half of the time of a small compile. Tests of tracing call
    `frontend.hf.trace` themselves; processes that tests start trace anew.
    """
    from scalebits_compiler.driver import inputs

    traced: dict[tuple[Any, ...], Module] = {}
    trace = inputs.traced_module

    def once(source: Any) -> Module:
        import torch

        if not hasattr(source, "hashes"):  # a model without weights
            return trace(source)
        files = json.dumps([source.name, source.task, source.config, source.hashes])
        # Tests put a function that fails in place of `export`.
        key = (files, next(source.model.parameters()).device, torch.export.export)
        if key not in traced:
            traced[key] = trace(source)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "traced_module", once)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the trained models and texts beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("the shared models are not beside this repository")
    return folder


def _save_tokenizer(folder: Path) -> None:
    """One token per byte: no merges, so nothing has to be trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _save_model(folder: Path, kind: str, changes: dict[str, Any], seed: int) -> None:
    import torch
    from transformers import AutoConfig

    from scalebits_compiler.pretrained import model_class

    architecture = changes.pop("architecture", None)
    config = AutoConfig.for_model(kind, **{**_SIZES, **_KINDS.get(kind, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config.architectures = [architecture] if architecture else None
        model = model_class(config)[0]._from_config(config, dtype=torch.float32).eval()
        # The initial gains are 1 and biases 0, which would hide a gain or bias that is left out.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_llama(kind="llama", seed=0, **config)` -> folder of a small random model.

    Kinds: any model type of transformers; llama, mistral, qwen2 and qwen3 have fitting defaults.
    `architecture` is the name of its class, if not the first that `model_class` has for the type.
    The folder has a byte-level tokenizer (256 tokens). Equal calls share one folder: do not write.
    """
    made: dict[str, Path] = {}

    def make(kind: str = "llama", seed: int = 0, **config: Any) -> Path:
        key = json.dumps([kind, seed, config], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / f"tiny-{kind}"
            folder.mkdir()
            _save_model(folder, kind, dict(config), seed)
            _save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """`golden(path, text)`: the text must be that of the file, or becomes it on --update-golden."""

    def check(path: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"{path} is missing: run pytest --update-golden"
        assert text == path.read_text(), f"{path} differs: see `pytest --update-golden`, git diff"

    return check


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels that are imported during the test run on the CPU, in numpy.

    The interpreter multiplies the raw bits of bfloat16 operands; here they are widened first.
    """
    pytest.importorskip("triton", reason="the cuda target's kernels need Triton")
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    dot = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(operand, tl.float32) for operand in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)
    # Whether integers overflow is computed at every sum, and asserted in Triton's debug mode alone.
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", options)
    # Every call of a device function patches `tl` anew, as the launch of the kernel has done.
    patch_lang, patched = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        names = id(function.__globals__)
        if names in patched:
            return None
        patched.add(names)
        scope = patch_lang(function)
        restore = scope.restore

        def restored() -> None:
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", once)
