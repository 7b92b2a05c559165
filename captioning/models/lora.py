"""Low-rank adapters (LoRA, Hu and others 2021, arXiv:2106.09685) by peft, which loads what is saved."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoImageProcessor, GenerationConfig
from transformers.pytorch_utils import Conv1D

from captioning.errors import UserError, as_user_error
from captioning.models.captioner import Captioner
from captioning.models.optional_file import optional_file


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHT_FILES = ("model.safetensors", ADAPTER_WEIGHTS)  # one of them is in each saved model
# The config of what is adapted. A `config.json` would make transformers take the folder for a whole model
BASE_CONFIG = "base_config.json"


def add_lora(
    captioner: Captioner,
    name: str,
    revision: str | None,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    target_modules: list[str] | None = None,
) -> None:
    """Put adapters into the model, which learn in place of it.

    Args:
        captioner: its model is wrapped in a `PeftModel`.
        name: Hub id or folder that the model came from.
        revision: its commit on the Hub, None for a folder.
        r: rank of the two matrices of an adapter, whose product is added to a weight.
        alpha: the product is scaled by alpha / r.
        dropout: of the inputs of an adapter in training.
        target_modules: ends of the paths of the layers that get one, or one regular expression of whole paths; None:
            all linear layers of the text model.

    Raises:
        UserError: peft finds no such layers, or cannot adapt one of them.
    """
    targets = target_modules or [text_layers(captioner)]
    is_pattern = len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0])  # or peft's "all-linear"
    config = LoraConfig(  # without a task type: peft's wrappers for them do not pass images on
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets[0] if is_pattern else targets
    )
    tied = {*captioner.model.all_tied_weights_keys.keys(), *captioner.model.all_tied_weights_keys.values()}
    head, captioner.concept_head = captioner.concept_head, None  # peft would freeze it, or adapt it
    with as_user_error("LoRA cannot be added", "set --lora_target_modules to names of linear layers"):
        model = get_peft_model(captioner.model, config)
    adapted = [path for path, module in model.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)]
    for target in [] if is_pattern else targets:  # peft asks for one match of all names
        if not any(f".{path}".endswith(f".{target}") for path in adapted):
            raise UserError(f"lora_target_modules: no layer is named '{target}'; correct or leave it out")
    for path in adapted:
        if f"{path}.weight" in tied:
            both = "whose weight is also that of another layer: merged, it would change both"
            raise UserError(f"lora_target_modules names '{path}', {both}; name others")
    # The Trainer's gradient checkpointing lets the outputs of all embeddings learn, as re-entrant checkpoints need.
    # Ours do not; GIT writes into its embeddings, and the backward pass would go through the frozen vision model
    captioner.plain_model.enable_input_require_grads = lambda: None
    # Where it was loaded from, which peft takes, may be a snapshot in a cache
    is_local = os.path.exists(name)
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = os.path.abspath(name) if is_local else name
    config.revision = None if is_local else revision
    captioner.model, captioner.concept_head = model, head


def text_layers(captioner: Captioner) -> str:
    """Return a regular expression of the paths of all linear layers of the text model but its head."""
    text, head = captioner.text_model, captioner.model.get_output_embeddings()
    root = next(path for path, module in captioner.model.named_modules() if module is text)
    linear = [path for path, layer in text.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer != head]
    names = sorted({path.rpartition(".")[2] for path in linear})
    return rf"{re.escape(root)}\.(.*\.)?({'|'.join(map(re.escape, names))})"


def save_config(captioner: Captioner, folder: str | Path) -> None:
    """Complete the adapter that peft has saved by the model's configs, and remove its card, which has local paths."""
    captioner.model.base_model.model.config.to_json_file(Path(folder) / BASE_CONFIG)
    captioner.model.generation_config.save_pretrained(folder)
    (Path(folder) / "README.md").unlink(missing_ok=True)


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model is one with adapters."""
    return isinstance(model, PeftModel)


def base_of_adapter(name: str, revision: str | None) -> tuple[str, str | None] | None:
    """Return the Hub id or folder, and the commit, of the model that `name` adapts; None if it is no adapter."""
    path = optional_file(name, ADAPTER_CONFIG, revision)
    if path is None:
        return None
    with as_user_error(f"adapter '{name}': {ADAPTER_CONFIG} names no model", "set base_model_name_or_path in it"):
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        return os.fspath(config["base_model_name_or_path"]), config.get("revision")


def load_adapter(captioner: Captioner, name: str, revision: str | None) -> None:
    """Put the saved adapters `name` into the model, and take over what lies beside; UserError: they are of another."""
    with as_user_error(f"adapter '{name}' cannot be loaded", "it must be one of this model"):
        captioner.model = PeftModel.from_pretrained(captioner.model, name, revision=revision)
    with suppress(OSError):  # those of others need not have such files
        images = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
        captioner.processor.image_processor = images
        captioner.plain_model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)


def merge_adapter(captioner: Captioner) -> None:
    """Add the adapters to the weights, after which the model is a plain one."""
    captioner.model = captioner.model.merge_and_unload()


def count_learning(model: nn.Module) -> str:
    """Return how many parameters learn, and in which parts of the model, in words."""
    counts: dict[str, int] = {}
    for path, value in model.named_parameters():
        if value.requires_grad:
            part = ".".join(path.removeprefix("base_model.model.").split(".")[:2])
            counts[part] = counts.get(part, 0) + value.numel()
    learning, all_of_them = sum(counts.values()), sum(value.numel() for value in model.parameters())
    parts = ", ".join(f"{part} {number:,}" for part, number in counts.items())
    return f"{learning:,} of {all_of_them:,} parameters learn ({learning / all_of_them:.2%}): {parts}"
