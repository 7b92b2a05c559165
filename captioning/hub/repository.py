"""The model repository on the Hub that an output folder is pushed to: what goes up, when, and how a push fails.

Only listed files are pushed, from a copy without the paths of this machine, which is searched before it leaves. The
Trainer's own push uploads `training_args.bin` and TensorBoard logs, which hold paths and could hold a token (T15),
rewrites the card (T16), does not report a failed upload, and uploads files that training is still writing.
"""

import json
import logging
import os
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from captioning.errors import UserError
from captioning.hub.faults import describe_fault
from captioning.hub.privacy import without_local_paths
from captioning.hub.private_strings import refuse_private_strings


logger = logging.getLogger(__name__)
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja",
    "qformer_tokenizer/*", "adapter_config.json", "adapter_model.safetensors", "base_config.json", "adapter/*",
    "surface_form.json", "concept_head.json", "concept_head.safetensors",
)  # fmt: skip
# Without report.html: it holds the images, which the user may not have the right to publish
RECORD_FILES = (
    "README.md", "recipe.json", "*_results.json", "scores.json", "trainer_state.json", "training_curve.png",
    "predictions/*.jsonl", "sample.*", "examples/*.jpg", "submission*.csv", "submission*.zip",
)  # fmt: skip
# Removed unless the run has them: those of a checkpoint before --merge_lora would be loaded in place of the model
STALE_FILES = ("adapter_config.json", "adapter_model.safetensors", "base_config.json", "surface_form.json")
STALE_FILES += ("concept_head.json", "concept_head.safetensors")
REWRITTEN_FILES = ("recipe.json", "trainer_state.json", "adapter_config.json")  # hold paths of this machine
BLANK_FILES = {".gitattributes", "README.md", "LICENSE"}  # what the Hub's web page creates in a new repository
ORIGIN_FIELDS = ("model_name_or_path", "config_name", "dataset_name")  # equal in all models of one repository


class NameTaken(UserError):
    """The repository is another's, or holds another model; `free` is a name that may be free."""

    def __init__(self, what: str, free: str):
        super().__init__(f"{what}; set another, such as --hub_model_id {free}")
        self.free = free


class Repository:
    """The model repository that an output folder is pushed to.

    Args:
        output_dir: the output folder.
        model_id: `<user>/<name>` or `<name>`, UserError if it is neither; default: the folder's name.
        private: whether a new repository is private; None: the default of the account.
    """

    def __init__(self, output_dir: str | Path, model_id: str | None = None, private: bool | None = None):
        self.output_dir = Path(output_dir)
        self.model_id = model_id or _name_for(self.output_dir.resolve().name)
        try:
            validate_repo_id(self.model_id)
        except HFValidationError as error:
            raise UserError(f"hub_model_id '{self.model_id}': {error}; set --hub_model_id to <user>/<name>") from error
        self.private = private
        self.repo_id: str | None = None
        self._api = HfApi()
        self._uploads: list[Future] = []

    def open(self) -> None:
        """Create the repository unless it exists; UserError if its name is taken, or it holds another model."""
        for leftover in self.output_dir.glob(".push-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            repo_id = self._api.create_repo(self.model_id, private=self.private, exist_ok=True).repo_id
        except KeyError as error:  # a 409 without the address of the user's own repository of this name
            raise NameTaken(f"409, the name '{self.model_id}' is taken", f"{self.model_id}-2") from error
        except HfHubHTTPError as error:
            user, _, name = self.model_id.rpartition("/")
            if not user or error.response.status_code != 403:
                raise
            raise NameTaken(f"{describe_fault(error)}; '{user}' may be another's", name) from error
        self._refuse_another_model(repo_id)
        self.repo_id = repo_id

    def try_to_open(self) -> None:
        """Open it; a failure is logged: the push at the end of the run tries again."""
        try:
            self.open()
        except Exception as error:
            message = "Nothing can be pushed now: %s. At the end of the run it is tried again"
            logger.warning(message, describe_fault(error))

    def _refuse_another_model(self, repo_id: str) -> None:
        """Raise UserError unless the repository is blank or its model has the same start and the same data."""
        is_ours = False
        try:
            files = {file.rfilename for file in self._api.model_info(repo_id).siblings} - BLANK_FILES
            if "recipe.json" in files:  # forced: the cache may hold an older one
                theirs = self._api.hf_hub_download(repo_id, "recipe.json", force_download=True)
                is_ours = _origin(Path(theirs)) == _origin(self.output_dir / "recipe.json")
        except Exception as error:
            raise UserError(f"what '{repo_id}' holds cannot be read: {describe_fault(error)}") from error
        if files and not is_ours:
            raise NameTaken(f"409, the name is taken: '{repo_id}' holds another model", f"{repo_id}-2")

    def push_checkpoint(self, folder: Path, strategy: HubStrategy, always: bool) -> None:
        """Upload a checkpoint in the background; a failure is logged, and training goes on.

        The model goes to the root of the repository, and by some strategies all that a resume needs to
        `last-checkpoint` or `checkpoint-<step>`. As in the Trainer, a checkpoint is skipped, unless `always`, while
        the one before is still being uploaded.
        """
        busy = not always and not all(upload.done() for upload in self._uploads)
        if self.repo_id is None or strategy == HubStrategy.END or busy:
            return
        message = f"Training, step {folder.name.rpartition('-')[2]}"
        model = _select(folder, (*MODEL_FILES, "trainer_state.json")) | _select(self.output_dir, ("recipe.json",))
        commits = {message: model}
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            state = {path: file for path, file in _select(folder, ("**/*",)).items() if path != "training_args.bin"}
            # In a second commit: the weights are on the Hub by then and are not uploaded twice
            commits[f"{message}, checkpoint"] = {f"{place}/{path}": file for path, file in state.items()}
        disable_progress_bars()  # they would mix with the bar of the training
        try:
            stages = {title: self._stage(files) for title, files in commits.items()}
        except OSError as error:
            logger.warning("%s cannot be pushed: %s; training goes on", folder, error)
            return
        self._uploads.append(self._api.run_as_future(self._upload_checkpoint, stages))

    def _upload_checkpoint(self, stages: dict[str, TemporaryDirectory]) -> None:
        for message, stage in stages.items():
            try:
                self._upload(stage, message)
            except Exception as error:
                logger.warning("%s is not on the Hub: %s; training goes on", message, describe_fault(error))

    def push(self, write_card: Callable[[str], None]) -> CommitInfo:
        """Push the finished output folder once all checkpoints are uploaded, and return the commit.

        `write_card` is called with the repository's id before the files are collected.

        Raises:
            UserError: the push failed; the message has the reason and the command that pushes later.
        """
        wait(self._uploads)
        enable_progress_bars()
        try:
            if self.repo_id is None:
                with self._stage_run() as stage:  # so that a push that is refused leaves no empty repository
                    refuse_private_strings(Path(stage), self.output_dir)
                self.open()
            write_card(self.repo_id)
            return self._upload(self._stage_run(), "End of training", STALE_FILES)
        except Exception as error:
            raise UserError(
                f"the model is complete in '{self.output_dir}' but not on the Hub: {describe_fault(error)}; push it "
                f"later with: {self.push_command(getattr(error, 'free', self.model_id))}"
            ) from error

    def push_command(self, name: str | None = None) -> str:
        """Return the command that pushes the output folder without running anything, by default under its name."""
        flags = {"push_only": self.output_dir, "hub_model_id": name or self.model_id, "hub_private_repo": self.private}
        given = [f"--{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value is not None]
        return f"python run_captioning.py {' '.join(given)}"

    def _stage_run(self) -> TemporaryDirectory:
        return self._stage(_select(self.output_dir, MODEL_FILES + RECORD_FILES))

    def _stage(self, files: dict[str, Path]) -> TemporaryDirectory:
        """Collect what is pushed in a folder of its own: training may rewrite or delete its files meanwhile."""
        stage = TemporaryDirectory(prefix=".push-", dir=self.output_dir, ignore_cleanup_errors=True)
        _collect(files, Path(stage.name))
        return stage

    def _upload(self, stage: TemporaryDirectory, message: str, stale: tuple[str, ...] = ()) -> CommitInfo:
        with stage as folder:
            refuse_private_strings(Path(folder), self.output_dir)
            where = {"repo_id": self.repo_id, "folder_path": folder, "delete_patterns": list(stale) or None}
            return self._api.upload_folder(**where, commit_message=message)


def copy_model(folder: Path, target: Path) -> None:
    """Copy the model in an output folder and its card, as they would be pushed, into `target`.

    Raises:
        UserError: a file has a path of this machine or a token in it.
    """
    files = _select(folder, (*MODEL_FILES, "recipe.json", "README.md", "sample.png"))
    _collect(files, target, shutil.copyfile)
    refuse_private_strings(target, folder)


def repository_of(args: TrainingArguments) -> Repository | None:
    """Return the repository of a run with `--push_to_hub`, not opened, in its main process; None in the others."""
    wanted, args.push_to_hub = args.push_to_hub, False  # the Trainer would push by itself, see the top of this file
    if not (wanted and args.should_save):
        return None
    return Repository(args.output_dir, args.hub_model_id, args.hub_private_repo)


class PushCheckpoints(TrainerCallback):
    """Push each checkpoint to a `Repository` as soon as it is saved."""

    def __init__(self, repository: Repository):
        self.repository = repository

    def on_save(self, args, state, control, **kwargs):
        """Start the upload, in the main process."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.repository.push_checkpoint(folder, args.hub_strategy, args.hub_always_push)


def _name_for(folder: str) -> str:
    """Return the name of a repository for an output folder; letters lose their accents, other scripts are refused."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", folder) if not unicodedata.combining(char))
    name = re.sub(r"[^A-Za-z0-9._]+|\.\.+", "-", plain).strip("-.").removesuffix(".git")[:96]
    if not name or any(char.isalnum() and not char.isascii() for char in plain):
        raise UserError(f"no repository can be named after the folder '{folder}'; set --hub_model_id to <user>/<name>")
    return name


def _select(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of `folder` that match a pattern, by their path in the repository."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}


def _collect(files: dict[str, Path], folder: Path, copy: Callable[[Path, Path], Any] | None = None) -> None:
    """Bring files into `folder`, without the paths of this machine; by default they are linked where that works."""
    for path, source in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name in REWRITTEN_FILES:
            target.write_text(without_local_paths(source.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            (copy or _link_or_copy)(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # no second copy of gigabytes of weights
    except OSError:
        shutil.copyfile(source, target)


def _origin(recipe_file: Path) -> list[Any] | None:
    """Return what a model was made from, None for a broken recipe."""
    try:
        recipe = json.loads(without_local_paths(recipe_file.read_text(encoding="utf-8")))
        config = Path(recipe["config_name"] or "").name  # where it was read from does not matter
        return [config if name == "config_name" else recipe[name] for name in ORIGIN_FIELDS]
    except (ValueError, KeyError, TypeError):
        return None
