"""Check a submission of captions or concepts by ImageCLEF's rules."""

from captioning.commands import existing_file


EXAMPLE = "submission.zip --references test_captions.csv"
WORK = "captioning.reporting.terminal:check_rules"
ARGUMENTS = {
    "submission": {"type": existing_file, "help": "submission.csv, or its zip"},
    "--references": {"type": existing_file, "help": "CSV of the official ids, in the order a submission must have"},
}
