"""All scores of a set of captions, beside what they are worth: floors, intervals, modalities, a test of two systems.

    scores = score(captions, Training(train_captions, train_cuis))    # a dict that JSON can hold
    print(table(scores))

`python metrics.py` is the command; `run_captioning.py` scores each split with the same function. The form of the dict
is that of `scores.json`, where it stands under the name of its split:

    captions, unique_captions, verdict, beats_constant
    scores      name -> value, low and high (95 % interval), floors (name -> value), ceiling
    floors      name -> caption or how it was made
    modalities  name -> captions, and scores as above
    missing     name -> what a score that was not computed needs
"""

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import clinical
import library_metrics
from concepts import ConceptExtractor, concept_f1, known_concepts
from errors import UserError
from floors import constant_caption, nearest_captions, shuffled, typical_captions
from intervals import Comparison, Score, compare, interval, resampled, resampling_counts
from metrics import imageclef_rouge1, rouge
from predictions import Captions, check_ids, read_captions, read_csv, split_cuis


logger = logging.getLogger("captioning.scoring")

HEADLINE = "rougeL"
FLOORS = {
    "shuffled_references": "the reference of another image",
    "constant": "the best constant caption",
    "typical_of_modality": "the most typical caption of the true modality",
    "nearest_image": "the caption of the nearest training image",
    "shuffled_images": "the model's caption of another image",
}
METEOR_CAPTIONS = 20_000
HEADINGS = {
    "shuffled_references": "other refs",
    "constant": "constant",
    "typical_of_modality": "modality",
    "nearest_image": "nearest",
    "shuffled_images": "other images",
}
# Scores that a table by modality shows; BLEU and METEOR are of a corpus, and few captions make no corpus
BY_MODALITY = (HEADLINE, "rouge1", "imageclef_rouge1", *(f"{name}_f1" for name in clinical.ATTRIBUTES), "concept_f1")


@dataclass(frozen=True)
class Training:
    """The training split, as far as floors and concepts are made of it.

    Attributes:
        captions: M captions.
        cuis: the concepts of each image, empty where none are known.
        features: float `[M, H]` of the images whose captions are `neighbours`; None without a model.
        neighbours: the captions of these images, where they are fewer than all.
    """

    captions: Sequence[str]
    cuis: Sequence[Sequence[str]]
    features: np.ndarray | None = None
    neighbours: Sequence[str] | None = None

    @cached_property
    def constant(self) -> str:
        """The training caption that agrees best with the training captions."""
        return constant_caption(self.captions, self.captions)

    @cached_property
    def typical(self) -> dict[str, str]:
        """The same for each modality."""
        modalities = [clinical.modality_of(c, text) for c, text in zip(self.cuis, self.captions, strict=True)]
        return typical_captions(self.captions, modalities)

    @cached_property
    def extractor(self) -> ConceptExtractor:
        """What reads concepts from a caption, learned from the pairs of the training split."""
        return ConceptExtractor().fit(self.captions, self.cuis)


# --- Score ----------------------------------------------------------------------------------------------------


def score(
    captions: Captions,
    training: Training | None = None,
    features: np.ndarray | None = None,
    tokenizer: str | None = "ptb",
    bertscore_model: str | None = None,
) -> dict[str, Any]:
    """Score the captions of a system, its floors, and its captions by modality.

    Args:
        captions: of N images.
        training: the training split; without it the floors are made of the references themselves.
        features: float `[N, H]` of the images, for the nearest training image.
        tokenizer: of the COCO metrics, `ptb` or `whitespace`; None leaves them out.
        bertscore_model: the weights of BERTScore; None leaves it out.

    Returns:
        The dict described at the top of this file; what is not defined is None.
    """
    modalities = [clinical.modality_of(c, text) for c, text in zip(captions.cuis, captions.references, strict=True)]
    floors, notes = _floors(captions, modalities, training, features)
    systems = {"": captions.predictions, **floors}
    missing: dict[str, str] = {}
    scores = {name: _caption_scores(texts, captions.references) for name, texts in systems.items()}
    if tokenizer:
        for name, found in _coco_scores(systems, captions.references, tokenizer, missing).items():
            scores[name] |= found
    if bertscore_model:
        found, reason = library_metrics.bertscore(captions.predictions, captions.references, bertscore_model)
        scores[""] |= {"imageclef_bertscore": found} if found else {}
        missing |= {"imageclef_bertscore": reason} if reason else {}
    ceilings = _concept_scores(systems, captions, training, scores, missing)

    counts = resampling_counts(len(captions))
    entries = {}
    for name, own in scores[""].items():
        entries[name] = _entry(own, counts)
        entries[name]["floors"] = {f: _finite(scores[f][name].value) for f in floors if name in scores[f]}
        if name in ceilings:
            entries[name]["ceiling"] = _finite(ceilings[name])
    return {
        "captions": len(captions),
        "unique_captions": len(set(captions.predictions)) / len(captions),
        **_verdict(scores, counts),
        "scores": entries,
        "floors": notes,
        "modalities": _by_modality(scores[""], modalities, counts),
        "missing": missing,
    }


def _caption_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    scores = {name: Score.of(values) for name, values in rouge(predictions, references).items()}
    scores["imageclef_rouge1"] = Score.of(imageclef_rouge1(predictions, references))
    return scores | {f"{name}_f1": found for name, found in clinical.agreement(predictions, references).items()}


def _floors(
    captions: Captions, modalities: Sequence[str], training: Training | None, features: np.ndarray | None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the captions of each floor, `[N]`, and what is to be said of it."""
    number = len(captions)
    if training:
        source = f"{len(training.captions):,} training captions"
        constant, typical = training.constant, training.typical
    else:
        source = f"the {number:,} references themselves"
        constant = constant_caption(captions.references, captions.references)
        typical = typical_captions(captions.references, modalities)
    floors = {
        "shuffled_references": shuffled(captions.references),
        "constant": [constant] * number,
        "typical_of_modality": [typical.get(modality, constant) for modality in modalities],
    }
    if training and training.features is not None and features is not None:
        neighbours = training.captions if training.neighbours is None else training.neighbours
        floors["nearest_image"] = nearest_captions(features, training.features, neighbours)
    floors["shuffled_images"] = shuffled(captions.predictions)
    notes = {name: {"what": FLOORS[name]} for name in floors}
    notes["constant"] |= {"caption": constant, "found_among": source}
    notes["typical_of_modality"] |= {"captions": typical, "found_among": source}
    if "nearest_image" in floors:
        notes["nearest_image"]["found_among"] = f"{len(neighbours):,} training images"
    return floors, notes


def _coco_scores(
    systems: Mapping[str, Sequence[str]], references: Sequence[str], tokenizer: str, missing: dict[str, str]
) -> dict[str, dict[str, Score]]:
    """Return the COCO metrics of each system; what cannot be computed is added to `missing`."""
    prefix = library_metrics.TOKENIZERS[tokenizer]
    try:
        reference_tokens = library_metrics.coco_tokens(references, tokenizer)
        tokens = {name: library_metrics.coco_tokens(texts, tokenizer) for name, texts in systems.items()}
    except library_metrics.MissingError as error:
        missing[f"{prefix}_*"] = str(error)
        return {name: {} for name in systems}
    # METEOR takes 0.7 ms a caption, more than all else: beyond its share only the floor that matters most has it
    number = max(2, METEOR_CAPTIONS // len(references))
    chosen = sorted(tokens, key=lambda name: name not in ("", "constant"))[:number]
    found, reasons = library_metrics.coco_scores_of_systems(tokens, reference_tokens, prefix, chosen)
    missing |= reasons
    return found


def _concept_scores(
    systems: Mapping[str, Sequence[str]],
    captions: Captions,
    training: Training | None,
    scores: Mapping[str, dict[str, Score]],
    missing: dict[str, str],
) -> dict[str, float]:
    """Add `concept_f1` to the scores of each system, and return its ceiling."""
    if not training:
        missing["concept_f1"] = "needs the captions and concepts of the training split"
        return {}
    truth = [known_concepts(cuis) for cuis in captions.cuis]
    reason = training.extractor.reason if any(truth) else "the images have no concepts (column cui)"
    if reason:
        missing["concept_f1"] = reason
        return {}

    def of(texts: Sequence[str]) -> Score:
        return concept_f1(training.extractor.predict(texts), truth)

    for name, texts in systems.items():
        scores[name]["concept_f1"] = of(texts)
    return {"concept_f1": of(captions.references).value}


def _entry(own: Score, counts: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float | None]:
    low, high = interval(resampled(own, counts, rows))
    value = own.value if rows is None else own.of_rows(rows)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _by_modality(scores: Mapping[str, Score], modalities: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    of_image = np.array(modalities)
    names, sizes = np.unique(of_image, return_counts=True)
    return {
        str(name): {
            "captions": int(size),
            **{key: _entry(scores[key], counts, of_image == name) for key in BY_MODALITY if key in scores},
        }
        for name, size in sorted(zip(names, sizes, strict=True), key=lambda pair: (-pair[1], pair[0]))
    }


def _verdict(scores: Mapping[str, Mapping[str, Score]], counts: np.ndarray) -> dict[str, Any]:
    """Say whether the captions beat the constant one, what looking at the image adds, and which floors are higher.

    A difference whose interval holds 0 is none: `beats_constant` needs all of it above 0.
    """
    own = scores[""][HEADLINE]
    values = {floor: scores[floor][HEADLINE].value for floor in FLOORS if floor in scores}
    constant = compare(own, scores["constant"][HEADLINE], counts)
    gain = compare(own, scores["shuffled_images"][HEADLINE], counts)
    if constant.low > 0:
        relation = "beats"
    elif constant.difference > 0:
        relation = "is not surely above"
    else:
        relation = "does NOT beat"
    sentences = [
        f"ROUGE-L {own.value:.4f} {relation} the best constant caption ({values['constant']:.4f})",
        f"looking at the image adds {gain.difference:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})",
    ]
    higher = [f"{FLOORS[f]} ({value:.4f})" for f, value in values.items() if value > own.value and f != "constant"]
    if higher:
        sentences.append(f"higher than the captions is {' and '.join(higher)}")
    return {"verdict": f"{'; '.join(sentences)}.", "beats_constant": constant.low > 0}


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores by the names that the Trainer's result files have: `rougeL`, `rougeL_constant`, ...

    Of the floors only those of ROUGE-L; all of them are in `scores.json`.
    """
    values = {name: entry["value"] for name, entry in scores["scores"].items()}
    values |= {f"{HEADLINE}_{floor}": value for floor, value in scores["scores"][HEADLINE]["floors"].items()}
    return {name: value for name, value in values.items() if value is not None}


# --- Show -----------------------------------------------------------------------------------------------------


def table(scores: Mapping[str, Any]) -> str:
    """Return the scores as text: each with its interval and its floors, then the modalities, what is missing, why."""
    floors = list(scores["floors"])
    width = max(len(name) for name in scores["scores"]) + 2
    lines = [f"{scores['captions']:,} captions, {scores['unique_captions']:.1%} of them distinct", ""]
    lines.append(" " * width + f"{'score':>8}  {'95 % interval':<17}" + "".join(f"{HEADINGS[f]:>13}" for f in floors))
    for name, entry in scores["scores"].items():
        row = f"{name:<{width}}{_number(entry['value']):>8}  {_number(entry['low'])} - {_number(entry['high']):<8}"
        row += "".join(f"{_number(entry['floors'].get(floor)):>13}" for floor in floors)
        lines.append(row + (f"   ceiling {_number(entry['ceiling'])}" if "ceiling" in entry else ""))
    lines += ["", *(f"{HEADINGS[name]}: {note['what']}" for name, note in scores["floors"].items())]
    constant = scores["floors"]["constant"]
    lines += [f"  the constant caption, found among {constant['found_among']}: {constant['caption']}", ""]
    lines.append(f"{'modality':<{width}}{'captions':>8}  " + "".join(f"{name:>18}" for name in BY_MODALITY[:3]))
    for name, own in scores["modalities"].items():
        cells = "".join(f"{_number(own[key]['value']):>18}" for key in BY_MODALITY[:3])
        lines.append(f"{name:<{width}}{own['captions']:>8,}  {cells}")
    lines += ["", *(f"not computed: {name}: {reason}" for name, reason in scores["missing"].items())]
    return "\n".join([*lines, scores["verdict"]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


# --- Command --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Score the captions of any system, or test them against those of another."""
    parser = argparse.ArgumentParser(prog="metrics.py", description=main.__doc__)
    parser.add_argument("predictions", help="JSON lines of a run, or a CSV of ID,Caption")
    parser.add_argument("--references", help="CSV of ID,Caption; JSON lines have their own")
    parser.add_argument("--concepts", help="CSV of ID,CUIs: the concepts of these images; JSON lines have their own")
    parser.add_argument("--train", help="CSV of ID,Caption: the training split, of which floors are made")
    parser.add_argument("--train_concepts", help="CSV of ID,CUIs of the training split, for concept_f1")
    parser.add_argument("--against", help="predictions of another system on the same images, for a paired test")
    parser.add_argument("--tokenizer", choices=[*library_metrics.TOKENIZERS, "none"], default="ptb")
    parser.add_argument(
        "--bertscore_model", help="folder or Hub id of the weights, e.g. microsoft/deberta-xlarge-mnli"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    captions = read_captions(arguments.predictions, arguments.references, arguments.concepts)
    tokenizer = None if arguments.tokenizer == "none" else arguments.tokenizer
    if arguments.against:
        other = read_captions(arguments.against, arguments.references, arguments.concepts)
        result = compare_captions(captions, other, arguments.predictions, arguments.against)
        print(json.dumps(result, indent=2) if arguments.json else comparison_table(result))
        return
    scores = score(captions, _training(arguments), None, tokenizer, arguments.bertscore_model)
    print(json.dumps(scores, indent=2, ensure_ascii=False) if arguments.json else table(scores))


def _training(arguments: argparse.Namespace) -> Training | None:
    if arguments.train_concepts and not arguments.train:
        raise UserError("--train_concepts goes with --train, the CSV of ID,Caption of the training split")
    if not arguments.train:
        return None
    captions = read_csv(arguments.train, "Caption")
    if not captions:
        raise UserError(f"'{arguments.train}' holds no captions; give a file with at least one")
    cuis = read_csv(arguments.train_concepts, "CUIs") if arguments.train_concepts else {}
    return Training(list(captions.values()), [split_cuis(cuis.get(image_id, "")) for image_id in captions])


# --- Two systems ----------------------------------------------------------------------------------------------


def compare_captions(first: Captions, second: Captions, first_name: str, second_name: str) -> dict[str, Any]:
    """Return for each score both values, their difference, its interval and p-value.

    Raises:
        UserError: the two are not about the same images.
    """
    if sorted(first.image_ids) != sorted(second.image_ids):
        check_ids(second.image_ids, first.image_ids, second_name, first_name)
    order = {image_id: row for row, image_id in enumerate(second.image_ids)}
    rows = [order[image_id] for image_id in first.image_ids]
    differ = [i for i, row in enumerate(rows) if first.references[i] != second.references[row]]
    if differ:
        raise UserError(
            f"'{first_name}' and '{second_name}' have other references for {len(differ)} images "
            f"({first.image_ids[differ[0]]}); both must be scored on the same data"
        )
    counts = resampling_counts(len(first))
    ours = _caption_scores(first.predictions, first.references)
    theirs = _caption_scores([second.predictions[row] for row in rows], first.references)
    return {
        "captions": len(first),
        "systems": [first_name, second_name],
        "scores": {name: _comparison(ours[name], theirs[name], counts) for name in ours},
    }


def _comparison(first: Score, second: Score, counts: np.ndarray) -> dict[str, float | None]:
    found: Comparison = compare(first, second, counts)
    return {
        "first": _finite(first.value),
        "second": _finite(second.value),
        "difference": _finite(found.difference),
        "low": _finite(found.low),
        "high": _finite(found.high),
        "p_value": _finite(found.p_value),
    }


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the result of `compare_captions` as text."""
    first, second = result["systems"]
    lines = [f"{result['captions']:,} captions; first: {first}; second: {second}", ""]
    lines.append(f"{'':<20}{'first':>8}{'second':>8}{'difference':>12}  {'95 % interval':<20}{'p':>8}")
    for name, row in result["scores"].items():
        difference, low, high = (_signed(row[key]) for key in ("difference", "low", "high"))
        p_value = _number(row["p_value"])
        lines.append(
            f"{name:<20}{_number(row['first']):>8}{_number(row['second']):>8}{difference:>12}  "
            f"{f'{low} to {high}':<20}{p_value:>8}"
        )
    lines += ["", "p: approximate randomisation, two-sided; the difference is the first's score minus the second's."]
    return "\n".join(lines)
