"""A Task from a Hugging Face config: that architecture, untrained, on random tokens or pixels.

Nothing is downloaded, and no code runs that is not part of the installed transformers.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.tree import tensors_in
from .task import Task

# Of other models the mean square of what they return is the loss.
LABELLED = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration",
            "ForImageClassification", "ForSequenceClassification", "ForTokenClassification")
SAMPLES, TOKENS, PIXELS = 4, 64, 224  # per rank and step; at most; where the config does not say


def load_config(path: Path) -> Task:
    """path: a config.json, or the folder that it is in. Raises ValueError for what is none."""
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a config: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ValueError(f"{file} is not a Hugging Face config: it has no \"model_type\"")
    if "auto_map" in raw:
        raise ValueError(f"{file} wants code from its repository (\"auto_map\"), which is not run "
                         "here: write a file with build(), batch() and loss() that imports it")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it talks above the tables
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{file} is a Hugging Face config, which needs the package transformers: "
                         "pip install transformers") from None
    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{file}: the installed transformers {transformers.__version__} does not "
                         f"know the model_type {raw['model_type']!r}")
    raw = {key: value for key, value in raw.items() if "attn_implementation" not in key}
    try:
        config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:
        raise ValueError(f"{file} is not what transformers takes: {error}") from error
    config.use_cache = False
    for token in ("pad_token_id", *["decoder_start_token_id"] * config.is_encoder_decoder):
        if getattr(config, token, None) is None:
            setattr(config, token, 0)
    kind = _model_class(transformers, config, raw.get("architectures") or [])
    takes = kind.main_input_name
    of_both = hasattr(config, "vision_config") and not kind.__name__.endswith(LABELLED)
    if of_both or not (
            takes == "input_ids" or (takes == "pixel_values" and hasattr(config, "num_channels"))):
        raise ValueError(f"{file}: a {kind.__name__} takes more than tokens or pixels alone, which "
                         "is all that is made up here: write a file with build(), batch() and "
                         "loss()")
    shape = " x ".join(map(str, _shape(config, kind)))
    return Task(name=f"{raw['model_type']} ({kind.__name__}) on {shape} random "
                     f"{'pixels' if takes == 'pixel_values' else 'tokens'} per rank",
                build=lambda: kind._from_config(config, dtype=torch.float32),
                batch=lambda step, rank: _batch(config, kind, step, rank), loss=_loss)


def _model_class(transformers: Any, config: Any, architectures: list[str]) -> type[nn.Module]:
    named = getattr(transformers, architectures[0], None) if architectures else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    for auto in ("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCausalLM",
                 "AutoModelForImageClassification", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"transformers {transformers.__version__} has no model for a "
                     f"{type(config).__name__}")


def _shape(config: Any, kind: type[nn.Module]) -> tuple[int, ...]:
    """Of the inputs: (samples, channels, height, width), or (samples, tokens)."""
    if kind.main_input_name == "pixel_values":
        side = getattr(config, "image_size", None) or PIXELS
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return SAMPLES, config.num_channels, height, width
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    # Half of them, because some models do not begin to count at 0.
    return SAMPLES, min(TOKENS, max(1, limit // 2)) if limit > 0 else TOKENS


def _batch(config: Any, kind: type[nn.Module], step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    takes_labels = kind.__name__.endswith(LABELLED)
    shape = _shape(config, kind)
    if kind.main_input_name == "pixel_values":
        batch = {"pixel_values": torch.randn(shape, generator=generator)}
        labels = torch.randint(config.num_labels, (SAMPLES,), generator=generator)
    else:
        vocabulary = config.get_text_config().vocab_size
        batch = {"input_ids": torch.randint(vocabulary, shape, generator=generator)}
        labels = batch["input_ids"]
        if "Classification" in kind.__name__:
            labels = torch.randint(config.num_labels,
                                   shape if "Token" in kind.__name__ else shape[:1],
                                   generator=generator)
    return batch | ({"labels": labels} if takes_labels else {})


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    if getattr(output, "loss", None) is not None:
        return output.loss
    return next(t for t in tensors_in(dict(output)) if t.is_floating_point()).square().mean()
