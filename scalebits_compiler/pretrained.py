"""Models of the transformers library: which class a config names, how it is built and called (L0).

A class is looked up by its name among those of the library; no other code is ever run.
"""

from __future__ import annotations

import json
import logging as python_logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

from scalebits_compiler.errors import FrontendError
from scalebits_compiler.tasks import CAUSAL, ENCODER, MASKED, SEQ2SEQ

if TYPE_CHECKING:
    import torch
    from torch import nn

# The library runs Python that an `auto_map` names, and kernels of a hub repository ("owner/name")
# that an implementation names.
_AUTO_MAP = "auto_map"
_IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
# Of a config and the configs in it, what could make the library fetch or run something, or is not
# the model's. So is every key that begins with `_`.
_NOT_THE_MODEL = (
    _AUTO_MAP, "quantization_config", "attn_implementation", "experts_implementation",
    "transformers_version", "name_or_path", "trust_remote_code", "code_revision", "use_kernels",
    "kernel_config", "backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone",
)  # fmt: skip


def code_in_config(config: Any) -> str | None:
    """The field of a config (JSON) by which the library would run code from elsewhere, or None.

    Fields of configs inside it count as well.
    """
    if not isinstance(config, dict):
        return None
    for name, value in config.items():
        if name == _AUTO_MAP or (name in _IMPLEMENTATIONS and "/" in json.dumps(value)):
            return name
        if (found := code_in_config(value)) is not None:
            return found
    return None


def _of_the_model(value: Any) -> Any:
    """A config, or a value in one, without what is not the model's."""
    if isinstance(value, list):
        return [_of_the_model(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = (key for key in value if key not in _NOT_THE_MODEL and not key.startswith("_"))
    return {key: _of_the_model(value[key]) for key in kept}


def model_class(config: Any) -> tuple[Any, str]:
    """(class, task) of a transformers config: by its `architectures`, else by its model type.

    Raises FrontendError for a class that is neither a language model nor an encoder of text.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    auto: Any = modeling_auto
    tables: list[tuple[str, Mapping[str, Any]]] = [
        (CAUSAL, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (SEQ2SEQ, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (MASKED, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        (ENCODER, auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
        (ENCODER, auto.MODEL_MAPPING_NAMES),
    ]
    given = getattr(config, "architectures", None) or []
    name = str(given[0]) if given else None
    for task, table in tables:
        if name is None and config.model_type in table:
            name = _first(table[config.model_type])
        if name is not None and name in map(_first, table.values()):
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                if found.main_input_name != "input_ids":
                    break  # one of images or sound
                return found, task
    raise FrontendError(
        f"{name or config.model_type} is neither a language model nor an encoder of text",
        help="give a model with logits of tokens (causal, masked, encoder-decoder), or one that"
        " gives states (such as BertModel)",
    )


def _first(names: Any) -> str:
    return names if isinstance(names, str) else names[0]


def call(
    model: nn.Module, task: str, ids: torch.Tensor, decoder_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """f32[batch, sequence, n] of token ids i64[batch, sequence]: logits, or last hidden states.

    An encoder-decoder reads the ids and continues `decoder_ids`; None: `shifted` ids.
    """
    module: Any = model
    given: dict[str, Any] = {"input_ids": ids}
    if task in (CAUSAL, SEQ2SEQ) or "use_cache" in signature(module.forward).parameters:
        given["use_cache"] = False
    if task == SEQ2SEQ:
        if decoder_ids is None:
            decoder_ids = shifted(ids, start_token(model))
        given["decoder_input_ids"] = decoder_ids
    found = module(**given)
    return found.last_hidden_state if task == ENCODER else found.logits


def shifted(ids: torch.Tensor, start: int) -> torch.Tensor:
    """Token ids behind a start token, without the last: position i then predicts token i."""
    import torch

    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), 1)


def start_token(model: nn.Module) -> int:
    """The token that the decoder of an encoder-decoder begins with; FrontendError if none."""
    module: Any = model
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in (module.generation_config, module.config):
            found = getattr(config, name, None)
            if found is not None:
                return int(found)
    raise FrontendError(
        f"{type(model).__name__}: no token is told that its decoder starts with",
        help="give decoder_start_token_id in its config.json",
    )


def config_text(model: nn.Module) -> str:
    """The config of a model as JSON, enough for `skeleton`."""
    module: Any = model
    plain = json.loads(module.config.to_json_string(use_diff=True))
    kept = _of_the_model(plain)
    kept |= {"model_type": module.config.model_type, "architectures": [type(model).__name__]}
    return json.dumps(kept, sort_keys=True)


def skeleton(text: str) -> nn.Module:
    """The model that a config describes, in eval mode, its parameters on the meta device.

    Its buffers are real. FrontendError for a text that describes no model of the library.
    """
    from transformers import AutoConfig

    try:
        plain = _of_the_model(json.loads(text))
        with quiet(), parameters_on_meta():
            config = AutoConfig.for_model(**plain)
            return empty(config)
    except FrontendError:
        raise
    except Exception as error:  # code of the library for a config that may hold anything
        raise FrontendError(
            f"the config describes no model that this transformers has: {error}",
            help="use the version of transformers that the model was compiled with",
        ) from error


def empty(config: Any) -> nn.Module:
    """A model with the parameters that `from_config` gives it: no data under `parameters_on_meta`.

    FrontendError as in `model_class`.
    """
    import torch

    cls, _ = model_class(config)
    return cls._from_config(config, dtype=torch.float32).eval().requires_grad_(False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made here have no data; buffers are real."""
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, logs, warnings and downloads of the libraries; their state and the RNG come back."""
    import torch
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    logging.set_verbosity(python_logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path of the weight -> module, of all layers that compute x Wᵀ + b and nothing else.

    `Conv1D` holds its matrix as [inputs, outputs], nn.Linear as [outputs, inputs].
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear.forward, Conv1D.forward)
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in kinds
    }


def is_causal(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether logits of a position do not change with later tokens; ids i64[1, at least 2]."""
    import torch

    other = ids.clone()
    other[:, -1] = (ids[:, -1] == 0).long()
    with torch.no_grad():
        one, two = (call(model, CAUSAL, tokens)[:, :-1] for tokens in (ids, other))
    return bool(torch.allclose(one, two, atol=1e-5, rtol=1e-4))
