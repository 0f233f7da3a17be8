"""Build any Hugging Face model from its configuration alone, on the meta device, and the arguments of a training call."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropbp_fx.values import shown

_SIZE = re.compile(r"^(num|n|d|max)_|size|layers|heads|dim|embd|positions|channels|depth")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ConfigError(ValueError):
    """A configuration that cannot be used, in one sentence with the remedy."""


def build(
    source: str, settings: Sequence[str], *, batch: int, tokens: int, dtype: str, lora_rank: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a configuration in training mode and the keyword arguments of a training call, all on the meta
    device.

    Args:
        source: a model type such as ``llama``, a ``config.json``, or a folder that holds one.
        settings: entries of the configuration to change, as ``name=value``; values are JSON, or else text.
        batch: examples in the batch.
        tokens: tokens in a sequence, for models that take any.
        dtype: of the parameters: one of :data:`DTYPES`.
        lora_rank: rank of LoRA on every linear layer, everything else frozen; 0 for full fine-tuning.

    Raises:
        ImportError: transformers, or peft where LoRA is asked for, is not installed.
        ConfigError: there is no such configuration, it has no such entry, or no model can be built from it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"Explaining a configuration needs transformers ({error}). Install the extra: pip install 'dropbp-fx[inspect]'."
        ) from error
    transformers.logging.set_verbosity_error()
    config = _configuration(source)
    _apply(config, settings)
    _check_sizes(config)
    config.dtype = DTYPES[dtype]
    _check_length(config, tokens)
    model_class = _model_class(config)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0  # only its being there matters
    try:
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=DTYPES[dtype])
            inputs = _inputs(model, config, batch, tokens, DTYPES[dtype])
            if lora_rank:
                model = _with_lora(model, lora_rank)
    except (ConfigError, ImportError):
        raise
    except Exception as error:
        raise ConfigError(
            f"No {model_class.__name__} can be built from this configuration: {_reason(error)}. Check its values, and those "
            "given with --set, against each other."
        ) from error
    return model.train(), inputs


def _configuration(source: str) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ConfigError(f"The folder {source!r} holds no config.json. Pass the folder of a Hugging Face model.")
    if path.is_file():
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"{path} is no JSON file ({error}). Pass the config.json of a Hugging Face model."
            ) from error
        kind = read.get("model_type") if isinstance(read, dict) else None
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ConfigError(
                f"{path} has the model_type {shown(kind)}, which transformers {transformers.__version__} does not know. Add "
                'or correct its entry "model_type", or install a version of transformers that has the model.'
            )
        try:
            return CONFIG_MAPPING[kind].from_dict(read)
        except Exception as error:  # configurations check their values, each in its own way
            raise ConfigError(
                f"{path} is no configuration of {kind} that transformers {transformers.__version__} takes: "
                f"{_reason(error)}. Correct it there."
            ) from error
    if source in CONFIG_MAPPING:
        return CONFIG_MAPPING[source]()
    if "/" in source or source.endswith(".json"):
        raise ConfigError(
            f"There is no file or folder {source!r}. Nothing is downloaded: pass a model type such as llama, or the path of "
            "a config.json or of a model's folder."
        )
    close = difflib.get_close_matches(source, list(CONFIG_MAPPING), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "some it has are llama, bert and vit."
    raise ConfigError(
        f"transformers {transformers.__version__} has no model type {source!r}; {hint} A config.json or a model's folder "
        "will do too."
    )


def _apply(config: Any, settings: Sequence[str]) -> None:
    known = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes name=value, such as num_hidden_layers=80, not {setting!r}.")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3) or sorted(known)[:3]
            raise ConfigError(
                f"The configuration of {config.model_type} has no entry {name!r}; did you mean {', '.join(close)}?"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        try:
            setattr(config, name, value)
        except Exception as error:  # configurations check some values, each in its own way
            raise ConfigError(f"The configuration refuses {setting!r}: {_reason(error)}.") from error


def _check_sizes(config: Any) -> None:
    """Refuse sizes below 0, which range() and the like take for none; and those that are none where the default is one."""
    default = type(config)().to_dict()
    for name, value in config.to_dict().items():
        usual = default.get(name)
        if (
            not _SIZE.search(name)
            or "window" in name
            or not isinstance(usual, int)
            or isinstance(usual, bool)
            or usual <= 0
        ):
            continue
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(
                f"The configuration's {name} is {shown(value)}, but a size cannot be negative; {config.model_type} has "
                f"{usual} by default."
            )


def _reason(error: Exception) -> str:
    """The first line of an error, without a full stop."""
    line = next(iter(str(error).strip().splitlines()), "")
    cause = error.__cause__
    if line.endswith(":") and cause is not None:
        line = f"{line} {_reason(cause) if isinstance(cause, Exception) else cause}"
    return line.rstrip(".:") if len(line.split()) > 1 else f"{type(error).__name__} {line}".strip()


def _check_length(config: Any, tokens: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < tokens:
        raise ConfigError(
            f"{config.model_type} takes {longest} tokens at most, not {tokens}. Give a shorter --seq, or --set "
            f"max_position_embeddings={tokens}."
        )


def _model_class(config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, (list, tuple)) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    mappings = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        auto.MODEL_MAPPING,
    )
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ConfigError(f"transformers has no trainable model for the model type {config.model_type}. Try another one.")


def _inputs(model: nn.Module, config: Any, batch: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of a training call, with labels for the loss where the model takes some."""
    import inspect

    name = str(getattr(model, "main_input_name", "input_ids"))
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    if name == "input_ids":
        return {"input_ids": ids, "labels": ids} if takes_labels else {"input_ids": ids}
    if name == "pixel_values":
        size = getattr(config, "image_size", 224) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        images = torch.zeros(batch, getattr(config, "num_channels", 3) or 3, height, width, dtype=dtype)
        labels = {"labels": torch.zeros(batch, dtype=torch.long)} if takes_labels else {}
        return {"pixel_values": images, **labels}
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        length = 2 * getattr(config, "max_source_positions", tokens)
        features = torch.zeros(batch, config.num_mel_bins, length, dtype=dtype)
        return {"input_features": features, **({"labels": ids} if takes_labels else {})}
    if name == "input_values":
        sound = torch.zeros(batch, max(tokens, 16000), dtype=dtype)
        labels = {"labels": torch.zeros(batch, dtype=torch.long)} if takes_labels else {}
        return {"input_values": sound, **labels}
    raise ConfigError(
        f"{type(model).__name__} takes {name!r}, and what such an input looks like is not known here. Build the model "
        "yourself and call dropbp_fx.explain(model, ...)."
    )


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"--lora-rank needs peft ({error}). Install the extra: pip install 'dropbp-fx[inspect]'."
        ) from error
    config = peft.LoraConfig(r=rank, target_modules="all-linear")
    return peft.get_peft_model(model, config)  # type: ignore[no-any-return]
