"""The output folder of a run: whether it may be written, what it is resumed from, and the recipe of what was run."""

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from captioning.errors import UserError, as_user_error
from captioning.files import to_json, write_whole
from captioning.models.lora import WEIGHT_FILES
from captioning.training.arguments import CaptioningArguments, DataArguments, ModelArguments
from captioning.training.checkpoints import checkpoint_fault, last_complete_checkpoint
from captioning.training.fingerprint import changes, refuse_changes
from captioning.training.folder_lock import LOCK_FILE, FolderInUse, hold_folder
from captioning.training.recipe import resolved_recipe


logger = logging.getLogger(__name__)

RESULT_FILES = ("*_results.json", "scores.json", "report.html", "predictions/*.jsonl", "submission*.*", "sample.*")
RESULT_FILES += ("surface_form.json", "concept_head.*", "retrieval/*")  # a run without these writes none
# Keys of a recipe in which two runs may differ whose results stand side by side
STAGE_FIELDS = (
    "do_train", "do_eval", "do_predict", "write_submission", "package_versions", "hardware", "code", "fingerprint",
)  # fmt: skip


@contextmanager
def own_output_dir(args: CaptioningArguments) -> Iterator[str | None]:
    """Hold the output folder for this run; the value is the checkpoint to resume from, if any.

    A run whose folder has the default name gets one of its own, with a number behind the name if need be, and resumes
    in the last of these in which a training has begun. `args.output_dir` is set to it, in all processes.

    Raises:
        UserError: the folder cannot be written, is in use, holds another run, or the checkpoint is incomplete.
    """
    with ExitStack() as stack:
        if args.process_index == 0:
            args.output_dir = _take_folder(args, stack)
        if args.world_size > 1:
            names = [args.output_dir]
            torch.distributed.broadcast_object_list(names, device=args.device)
            args.output_dir = names[0]
        yield checkpoint_to_resume(args)


def _take_folder(args: CaptioningArguments, stack: ExitStack) -> str:
    wanted, seeks = args.output_dir, args.has_default_output_dir
    if seeks and args.resume_from_checkpoint and (found := _folder_to_resume(wanted, args.resume_from_checkpoint)):
        wanted, seeks = found, False
    for name in chain([wanted], (f"{wanted}-{number}" for number in count(2))):
        with as_user_error(f"output folder '{name}' cannot be written", "set --output_dir"):
            Path(name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=name).close()
            # What a run leaves that ends before it begins
            taken = any(path.name not in (LOCK_FILE, "rejected.jsonl") for path in Path(name).iterdir())
        if seeks and taken:
            continue
        try:
            stack.enter_context(hold_folder(name))
        except FolderInUse:
            if not seeks:
                raise
            continue
        if name != wanted:
            logger.info("Writing to '%s': '%s' is that of another run", name, wanted)
        return name


def _folder_to_resume(name: str, checkpoint: str) -> str | None:
    """Return that of `name` and `name-<number>` that holds `checkpoint`, if any; 'true': the last with a training.

    A run that was killed before its first checkpoint must not go on from that of another run.
    """
    number = re.compile(re.escape(Path(name).name) + r"-(\d+)")
    found = {
        int(match[1]): str(path) for path in Path(name).parent.glob("*") if (match := number.fullmatch(path.name))
    }
    folders = [name, *(found[key] for key in sorted(found))]
    if checkpoint.lower() != "true":
        there = Path(checkpoint).resolve().parent
        return next((folder for folder in folders if Path(folder).resolve() == there), None)
    last = next(filter(_holds_training, reversed(folders)), name)
    if found:
        logger.info("Of '%s' to '%s', '%s' is continued; set --output_dir for another", name, folders[-1], last)
    return last


def _holds_training(folder: str) -> bool:
    with suppress(OSError, ValueError, AttributeError):  # missing or damaged
        return json.loads((Path(folder) / "recipe.json").read_text(encoding="utf-8")).get("do_train", True)
    return last_complete_checkpoint(folder) is not None


def checkpoint_to_resume(args: CaptioningArguments) -> str | None:
    """Return the checkpoint to resume from, if any.

    Raises:
        UserError: the output folder holds another run, or the checkpoint is incomplete.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if not args.do_train:
        if any((folder / name).is_file() for name in WEIGHT_FILES):
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


def write_recipe(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CaptioningArguments,
    found: dict[str, Any],
    checkpoint: str | None = None,
) -> None:
    """Write `recipe.json`: what was run, at which commits, with which packages, on which hardware.

    What differs from the given recipe, or from the run that is resumed, is logged.

    Args:
        model_args: the model.
        data_args: the data.
        args: all else. Its `fingerprint`, so far that of the given recipe, is set to that of the run.
        found: the fingerprint of the run.
        checkpoint: what is resumed from.

    Raises:
        UserError: the run that is to be resumed has another model, tokenizer, or other data.
    """
    if checkpoint and not args.resume_despite_changes:
        refuse_changes(checkpoint, found)
    given = {name: part for name, part in (args.fingerprint or {}).items() if args.do_train or name != "model"}
    for change in (unlike := changes(given, found)):
        logger.warning("The recipe ran with something else: %s; the numbers will differ", change)
    if given and not unlike:
        logger.info("Data, tokenizer and model are those that the recipe ran with")
    if args.changed_on_resume:
        keys = ", ".join(args.changed_on_resume)
        logger.warning("The recipe's run was resumed with other values of %s; the numbers will differ", keys)
    args.fingerprint = found
    recipe = resolved_recipe(model_args, data_args, args) | {"fingerprint": found}
    _log_differences("package", args.package_versions, recipe["package_versions"])
    _log_differences("hardware", args.hardware, recipe["hardware"])
    _log_differences("code", args.code, recipe["code"])
    folder = Path(args.output_dir)
    path = folder / "recipe.json"
    resumes = args.do_train and args.resume_from_checkpoint
    if args.should_save and not resumes:
        remove_other_results(path, recipe)
    if resumes and path.is_file():
        with as_user_error(f"'{path}' of the run to resume cannot be read", "delete it"):
            before = json.loads(path.read_text(encoding="utf-8"))
        history = before.pop("changed_on_resume", None) or {}
        if args.tune_decoding and (tuned := before.pop("tuned_decoding", None)):  # at its end, which comes again
            before |= tuned["before"] | {name: value for name, value in recipe.items() if name.startswith("tune_")}
        other = {key for key in recipe.keys() | before.keys() if recipe.get(key) != before.get(key)}
        # Fields of the model are missing where an earlier version wrote the recipe, which had but their defaults
        new = {name for name, item in model_args.__dataclass_fields__.items() if recipe[name] == item.default}
        for key in sorted(other - {"fingerprint"} - ((new | {"model_config"}) - before.keys())):
            if hasattr(model_args, key) and key != "label_smoothing":
                change = f"{key} was {before.get(key)}, is {recipe.get(key)}"
                raise UserError(f"cannot resume in '{folder}': {change}; set it back, or another --output_dir")
            logger.warning("Resuming with another recipe: %s was %s, is %s", key, before.get(key), recipe.get(key))
            if key not in (*STAGE_FIELDS, "code"):
                history[key] = [*history.get(key, [before.get(key)]), recipe.get(key)]
        recipe |= {"changed_on_resume": history} if history else {}
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
