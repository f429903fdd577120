"""The pristine folders that cases edit: a model of one layer, compiled once in several ways."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from scalebits_compiler.cli.main import main
from tests.fuzz.edits import MANIFEST, with_digest

# A compile with little text; a second one from the same model gives the same bytes.
SHORT = ("--calib-windows", "2", "--accept-windows", "2", "--seq-len", "16", "--quiet")
_TEXT_BYTES = 8_000


@dataclass(frozen=True)
class Base:
    """One pristine folder.

    what: "artifact", "dump" (IR texts with their tensors), "frontier" or "search" (the state of a
    search, beside which --resume looks). model: the model that it was made from.
    """

    name: str
    what: str
    folder: Path
    model: Path

    @property
    def files(self) -> list[str]:
        """All files, by their path inside the folder."""
        return _files(self.folder)

    def read(self, name: str) -> bytes:
        return _read(self.folder / name)


@cache
def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@cache
def _read(path: Path) -> bytes:
    return path.read_bytes()


def text_file(work: Path) -> Path:
    return work / "text.txt"


# Models beside the Llama, for the full run. They have what it has not: experts, ops that torch
# runs, an encoder's result, code that cannot be traced.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"num_local_experts": 4}),
    "unrecognised": ("codegen", {"rotary_dim": 8}),
    "encoder": ("bert", {"architecture": "BertModel"}),
    "not-traced": ("mamba", {}),
}


def build(work: Path, full: bool) -> None:
    """Make all bases in `work`, those that are not there yet."""
    content = (files("scalebits_compiler") / "data" / "wikitext2-calibration.txt").read_bytes()
    text_file(work).write_bytes(content[:_TEXT_BYTES].decode(errors="ignore").encode())
    model = _model(work, "llama", "llama", {})
    with _once(work / "cpu") as out:
        if out is not None:
            _compile(work, model, out, "--dump-ir", work / "dump")
            shutil.rmtree(work / "dump" / "kernels")
    with _once(work / "no-kernels") as out:
        if out is not None:
            _without_kernels(work / "cpu", out)
    with _once(work / "frontier") as out:
        if out is not None:
            _compile(work, model, out, "--search-only", "--avg-bits", "3,4")
    if not full:
        return
    with _once(work / "search") as out:
        if out is not None:
            _search_state(work, model, out)
    with _once(work / "reference") as out:
        if out is not None:
            _run("retarget", work / "cpu", "--target", "reference", "-o", out)
    for name, (kind, changes) in _MODELS.items():
        with _once(work / name) as out:
            if out is not None:
                _compile(work, _model(work, name, kind, changes), out)
    with _once(work / "gather") as out:
        if out is not None:
            _compile(work, model, out, "--gather", "fused")
    with _once(work / "cuda") as out:
        if out is not None:
            _run("retarget", work / "cpu", "--target", 'cuda{arch = "sm_80"}', "-o", out)


def bases(work: Path, full: bool) -> dict[str, Base]:
    """The bases that `build` has made, by name."""
    whats = {"cpu": "artifact", "no-kernels": "artifact", "dump": "dump", "frontier": "frontier"}
    if full:
        whats |= dict.fromkeys((*_MODELS, "gather", "cuda", "reference"), "artifact")
        whats["search"] = "search"
    model = {name: work / "models" / name for name in _MODELS}
    return {
        name: Base(name, what, work / name, model.get(name, work / "models" / "llama"))
        for name, what in whats.items()
    }


def _model(work: Path, name: str, kind: str, changes: dict[str, Any]) -> Path:
    from tests.conftest import _save_model, _save_tokenizer

    folder = work / "models" / name
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _save_model(folder, kind, {"num_hidden_layers": 1, **changes}, 0)
        _save_tokenizer(folder)
    return folder


@contextlib.contextmanager
def _once(folder: Path) -> Iterator[Path | None]:
    """The folder, if it has to be made; else None."""
    yield None if folder.is_dir() else folder


def _compile(work: Path, model: Path, out: Path, *options: object) -> None:
    _run("compile", model, "-o", out, "--calib", text_file(work), *SHORT, *options)


def _without_kernels(artifact: Path, out: Path) -> None:
    """The artifact as one that numpy runs, op by op."""
    shutil.copytree(artifact, out, ignore=lambda *_: ["kernels"])
    body = json.loads((out / MANIFEST).read_text())
    body["kernels"] = None
    del body["files"]["kernels/cpu.so"]
    (out / MANIFEST).write_bytes(with_digest(json.dumps(body, indent=1).encode()))


def _search_state(work: Path, model: Path, out: Path) -> None:
    """What a killed compile leaves: it ends when the state of the search would be removed."""
    from scalebits_compiler.driver.checkpoint import SearchFolder

    remove = SearchFolder.remove
    SearchFolder.remove = lambda _: None  # type: ignore[method-assign]
    try:
        _compile(work, model, out / "out")
    finally:
        SearchFolder.remove = remove  # type: ignore[method-assign]
    shutil.rmtree(out / "out")


def _run(*argv: object) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main([os.fspath(arg) if isinstance(arg, Path) else str(arg) for arg in argv])
    if code:
        raise SystemExit(f"cannot make the files to edit: {list(argv)}\n{printed.getvalue()}")


def suffixes(names: Sequence[str], *ends: str) -> list[str]:
    """The names that end so."""
    return [name for name in names if name.endswith(ends)]
