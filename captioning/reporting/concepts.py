"""The concepts of a run's images: predicted by several systems, scored side by side, and listed one by one.

In `scores.json`, `concept_detection` of a split has, where its images have concepts:

    systems     key of `SYSTEMS` -> the scores of `detection_scores`, each with value, low and high (95 % confidence
                interval) and signature; threshold, where all concepts have the same
    of          the first of them, to which belong
    concepts    the rows of `concept_table`, with name
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captioning.models.concept_head import CONFIG_FILE, DEFAULT_THRESHOLD, MAX_CONCEPTS, concepts_above
from captioning.reporting.run_record import RunRecord
from captioning.scoring.captions import Captions
from captioning.scoring.concept_detection import (
    NAMES,
    SYSTEMS,
    choose_thresholds,
    concept_table,
    detection_entries,
    neighbor_votes,
)
from captioning.scoring.concepts import known_concepts
from captioning.scoring.constants import best_concepts
from captioning.scoring.training_split import Training
from captioning.training.trainer import CaptioningTrainer


def detect_concepts(
    trainer: CaptioningTrainer,
    record: RunRecord,
    captions: Captions,
    features: np.ndarray,
    split: str,
    training: Training | None,
    retrieved: np.ndarray | None = None,
) -> tuple[list[list[str]] | None, dict[str, Any]]:
    """Return the concepts that the head predicts for N images, None without one, and what `scores.json` has of them.

    The latter is empty where the images have no concepts. Thresholds are chosen on the validation split; a head keeps
    its own. `features` are float32 `[N, D]`, `training` is that of the baselines, `retrieved` by its retriever.
    """
    head, truth = trainer.captioner.concept_head, [known_concepts(cuis) for cuis in captions.cuis]
    args, chooses = trainer.args, split == "validation" and any(truth)
    predicted, thresholds = {}, {}
    if head:
        probabilities = head.probabilities(features)
        if head.thresholds is None and chooses:
            each = args.concept_thresholds == "each"
            head.thresholds = choose_thresholds(probabilities, head.concepts, truth, each)
            for folder in (record.folder, record.folder / "adapter"):
                if (folder / CONFIG_FILE).is_file():  # saved by the training of this run
                    head.save_config(folder)
        thresholds["head"] = head.thresholds
        predicted["head"] = head.predict(features)
    if not any(truth):
        return predicted.get("head"), {}
    if training and training.features is not None and any(map(known_concepts, training.neighbor_cuis)):
        own, others = (features, training.features) if retrieved is None else (retrieved, training.retrieved)
        concepts, votes = neighbor_votes(own, others, captions.image_ids, training, args.concept_neighbors)
        if chooses:
            thresholds["neighbors"] = choose_thresholds(votes, concepts, truth)
        else:
            before = record.scores.get("validation", {}).get("concept_detection", {"systems": {}})["systems"]
            thresholds["neighbors"] = [before.get("neighbors", {}).get("threshold") or DEFAULT_THRESHOLD]
        predicted["neighbors"] = concepts_above(votes, concepts, thresholds["neighbors"])
    if training and (known := [own for own in map(known_concepts, training.cuis) if own]):
        predicted["frequent"] = [best_concepts(known)] * len(captions)
    if training and not training.extractor.reason:
        predicted["captions"] = [sorted(own) for own in training.extractor.predict(captions.predictions)]
    if head:
        predicted["bound"] = [sorted(own.intersection(head.concepts)) for own in truth]
    names = NAMES | (head.names if head else {})
    return predicted.get("head"), _scored(predicted, thresholds, truth, names) if predicted else {}


def _scored(
    predicted: Mapping[str, Sequence[Sequence[str]]],
    thresholds: Mapping[str, Sequence[float] | None],
    truth: Sequence[frozenset[str]],
    names: Mapping[str, str],
) -> dict[str, Any]:
    systems = {}
    for key in (key for key in SYSTEMS if key in predicted):
        systems[key] = detection_entries([set(own[:MAX_CONCEPTS]) for own in predicted[key]], truth)
        if len(common := set(thresholds.get(key) or ())) == 1:
            systems[key]["threshold"] = common.pop()
    first = next(iter(systems))
    rows = concept_table([set(own) for own in predicted[first]], truth)
    return {"systems": systems, "of": first, "concepts": [row | {"name": names.get(row["cui"])} for row in rows]}
