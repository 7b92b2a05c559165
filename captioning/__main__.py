"""The commands beside `run_captioning.py`.

    python -m captioning prepare labels.csv data/mine --group_column patient_id
    python -m captioning score outputs/my-run/predictions/test.jsonl
    python -m captioning check outputs/my-run/submission.csv --references test_captions.csv

`python -m captioning <command> --help` says more about each.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from datasets import DatasetDict, Image

from captioning.command_line import OneLineParser, exit_on_user_error, set_up_logging
from captioning.data.checks import check_rows, usable
from captioning.data.leaks import find_leaks
from captioning.data.own_data import Layout
from captioning.data.sources import UNFINISHED, load_source
from captioning.errors import UserError, printable
from captioning.files import to_json
from captioning.hub.client import limit_waiting
from captioning.reporting.comparison_page import write_comparison
from captioning.reporting.score_table import comparison_table, score_table
from captioning.scoring.captions import in_order_of, read_captions
from captioning.scoring.coco import TOKENIZERS
from captioning.scoring.score import compare_captions, score
from captioning.scoring.submission import check_submission
from captioning.scoring.training_split import read_training


SHOWN_FAULTS = 20
BEFORE_STORING = {UNFINISHED, "rejected.jsonl"}  # in a folder that `prepare` has made, until it stores rows


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Raises:
        UserError: a mistake in its arguments or files.
    """
    parser = OneLineParser(
        prog="python -m captioning",
        description="Prepare data, score captions, check submissions.",
        epilog="example: python -m captioning score outputs/my-run/predictions/test.jsonl",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="command")
    for add_command in (_add_prepare, _add_score, _add_check):
        add_command(commands)
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return
    set_up_logging()
    limit_waiting()
    arguments.run(arguments)


def _command(commands, run: Callable, name: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=f"example: python -m captioning {name} {example}",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


# --- prepare --------------------------------------------------------------------------------------------------


def _add_prepare(commands) -> None:
    description = "Check the rows of any source, and store them in a folder that --dataset_name takes."
    parser = _command(commands, prepare, "prepare", description, "eltorio/ROCOv2-radiology data/rocov2")
    parser.add_argument("source", help="Hub id, folder, table of paths and captions, or 'phantoms'; see docs/data.md")
    parser.add_argument("folder", help="new folder to write; its rejected.jsonl lists the rows that were left out")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub id")
    parser.add_argument(
        "--max_rejected_fraction",
        type=float,
        default=0.01,
        help="more rows left out than this fraction of a split are an error; default: 0.01",
    )
    parser.add_argument("--num_proc", type=int, help="number of processes that check the rows")
    for item in fields(Layout):
        kind = next(kind for kind in (int, float, str) if kind.__name__ in str(item.type))
        parser.add_argument(f"--{item.name}", type=kind, default=item.default, help=item.metadata["help"])


def prepare(arguments: argparse.Namespace) -> None:
    """Load any source, leave out the rows that cannot be used and store the rest with `save_to_disk`."""
    folder = Path(arguments.folder)
    if not 0 <= arguments.max_rejected_fraction <= 1:
        raise UserError(f"max_rejected_fraction is {arguments.max_rejected_fraction}; set it from 0 to 1")
    if arguments.num_proc is not None and arguments.num_proc < 1:
        raise UserError(f"num_proc is {arguments.num_proc}; set --num_proc to 1 or more")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if UNFINISHED in there and there - BEFORE_STORING:
        raise UserError(f"'{folder}' is half written: an earlier `prepare` was stopped; delete it and run again")
    if there - BEFORE_STORING or (folder.exists() and not folder.is_dir()):
        raise UserError(f"'{folder}' exists and is not an empty folder; name a new one")
    layout = Layout(**{item.name: getattr(arguments, item.name) for item in fields(Layout)})
    dataset = load_source(arguments.source, arguments.revision, layout=layout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).touch()
        checked = check_rows(dataset, arguments.max_rejected_fraction, folder / "rejected.jsonl", arguments.num_proc)
        rows_to_store = {split: usable(rows) for split, rows in checked.items()}
        find_leaks(rows_to_store)
        stored = DatasetDict({
            split: rows.remove_columns("pixels").cast_column("image", Image()) for split, rows in rows_to_store.items()
        })  # fmt: skip
        stored.save_to_disk(str(folder), num_proc=arguments.num_proc)
        (folder / UNFINISHED).unlink()
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be written: {error}") from error
    print(f"{folder}: " + ", ".join(f"{split} {len(rows):,}" for split, rows in stored.items()))


# --- score ----------------------------------------------------------------------------------------------------


def _add_score(commands) -> None:
    description = "Score the captions of any system beside baselines, or test them against those of another system."
    example = "run.csv --references test_captions.csv --train train_captions.csv"
    parser = _command(commands, score_captions, "score", description, example)
    parser.add_argument("predictions", help="predictions of a run (JSON lines), or a CSV of ID,Caption")
    parser.add_argument("--references", help="CSV of ID,Caption; predictions of a run have theirs")
    parser.add_argument("--concepts", help="CSV of ID,CUIs of the same images; predictions of a run have theirs")
    parser.add_argument("--train", help="CSV of ID,Caption of the training split, among which baselines are found")
    parser.add_argument("--train_concepts", help="CSV of ID,CUIs of the training split, for concept_f1")
    parser.add_argument("--against", help="captions of another system for the same images, for a paired test")
    parser.add_argument("--html", help="page to write with --against: both systems side by side, image by image")
    parser.add_argument(
        "--tokenizer",
        choices=[*TOKENIZERS, "none"],
        default="ptb",
        help="of BLEU, CIDEr and METEOR: ptb (coco_*, needs Java; the default), whitespace (nlgeval_*), or none",
    )
    parser.add_argument("--bertscore_model", help="folder or Hub id of weights, e.g. microsoft/deberta-xlarge-mnli")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def score_captions(arguments: argparse.Namespace) -> None:
    """Print the scores of one system, or of two with the differences."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks a character
    if arguments.html and not arguments.against:
        raise UserError("--html compares two systems; add --against with the captions of the other")
    captions = read_captions(arguments.predictions, arguments.references, arguments.concepts)
    training = read_training(arguments.train, arguments.train_concepts)
    tokenizer = None if arguments.tokenizer == "none" else arguments.tokenizer
    if arguments.against:
        names = arguments.predictions, arguments.against
        other = read_captions(arguments.against, arguments.references, arguments.concepts)
        other = in_order_of(captions, other, *names)
        result = compare_captions(captions, other, training, tokenizer, arguments.bertscore_model)
        if arguments.html:
            write_comparison(arguments.html, result, captions, other, names)
        result = {"captions": len(captions), "systems": names, **result}
    else:
        result = score(captions, training, None, tokenizer, arguments.bertscore_model)
    if arguments.json:
        print(to_json(result, indent=2))
    else:
        print(comparison_table(result) if arguments.against else score_table(result))


# --- check ----------------------------------------------------------------------------------------------------


def _add_check(commands) -> None:
    description = "Check a submission of captions or concepts by ImageCLEF's rules."
    parser = _command(commands, check_rules, "check", description, "submission.zip --references test_captions.csv")
    parser.add_argument("submission", help="submission.csv, or its zip")
    parser.add_argument("--references", help="CSV of the official ids, in the order that a submission must have")


def check_rules(arguments: argparse.Namespace) -> None:
    """Check an ImageCLEF submission; faults are printed, one a line, and end the command with status 2."""
    faults = check_submission(arguments.submission, arguments.references)
    for fault in faults[:SHOWN_FAULTS]:
        print(printable(f"{arguments.submission}: {fault}"), file=sys.stderr)
    if faults:
        raise UserError(f"'{arguments.submission}': faults found: {len(faults)}; a submission must have none")
    unchecked = "" if arguments.references else "; ids and their order were not checked: give --references"
    print(f"'{arguments.submission}' is a valid submission{unchecked}")


if __name__ == "__main__":
    exit_on_user_error(main)
