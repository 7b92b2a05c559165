"""What a run keeps of each split that it captioned: predictions, scores beside their baselines, submission, page.

The Trainer's few metrics of a split are computed each epoch; these are computed once, at the end.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from captioning.data import checks
from captioning.data.images import open_image
from captioning.data.retrieve import cached_features
from captioning.data.splits import NEIGHBORS
from captioning.files import to_json, write_whole
from captioning.models.retriever import Retriever
from captioning.reporting.concepts import detect_concepts
from captioning.reporting.page import write_report
from captioning.reporting.run_record import RunRecord
from captioning.scoring.captions import Captions, write_predictions
from captioning.scoring.clinical import modality_of
from captioning.scoring.score import flat, score
from captioning.scoring.submission import write_concepts, write_submission
from captioning.scoring.training_split import Training
from captioning.stages import stage
from captioning.training.arguments import DataArguments
from captioning.training.self_critical import SelfCritical, parse_reward
from captioning.training.trainer import CaptioningTrainer, Evaluated


logger = logging.getLogger(__name__)

SHOWN_ATTENTION = 4  # captions of each order whose attention the page shows


@stage("baselines")
def training_for_baselines(
    trainer: CaptioningTrainer, dataset: DatasetDict, splits: DatasetDict, data_args: DataArguments
) -> Training | None:
    """Return what baselines and concepts are made of, None where there is no training split or nothing is captioned.

    A run that only scores takes the captions from `dataset`, which is not checked.
    """
    args = trainer.args
    if not (args.do_eval or args.do_predict) or not args.predict_with_generate or "train" not in dataset:
        return None
    texts = checks.texts(splits["train"] if args.do_train else dataset["train"])
    captions, cuis = (column[: data_args.max_train_samples] for column in texts)
    if not captions:
        return None
    if NEIGHBORS not in splits:
        return Training(captions, cuis)
    rows = splits[NEIGHBORS]
    columns = (list(rows[column]) for column in ("caption", "cui", "image_id"))
    training = Training(captions, cuis, trainer.image_features(rows), *columns)
    if not args.retriever or not trainer.is_world_process_zero():
        return training
    retriever = Retriever.from_pretrained(args.retriever, args.device, args.retriever_revision)
    return replace(training, retriever=retriever, retrieved=cached_features(retriever, rows))


@stage("scores")
def keep_split(
    trainer: CaptioningTrainer,
    record: RunRecord,
    rows: Dataset,
    found: Evaluated,
    split: str,
    training: Training | None,
) -> dict[str, float]:
    """Write predictions and scores of a split, and return its scores by the names of the result files.

    `found` was generated for the N tokenized `rows`; `record` gets predictions and scores. Without `training`, see
    `training_for_baselines`, the baselines are made of the references. Other processes than the main one return {}.
    """
    if not trainer.is_world_process_zero():
        return {}
    folder, args = record.folder, trainer.args
    captions = Captions(list(rows["image_id"]), found.captions, list(rows["caption"]), list(rows["cui"]))
    features = cached_features(training.retriever, rows) if training and training.retriever else None
    concepts, detection = detect_concepts(trainer, record, captions, found.features, split, training, features)
    retrieved = list(rows["retrieved_ids"]) if "retrieved_ids" in rows.column_names else None
    file = folder / "predictions" / f"{split}.jsonl"
    predictions = write_predictions(file, captions, found.nll, concepts, retrieved)
    bound = trainer.captioner.round_trip(captions.references) if trainer.captioner.loses_surface_form else None
    tokenizer = "ptb" if args.coco_metrics else None
    scores = score(captions, training, found.features, tokenizer, args.bertscore_model, bound)
    if detection:
        scores["concept_detection"] = detection
    rewarded = parse_reward(args.reward) if isinstance(trainer.objective, SelfCritical) else ()
    for name in scores["scores"].keys() & rewarded:  # held-out scores are read otherwise
        scores["scores"][name]["rewarded"] = True
    record.keep(split, predictions, scores)
    write_whole(folder / "scores.json", to_json(record.scores, indent=2, ensure_ascii=False) + "\n")
    if not scores["beats_constant"]:
        logger.warning("%s: %s Look next at the worst captions in report.html", split, scores["verdict"])
    if args.write_submission and split == "test":
        write_submission(folder, captions.image_ids, captions.predictions)
        if concepts:
            write_concepts(folder, captions.image_ids, concepts)
    return flat(scores)


@stage("page")
def write_page(trainer: CaptioningTrainer, record: RunRecord, rows: Dataset, found: Evaluated, split: str) -> None:
    """Write `report.html` of a split, with the attention maps of some captions. A failure is logged, and no more.

    `record` has predictions and scores of the split, `found` was generated for its N tokenized `rows`.
    """
    if not trainer.is_world_process_zero():
        return
    try:
        chosen = shown_with_attention(record.predictions(split))
        attended = rows.select(chosen)
        attention = trainer.word_attention(attended, found.tokens[chosen])
        retrieved = []
        if "retrieved" in rows.column_names:
            in_prompts = zip(rows["retrieved_ids"], rows["retrieved"], strict=True)
            retrieved = [list(zip(*own, strict=True)) for own in in_prompts]
        write_report(
            record,
            split,
            images=(open_image(row["image"]) for row in rows.select_columns("image")),
            modalities=[modality_of(cui, caption) for cui, caption in zip(rows["cui"], rows["caption"], strict=True)],
            attention=dict(zip(attended["image_id"], attention, strict=True)),
            num_tokens=found.num_tokens.tolist(),
            retrieved=retrieved,
        )
    except Exception as error:  # the page is made of what is on disk already: no reason to lose card and push
        logger.error("report.html cannot be written: %s: %s", type(error).__name__, error)
        logger.debug("The page failed here", exc_info=True)


def shown_with_attention(predictions: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the rows that come first in each order of the page: the data's, best, worst, most frequent."""
    scores = np.array([row["rougeL"] for row in predictions])
    counts = Counter(row["prediction"] for row in predictions)
    uses = np.array([counts[row["prediction"]] for row in predictions])
    orders = [np.argsort(key, kind="stable") for key in (np.zeros(len(predictions)), -scores, scores, -uses)]
    return list(dict.fromkeys(row for order in orders for row in order[:SHOWN_ATTENTION].tolist()))
