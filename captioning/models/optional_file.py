"""A file that may lie beside a model, in its folder or on the Hub."""

from transformers.utils import cached_file


def optional_file(name: str, file: str, revision: str | None = None) -> str | None:
    """Return the path of a file of the model `name`, a folder or Hub id; None if there is none, or no connection."""
    return cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
