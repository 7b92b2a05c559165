"""The output folder of a run: whether it may be written, what it is resumed from, and the recipe of what was run."""

import json
import logging
import tempfile
from pathlib import Path

from captioning.errors import UserError, as_user_error
from captioning.files import to_json, write_whole
from captioning.training.arguments import CaptioningArguments, DataArguments, ModelArguments
from captioning.training.checkpoints import checkpoint_fault, last_complete_checkpoint
from captioning.training.recipe import resolved_recipe


logger = logging.getLogger(__name__)

RESULT_FILES = ("*_results.json", "scores.json", "report.html", "predictions/*.jsonl", "submission.*", "sample.*")
# Keys of a recipe in which two runs may differ whose results stand side by side
STAGE_FIELDS = ("do_train", "do_eval", "do_predict", "write_submission", "package_versions", "hardware")


def prepare_output_dir(args: CaptioningArguments) -> str | None:
    """Create the output folder and return the checkpoint to resume from, if any.

    Raises:
        UserError: the folder cannot be written, holds another run, or the checkpoint is incomplete.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    with as_user_error(f"output folder '{folder}' cannot be written", "set --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    if not args.do_train:
        if (folder / "model.safetensors").is_file():
            reason = "whose recipe and scores must stay together; set another --output_dir for these scores"
            raise UserError(f"output folder '{folder}' holds a trained model, {reason}")
        return None
    if resume is None:
        if any(folder.glob("checkpoint-*")):
            mend = "continue it with --resume_from_checkpoint true, or set another --output_dir"
            raise UserError(f"output folder '{folder}' holds checkpoints of an earlier run; {mend}")
        return None
    if resume.lower() == "true":
        checkpoint = last_complete_checkpoint(args.output_dir)
        logger.info("Resuming from %s", checkpoint or f"the start: '{folder}' holds no complete checkpoint")
        return checkpoint
    if fault := checkpoint_fault(Path(resume)):
        mend = "set 'true' for the last one"
        raise UserError(f"resume_from_checkpoint '{resume}' is not a complete checkpoint ({fault}); {mend}")
    return resume


def write_recipe(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> None:
    """Write `recipe.json`: what was run, at which commits, with which packages, on which hardware.

    What differs from the given recipe, or from the run that is resumed, is logged.

    Raises:
        UserError: the run that is to be resumed has another model.
    """
    recipe = resolved_recipe(model_args, data_args, args)
    _log_differences("package", args.package_versions, recipe["package_versions"])
    _log_differences("hardware", args.hardware, recipe["hardware"])
    folder = Path(args.output_dir)
    path = folder / "recipe.json"
    resumes = args.do_train and args.resume_from_checkpoint
    if args.should_save and not resumes:
        remove_other_results(path, recipe)
    if resumes and path.is_file():
        with as_user_error(f"'{path}' of the run to resume cannot be read", "delete it"):
            before = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(key for key in recipe.keys() | before.keys() if recipe.get(key) != before.get(key)):
            if hasattr(model_args, key) and key != "label_smoothing":
                change = f"{key} was {before.get(key)}, is {recipe.get(key)}"
                raise UserError(f"cannot resume in '{folder}': {change}; set it back, or another --output_dir")
            logger.warning("Resuming with another recipe: %s was %s, is %s", key, before.get(key), recipe.get(key))
    if args.should_save:
        write_whole(path, to_json(recipe, indent=2) + "\n")


def remove_other_results(path: Path, recipe: dict[str, object]) -> None:
    """Remove scores, predictions and page that a run of another recipe left beside its recipe at `path`.

    A run of the same recipe keeps them, so that one split after the other can be scored into one folder; but not a run
    that trains, whose weights are new.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = not recipe.get("do_train", True) and all(
            before.get(key) == recipe.get(key) for key in before.keys() | recipe.keys() if key not in STAGE_FIELDS
        )
    except (OSError, ValueError, AttributeError):
        same = False
    found = [] if same else [file for pattern in RESULT_FILES for file in path.parent.glob(pattern)]
    for file in found:
        file.unlink()
    if found:
        logger.info("Removed the results of an earlier run from '%s'", path.parent)


def _log_differences(kind: str, given: dict[str, object] | None, here: dict[str, object]) -> None:
    """Log where the given recipe was run otherwise than here: only the same machine repeats a run bit for bit."""
    message = "The recipe ran with %s %s '%s', here is '%s': the numbers may differ"
    for name, wanted in (given or {}).items():
        if here.get(name, "none") != wanted:
            logger.warning(message, kind, name, wanted, here.get(name, "none"))
