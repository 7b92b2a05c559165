"""The push of an output folder to the Hub, its card under the name of the repository."""

import json
import logging
import re
import signal
from pathlib import Path

from captioning.command_line import end_now, on_stop_signals
from captioning.errors import UserError, as_user_error
from captioning.hub.repository import Repository
from captioning.reporting.model_card import render_card, write_model_card
from captioning.reporting.run_record import RunRecord


logger = logging.getLogger(__name__)
NAME_LINE = re.compile(r'^name = "(.*)"$', re.MULTILINE)


def push(repository: Repository, record: RunRecord) -> None:
    """Push the output folder of a run. A signal ends the process at once, without waiting for what is being uploaded.

    Raises:
        UserError: the push failed; the message has the command that pushes later.
    """

    def stop(number: signal.Signals) -> None:
        whole = f"the model is complete in '{record.folder}', but may not be on the Hub"
        end_now(f"stopped by {number.name} during the push; {whole}: push it with: {repository.push_command}", number)

    with on_stop_signals(stop):
        print(f"\nPushed: {repository.push(lambda repo_id: _rename_card(record, repo_id))}")


def push_finished_run(folder: str, model_id: str | None = None, private: bool | None = None) -> None:
    """Push the output folder of a run that has ended.

    Raises:
        UserError: the folder does not hold a finished run, or the push failed.
    """
    for file in ("model.safetensors", "recipe.json", "README.md"):
        if not (Path(folder) / file).is_file():
            raise UserError(f"push_only: '{folder}' holds no finished run, it has no {file}; give an output folder")
    record = RunRecord(folder)
    with as_user_error(f"push_only: the card of '{folder}' cannot be written", "recipe.json must be that of the run"):
        render_card(record, "name")
    push(Repository(folder, model_id, private), record)


def _rename_card(record: RunRecord, name: str) -> None:
    """Write the card again under another name, unless somebody has edited it."""
    card = (record.folder / "README.md").read_text(encoding="utf-8")
    named = NAME_LINE.search(card)
    if named and card == render_card(record, json.loads(f'"{named[1]}"')):
        write_model_card(record, name)
    else:
        logger.info("'%s' was edited and is pushed as it is", record.folder / "README.md")
