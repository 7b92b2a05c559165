"""Names on the Hub made exact: the commit of a model or dataset, and recipes by their address `hf://...`."""

import logging
import os
import re
from urllib.parse import unquote

from huggingface_hub import HfApi, errors, hf_hub_download

from captioning.errors import UserError
from captioning.hub.faults import describe_fault


logger = logging.getLogger(__name__)
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
HUB_RECIPE = re.compile(r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>[^/\s]+))?(/(?P<file>\S+))?")


def pin_revision(name: str, revision: str | None, kind: str = "model", role: str | None = None) -> str | None:
    """Return the commit that `revision` of a Hub repository names now, or `revision` itself if the Hub has no answer.

    Args:
        name: Hub id.
        revision: commit, branch or tag; None: the main branch.
        kind: `model` or `dataset`.
        role: what it is called in messages, and in the name of the flag; by default its kind.

    Raises:
        UserError: `revision` is not in the repository (any more).
    """
    if os.path.exists(name):
        return revision
    role, api = role or kind, HfApi()
    try:
        if revision is None or not COMMIT_HASH.fullmatch(revision):
            return api.resolve_revision(name, repo_type=kind, revision=revision).resolved
        found = api.repo_info(name, repo_type=kind, revision=revision).sha
    except errors.RevisionNotFoundError as error:
        raise UserError(_moved(api, name, revision, kind, role)) from error
    except (errors.HFValidationError, errors.RepositoryNotFoundError):
        return revision  # loading it will say what is wrong
    except Exception as error:  # it may still be in the cache
        logger.warning("The commit of %s '%s' cannot be checked: %s", role, name, describe_fault(error))
        return revision
    if found != revision:
        raise UserError(_moved(api, name, revision, kind, role))
    return revision


def _moved(api: HfApi, name: str, revision: str, kind: str, role: str) -> str:
    try:
        now = f"at {api.repo_info(name, repo_type=kind).sha}"
    except Exception:
        now = "out of reach too"
    moved = f"{role} '{name}' has moved: revision {revision} is not there, its main branch is {now}"
    return f"{moved}; to use other contents, set --{role}_revision to that commit"


def download_recipe(address: str) -> str:
    """Download `hf://<user>/<model>[@<revision>][/recipe.json]` and return the path of the local copy.

    Raises:
        UserError: the address is malformed, or the file cannot be read.
    """
    match = HUB_RECIPE.fullmatch(address)
    if not match:
        raise UserError(f"recipe '{address}' is not an address; write hf://<user>/<model>/recipe.json")
    file, revision = match["file"] or "recipe.json", match["revision"] and unquote(match["revision"])
    try:
        return hf_hub_download(match["repo"], file, revision=revision)
    except Exception as error:
        reasons = {
            errors.RepositoryNotFoundError: "there is no such repository, or it is private: `hf auth login`",
            errors.RevisionNotFoundError: f"there is no revision '{revision}'",
            errors.RemoteEntryNotFoundError: f"the repository has no file '{file}'",
        }
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
        raise UserError(f"recipe '{address}' cannot be read: {reason or describe_fault(error)}") from error
