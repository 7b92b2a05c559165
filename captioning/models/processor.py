"""Processors of image-text models: image processor and tokenizer, built in the same way on every machine.

Images are processed by PIL whatever is installed: torchvision resizes to other pixels (T11). A part for videos, which
needs torchvision, is never built; its config is kept and saved with the rest, so that stock loads the processor whole.
"""

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    ProcessorMixin,
    VisionTextDualEncoderProcessor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from captioning.models.optional_file import optional_file


VIDEO = "video_processor"


def load_processor(name: str, revision: str | None, config: PreTrainedConfig) -> ProcessorMixin:
    """Load the processor of a checkpoint with this `config`; of a family that has none, the pair of its parts."""
    content, _ = ProcessorMixin.get_processor_dict(name, revision=revision)
    class_name = content.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    kind = getattr(transformers, class_name or "", VisionTextDualEncoderProcessor)
    parts: dict[str, Any] = {}
    for part in _parts(kind):
        if part == "image_processor":
            parts[part] = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
        else:  # that of BLIP-2's Q-Former has a folder of its own
            folder = "" if part == "tokenizer" else part
            parts[part] = AutoTokenizer.from_pretrained(name, revision=revision, subfolder=folder)
    values = {key: value for key, value in content.items() if key not in parts}
    values.setdefault("chat_template", getattr(parts["tokenizer"], "chat_template", None))
    processor = build_processor(kind, **parts, **values)
    if VIDEO in kind.get_attributes():
        path = optional_file(name, "video_preprocessor_config.json", revision)
        video = content.get(VIDEO) or (path and json.loads(Path(path).read_text(encoding="utf-8")))
        vars(processor).update({VIDEO: video} if video else {})
    # What old checkpoints lack here is in the model's config. Without the first, BLIP-2 would caption without having
    # seen the image, and report nothing (T19)
    owners = {"num_query_tokens": config, "vision_feature_select_strategy": config}
    owners["patch_size"] = getattr(config, "vision_config", None)
    for attribute, owner in owners.items():
        if getattr(processor, attribute, 0) is None:
            setattr(processor, attribute, getattr(owner, attribute, None))
    if hasattr(processor, "num_additional_image_tokens") and "num_additional_image_tokens" not in content:
        # Stock takes 0 of them; CLIP has one before those of the patches
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")
    return processor


def build_processor(kind: type[ProcessorMixin], **values: Any) -> ProcessorMixin:
    """Return a processor of the class `kind` without its part for videos; other `values` than it takes are ignored."""
    processor = kind.__new__(kind)
    processor.get_attributes = partial(list, _parts(kind))  # what stock asks for its parts, and can be pickled
    taken = inspect.signature(kind.__init__).parameters
    processor.__init__(**{key: values.get(key) for key in values.keys() | {VIDEO} if key in taken})
    return processor


def _parts(kind: type[ProcessorMixin]) -> list[str]:
    return [name for name in kind.get_attributes() if name != VIDEO]
