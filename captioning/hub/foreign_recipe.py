"""A recipe from the Hub was written by somebody else: it may name what is on the Hub, and nothing on this machine."""

import os
import re
from pathlib import Path
from typing import Any

from captioning.errors import UserError
from captioning.files import PROJECT
from captioning.hub.privacy import LOCAL_PATH
from captioning.hub.private_strings import texts_in


NAME_FIELDS = (
    "model_name_or_path", "config_name", "tokenizer_name", "dataset_name", "bertscore_model", "retriever",
)  # fmt: skip
LOCAL_FIELDS = ("image_folder",)  # what is in such a field is on this machine, whatever it looks like
TEXT_FIELDS = (
    "prompt", "license", "language", "package_versions", "hardware", "code", "fingerprint", "changed_on_resume",
)  # fmt: skip
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
OTHER_PATH = re.compile(r"(?<!\w)(~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")


def refuse_local_names(address: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe from the Hub, in which a config of this project is not mistaken for one in the working folder.

    It is given without the values that a flag of the user replaces.

    Raises:
        UserError: a value is a path, or names something in the working folder: a run would read the user's own files
            on behalf of its author, and might publish their captions.
    """
    for key, value in recipe.items():
        if value and key in LOCAL_FIELDS:
            raise _refusal(address, key, value)
        if key == "config_name" and recipe.get("model_config"):
            # A label, which names no file here: the recipe brings the config itself
            recipe = recipe | {key: f"{address.removesuffix('/recipe.json')}/{Path(value).name}"}
        elif value and key in NAME_FIELDS:
            own = _config_of_project(value) if key == "config_name" else None
            if own is None and not HUB_ID.fullmatch(value):
                raise _refusal(address, key, value)
            is_built_in = own is not None or (key, value) == ("dataset_name", "phantoms")
            if not is_built_in and os.path.lexists(value):
                mend = f"add --{key} {value} if you mean that, or run in another folder"
                raise UserError(f"recipe '{address}': {key} '{value}' also exists in the working folder; {mend}")
            recipe = recipe | {key: own or value}
        elif key not in TEXT_FIELDS:
            is_file = key == "accelerator_config" and isinstance(value, str) and not value.lstrip().startswith("{")
            for text in texts_in(value):
                if is_file or LOCAL_PATH.search(text) or OTHER_PATH.search(text):
                    raise _refusal(address, key, text)
    return recipe


def _refusal(address: str, key: str, value: str) -> UserError:
    what = f"{key} is '{value[:200]}', a local path, which a recipe from the Hub must not name"
    return UserError(f"recipe '{address}': {what}; add --{key} with your own, or with what is on the Hub")


def _config_of_project(name: str) -> str | None:
    """Return a config in the project's recipes, as a path where the working folder has another; else None."""
    path, recipes = (PROJECT / name).resolve(), PROJECT / "recipes"
    inside = not os.path.isabs(name) and path.suffix == ".json" and path.is_relative_to(recipes.resolve())
    if not inside or not path.is_file():
        return None
    return str(path) if os.path.exists(name) and not os.path.samefile(name, path) else name
