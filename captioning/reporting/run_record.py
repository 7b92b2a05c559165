"""What an output folder says of its run, read once: the summary, the card and the page are all made from it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from captioning.data.checks import read_rejected, reasons_in_words
from captioning.data.leaks import Leaks, leaks_in_words
from captioning.hub.revisions import COMMIT_HASH
from captioning.models.captioner import Captioner, CardFacts
from captioning.models.load import captioner_class
from captioning.models.lora import BASE_CONFIG
from captioning.scoring.captions import read_predictions
from captioning.training.decoding import generation_config, in_words


ROCOV2 = "eltorio/ROCOv2-radiology"
SPLITS = {"test": "predict", "validation": "eval"}  # with the prefix of their metrics; where one is shown, the first
# Which a recipe lacks
RECIPE_DEFAULTS = {"do_train": True, "use_peft": False, "merge_lora": False, "torch_dtype": "float32"}
RECIPE_DEFAULTS |= {"language": "en", "license": None, "publish_images": False, "tuned_decoding": {}, "code": {}}
RECIPE_DEFAULTS |= {"hardware": {"device": "cpu", "processor": "unknown", "threads": "unknown", "processes": 1}}


@dataclass(frozen=True)
class Origin:
    """Where a model or a dataset came from: its id and commit on the Hub, or the last part of its path and None."""

    id: str
    revision: str | None = None

    @classmethod
    def of(cls, given: str, revision: str | None) -> "Origin":
        """Return the origin of what a recipe names; the recipe holds the commit of all that came from the Hub."""
        if revision and COMMIT_HASH.fullmatch(revision):
            return cls(given, revision)
        return cls(re.sub(r"[^\w.-]+", "-", PureWindowsPath(given).name) or "local")  # as an id on the Hub

    def in_words(self, digits: int) -> str:
        """Return the id, with that many digits of the commit."""
        return f"{self.id} @ {self.revision[:digits]}" if self.revision else self.id


class RunRecord:
    """A run by the files of its output folder, each of which is read at most once, when it is first asked for.

    The folder has `recipe.json` at least. Ask for `results` after the last of them has been written. `model_type` is
    by default that of the model saved in the folder, BLIP's if there is none. `found_leaks`: see `find_leaks`.
    """

    def __init__(self, folder: str | Path, model_type: str | None = None, found_leaks: Mapping[str, Leaks] = {}):
        self.folder = Path(folder)
        self._model_type, self._found_leaks = model_type, found_leaks
        self._predictions: dict[str, list[dict[str, Any]]] = {}

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """`recipe.json`, with the defaults of keys that it lacks."""
        return RECIPE_DEFAULTS | self._read("recipe.json")

    @cached_property
    def results(self) -> Mapping[str, float | None]:
        """`all_results.json`: the metrics of all stages, each with the prefix of its stage; None for NaN."""
        return self._read("all_results.json")

    @cached_property
    def scores(self) -> dict[str, Any]:
        """`scores.json`: for each split what `scoring.score.score` returns."""
        return self._read("scores.json")

    @cached_property
    def log_history(self) -> list[dict[str, float | None]]:
        """The Trainer's log, empty if the run did not train; None for NaN."""
        return self._read("trainer_state.json").get("log_history", [])

    @cached_property
    def sample(self) -> dict[str, Any]:
        """`sample.json`, see `write_card_images`."""
        return self._read("sample.json")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json` of the model, or of what an adapter adapts; empty if no model was saved."""
        return self._read("config.json") or self._read(BASE_CONFIG)

    def predictions(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of `predictions/<split>.jsonl`, none if the split was not captioned."""
        if split not in self._predictions:
            path = self.folder / "predictions" / f"{split}.jsonl"
            self._predictions[split] = read_predictions(path) if path.is_file() else []
        return self._predictions[split]

    def keep(self, split: str, predictions: list[dict[str, Any]], scores: dict[str, Any]) -> None:
        """Take over what the run has found on a split, so that it is not read back."""
        self._predictions[split] = predictions
        self.scores[split] = scores | ({"leaks": leaks} if (leaks := self._found_leaks.get(split)) else {})

    def _read(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    # --- What was run on what ---------------------------------------------------------------------------------

    @cached_property
    def model_type(self) -> str:
        """The family of the model."""
        return self._model_type or self.config.get("model_type") or "blip"

    @property
    def captioner_class(self) -> type[Captioner]:
        """The class of the model."""
        return captioner_class(self.model_type, str(self.folder))

    @property
    def card_facts(self) -> CardFacts:
        """What the card says of the family of the model."""
        return self.captioner_class.card_facts(self.model_type)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, and not a whole model."""
        return bool(self.recipe["do_train"] and self.recipe["use_peft"] and not self.recipe["merge_lora"])

    @cached_property
    def start(self) -> Origin | None:
        """The checkpoint that was fine-tuned or scored; None for a model that was built from a config."""
        given = self.recipe["model_name_or_path"]
        return Origin.of(given, self.recipe["model_revision"]) if given else None

    @cached_property
    def data(self) -> Origin:
        """The dataset. A local copy of ROCOv2 has the id of that on the Hub."""
        found = Origin.of(self.recipe["dataset_name"], self.recipe["dataset_revision"])
        return Origin(ROCOV2) if self.data_kind == "rocov2" and not found.revision else found

    @cached_property
    def data_kind(self) -> str:
        """`phantoms`, `rocov2` (by the id of the dataset or of its images), or `other`."""
        given = self.recipe["dataset_name"]
        if given == "phantoms":
            return given
        first = [row["image_id"] for split in SPLITS for row in self.predictions(split)[:1]]
        is_rocov2 = given == ROCOV2 or any(image_id.startswith("ROCOv2_") for image_id in first)
        return "rocov2" if is_rocov2 else "other"

    @property
    def may_publish_images(self) -> bool:
        """Whether images of the dataset may go into the card: phantoms, or by the user's word."""
        return self.data_kind == "phantoms" or self.recipe["publish_images"]

    @cached_property
    def captioned(self) -> str | None:
        """The split that is shown: test if it was captioned, else validation, else None."""
        return next((split for split in SPLITS if self.predictions(split)), None)

    @cached_property
    def data_in_words(self) -> str:
        """The dataset as a reader knows it."""
        local = {"phantoms": "phantoms, synthetic images", "rocov2": "a local copy of ROCOv2"}
        return self.data.id if self.data.revision else local.get(self.data_kind, f"the folder {self.data.id}")

    @property
    def leaks(self) -> list[str]:
        """Sentences on rows of scored splits that an earlier split has too, and on decoding chosen on a scored one."""
        note = "validation" in self.scores and self.recipe["tuned_decoding"].get("note")
        found = [f"validation: {note}"] if note else []
        for split, scores in self.scores.items():
            found += leaks_in_words(split, scores["captions"], scores["leaks"]) if "leaks" in scores else []
        return found

    @property
    def left_out(self) -> list[str]:
        """How many rows of each split are in `rejected.jsonl`, and why: a sentence for each."""
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in read_rejected(self.folder / "rejected.jsonl"):
            found.setdefault(entry["split"], []).append(entry)
        return [f"{split}: rows left out: {len(own):,} ({reasons_in_words(own)})" for split, own in found.items()]

    def facts(self, digits: int) -> dict[str, str]:
        """Return the model, the data and the decode settings in words, commits with that many digits."""
        trained = self.recipe["do_train"]
        if self.start:
            model = f"{'fine-tuned from ' if trained else ''}{self.start.in_words(digits)}"
        else:
            model = f"{Path(self.recipe['config_name']).stem}, {'trained from ' if trained else ''}random weights"
        data = self.data.in_words(digits) if self.data.revision else self.data_in_words
        found = {"model": model, "data": data, "decoding": in_words(generation_config(self.recipe))}
        if number := self.recipe.get("retrieved_captions"):
            by = Origin.of(self.recipe["retriever"], self.recipe.get("retriever_revision")).in_words(digits)
            found["prompt"] = f"with the captions of the {number} nearest training images, found by {by}"
        return found
