"""The captioner of a checkpoint or a config, by its `model_type`."""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig

from captioning.errors import UserError
from captioning.files import PROJECT
from captioning.hub.faults import reading_from_hub
from captioning.models.blip import BlipCaptioner
from captioning.models.captioner import Captioner
from captioning.models.concept_head import ConceptHead
from captioning.models.families import FAMILIES
from captioning.models.image_text_to_text import ImageTextToTextCaptioner
from captioning.models.lora import base_of_adapter, load_adapter
from captioning.models.surface_form import SurfaceForm
from captioning.models.weights import refuse_nan_weights


logger = logging.getLogger(__name__)
CAPTIONERS: dict[str, type[Captioner]] = {"blip": BlipCaptioner} | dict.fromkeys(FAMILIES, ImageTextToTextCaptioner)


def captioner_class(model_type: str | None, name: str) -> type[Captioner]:
    """Return the class for the `model_type` of `name`; raise UserError if there is none."""
    if model_type not in CAPTIONERS:
        mend = f"supported: {', '.join(CAPTIONERS)}; give one such as Salesforce/blip-image-captioning-base"
        raise UserError(f"'{name}' is of model type {model_type}; {mend}")
    return CAPTIONERS[model_type]


def refuse_retrieved(name: str, revision: str | None = None) -> None:
    """Raise UserError if the family of a model takes no captions of similar images; only its config is read."""
    _, model_type = _base_and_type(name, revision)
    takes = [kind for kind, family in FAMILIES.items() if family.image_start]
    if model_type not in takes:
        only = ", ".join(takes)
        raise UserError(f"a {model_type} takes no retrieved captions, only {only}; leave out --retrieved_captions")


def load_captioner(name: str, revision: str | None = None, dtype: str = "float32") -> Captioner:
    """Load a model with all that lies beside it; of an adapter, the model that it adapts, and the adapter into it.

    Raises:
        UserError: as of `Captioner.from_pretrained`; the type is not supported; tokenizer or weights are broken.
    """
    adapts, model_type = _base_and_type(name, revision)
    base, base_revision = adapts or (name, revision)
    captioner = captioner_class(model_type, base).from_pretrained(base, base_revision, getattr(torch, dtype))
    num_entries, vocab_size = len(captioner.tokenizer), captioner.config.get_text_config(decoder=True).vocab_size
    if num_entries > vocab_size:
        mend = "give the tokenizer that it was trained with"
        raise UserError(f"model '{base}': its tokenizer has {num_entries} entries, its embedding {vocab_size}; {mend}")
    if adapts:
        load_adapter(captioner, name, revision)
    refuse_nan_weights(captioner.model, name)
    captioner.concept_head = ConceptHead.load(name, revision)
    if captioner.loses_surface_form:
        captioner.surface_form = SurfaceForm.load(name, revision)
    return captioner


def _base_and_type(name: str, revision: str | None) -> tuple[tuple[str, str | None] | None, str | None]:
    """Return the name and commit of the model that `name` adapts, None if it is whole, and the `model_type`."""
    mend = "give the folder of a saved model or a Hub id"
    with reading_from_hub(f"model '{name}' cannot be loaded", mend):
        adapts = base_of_adapter(name, revision)
    base, base_revision = adapts or (name, revision)
    what = f"model '{base}'" + (f", which '{name}' adapts," if adapts else "")
    with reading_from_hub(f"{what} cannot be loaded", mend):
        model_type = PreTrainedConfig.get_config_dict(base, revision=base_revision)[0].get("model_type")
    return adapts, model_type


def read_config(name: str, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a config file, folder or Hub id; a path may also be relative to this project.

    What a recipe `recorded` of it goes before; that it differs now is logged. UserError: there is none.
    """
    inside = PROJECT / name
    path = str(inside) if inside.exists() and not os.path.exists(name) else name
    if recorded and not os.path.exists(path):
        return recorded
    with reading_from_hub(f"config '{name}' cannot be loaded", "recipes/configs/ has examples"):
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
    config: dict | None = None,
) -> Captioner:
    """See `Captioner.from_config`; `config_name` may also be a path relative to this project."""
    config = config or read_config(config_name)
    found = captioner_class(config.get("model_type") or "blip", config_name)
    return found.from_config(config, config_name, seed, tokenizer_name, captions, vocab_size)
