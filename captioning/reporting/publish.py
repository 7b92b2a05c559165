"""TODO."""

import json
import logging
import re
from pathlib import Path

from captioning.errors import UserError, as_user_error
from captioning.hub.repository import Repository
from captioning.reporting.model_card import render, write_model_card


logger = logging.getLogger(__name__)
NAME_LINE = re.compile(r'^name = "(.*)"$', re.MULTILINE)


def push(repository: Repository) -> None:
    """Push an output folder, its card under the name of the repository.

    Raises:
        UserError: the push failed; its line has the command that pushes later.
    """
    print(f"\nPushed: {repository.push(lambda repo_id: _rename_card(repository.output_dir, repo_id))}")


def push_finished_run(folder: str, model_id: str | None = None, private: bool | None = None) -> None:
    """Push the output folder of a run that has ended.

    Raises:
        UserError: the folder holds no finished run, or cannot be pushed.
    """
    for file in ("model.safetensors", "recipe.json", "README.md"):
        if not (Path(folder) / file).is_file():
            raise UserError(f"push_only: '{folder}' holds no finished run, it has no {file}; give an output folder")
    with as_user_error(f"push_only: the card of '{folder}' cannot be written", "recipe.json must be that of the run"):
        render(Path(folder), "name")
    push(Repository(folder, model_id, private))


def _rename_card(output_dir: Path, name: str) -> None:
    """Write the card anew under another name, unless somebody has edited it."""
    card = (output_dir / "README.md").read_text(encoding="utf-8")
    named = NAME_LINE.search(card)
    if named and card == render(output_dir, json.loads(f'"{named[1]}"')):
        write_model_card(output_dir, name)
    else:
        logger.info("'%s' was edited and is pushed as it is", output_dir / "README.md")
