"""Score captions or concepts of any system beside baselines, or test captions against those of another system."""

from captioning.commands import existing_file, new_file
from captioning.scoring import TOKENIZERS


EXAMPLE = "run.csv --references test_captions.csv --train train_captions.csv"
WORK = "captioning.reporting.terminal:score_captions"
FILES = {
    "predictions": "predictions of a run (JSON lines), or a CSV of ID,Caption, or of ID,CUIs",
    "--references": "CSV of ID,Caption; predictions of a run have theirs; for concepts, of ID,CUIs",
    "--concepts": "CSV of ID,CUIs of the same images; predictions of a run have theirs; for concepts, the manual ones",
    "--train": "CSV of ID,Caption of the training split, among which baselines are found",
    "--train_concepts": "CSV of ID,CUIs of the training split, for concept_f1; for concepts, for their baseline",
    "--against": "captions of another system for the same images, for a paired test",
}
ARGUMENTS = {name: {"type": existing_file, "help": what} for name, what in FILES.items()} | {
    "--tokenizer": {
        "choices": [*TOKENIZERS, "none"],
        "default": "ptb",
        "help": "of BLEU, CIDEr and METEOR: ptb (coco_*, needs Java; the default), whitespace (nlgeval_*), "
        "whitespace_lower (nlgeval_lower_*), or none",
    },
    "--bertscore_model": {"help": "folder or Hub id of weights, e.g. microsoft/deberta-xlarge-mnli"},
    "--html": {
        "type": new_file(".html"),
        "help": "page to write with --against: both systems side by side, image by image",
    },
    "--format": {
        "choices": ["text", "json", "markdown", "latex"],
        "default": "text",
        "help": "of what is printed; markdown and latex: a table for a paper",
    },
    "--json": {"dest": "format", "action": "store_const", "const": "json", "help": "the same as --format json"},
}
