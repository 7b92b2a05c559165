"""What a failed call to the Hub says to the user: one line with the cause and, where there is one, the fix."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors, get_token

from captioning.errors import UserError, as_user_error, causes, first_line
from captioning.hub.client import SilentHub


MAX_QUOTED = 300  # characters of a message that is not ours
FIXES = {
    403: "the token may not do this; use one with write access to this repository",
    404: "there is no such repository, or the token may not see it",
    409: "the name is taken, or another push is going on",
    429: "too many requests: wait some minutes",
}


def describe_fault(error: BaseException) -> str:
    """Return in one line why a call to the Hub failed, and what helps where it is known."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())[:MAX_QUOTED]
    if text.startswith("Invalid metadata in README.md"):
        return f"400, the Hub rejects the card: {text}; correct README.md"
    for cause in causes(error):
        if isinstance(cause, SilentHub):
            return str(cause)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "offline mode: HF_HUB_OFFLINE is set"
        if isinstance(cause, errors.HfHubHTTPError):
            return _describe_status(cause)
        if isinstance(cause, json.JSONDecodeError):
            return "the Hub's answer is not JSON: its server is down, a proxy answers, or HF_ENDPOINT is wrong"
        if isinstance(cause, errors.HTTPError):
            return f"the Hub cannot be reached, or the connection broke ({type(cause).__name__}: {cause})"[:MAX_QUOTED]
    return first_line(error)


@contextmanager
def reading_from_hub(what: str, mend: str = "") -> Iterator[None]:
    """See `as_user_error`; where the Hub gave no access or no answer, the message says so."""
    with as_user_error(what, mend):
        try:
            yield
        except Exception as error:
            if fault := next(filter(_is_of_access, causes(error)), None):
                raise UserError(f"{what}: {_describe_access(fault)}{'; ' if mend else ''}{mend}") from error
            raise


def _is_of_access(error: BaseException) -> bool:
    # By its name: `datasets` takes seconds to import, and captions of one's own images do without it
    of_datasets = type(error).__name__ == "DatasetNotFoundError"
    return of_datasets or isinstance(error, (errors.RepositoryNotFoundError, SilentHub, errors.HFValidationError))


def _describe_access(error: Exception) -> str:
    if isinstance(error, SilentHub):
        return str(error)
    if isinstance(error, errors.HFValidationError):
        return "there is no such folder, and a name on the Hub is user/name"
    log_in = "`hf auth login` with a token that may read it" if get_token() else "run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its terms on its page of the Hub, and {log_in}"
    return f"the Hub has no such repository, or it is private: check the name, or {log_in}"


def _describe_status(error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f" ({' '.join(error.server_message.split())[:MAX_QUOTED]})" if error.server_message else ""
    if status == 401:
        what = "the token is not accepted" if get_token() else "there is no token"
        return f"401, {what}{said}: run `hf auth login` or set HF_TOKEN to a token with write access"
    return f"{status}, {FIXES.get(status, 'a fault of the Hub' if status >= 500 else 'the Hub rejects it')}{said}"
