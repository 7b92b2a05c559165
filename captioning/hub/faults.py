"""TODO."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx2
from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._http import default_client_factory


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# The client itself retries uploads, but not these three calls (huggingface_hub 2.4.0)
UNRETRIED_CALLS = ("/api/repos/create", "/api/validate-yaml", "/commit/")
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
TIMEOUT = 60.0  # seconds without a byte; the client's own default is to wait for ever
RETRY_WAITS = (1.0, 4.0)  # seconds before the second and the third try
LONGEST_RETRY_AFTER = 60.0  # seconds; a rate limit that asks for more ends the push


# --- Faults ---------------------------------------------------------------------------------------------------


def describe_fault(error: BaseException) -> str:
    """Return in one line why a call of the Hub's client failed, and what helps where it is known."""
    text = " ".join(str(error).split())
    if text.startswith("Invalid metadata in README.md"):
        return f"400, the Hub rejects the card: {text[:300]}; mend README.md"
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode: HF_HUB_OFFLINE is set"
        if isinstance(cause, HfHubHTTPError):
            return _describe_status(cause)
        if isinstance(cause, json.JSONDecodeError):
            return "the Hub's answer is no JSON: its server is down, a proxy answers, or HF_ENDPOINT is wrong"
        if isinstance(cause, HTTPError):
            return f"the Hub cannot be reached, or the connection broke ({type(cause).__name__}: {cause})"[:300]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _describe_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f" ({' '.join(error.server_message.split())[:200]})" if error.server_message else ""
    if status == 401:
        what = "the token is not accepted" if get_token() else "there is no token"
        return f"401, {what}{said}: run `hf auth login` or set HF_TOKEN to a token that may write"
    meanings = {
        403: "the token may not do this",
        404: "there is no such repository, or the token may not see it",
        409: "the name is taken, or another push is going on",
        429: "too many requests: wait some minutes",
    }
    meaning = meanings.get(status, "a fault of the Hub" if status >= 500 else "the Hub rejects the request")
    return f"{status}, {meaning}{said}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _limit_waiting() -> None:
    """Make the Hub's client give up on a server that is silent for `TIMEOUT`: a run must not hang on its upload."""

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = TIMEOUT
        return made

    set_client_factory(client)


def _with_retries(call: Callable[[], Result]) -> Result:
    """Return `call()`, tried again after a transient fault of a call that the client does not retry itself."""
    for seconds in RETRY_WAITS:
        try:
            return call()
        except Exception as error:
            asked = _seconds_to_retry(error)
            if asked is None or asked > LONGEST_RETRY_AFTER:
                raise
            time.sleep(max(seconds, asked))
    return call()


def _seconds_to_retry(error: Exception) -> float | None:
    """Return for how long the server asks to wait, 0 if it does not say, None if another try is of no use."""
    for cause in _causes(error):
        if isinstance(cause, HTTPError):
            request = cause.response.request if isinstance(cause, HfHubHTTPError) else cause.request
            if not any(call in request.url.path for call in UNRETRIED_CALLS):
                return None
            if not isinstance(cause, HfHubHTTPError):
                # A refused connection stays refused, a silent server silent; one that broke may be an accident
                return None if isinstance(cause, httpx2.ConnectError | httpx2.TimeoutException) else 0.0
            if cause.response.status_code not in TRANSIENT_STATUS:
                return None
            asked = cause.response.headers.get("Retry-After", "")
            return float(asked) if asked.isdigit() else 0.0
        if isinstance(cause, json.JSONDecodeError):  # the answer of a proxy, or of a server that is down
            return 0.0
    return None
