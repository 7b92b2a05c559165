"""The command `python metrics.py`: all scores of any system's captions, as a table or JSON; a test of two systems."""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from captioning.errors import UserError
from captioning.scoring import coco
from captioning.scoring.captions import Captions, _in_order, check_ids, printable, read_captions, read_csv, split_cuis
from captioning.scoring.score import (
    BY_MODALITY,
    HEADINGS,
    Training,
    compare_captions,
    score,
)


logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Score the captions of any system beside their baselines, or test them against those of another system."""
    parser = argparse.ArgumentParser(prog="metrics.py", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("predictions", help="JSON lines of a run, or a CSV of ID,Caption")
    parser.add_argument("--references", help="CSV of ID,Caption; JSON lines have their own")
    parser.add_argument("--concepts", help="CSV of ID,CUIs: the concepts of these images; JSON lines have their own")
    parser.add_argument("--train", help="CSV of ID,Caption: the training split, of which baselines are made")
    parser.add_argument("--train_concepts", help="CSV of ID,CUIs of the training split, for concept_f1")
    parser.add_argument("--against", help="captions of another system for the same images, for a paired test")
    parser.add_argument(
        "--tokenizer",
        choices=[*coco.TOKENIZERS, "none"],
        default="ptb",
        help="of BLEU, CIDEr, METEOR: ptb (coco_*, needs Java), whitespace (nlgeval_*), or none of them",
    )
    parser.add_argument("--bertscore_model", help="folder or Hub id of weights, e.g. microsoft/deberta-xlarge-mnli")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of another encoding shows what it can
    captions = _read(arguments.predictions, arguments)
    training = _training(arguments)
    tokenizer = None if arguments.tokenizer == "none" else arguments.tokenizer
    if arguments.against:
        names = arguments.predictions, arguments.against
        other = _in_order(_read(arguments.against, arguments), captions, *names)
        result = compare_captions(captions, other, training, tokenizer, arguments.bertscore_model)
        result = {"captions": len(captions), "systems": names, **result}
    else:
        result = score(captions, training, None, tokenizer, arguments.bertscore_model)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(comparison_table(result) if arguments.against else table(result))


def _read(path: str, arguments: argparse.Namespace) -> Captions:
    return read_captions(path, arguments.references, arguments.concepts)


def _training(arguments: argparse.Namespace) -> Training | None:
    if arguments.train_concepts and not arguments.train:
        raise UserError("--train_concepts goes with --train, the CSV of ID,Caption of the training split")
    if not arguments.train:
        return None
    captions = read_csv(arguments.train, "Caption")
    if not captions:
        raise UserError(f"'{arguments.train}' holds no captions; give a file with at least one")
    cuis = read_csv(arguments.train_concepts, "CUIs") if arguments.train_concepts else {}
    if cuis:
        check_ids(cuis, captions, arguments.train_concepts, arguments.train, more=True)
    return Training(list(captions.values()), [split_cuis(cuis.get(image_id, "")) for image_id in captions])


# --- One system -----------------------------------------------------------------------------------------------


def table(scores: Mapping[str, Any]) -> str:
    """Return the dict of `scoring.score` as text: scores with intervals and baselines, modalities, what is missing."""
    baselines = list(scores["baselines"])
    width = max(len(name) for name in scores["scores"]) + 2
    lines = [f"{scores['captions']:,} captions, {scores['unique_captions']:.1%} of them distinct", ""]
    lines.append(
        " " * width + f"{'score':>8}  {'95 % interval':<17}" + "".join(f"{HEADINGS[f]:>13}" for f in baselines)
    )
    for name, entry in scores["scores"].items():
        row = f"{name:<{width}}{_number(entry['value']):>8}  {_number(entry['low'])} - {_number(entry['high']):<8}"
        row += "".join(f"{_number(entry['baselines'].get(baseline)):>13}" for baseline in baselines)
        lines.append(row + (f"   upper bound {_number(entry['upper_bound'])}" if "upper_bound" in entry else ""))
    lines.append("")
    for name, note in scores["baselines"].items():
        among = f", found among {note['found_among']}" if "found_among" in note else ""
        lines.append(f"{HEADINGS[name]}: {note['what']}{among}")
    lines += [f"  {printable(scores['baselines']['constant']['caption'])}", ""]
    modalities = scores["modalities"]
    lines.append(f"{'by modality':<{width}}" + "".join(f"{name:>13}" for name in modalities))
    lines.append(f"{'captions':<{width}}" + "".join(f"{own['captions']:>13,}" for own in modalities.values()))
    for key in (key for key in BY_MODALITY if key in scores["scores"]):
        lines.append(f"{key:<{width}}" + "".join(f"{_number(own[key]['value']):>13}" for own in modalities.values()))
    lines += ["", *(f"not computed: {name}: {reason}" for name, reason in scores["missing"].items())]
    return "\n".join([*lines, scores["verdict"]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the result of `compare_captions` as text."""
    first, second = result["systems"]
    width = max(len(name) for name in result["scores"]) + 2
    lines = [f"{result['captions']:,} captions; first: {first}; second: {second}", ""]
    lines.append(f"{'':<{width}}{'first':>8}{'second':>8}{'difference':>12}  {'95 % interval':<20}{'p':>8}")
    for name, row in result["scores"].items():
        difference, low, high = (_signed(row[key]) for key in ("difference", "low", "high"))
        values = f"{_number(row['first']):>8}{_number(row['second']):>8}{difference:>12}"
        lines.append(f"{name:<{width}}{values}  {f'{low} to {high}':<20}{_number(row['p_value']):>8}")
    lines += ["", *(f"not computed: {name}: {reason}" for name, reason in result["missing"].items())]
    lines += ["p: approximate randomization, two-sided; the difference is the first's score minus the second's."]
    return "\n".join(lines)
