"""The output folder of a run: who may write to it, what is resumed there, and the recipe of what was run."""

import fcntl
import json
import logging
import os
import re
import socket
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
from captioning.training.fingerprint import changes
from captioning.training.recipe import resolved_recipe


logger = logging.getLogger(__name__)

RESULT_FILES = ("*_results.json", "scores.json", "report.html", "predictions/*.jsonl", "submission*.*", "sample.*")
RESULT_FILES += ("surface_form.json", "concept_head.*", "retrieval/*")  # a run without these writes none
# Keys of a recipe in which two runs may differ whose results stand side by side
STAGE_FIELDS = (
    "do_train", "do_eval", "do_predict", "write_submission", "package_versions", "hardware", "code", "fingerprint",
)  # fmt: skip
LOCK_FILE = ".lock"  # says who writes to the folder; a killed run leaves it, without its lock
_held: set[int] = set()  # file descriptors of this process
# A worker that outlives its killed parent must not keep the folder locked
os.register_at_fork(after_in_child=lambda: [os.close(file) for file in _held] and _held.clear())


# --- Who may write to it --------------------------------------------------------------------------------------


class FolderInUse(UserError):
    """Another process writes to the folder."""


@contextmanager
def hold_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a folder, also those of machines that share it; the lock ends with the process.

    Raises a FolderInUse that names the holder, or a UserError if the block fails and the folder was removed meanwhile.
    """
    path, file = Path(folder) / LOCK_FILE, None
    with ExitStack() as stack:
        try:
            file = _open_locked(path, stack)
        except BlockingIOError:
            holder = "another process"
            with suppress(OSError):
                holder = path.read_bytes()[:200].decode(errors="replace").strip() or holder
            mend = "wait until it has ended, or set another --output_dir"
            raise FolderInUse(f"output folder '{folder}' is being written by {holder}; {mend}") from None
        except OSError as error:
            if path.parent.is_dir():  # read-only, or on a file system without locks
                logger.warning("'%s' cannot be locked (%s): let no other run write to it", folder, error)
        try:
            yield
        except Exception as error:
            if file is None or isinstance(error, UserError) or _is_at(path, file):
                raise
            what = f"output folder '{folder}' was removed while the run wrote to it"
            raise UserError(f"{what}; run again, with --resume_from_checkpoint true if it trains") from error


def _open_locked(path: Path, stack: ExitStack) -> int:
    """Return the locked file, which the end of `stack` removes."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, file):  # else the run that held it has just removed it
            break
    _held.add(file)
    stack.callback(_held.discard, file)
    stack.callback(lambda: _is_at(path, file) and path.unlink())
    with suppress(OSError):  # a full disk
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def _is_at(path: Path, file: int) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file), os.stat(path))


@contextmanager
def own_output_dir(args: CaptioningArguments) -> Iterator[str | None]:
    """Hold the output folder for this run; the value is the checkpoint to resume from, if any.

    A run that names no folder gets one of its own, with a number behind the default name if need be, or resumes in the
    last of these in which a training has begun. `args.output_dir` is set to it, in all processes. A folder that cannot
    be written, is in use or holds another run, and a checkpoint that is incomplete, are UserErrors.
    """
    with ExitStack() as stack:
        if args.process_index == 0:
            args.output_dir = _take_folder(args, stack)
        if args.world_size > 1:
            names = [args.output_dir]
            torch.distributed.broadcast_object_list(names, device=args.device)
            args.output_dir = names[0]
        yield _checkpoint_to_resume(args)


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
    number = re.compile(re.escape(Path(name).name) + r"-\d+")
    found = [path for path in Path(name).parent.glob("*") if number.fullmatch(path.name)]
    folders = [name, *map(str, sorted(found, key=lambda path: int(path.name.rpartition("-")[2])))]
    if checkpoint.lower() != "true":
        there = Path(checkpoint).resolve().parent
        return next((folder for folder in folders if Path(folder).resolve() == there), None)
    last = next(filter(_holds_training, reversed(folders)), name)
    if found:
        logger.info("Of '%s' to '%s', '%s' is continued; set --output_dir for another", name, folders[-1], last)
    return last


def _holds_training(folder: str) -> bool:
    with suppress(UserError):  # damaged
        if recipe := _recipe_in(folder):
            return recipe.get("do_train", True)
    return last_complete_checkpoint(folder) is not None


def _recipe_in(folder: str) -> dict[str, Any]:
    """Return what a run has written into its folder, {} if there is none."""
    path = Path(folder) / "recipe.json"
    if not path.is_file():
        return {}
    with as_user_error(f"'{path}' cannot be read", "delete it, or set another --output_dir"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


# --- What is resumed there ------------------------------------------------------------------------------------


def _checkpoint_to_resume(args: CaptioningArguments) -> str | None:
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


# --- The recipe of what was run -------------------------------------------------------------------------------


def write_recipe(
    model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments, digests: dict[str, Any]
) -> None:
    """Write `recipe.json`, and log what differs from the given recipe, or from the run that is resumed.

    `args.fingerprint`, so far of the given recipe, becomes the `digests` of the run. Another model is a UserError.
    """
    given = {name: part for name, part in (args.fingerprint or {}).items() if args.do_train or name != "model"}
    for change in (unlike := changes(given, digests)):
        logger.warning("The recipe ran with something else: %s; the numbers will differ", change)
    if given and not unlike:
        logger.info("Data, tokenizer and model are those that the recipe ran with")
    if args.changed_on_resume:
        keys = ", ".join(args.changed_on_resume)
        logger.warning("The recipe's run was resumed with other values of %s; the numbers will differ", keys)
    args.fingerprint = digests
    recipe = resolved_recipe(model_args, data_args, args) | {"fingerprint": digests}
    for part in ("package_versions", "hardware", "code"):
        _log_differences(part.removesuffix("_versions"), getattr(args, part), recipe[part])
    before = _recipe_in(args.output_dir)
    if before and args.do_train and args.resume_from_checkpoint:
        _compare_with_resumed(before, recipe, model_args, args)
    elif args.should_save:
        remove_other_results(args.output_dir, before, recipe)
    if args.should_save:
        write_whole(Path(args.output_dir) / "recipe.json", to_json(recipe, indent=2) + "\n")


def _compare_with_resumed(
    before: dict[str, Any], recipe: dict[str, Any], model_args: ModelArguments, args: CaptioningArguments
) -> None:
    """Refuse another model, log each other change, and add the history of changes to `recipe`."""
    history = before.pop("changed_on_resume", None) or {}
    if args.tune_decoding and (tuned := before.pop("tuned_decoding", None)):  # at its end, which comes again
        before |= tuned["before"] | {name: value for name, value in recipe.items() if name.startswith("tune_")}
    # Fields that an earlier version did not have, and did not write, had their defaults
    defaults = {name: item.default for name, item in ModelArguments.__dataclass_fields__.items()}
    before = defaults | {"model_config": recipe["model_config"]} | before
    for key in sorted((recipe.keys() | before.keys()) - {"fingerprint"}):
        was, now = before.get(key), recipe.get(key)
        if was == now:
            continue
        if hasattr(model_args, key) and key != "label_smoothing":
            mend = "set it back, or another --output_dir"
            raise UserError(f"cannot resume in '{args.output_dir}': {key} was {was}, is {now}; {mend}")
        logger.warning("Resuming with another recipe: %s was %s, is %s", key, was, now)
        if key not in STAGE_FIELDS:
            history[key] = [*history.get(key, [was]), now]
    recipe |= {"changed_on_resume": history} if history else {}


def remove_other_results(folder: str, before: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Remove scores, predictions and page of the run before if its recipe is another.

    A run of the same recipe that only scores keeps them: one split after the other can be scored into one folder.
    """
    keys = (before.keys() | recipe.keys()) - set(STAGE_FIELDS)
    same = not recipe.get("do_train", True) and all(before.get(key) == recipe.get(key) for key in keys)
    found = [] if same else [file for pattern in RESULT_FILES for file in Path(folder).glob(pattern)]
    for file in found:
        file.unlink()
    if found:
        logger.info("Removed the results of an earlier run from '%s'", folder)


def _log_differences(kind: str, given: dict[str, Any] | None, here: dict[str, Any]) -> None:
    message = "The recipe ran with %s %s '%s', here is '%s': the numbers may differ"
    for name, wanted in (given or {}).items():
        if here.get(name, "none") != wanted:
            logger.warning(message, kind, name, wanted, here.get(name, "none"))
