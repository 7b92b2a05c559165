"""A saved model that captions images as its run's evaluation did: its own prompt, decode settings and precision."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import GenerationConfig

from captioning.data.neighbors import FOLDER, Pool, Retrieval
from captioning.errors import UserError, as_user_error
from captioning.hub.faults import reading_from_hub
from captioning.hub.revisions import pin_revision
from captioning.models.captioner import Batch
from captioning.models.load import load_captioner
from captioning.models.optional_file import optional_file
from captioning.models.retriever import Retriever, weights_digest
from captioning.training.decoding import DEFAULTS, check_decoding, generation_config


logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
INNER_FOLDER = re.compile(r"checkpoint-\d+|adapter")  # of a run, whose recipe is beside it
UNRECORDED = DEFAULTS | {"num_beams": 3, "max_new_tokens": 64}  # a run's, for a model that says nothing
# What is read of a recipe, with its types in JSON
RECORDED = dict.fromkeys([*DEFAULTS, "retrieved_captions"], (int,)) | {"length_penalty": (int, float)}
RECORDED |= dict.fromkeys(["prompt", "torch_dtype", "retriever", "retriever_revision"], (str,))
RECORDED |= dict.fromkeys(["bf16", "fp16"], (bool,))


class Description(NamedTuple):
    """What a model says of an image; `concepts` are the CUIs of its concept head, None without one."""

    caption: str
    concepts: list[str] | None = None


class InferenceModel:
    """A saved model with its own decode settings, ready to caption images.

    Args:
        name: folder or Hub id of a model of any family, of an adapter, or of a merged model.
        revision: commit, branch or tag of a Hub id; as an attribute the commit, None for a folder.
        device: as torch names it; None: the GPU if there is one.
        settings: decode settings in place of those recorded with the model, by the fields of a recipe, if not None.
        prompt: text that every caption continues; None: the recorded one, else the family's.

    Attributes:
        captioner: in evaluation mode, on the device, with the family's fast code.
        generation_config: decode settings, for `captioner.generate`.
        retrieval: finds captions for the prompt; None: the model was trained without, or they are not there.

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
        check_decoding(UNRECORDED | {"max_new_tokens": 10**9} | given)  # the model's own limits are not known yet
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with as_user_error(f"device '{device}' cannot be used", "set --device to cpu or cuda"):
            self.device = torch.empty(0, device=device).device
        self.name, self.revision = name, pin_revision(name, revision)
        recipe = recorded_recipe(name, self.revision)
        self.captioner = load_captioner(name, self.revision, recipe.get("torch_dtype", "float32"))
        self.captioner.model.to(self.device).eval()
        self.captioner.adapt(fast=True)
        self.retrieval = _load_retrieval(name, recipe, self.device)
        self.captioner.retrieved_captions = self.retrieval.number if self.retrieval else 0
        self.captioner.set_prompt(recipe.get("prompt") if prompt is None else prompt)
        self.prompt = self.captioner.prompt
        config = self.captioner.plain_model.generation_config
        recorded = {key: getattr(config, key) for key in DEFAULTS} | recipe
        fields = UNRECORDED | {key: value for key, value in recorded.items() if value is not None} | given
        with as_user_error(f"the decode settings recorded with model '{name}' cannot be used", "set them by flags"):
            check_decoding(fields)
        self.captioner.check_lengths(1, fields["max_new_tokens"])
        self.generation_config: GenerationConfig = generation_config(fields)
        self.captioner.set_generation_config(self.generation_config)  # or `generate` would add others that it holds
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
        if self.retrieval:
            parts += [self.retrieval.number, self.retrieval.pool.retriever, self.retrieval.pool.captions]
            weights |= {"retrieval": torch.from_numpy(self.retrieval.pool.features)}
        return weights_digest(weights, *parts)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Return a context for one batch, in which the captioner computes as in the evaluation."""
        mixed = torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)
        # Autocast casts a weight once a batch only if it may need a gradient: not frozen, nor in `inference_mode`
        with torch.no_grad(), mixed, self.captioner.evaluation():
            yield

    def collate(self, images: Sequence[Image.Image]) -> Batch:
        """Return the captioner's batch of B images, on the device, with their prompts alone.

        Raises:
            ValueError: an image cannot be processed.
        """
        retrieved = [self.retrieval.captions(images)] if self.retrieval else []
        batch = self.captioner.collate(images, [self.captioner.prompt_row] * len(images), *retrieved)
        return {name: value.to(self.device) for name, value in batch.items()}

    def encode(self, images: Sequence[Image.Image]) -> Any:
        """Encode B images for the captioner's methods; to be called within `computing`; see `collate`."""
        return self.captioner.encode_images(self.collate(images))

    def concepts(self, encoded: Any) -> list[list[str]] | None:
        """Return the concepts of B encoded images, the most probable first; None if the model has no concept head."""
        head = self.captioner.concept_head
        return head and head.predict(self.captioner.image_features(encoded).float().cpu().numpy())

    def names(self, concepts: Sequence[str]) -> list[str]:
        """Return the names of CUIs where the concept head knows them, else the CUIs."""
        head = self.captioner.concept_head
        return [head.names.get(cui, cui) if head else cui for cui in concepts]

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        """Return the captions of a batch of B images, in their surface form, and their concepts.

        Raises:
            ValueError: an image cannot be processed.
        """
        with self.computing():
            encoded = self.encode(images)
            tokens = self.captioner.generate(encoded, self.generation_config)
            concepts = self.concepts(encoded) or [None] * len(images)
        return [Description(*one) for one in zip(self.captioner.decode(tokens.cpu().numpy()), concepts, strict=True)]


def recorded_recipe(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return what `recipe.json` beside a model on the Hub or in a folder says of how it captions.

    Raises:
        UserError: there is no such model, or the file is broken.
    """
    where = _run_of(name)
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


def _run_of(name: str) -> str:
    """Return the output folder of the run that a model is a part of, by default the name of the model itself."""
    folder = Path(name)
    inner = INNER_FOLDER.fullmatch(folder.resolve().name) and not (folder / RECIPE).exists()
    return str(folder.resolve().parent) if inner and folder.is_dir() else name


def _load_retrieval(name: str, recipe: Mapping[str, Any], device: torch.device) -> Retrieval | None:
    """Return what finds captions for the prompts of a model that was trained with them; warn where it is not there."""
    number, folder = recipe.get("retrieved_captions"), Path(_run_of(name)) / FOLDER
    if not number:
        return None
    if not folder.is_dir():
        logger.warning(
            "model '%s' was trained with the captions of %d similar images in each prompt; its folder '%s', which is "
            "never pushed, is not there: it writes without them, which it was not trained for", name, number, FOLDER
        )  # fmt: skip
        return None
    pool, given = Pool.load(folder), recipe.get("retriever", "")
    try:
        return Retrieval(pool, Retriever.from_pretrained(given, device, recipe.get("retriever_revision")), number)
    except UserError as error:
        mend = f"correct 'retriever' in {RECIPE}, or remove '{folder}' to caption without retrieved captions"
        raise UserError(f"model '{name}': {str(error).rsplit('; ', 1)[0]}; {mend}") from error
