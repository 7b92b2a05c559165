"""What a run keeps of each split that it captioned: predictions, scores beside their floors, submission, page.

The Trainer's metrics of a split are made epoch after epoch and are few; these are made once, at the end.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

import rocov2
from clinical import modality_of
from collator import open_image
from floors import sample_rows
from metrics import decode_captions
from predictions import Captions, read_predictions, write_predictions, write_submission, write_whole
from report_page import write_report
from scoring import Training, flat, score
from trainer import CaptioningTrainer


SHOWN_ATTENTION = 4  # captions of each kind (first, best, worst) whose attention the page shows


def training_for_floors(
    trainer: CaptioningTrainer, dataset: DatasetDict, splits: DatasetDict, neighbour_samples: int
) -> Training | None:
    """Return what floors and concepts are made of, None where there is no training split or nothing is captioned.

    Args:
        trainer: its model looks at the training images among which the nearest is sought.
        dataset: what was loaded, unchecked. A run that only scores takes the captions from here.
        splits: what was checked and tokenised.
        neighbour_samples: most images.
    """
    if not trainer.args.predict_with_generate or "train" not in dataset:
        return None
    captions, cuis = rocov2.texts(splits["train"] if trainer.args.do_train else dataset["train"])
    if not captions:
        return None
    if "train" not in splits or not neighbour_samples:
        return Training(captions, cuis)
    rows = splits["train"].select(sample_rows(len(splits["train"]), neighbour_samples))
    return Training(captions, cuis, trainer.image_features(rows), list(rows["caption"]))


def keep_split(
    trainer: CaptioningTrainer,
    rows: Dataset,
    tokens: np.ndarray,
    nll: np.ndarray,
    split: str,
    training: Training | None,
) -> dict[str, float]:
    """Write predictions and scores of a split, and return its scores by the names of the result files.

    Args:
        trainer: the trainer that captioned it.
        rows: N rows of the tokenised split.
        tokens: int `[N, T]`, what was generated, padded with the padding token or -100.
        nll: `[N]`, the negative log-likelihood of each reference in nats.
        split: `validation` or `test`.
        training: see `training_for_floors`; None makes the floors of the references.

    Returns:
        On the main process; an empty dict on the others, which only help to look at the images.
    """
    features = None if training is None or training.features is None else trainer.image_features(rows)
    if not trainer.is_world_process_zero():
        return {}
    folder, args = Path(trainer.args.output_dir), trainer.args
    captions = Captions(
        list(rows["image_id"]), decode_captions(tokens, trainer.tokenizer), list(rows["caption"]), list(rows["cui"])
    )
    path = folder / "predictions" / f"{split}.jsonl"
    write_predictions(path, captions, nll)
    scores = score(captions, training, features, "ptb" if args.coco_metrics else None, args.bertscore_model)
    write_scores(folder, split, scores)
    if args.write_submission and split == "test":
        write_submission(folder, captions.image_ids, captions.predictions)
    return flat(scores)


def write_scores(folder: Path, split: str, scores: dict[str, Any]) -> None:
    """Write the scores of a split into `scores.json`, beside those of the other."""
    path = folder / "scores.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_whole(path, json.dumps(known | {split: scores}, indent=2, ensure_ascii=False) + "\n")


def write_page(trainer: CaptioningTrainer, rows: Dataset, tokens: np.ndarray, split: str) -> None:
    """Write `report.html` of a split, with the cross-attention of its first, its best and its worst captions.

    Args:
        trainer: the trainer that captioned it.
        rows: N rows of the tokenised split.
        tokens: int `[N, T]`, what was generated.
        split: whose `predictions/<split>.jsonl` is written.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    ranked = np.argsort([-row["rougeL"] for row in read_predictions(folder / "predictions" / f"{split}.jsonl")])
    chosen = list(
        dict.fromkeys(
            [
                *range(len(ranked))[:SHOWN_ATTENTION],
                *ranked[:SHOWN_ATTENTION].tolist(),
                *ranked[-SHOWN_ATTENTION:].tolist(),
            ]
        )
    )
    attention = trainer.word_attention(rows.select(chosen), tokens[chosen])
    write_report(
        folder,
        split,
        images=(open_image(row["image"]) for row in rows.select_columns("image")),
        modalities=[modality_of(cui, caption) for cui, caption in zip(rows["cui"], rows["caption"], strict=True)],
        attention={rows[row]["image_id"]: words for row, words in zip(chosen, attention, strict=True)},
    )
