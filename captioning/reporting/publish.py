"""The push of an output folder to the Hub, its card under the name of the repository, and what came back of it."""

import filecmp
import json
import logging
import re
import signal
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, snapshot_download
from PIL import Image

from captioning.command_line import end_now, on_stop_signals
from captioning.errors import UserError, as_user_error
from captioning.files import write_whole
from captioning.hub.faults import describe_fault
from captioning.hub.repository import MODEL_FILES, REWRITTEN_FILES, Repository
from captioning.models.load import load_captioner
from captioning.reporting.model_card import render_card, write_model_card
from captioning.reporting.run_record import RunRecord
from captioning.stages import stage
from captioning.training.trainer import CaptioningTrainer


logger = logging.getLogger(__name__)
NAME_LINE = re.compile(r'^name = "(.*)"$', re.MULTILINE)


@stage("push")
def push(repository: Repository, record: RunRecord, trainer: CaptioningTrainer | None = None) -> None:
    """Push the output folder of a run, and verify the push, see `verify_push`.

    A signal ends the process at once, without waiting for what is being uploaded.

    Raises:
        UserError: the push failed; the message has the command that pushes later.
    """

    def stop(number: signal.Signals) -> None:
        whole = f"the model is complete in '{record.folder}', but may not be on the Hub"
        later = f"push it with: {repository.push_command()}"
        end_now(f"stopped by {number.name} during the push; {whole}: {later}", number)

    with on_stop_signals(stop):
        commit = repository.push(lambda repo_id: _rename_card(record, repo_id))
    print(f"\nPushed: {commit.commit_url}", flush=True)
    verify_push(commit, record, trainer)


def push_finished_run(folder: str, model_id: str | None = None, private: bool | None = None) -> None:
    """Push the output folder of a run that has ended.

    Raises:
        UserError: the folder does not hold a finished run, or the push failed.
    """
    adapter, whole = "adapter_model.safetensors", "model.safetensors"
    for file in (adapter if (Path(folder) / adapter).is_file() else whole, "recipe.json", "README.md"):
        if not (Path(folder) / file).is_file():
            raise UserError(f"push_only: '{folder}' holds no finished run, it has no {file}; give an output folder")
    record = RunRecord(folder)
    with as_user_error(f"push_only: the card of '{folder}' cannot be written", "recipe.json must be that of the run"):
        render_card(record, "name")
    push(Repository(folder, model_id, private), record)


def _rename_card(record: RunRecord, name: str) -> None:
    """Write the card again under another name; in one that somebody has edited, only its name changes."""
    path = record.folder / "README.md"
    card = path.read_text(encoding="utf-8")
    named = NAME_LINE.search(card)
    if not named:
        logger.info("'%s' was edited and is pushed as it is", path)
        return
    old = json.loads(f'"{named[1]}"')
    if card == render_card(record, old):
        write_model_card(record, name)
        return
    logger.info("'%s' was edited and is pushed as it is, but for its name: %s", path, name)
    here, last = re.escape(old), re.escape(old.split("/")[-1])
    for pattern, new in (  # where the card was written with its name, not in other text
        (rf"(?<![\w./-])(hf://)?{here}(?=/recipe\.json)", f"hf://{name}"),
        (rf"""(?<=["']){here}(?=["'])""", name),
        (rf"(?<=--model_name_or_path ){here}(?![\w./-])", name),
        (rf"^# {here}$", f"# {name}"),
        (rf"^- name: {last}$", f"- name: {name.split('/')[-1]}"),
    ):
        card = re.sub(pattern, new, card, flags=re.MULTILINE)
    write_whole(path, card)


def verify_push(commit: CommitInfo, record: RunRecord, trainer: CaptioningTrainer | None = None) -> None:
    """Log whether the pushed model loads, has the bytes of the output folder, and captions the sample as in the run.

    The caption needs the `trainer` of the run, for its precision and device. Nothing is raised: the model is on the
    Hub already.
    """
    repo_id, faults = commit.repo_url.repo_id, []
    what = f"{repo_id} at {commit.oid}"
    try:
        # An empty cache, so that nothing comes from an earlier download; on the disk that has held the model
        with tempfile.TemporaryDirectory(prefix=".push-", dir=record.folder, ignore_cleanup_errors=True) as cache:
            patterns = list(MODEL_FILES)
            folder = snapshot_download(repo_id, revision=commit.oid, cache_dir=cache, allow_patterns=patterns)
            captioner = load_captioner(folder)
            captioner.set_prompt(record.recipe["prompt"])
            paths = {path for pattern in MODEL_FILES for path in record.folder.glob(pattern)}
            names = sorted(str(path.relative_to(record.folder)) for path in paths if path.name not in REWRITTEN_FILES)
            _, differ, missing = filecmp.cmpfiles(record.folder, folder, names, shallow=False)
            faults += [f"{name} differs" for name in differ] + [f"{name} is missing" for name in missing]
            if trainer is not None:
                captioner.model.to(trainer.args.device)
                found = trainer.caption(Image.open(record.folder / "sample.png"), captioner)
                if found != (known := record.sample["caption"]):
                    faults.append(f"its caption of sample.png is '{found}', not '{known}'")
    except Exception as error:
        logger.warning("Not verified: %s cannot be loaded back: %s", what, describe_fault(error))
    else:
        if faults:
            logger.warning("Not verified: %s is not what was pushed: %s", what, "; ".join(faults))
        else:
            logger.info("Verified: %s loads, and is what was pushed", what)
