"""Reads a Hugging Face folder and traces the model. Nothing is unpickled, nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from scalebits_compiler.errors import FrontendError, memory_error
from scalebits_compiler.numerics.safetensors import read_header
from scalebits_compiler.pretrained import (
    call,
    code_in_config,
    empty,
    is_causal,
    model_class,
    parameters_on_meta,
    quiet,
)
from scalebits_compiler.tasks import CAUSAL, MASKED, SEQ2SEQ

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# What a model is run on to see how it works: no padding, which is a small number in most models.
PROBE = 2 + torch.arange(14).reshape(2, 7)
DOWNLOAD_AGAIN = "the folder is damaged or incomplete; download or save the model again"


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A model as found on disk.

    model: float32, eval mode, no gradients. task: what it is for, one of `tasks.TASKS`. dtypes:
    tensor name in the files -> dtype it is stored in (`bf16`), for honest sizes. hashes: weight
    file name -> sha256. tokenizer_files: the text files that belong beside a compiled model (those
    that exist).
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    model: nn.Module
    task: str
    dtypes: Mapping[str, str]
    hashes: Mapping[str, str]
    tokenizer_files: tuple[Path, ...]

    @property
    def dtype(self) -> str:
        """The dtype that most tensors are stored in."""
        return Counter(self.dtypes.values()).most_common(1)[0][0]


def load_model(path: str | Path) -> SourceModel:
    """Load a Hugging Face folder, or a hub id whose files are in the local cache.

    Raises FrontendError, naming folder, file or tensor, for a missing or broken config, weights
    that are absent, pickled, incomplete or not finite, and models that need custom code.
    """
    folder = _folder(path)
    config = _config(folder)
    files = _weight_files(folder)
    model, task = _load(folder)
    _check_finite(folder, model)
    return SourceModel(
        path=folder,
        name=re.sub(r"[^A-Za-z0-9_.\-]+", "-", _display_name(path, folder)).strip("-") or "model",
        config=config,
        model=model,
        task=task,
        dtypes=_stored_dtypes(files),
        hashes={file.name: _sha256(file) for file in files},
        tokenizer_files=tuple(
            folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()
        ),
    )


@dataclass(frozen=True, eq=False)
class EmptyModel:
    """A model of which only the shapes are known: parameters without data, on the meta device.

    task: what its class is for. buffers: path -> the tensors that the config alone determines
    (frequencies, positions).
    """

    name: str
    model: nn.Module
    task: str
    buffers: Mapping[str, torch.Tensor]


def empty_model(path: str | Path) -> EmptyModel:
    """The model that a folder's config.json describes, without weights; takes no memory for them.

    Raises FrontendError for a config that describes no model of text.
    """
    from transformers import AutoConfig

    folder = _folder(path)
    _config(folder)
    try:
        with quiet(), parameters_on_meta():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            _, task = model_class(config)
            model = empty(config)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise FrontendError(f"{folder} describes no model: {error}", help=DOWNLOAD_AGAIN) from error
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return EmptyModel(folder.name, model.to("meta"), task, buffers)


def trace(model: nn.Module, task: str = CAUSAL) -> torch.export.ExportedProgram:
    """The graph of `pretrained.call` for token ids i64[batch, sequence], both axes dynamic.

    Of an encoder-decoder for two texts, whose lengths do not depend on each other. The one place
    that knows how a graph is obtained. FrontendError if torch.export cannot.
    """
    dynamic = torch.export.Dim.DYNAMIC
    lengths = (7, 5) if task == SEQ2SEQ else (7,)
    try:
        with quiet():
            device = next(model.parameters()).device
            exported = torch.export.export(
                _Forward(model, task).eval(),
                tuple(torch.zeros(2, n, dtype=torch.long, device=device) for n in lengths),
                dynamic_shapes=tuple({0: dynamic, 1: dynamic} for _ in lengths),
                strict=False,
            )
            return _functional(exported)
    except Exception as error:  # torch.export raises errors of many kinds
        if memory_error(error) is not None:
            raise
        lines = str(error).partition(" For more information")[0].strip().splitlines()
        reason = lines[0].rstrip(".! ") if lines else repr(error)
        raise FrontendError(
            f"{type(model).__name__} cannot be traced: {reason}",
            help="the model must be one of text that torch.export accepts",
        ) from error


class _Forward(nn.Module):
    """Token ids in, logits or states out; the attribute name `hf` is known to `lower_fx`."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.hf = model
        self.task = task

    def forward(self, ids: torch.Tensor, decoder_ids: torch.Tensor | None = None) -> torch.Tensor:
        return call(self.hf, self.task, ids, decoder_ids)


def _functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without in-place calls, which the IR does not have. Rarely needed, and it costs a retrace."""
    graphs = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return exported.run_decompositions({})
    return exported


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.exists():
        raise FrontendError(
            f"{path} has no config.json",
            help="give the folder of a Hugging Face model: config.json, *.safetensors and"
            " tokenizer.json",
        )
    if isinstance(path, str) and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", path):
        return _cached(path)
    raise FrontendError(
        f"the model folder {path} does not exist", help="give a folder, or a hub id in the cache"
    )


def _cached(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FrontendError(
            f"{hub_id} is neither a folder nor in the local Hugging Face cache",
            help=f"download it first (hf download {hub_id}), or give a model folder",
        ) from error


def _display_name(path: str | Path, folder: Path) -> str:
    # A cached snapshot is a folder named by its commit; the id says more.
    return folder.name if Path(path).exists() else str(path).rsplit("/", 1)[-1]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FrontendError(f"{file} cannot be read: {error}", help=DOWNLOAD_AGAIN) from error
    if not isinstance(config, dict):
        raise FrontendError(f"{file} is no JSON object", help=DOWNLOAD_AGAIN)
    if "quantization_config" in config:
        raise FrontendError(
            f"{folder} is quantized already", help="give the folder of the original model"
        )
    if (field := code_in_config(config)) is not None:
        raise FrontendError(
            f"{folder} needs Python code of its own ({field} in config.json), which is not run",
            help="use a model whose architecture is part of transformers",
        )
    return config


class _WeightIndex(msgspec.Struct):
    """model.safetensors.index.json: which file each tensor is in."""

    weight_map: dict[str, str]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            found = msgspec.json.decode(index.read_bytes(), type=_WeightIndex)
        except (OSError, msgspec.MsgspecError) as error:
            raise FrontendError(f"{index} cannot be read: {error}", help=DOWNLOAD_AGAIN) from error
        names = sorted(set(found.weight_map.values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise FrontendError(
            f"{folder} has pickled weights only, and unpickling runs code",
            help="convert them: load the model with transformers, then save_pretrained(folder)",
        )
    raise FrontendError(f"{folder} lacks the weight file {missing[0]}", help=DOWNLOAD_AGAIN)


def _stored_dtypes(files: list[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        try:
            header = read_header(file)
        except (OSError, ValueError) as error:
            raise FrontendError(f"{file} cannot be read: {error}", help=DOWNLOAD_AGAIN) from error
        found |= {key: info.dtype.lower() for key, info in header.items()}
    return found


def _load(folder: Path) -> tuple[nn.Module, str]:
    """The model and its task: a causal class whose attention sees later tokens is a masked one."""
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        with quiet():
            cls, task = model_class(AutoConfig.from_pretrained(folder, local_files_only=True))
            loaded: Any = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise FrontendError(f"{folder} cannot be loaded: {error}", help=DOWNLOAD_AGAIN) from error
    model, info = loaded
    model.eval().requires_grad_(False)
    names = sorted(info["missing_keys"])
    if names and _reads(model, task, names):
        raise FrontendError(
            f"{folder} has no tensor {names[0]} in its weight files",
            help=DOWNLOAD_AGAIN,
            notes=[f"{len(names)} tensors are missing"],
        )
    with quiet():
        masked = task == CAUSAL and not is_causal(model, PROBE[:1])
    return model, MASKED if masked else task


def _reads(model: nn.Module, task: str, names: list[str]) -> bool:
    """Whether the result depends on some tensors (a pooling layer's are often left out).

    They are zero afterwards.
    """
    found = [tensor for name, tensor in model.state_dict().items() if name in names]
    tensors = [tensor for tensor in found if tensor.is_floating_point()]
    draw, results = torch.Generator().manual_seed(0), []
    for scale in (1.0, 0.0):  # not NaN, which attention does not hand on
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * scale)
        with quiet():
            results.append(call(model, task, PROBE))
    return len(tensors) < len(names) or not torch.equal(*results)


def _check_finite(folder: Path, model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise FrontendError(
                f"{folder}: the weight {name} has {bad} values that are NaN or infinite",
                help="the file is damaged or the model diverged; get a sound copy",
            )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
