"""The captioner of a checkpoint or a config, by its `model_type`."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from captioning.errors import UserError, as_user_error
from captioning.files import PROJECT
from captioning.models.blip import BlipCaptioner
from captioning.models.captioner import Captioner


logger = logging.getLogger(__name__)
CAPTIONERS: dict[str, type[Captioner]] = {"blip": BlipCaptioner}


def captioner_class(model_type: str | None, name: str) -> type[Captioner]:
    """Return the class for the `model_type` of `name`; raise UserError if there is none."""
    if model_type not in CAPTIONERS:
        mend = f"supported: {', '.join(CAPTIONERS)}; give one such as Salesforce/blip-image-captioning-base"
        raise UserError(f"'{name}' is of model type {model_type}; {mend}")
    return CAPTIONERS[model_type]


def load_captioner(name: str, revision: str | None = None) -> Captioner:
    """See `Captioner.from_pretrained`; an unsupported type is a `UserError`, too."""
    with as_user_error(f"model '{name}' cannot be loaded", "give the folder of a saved model or a Hub id"):
        model_type = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type")
    return captioner_class(model_type, name).from_pretrained(name, revision)


def read_config(name: str, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a config file, folder or Hub id; a path may also be relative to this project.

    What a recipe `recorded` of it goes before; that the file differs now is logged. Raises UserError if there is none.
    """
    inside = PROJECT / name
    path = str(inside) if inside.exists() and not os.path.exists(name) else name
    if recorded and not os.path.exists(path):
        return recorded
    with as_user_error(f"config '{name}' cannot be loaded", "recipes/configs/ has examples"):
        content = PreTrainedConfig.get_config_dict(path)[0]
    if recorded and content != recorded:
        logger.warning(
            "config '%s' differs from the one in the recipe, which is used; set --config_name to use it", name
        )
    return recorded or content


def build_captioner(
    config_name: str,
    seed: int,
    tokenizer_name: str | None,
    captions: Iterable[str],
    vocab_size: int,
    config: dict[str, Any] | None = None,
) -> Captioner:
    """See `Captioner.from_config`; `config_name` may also be a path relative to this project."""
    config = config or read_config(config_name)
    found = captioner_class(config.get("model_type") or "blip", config_name)
    return found.from_config(config_name, seed, tokenizer_name, captions, vocab_size, config)


def class_in_folder(folder: Path) -> type[Captioner]:
    """Return the class of the model that is saved in a folder; BLIP's where there is none."""
    if not (folder / "config.json").is_file():
        return BlipCaptioner
    return captioner_class(PreTrainedConfig.get_config_dict(folder)[0].get("model_type"), str(folder))
