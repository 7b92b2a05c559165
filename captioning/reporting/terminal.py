"""The work of `python -m captioning score` and `check`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from captioning.errors import UserError, printable
from captioning.files import refuse_to_replace, to_json
from captioning.reporting.comparison_page import write_comparison
from captioning.reporting.score_table import comparison_table, concepts_table, score_table
from captioning.scoring.captions import in_order_of, read_captions
from captioning.scoring.concept_detection import holds_concepts, score_concepts
from captioning.scoring.score import compare_captions, score
from captioning.scoring.submission import check_submission
from captioning.scoring.training_split import read_training


READ = ("predictions", "against", "references", "concepts", "train", "train_concepts")  # the files of `score`
SHOWN_FAULTS = 20


def score_captions(arguments: argparse.Namespace) -> None:
    """Print the scores of one system, or of two with the differences."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks a character
    if arguments.html and not arguments.against:
        raise UserError("--html compares two systems; add --against with the captions of the other")
    refuse_to_replace([getattr(arguments, name) for name in READ], arguments.html)
    if any(path and holds_concepts(path) for path in (arguments.predictions, arguments.references)):
        _score_concepts(arguments)
        return
    captions = read_captions(arguments.predictions, arguments.references, arguments.concepts)
    training = read_training(arguments.train, arguments.train_concepts)
    options = None if arguments.tokenizer == "none" else arguments.tokenizer, arguments.bertscore_model
    if not arguments.against:
        _print(score(captions, training, None, *options), score_table, arguments.format)
        return
    names = arguments.predictions, arguments.against
    other = read_captions(arguments.against, arguments.references, arguments.concepts)
    other = in_order_of(captions, other, *names)
    result = compare_captions(captions, other, training, *options)
    if arguments.html:
        write_comparison(arguments.html, result, captions, other, names)
    _print({"captions": len(captions), "systems": names, **result}, comparison_table, arguments.format)


def _score_concepts(arguments: argparse.Namespace) -> None:
    path = arguments.predictions
    if arguments.references is None:
        raise UserError(f"'{path}' holds concepts; add --references with a CSV of ID,CUIs of the same images")
    if wrong := [name for name in ("train", "against", "html", "bertscore_model") if getattr(arguments, name)]:
        raise UserError(f"'{path}' holds concepts, and --{wrong[0]} is for captions; leave it out")
    result = score_concepts(path, arguments.references, arguments.concepts, arguments.train_concepts)
    _print(result, concepts_table, arguments.format)


def _print(result: dict[str, Any], table: Callable[[dict[str, Any], str], str], format: str) -> None:
    print(to_json(result, indent=2) if format == "json" else table(result, format))


def check_rules(arguments: argparse.Namespace) -> None:
    """Check an ImageCLEF submission; faults are printed, one a line, and end the command with status 2."""
    faults = check_submission(arguments.submission, arguments.references)
    for fault in faults[:SHOWN_FAULTS]:
        print(printable(f"{arguments.submission}: {fault}"), file=sys.stderr)
    if faults:
        raise UserError(f"'{arguments.submission}': faults found: {len(faults)}; a submission must have none")
    unchecked = "" if arguments.references else "; ids and their order were not checked: give --references"
    print(f"'{arguments.submission}' is a valid submission{unchecked}")
