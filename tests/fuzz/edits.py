"""A case and its edits, as plain data: what can be printed, kept in the corpus, and applied."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

MANIFEST = "manifest.json"
Edit: TypeAlias = dict[str, Any]

_RAW, _TWICE = "\ufdd0raw", "\ufdd0twice"
ITEM_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class NotApplicable(Exception):
    """The edit does not fit the file, for example because an earlier edit changed it."""


@dataclass(frozen=True)
class Case:
    """One case: `edits` of a copy of the folder `base`, read by `entry`.

    subject: the file or matrix that the entry is given, where it takes one. fresh: whether the
    digests in the manifest are made those of the edited files.

    An edit names its `file`, what to `do`, and a `kind` for the table of results. The rest of its
    keys depends on `do`; see the functions below.
    """

    base: str
    entry: str
    subject: str
    fresh: bool
    edits: tuple[Edit, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        body = json.loads(text)
        names = ("base", "entry", "subject", "fresh")
        return Case(*(body[name] for name in names), tuple(body["edits"]))


def apply(case: Case, source: Path, target: Path) -> list[Edit]:
    """Make the edited copy `target` of the folder `source`; gives the edits that did not fit.

    Files that are not edited are hard links.
    """
    for folder, _, names in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir()
        for name in names:
            os.link(Path(folder) / name, here / name)
    skipped: list[Edit] = []
    manifest = target / MANIFEST
    for edit in case.edits:
        if edit["file"] != MANIFEST:
            _apply_one(edit, target, skipped)
    if case.fresh and manifest.is_file() and len(skipped) < len(case.edits):
        _write(manifest, _with_file_digests(manifest.read_bytes(), target))
    for edit in case.edits:
        if edit["file"] == MANIFEST:
            _apply_one(edit, target, skipped)
    if case.fresh and manifest.is_file():
        _write(manifest, with_digest(manifest.read_bytes()))
    return skipped


def _apply_one(edit: Edit, folder: Path, skipped: list[Edit]) -> None:
    path = folder / edit["file"]
    try:
        if edit["do"] == "become":
            _become(path, edit["what"], folder)
        elif not path.is_file():
            raise NotApplicable
        else:
            _write(path, _BYTES[edit["do"]](path.read_bytes(), edit))
    except (NotApplicable, LookupError, ValueError, TypeError, RecursionError):
        skipped.append(edit)


def _write(path: Path, content: bytes) -> None:
    """Replace a file; it may be a hard link to the pristine one."""
    path.unlink()
    path.write_bytes(content)


# Digests


def with_digest(manifest: bytes) -> bytes:
    """The manifest with its own digest made right, as far as it can be read at all."""
    try:
        body = json.loads(manifest)
        old = body.pop("digest")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        new = hashlib.sha256(text.encode()).hexdigest()
        return manifest.replace(old.encode(), new.encode())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return manifest


def _with_file_digests(manifest: bytes, folder: Path) -> bytes:
    body = json.loads(manifest)
    for name in list(body["files"]):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            body["files"][name] = {"sha256": digest, "bytes": len(content)}
    return json.dumps(body, sort_keys=True).encode()


def is_damaged(folder: Path, source: Path) -> bool:
    """Whether a file that the pristine manifest lists differs, or the manifest says otherwise."""
    was = json.loads((source / MANIFEST).read_bytes())
    try:
        now = json.loads((folder / MANIFEST).read_bytes())
        if json.dumps(now, sort_keys=True) != json.dumps(was, sort_keys=True):
            return True
        return any(
            (folder / name).read_bytes() != (source / name).read_bytes() for name in was["files"]
        )
    except (OSError, ValueError, RecursionError):
        return True


# What an edit can do with the bytes of a file


def _splice(content: bytes, edit: Edit) -> bytes:
    """at, drop, hex: replace `drop` bytes at `at`."""
    at, drop = edit["at"], edit["drop"]
    if at > len(content):
        raise NotApplicable
    return content[:at] + bytes.fromhex(edit["hex"]) + content[at + drop :]


def _replace(content: bytes, edit: Edit) -> bytes:
    """old, new, nth: replace the n-th occurrence of a text."""
    old, at = edit["old"].encode(), -1
    for _ in range(edit["nth"] + 1):
        at = content.find(old, at + 1)
        if at < 0:
            raise NotApplicable
    new = edit["new"].encode("utf-8", "surrogatepass")
    return content[:at] + new + content[at + len(old) :]


def _repeat(content: bytes, edit: Edit) -> bytes:
    """at, text, times: insert a text many times, too long for a corpus otherwise."""
    new = edit["text"].encode() * edit["times"]
    return content[: edit["at"]] + new + content[edit["at"] :]


def _json(content: bytes, edit: Edit) -> bytes:
    """path, and one of: `to` (a new value), `raw` and `close` (its text, each `times` over),
    `insert` (into a list), `twice` (the key again, with this value first), `drop`, `name`."""
    return _edited_json(json.loads(content), edit).encode("utf-8", "surrogatepass")


def _edited_json(body: Any, edit: Edit) -> str:
    path, root = edit["path"], [body]
    parent: Any = root
    for key in (0, *path[:-1]) if path else ():
        parent = parent[key]
    last = path[-1] if path else 0
    if "drop" in edit:
        del parent[last]
    elif "name" in edit:
        renamed = {(edit["name"] if key == last else key): value for key, value in parent.items()}
        parent.clear()
        parent.update(renamed)
    elif "twice" in edit:
        again = {last + _TWICE: edit["twice"], **parent}
        parent.clear()
        parent.update(again)
    elif "insert" in edit:
        parent.insert(last, edit["insert"])
    elif isinstance(parent, list) and not 0 <= last < len(parent):
        raise NotApplicable
    else:
        parent[last] = _RAW if "raw" in edit else edit["to"]
    text = json.dumps(root[0]).replace(json.dumps(_TWICE)[1:-1], "")
    times = edit.get("times", 1)
    raw = edit.get("raw", "") * times + edit.get("close", "") * times
    return text.replace(json.dumps(_RAW), raw)


def split_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join_tensors(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _header(content: bytes, edit: Edit) -> bytes:
    """As `json`, in the header of a safetensors file."""
    header, body = split_tensors(content)
    return _join_tensors(_edited_json(header, edit), body)


def _header_length(content: bytes, edit: Edit) -> bytes:
    """to: what the first eight bytes of a safetensors file say."""
    return struct.pack("<Q", edit["to"] % 2**64) + content[8:]


def _tensor(content: bytes, edit: Edit) -> bytes:
    """name, dtype, shape, and `hex` or null: the tensor anew, its bytes these or its old ones over
    and over; the file stays in order."""
    header, body = split_tensors(content)
    entry = header[edit["name"]]
    size = ITEM_SIZES[edit["dtype"]]
    for length in edit["shape"]:
        size *= length
    start, end = entry["data_offsets"]
    pattern = body[start:end] if edit["hex"] is None else bytes.fromhex(edit["hex"])
    data = (pattern * (size // max(1, len(pattern)) + 1))[:size]
    named = {name: value for name, value in header.items() if name != "__metadata__"}
    parts: list[bytes] = []
    at = 0
    for name, value in sorted(named.items(), key=lambda item: item[1]["data_offsets"]):
        part = data if name == edit["name"] else body[slice(*value["data_offsets"])]
        parts.append(part)
        value["data_offsets"] = [at, at := at + len(part)]
    entry |= {"dtype": edit["dtype"], "shape": edit["shape"]}
    return _join_tensors(json.dumps(header), b"".join(parts))


def _values(content: bytes, edit: Edit) -> bytes:
    """name, at, hex: bytes of a tensor from its byte `at` on."""
    header, body = split_tensors(content)
    start, end = header[edit["name"]]["data_offsets"]
    new = bytes.fromhex(edit["hex"])
    if start + edit["at"] + len(new) > end:
        raise NotApplicable
    at = len(content) - len(body) + start + edit["at"]
    return content[:at] + new + content[at + len(new) :]


_BYTES: dict[str, Callable[[bytes, Edit], bytes]] = {
    "splice": _splice,
    "replace": _replace,
    "repeat": _repeat,
    "json": _json,
    "header": _header,
    "header length": _header_length,
    "tensor": _tensor,
    "values": _values,
}


def _become(path: Path, what: str, folder: Path) -> None:
    """`what`: one of BECOMES, or `copy of NAME`."""
    old = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        raise NotApplicable
    if what.startswith("copy of "):
        old = (folder / what.removeprefix("copy of ")).read_bytes()
    path.unlink(missing_ok=True)
    match what:
        case "missing":
            pass
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to("nowhere")
        case "link to itself":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case "sparse":
            path.touch()
            os.truncate(path, 4 << 20)
        case _:
            path.write_bytes(old)


BECOMES = (
    "missing", "empty", "folder", "fifo", "dangling link", "link to itself", "device", "sparse",
)  # fmt: skip
