"""The captions on the report page: what each states, where it errs, and which ones are shown first."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from captioning.reporting.page_scores import score_label
from captioning.scoring import clinical
from captioning.scoring.clinical import ATTRIBUTES, stated_attributes
from captioning.scoring.concept_detection import NAMES
from metrics import wording_scores


KINDS = {f"{how}_{name}": f"{how} {name}" for how in ("wrong", "missed") for name in ATTRIBUTES}
KINDS |= {"wrong_laterality": "wrong side", "missed_laterality": "missed side", "wrong_negation": "false negation"}
KINDS |= {"empty": "empty caption", "none": "no error found"}
SHOWN_KINDS = ("wrong_laterality", "wrong_modality", "wrong_negation")  # the top of the page shows one each
UNITS = {"negation": "no {}", "measurement": "{} mm"}
NLL, NLL_PER_TOKEN = "NLL", "nats per token"
CONCEPT_NAMES = NAMES | clinical.MODALITY_CUIS

Row = dict[str, Any]


def caption_payload(
    predictions: Sequence[Mapping[str, Any]],
    modalities: Sequence[str],
    num_tokens: Sequence[int] | None,
    names: Mapping[str, str],
    retrieved: Sequence[Sequence[tuple[str, str]]],
) -> dict[str, Any]:
    """Return what the page's script is given of the N captions of a run; `names` of concepts, else `write_report`."""
    texts = [tuple(row[key] for row in predictions) for key in ("prediction", "reference")]
    nll = [row["nll"] for row in predictions]
    scores = {"rougeL": [], **(wording_scores(*texts) if predictions else {})}  # the first is on each card
    scores |= {"rougeL": [row["rougeL"] for row in predictions], NLL: nll}
    if num_tokens is not None:
        pairs = zip(nll, num_tokens, strict=True)
        scores[NLL_PER_TOKEN] = [None if value is None else value / number for value, number in pairs]
    rows = []
    for row, modality, *values in zip(predictions, modalities, *scores.values(), strict=True):
        image_id, reference, captions = row["image_id"], row["reference"], [row["prediction"]]
        cuis, detected = row.get("cui", ()), row.get("concepts")
        rows.append(caption_row(image_id, reference, captions, modality, cuis, values, detected, names))
    for row, own in zip(rows, retrieved, strict=bool(retrieved)):
        row["retrieved"] = own
    labels = [key if key in (NLL, NLL_PER_TOKEN) else score_label(key, full=True) for key in scores]
    on_card = [labels[0], NLL, NLL_PER_TOKEN]
    gallery = {"systems": ["Prediction"], "scores": labels, "onCard": on_card, "kinds": KINDS, "rows": rows}
    return gallery | {"highlights": _highlights(rows)}


def caption_row(
    image_id: str,
    reference: str,
    predictions: Sequence[str],
    modality: str,
    cuis: Iterable[str],
    scores: Iterable,
    detected: Iterable[str] | None = None,
    names: Mapping[str, str] = CONCEPT_NAMES,
) -> Row:
    """Return what the page shows of an image: its tags by prediction, and the errors of the first prediction.

    `detected` are the concepts that a system finds: right, wrong, or missed; `names` those of concepts.
    """
    read = [_tags_and_errors(text, reference, modality) for text in predictions]
    return {
        "id": image_id,
        "modality": modality,
        "reference": reference,
        "predictions": list(predictions),
        "tags": [tags for tags, _ in read],
        "kinds": read[0][1],
        "concepts": _concept_tags(list(cuis), detected, names),
        "scores": [round(float(x), 4) if x is not None and math.isfinite(x) else None for x in scores],
    }


def _concept_tags(
    cuis: Sequence[str], detected: Iterable[str] | None, names: Mapping[str, str]
) -> list[tuple[str, int]]:
    """Return concepts with their names and the number of their place: see `PLACES` of the page's script."""
    of_image, found = (3, 3, 3), set(cuis)
    if detected is not None:
        of_image, found = (4, 5, 6), set(detected)
    right, missed = ([cui for cui in cuis if (cui in found) == wanted] for wanted in (True, False))
    parts = zip(of_image, (right, missed, sorted(found.difference(cuis))), strict=True)
    return [(f"{cui} {names.get(cui, '')}".rstrip(), place) for place, own in parts for cui in own]


def _tags_and_errors(prediction: str, reference: str, modality: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the attributes that two captions state, with where each stands, and the errors of the prediction.

    A value is wrong if the reference states another in its place. A negation is false if the reference names the
    finding. The modality of an image is known where its reference has none.
    """
    said, stated = stated_attributes(prediction), stated_attributes(reference)
    text, tags, errors = clinical.plain_text(reference), [], []
    for name in ATTRIBUTES:
        known = stated[name] or {modality} & clinical.MODALITY.keys() if name == "modality" else stated[name]
        wrong = [value for value in sorted(said[name]) if not _is_among(name, value, known)]
        missed = [value for value in sorted(stated[name]) if not _is_among(name, value, said[name])]
        right = sorted(said[name].difference(wrong))
        for where, values in enumerate((right, missed, wrong)):  # in both texts, the reference, the prediction
            tags += [(UNITS.get(name, "{}").format(value), where) for value in values]
        denied = [value for value in wrong if re.search(rf"\b{re.escape(value)}(?:e?s)?\b", text)]
        if denied if name == "negation" else wrong and known:
            errors.append(f"wrong_{name}")
        elif missed:
            errors.append(f"missed_{name}")
    return tags, (errors if prediction.strip() else ["empty", *errors]) or ["none"]


def _is_among(attribute: str, value: str, others: Set[str]) -> bool:
    if attribute != "measurement" or value in others:
        return value in others
    # Lengths agree within a tolerance
    return clinical.item_agreement(attribute, [{value}], [others]).statistics[0, 0] > 0


def _highlights(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the images that the top of the page shows: best, worst, one of each kind of error, the most repeated.

    Of an error it is the caption with the highest score, which looks right. `order` and `kind` lead to more.
    """
    scored = [i for i, row in enumerate(rows) if row["scores"][0] is not None]
    ranked = sorted(scored, key=lambda i: -rows[i]["scores"][0])
    found: list[dict[str, Any]] = []

    def show(title: str, row: int, order: str = "0 highest", kind: str = "") -> None:
        found.append({"title": title, "row": row, "order": order, "kind": kind})

    if len(ranked) > 1:
        show("Best ROUGE-L", ranked[0])
        show("Worst ROUGE-L", ranked[-1], order="0 lowest")
    for kind in SHOWN_KINDS:
        if own := [i for i in ranked if kind in rows[i]["kinds"]]:
            own.sort(key=lambda i: i in [other["row"] for other in found])  # another image than those before
            show(f"{KINDS[kind].capitalize()}: {len(own):,}", own[0], kind=kind)
    texts = [row["predictions"][0] for row in rows]
    for text, number in Counter(texts).most_common(1):
        if number > 1:
            show(f"Most repeated: {number:,} times", texts.index(text), order="uses")
    return found
