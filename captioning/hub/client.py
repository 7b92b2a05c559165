"""The HTTP client of `huggingface_hub`, made to give up on a server that is silent or busy, and to retry all calls."""

from functools import partial

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils import hf_raise_for_status, http_backoff, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory


TIMEOUT = 60.0  # seconds without a byte; the client's own default is to wait forever
LONGEST_WAIT = 60  # seconds; a rate limit that asks for more is an error, for which the client would sleep
MAX_RETRIES = 2
# A refused connection stays refused and a silent server silent; one that broke off may be an accident
RETRIED_ERRORS = (httpx2.ReadError, httpx2.WriteError, httpx2.CloseError, httpx2.RemoteProtocolError)


def limit_waiting() -> None:
    """Bound how long calls to the Hub wait: a run must not hang on its upload."""
    set_client_factory(_make_client)


def _make_client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = TIMEOUT
    client.event_hooks["response"].append(_refuse_long_wait)
    # Uploads retry by `http_backoff`, which calls `client.request`; creating a repository, validating the card and
    # committing call `client.post` and do not retry (huggingface_hub 2.4.0)
    client.post = partial(http_backoff, "POST", max_retries=MAX_RETRIES, retry_on_exceptions=RETRIED_ERRORS)
    return client


def _refuse_long_wait(response: httpx2.Response) -> None:
    limit = parse_ratelimit_headers(response.headers)
    asked = response.headers.get("Retry-After", "")
    seconds = limit.reset_in_seconds if limit and not limit.remaining else int(asked) if asked.isdigit() else 0
    if response.status_code >= 400 and seconds > LONGEST_WAIT:
        response.read()  # the Hub's message
        hf_raise_for_status(response)
