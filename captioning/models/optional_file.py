"""A file that may lie beside a model, in its folder or on the Hub."""

import logging
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


logger = logging.getLogger(__name__)


def optional_file(name: str, file: str, revision: str | None = None) -> str | None:
    """Return the path of a file of the model `name`, a folder or Hub id; None if there is none.

    None too where the Hub does not answer; if the model itself is in the cache, and so will be used, with a warning.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(name, file, revision=revision)
    except LocalEntryNotFoundError:
        model, known = (try_to_load_from_cache(name, one, revision=revision) for one in ("config.json", file))
        if isinstance(model, str) and known is not _CACHED_NO_EXIST and not constants.HF_HUB_OFFLINE:
            logger.warning("model '%s': the Hub does not answer; if it has a %s, that is not used", name, file)
    except EntryNotFoundError:
        pass
    return None
