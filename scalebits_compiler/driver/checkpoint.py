"""The state of a search in a folder beside the output, so that a killed compile can go on (L3).

Whoever has the lock of the output (artifact/output.py) owns the folder: no other run touches it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from scalebits_compiler import __version__
from scalebits_compiler.errors import UsageError, system_remedy
from scalebits_compiler.files import remove_parts
from scalebits_compiler.ir.save import replacing
from scalebits_compiler.numerics.layout import FORMAT_VERSION
from scalebits_compiler.runtime.schema import convert, parse_json

_FORMAT = "scalebits-search"
_START_OVER = "go on with the options it was made with, or start over with --force"
# In this order: the first difference is the one to name.
_DIFFERENCES = {
    "version": "by another version, {was}, of this program",
    "model": "of another model",
    "text": "with other calibration windows",
    "setting": "for another setting, {was}",
    "module": "from a module that was edited since",
}


def state_folder(out: Path) -> Path:
    """`OUT.search`, beside the output."""
    out = out.resolve()
    return out.with_name(f"{out.name}.search")


class _Saved(Struct, forbid_unknown_fields=True):
    """The file of a search; what `state` holds is the search's own."""

    format: Literal["scalebits-search"]
    identity: dict[str, str]
    state: dict[str, Any]


class SearchFolder:
    """A `passes.base.Checkpoint`: one JSON file per search of the pipeline, replaced atomically."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.resume = folder, resume
        self._saved: set[Path] = set()

    def check(self, force: bool) -> None:
        """UsageError if there is a state that would be lost: neither --resume nor --force.

        With --force it is replaced by the first state of the new search, not before: a compile that
        fails until then has not lost it. UsageError for something else than a folder in its place.
        """
        if not self.folder.is_dir() and (self.folder.exists() or self.folder.is_symlink()):
            raise UsageError(
                f"{self.folder} is not a folder, and the state of the search belongs there",
                help="remove it, or give another output with -o",
            )
        if self._files() and not self.resume and not force:
            raise UsageError(
                f"{self.folder} holds the state of a search that was cut short",
                help="go on with --resume, or start over with --force",
            )

    def load(self, name: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
        """The last state of a search; None if there is none or none is wanted.

        UsageError for a file that is damaged, or of another identity or version.
        """
        path = self._path(name)
        if not self.resume or not path.is_file():
            return None
        help = "start over with --force"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}", help=help) from None
        where = f"{path} is no search state"
        found = parse_json(text, where, error=UsageError, help=help)
        saved = convert(found, _Saved, where, error=UsageError, help=help)
        was, now = saved.identity, self._identified(identity)
        for key, made in _DIFFERENCES.items():
            if was.get(key) != now[key]:
                told = made.format(was=was.get(key, "unknown"))
                raise UsageError(f"the search in {path} was made {told}", help=_START_OVER)
        return saved.state

    def save(self, name: str, identity: Mapping[str, str], state: Mapping[str, Any]) -> None:
        """Replace the state of a search. UsageError where it cannot be written."""
        body = {"format": _FORMAT, "identity": self._identified(identity), "state": state}
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot write {self.folder}: {error.strerror}", help=system_remedy(error)
            ) from error
        with replacing(self._path(name)) as file:
            file.write(json.dumps(body).encode())
        self._saved.add(self._path(name))
        if not self.resume:
            for path in set(self._files()) - self._saved:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the states, and the folder if it holds nothing else."""
        remove_parts(self.folder)
        for path in self._files():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("search-*.json"))

    def _path(self, name: str) -> Path:
        return self.folder / f"search-{name}.json"

    @staticmethod
    def _identified(identity: Mapping[str, str]) -> dict[str, str]:
        # Losses of a search are those of the quantizer: another format has other levels.
        return {**identity, "version": f"{__version__} (format {FORMAT_VERSION})"}
