"""The push of an output folder to the Hub, its card under the name of the repository."""

import json
import logging
import re
import signal
from pathlib import Path

from captioning.command_line import end_now, on_stop_signals
from captioning.errors import UserError, as_user_error
from captioning.files import write_whole
from captioning.hub.repository import Repository
from captioning.reporting.model_card import render_card, write_model_card
from captioning.reporting.run_record import RunRecord
from captioning.reporting.verify_push import verify_push
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
    old = named and json.loads(f'"{named[1]}"')
    if named and card == render_card(record, old):
        write_model_card(record, name)
        return
    logger.info("'%s' was edited and is pushed as it is%s", path, f", but for its name: {name}" if old else "")
    if old:
        write_whole(path, _renamed(card, old, name))


def _renamed(card: str, old: str, name: str) -> str:
    """Return an edited card with its name replaced where the card was written with it, and left in other text."""
    here = re.escape(old)
    for pattern, new in (
        (rf"(?<![\w./-])(hf://)?{here}(?=/recipe\.json)", f"hf://{name}"),
        (rf"""(?<=["']){here}(?=["'])""", name),
        (rf"(?<=--model_name_or_path ){here}(?![\w./-])", name),
        (rf"^# {here}$", f"# {name}"),
        (rf"^- name: {re.escape(old.split('/')[-1])}$", f"- name: {name.split('/')[-1]}"),
    ):
        card = re.sub(pattern, lambda match, new=new: new, card, flags=re.MULTILINE)
    return card
