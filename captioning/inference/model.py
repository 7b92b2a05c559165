"""A saved model that captions images as its run's evaluation did: its own prompt, decode settings and precision."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from PIL import Image
from transformers import GenerationConfig

from captioning.errors import as_user_error
from captioning.hub.faults import reading_from_hub
from captioning.hub.revisions import pin_revision
from captioning.models.load import load_captioner
from captioning.models.optional_file import optional_file
from captioning.training.decoding import DEFAULTS, check_decoding, generation_config


RECIPE = "recipe.json"
INNER_FOLDER = re.compile(r"checkpoint-\d+|adapter")  # of a run, whose recipe is beside it
UNRECORDED = DEFAULTS | {"num_beams": 3, "max_new_tokens": 64}  # a run's, for a model that says nothing
# What is read of a recipe, with the types of JSON
RECORDED = {"prompt": (str,), "torch_dtype": (str,), "bf16": (bool,), "fp16": (bool,), "length_penalty": (int, float)}
RECORDED |= {name: (int,) for name in DEFAULTS if name not in RECORDED}


class Description(NamedTuple):
    """What a model says of an image; `concepts` are the CUIs of its concept head, None without one."""

    caption: str
    concepts: list[str] | None = None


class InferenceModel:
    """A saved model with its own decode settings, ready to caption images.

    Args:
        name: folder or Hub id of a model of any family, of an adapter, or of a merged model.
        revision: commit, branch or tag of a Hub id.
        device: as torch names it; None: the GPU if there is one.
        settings: decode settings that go before those recorded with the model, by the fields of a recipe; None is as
            if not given.
        prompt: goes before the recorded one; None: that one, else the family's.

    Attributes:
        captioner: in evaluation mode, on the device, with the family's fast code.
        generation_config: decode settings, for `captioner.generate`.
        prompt: text that every caption continues.
        device: where it computes.
        name: what was given.
        revision: the commit on the Hub; None for a folder.

    Raises:
        UserError: there is no such model or device, or a setting is impossible.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        device: str | None = None,
        settings: Mapping[str, Any] = {},
        prompt: str | None = None,
    ):
        given = {key: value for key, value in settings.items() if value is not None}
        # Before the model is loaded, so its own limits are not known
        check_decoding(UNRECORDED | {"max_new_tokens": 10**9} | given)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with as_user_error(f"device '{device}' cannot be used", "set --device to cpu or cuda"):
            self.device = torch.empty(0, device=device).device
        self.name, self.revision = name, pin_revision(name, revision)
        recipe = recorded_recipe(name, self.revision)
        self.captioner = load_captioner(name, self.revision, recipe.get("torch_dtype", "float32"))
        model = self.captioner.model.to(self.device).eval()
        self.captioner.adapt(fast=True)
        self.captioner.set_prompt(recipe.get("prompt") if prompt is None else prompt)
        self.prompt = self.captioner.prompt
        recorded = {key: getattr(self.captioner.plain_model.generation_config, key) for key in UNRECORDED}
        recorded = {key: value for key, value in (recorded | recipe).items() if key in DEFAULTS and value is not None}
        with as_user_error(f"the decode settings recorded with model '{name}' cannot be used", "set them by flags"):
            fields = UNRECORDED | recorded | given
            check_decoding(fields)
        self.captioner.check_lengths(1, fields["max_new_tokens"])
        self.generation_config: GenerationConfig = generation_config(fields)
        self.captioner.set_generation_config(self.generation_config)  # or `generate` would add others that it holds
        model.requires_grad_(False)
        self._autocast = self._precision(recipe)

    def _precision(self, recipe: Mapping[str, Any]) -> torch.dtype | None:
        """Return what a GPU computes in, as in the evaluation; None: float32."""
        if self.device.type != "cuda":
            return None
        if recipe.get("fp16"):
            return torch.float16
        return torch.bfloat16 if recipe.get("bf16", torch.cuda.is_bf16_supported(False)) else None

    def digest(self) -> str:
        """Return a digest of all that a description depends on beside image, prompt and decode settings."""
        head = self.captioner.concept_head
        parts = [self.captioner.processor.image_processor.to_json_string(), self.captioner.surface_form]
        weights = self.captioner.model.state_dict()
        if head:
            parts += [head.concepts, head.thresholds]
            weights |= {"head weight": head.weight.detach(), "head bias": head.bias.detach()}
        found = xxhash.xxh3_128(repr(tuple(parts)).encode())
        for name, weight in weights.items():
            found.update(name.encode())
            found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Return a context for one batch in which methods of the captioner compute as in the evaluation."""
        mixed = torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)
        with torch.inference_mode(), mixed, self.captioner.evaluation():
            yield

    def encode(self, images: Sequence[Image.Image]) -> Any:
        """Encode B images for the captioner's methods; to be called within `computing`.

        Raises:
            ValueError: an image cannot be processed.
        """
        batch = self.captioner.collate(images, [self.captioner.prompt_row] * len(images))
        return self.captioner.encode_images({name: value.to(self.device) for name, value in batch.items()})

    def concepts(self, encoded: Any) -> list[list[str]] | None:
        """Return the concepts of B encoded images, the most probable first; None if the model has no concept head."""
        head = self.captioner.concept_head
        return head and head.predict(self.captioner.image_features(encoded).float().cpu().numpy())

    def names(self, concepts: Sequence[str]) -> list[str]:
        """Return the names of CUIs where the concept head knows them, else the CUIs."""
        head = self.captioner.concept_head
        return [head.names.get(cui, cui) if head else cui for cui in concepts]

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        """Return the captions of B images, one batch, in their surface form, and their concepts.

        Args:
            images: as `data.images.open_image` returns them.

        Raises:
            ValueError: an image cannot be processed.
        """
        with self.computing():
            encoded = self.encode(images)
            tokens = self.captioner.generate(encoded, self.generation_config)
            concepts = self.concepts(encoded) or [None] * len(images)
        return [Description(*one) for one in zip(self.captioner.decode(tokens.cpu().numpy()), concepts, strict=True)]

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the captions alone, as `describe`."""
        return [one.caption for one in self.describe(images)]


def recorded_recipe(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return what `recipe.json` beside a model on the Hub or in a folder says of how it captions, as far as it does.

    Raises:
        UserError: there is no such model, or the file is broken.
    """
    folder = Path(name)
    inner = INNER_FOLDER.fullmatch(folder.resolve().name) and not (folder / RECIPE).exists()
    where = str(folder.resolve().parent) if inner and folder.is_dir() else name
    with reading_from_hub(f"model '{name}' cannot be loaded", "give the folder of a saved model or a Hub id"):
        path = optional_file(where, RECIPE, revision)
    if path is None:
        return {}
    with as_user_error(f"model '{name}': {RECIPE} cannot be read", "correct it or leave it out"):
        recipe = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {key: recipe[key] for key in RECORDED if recipe.get(key) is not None}
        if wrong := [key for key, value in found.items() if type(value) not in RECORDED[key]]:
            raise TypeError(f"'{wrong[0]}' has a value of another type")
        if found.get("torch_dtype", "float32") not in ("float32", "bfloat16"):
            raise ValueError(f"torch_dtype is '{found['torch_dtype']}'")
    return found
