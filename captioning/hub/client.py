"""The HTTP client of `huggingface_hub`: says what it waits for, gives up on a silent or busy Hub, retries all calls.

transformers and datasets call the Hub by it too, and many of these calls have no time limit of their own.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, http_backoff, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory


logger = logging.getLogger(__name__)
TIMEOUT = max(60.0, constants.HF_HUB_DOWNLOAD_TIMEOUT)  # seconds without a byte
FORGOTTEN = 60.0  # seconds after which a silent host is waited for anew
NOTICE = 10.0  # seconds without a byte after which a line says what is waited for
LONGEST_WAIT = 60  # seconds; a rate limit that asks for more is an error, for which the client would sleep
MAX_RETRIES = 2
# A refused connection stays refused and a silent server silent; one that broke off may be an accident
RETRIED_ERRORS = (httpx2.ReadError, httpx2.WriteError, httpx2.CloseError, httpx2.RemoteProtocolError)


class SilentHub(OfflineModeIsEnabled):
    """The Hub sends nothing, or was never reached: clients do not try again, and take what is in their cache."""


def limit_waiting() -> None:
    """Bound how long calls to the Hub wait, and silence its client's messages, which report each retry twice."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    set_client_factory(_make_client)


def _make_client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = TIMEOUT
    client.event_hooks["response"].append(_refuse_long_wait)
    choose = client._transport_for_url
    client._transport_for_url = lambda url: _PatientTransport(choose(url))
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


# --- Silence --------------------------------------------------------------------------------------------------

_heard: dict[str, float] = {}  # by host, when its last byte came
_silent: dict[str, float] = {}  # by host, when it was found to be silent


class _PatientTransport(httpx2.BaseTransport):
    """Sends each request to a host that is not known to be silent, and watches how long that sends nothing."""

    def __init__(self, transport: httpx2.BaseTransport):
        self._transport = transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        wait = _Wait(request)
        if time.monotonic() < _silent.get(wait.host, -FORGOTTEN) + FORGOTTEN:
            raise wait.silent()
        # Whatever limits the client gives: a call that is repeated after a shorter one waits no less
        request.extensions |= {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT)}
        request.stream = _Body(request.stream, wait, nullcontext(), wait.pause)
        with wait:
            response = self._transport.handle_request(request)
            wait.receive()
        response.stream = _Body(response.stream, wait, wait, wait.receive)
        return response


class _Wait:
    """A context in which a thread waits for the Hub: a long silence is logged, a too long one is `SilentHub`."""

    def __init__(self, request: httpx2.Request):
        self.host = request.url.host
        self._what = f"{request.method} {request.url.copy_with(query=None)}"  # a query may hold a signature
        self.since: float | None = None  # None while the Hub waits for us

    def silent(self) -> SilentHub:
        return SilentHub(f"the Hub has been silent for {TIMEOUT:g} s: {self._what}")

    def pause(self) -> None:
        self.since = None

    def receive(self) -> None:
        _heard[self.host] = time.monotonic()
        _silent.pop(self.host, None)
        self.pause()

    def __enter__(self) -> None:
        self.since, self._over = time.monotonic(), threading.Event()
        threading.Thread(target=self._report, args=(self._over,), daemon=True).start()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._over.set()
        if isinstance(error, httpx2.TimeoutException):
            # Other timeouts are of our sending, and another connection may have had a byte
            is_silence = isinstance(error, httpx2.ConnectTimeout | httpx2.ReadTimeout)
            if is_silence and self.since and _heard.get(self.host, 0.0) <= self.since:
                _silent[self.host] = time.monotonic()
            raise self.silent() from error
        if isinstance(error, httpx2.ConnectError) and not _heard:  # there is no network
            raise SilentHub(f"the Hub cannot be reached ({error})") from error

    def _report(self, over: threading.Event) -> None:
        reported = 0.0
        while not over.wait(NOTICE / 10):
            silence = time.monotonic() - self.since if self.since else 0.0
            reported = min(reported, silence)
            if silence >= reported + NOTICE:
                reported = silence
                logger.warning("waiting for the Hub: %s (%.0f s)", self._what, silence)


class _Body(httpx2.SyncByteStream):
    """The body of a request or response, which calls `on_chunk` at each chunk."""

    def __init__(
        self, stream: httpx2.SyncByteStream, wait: _Wait, context: AbstractContextManager, on_chunk: Callable[[], None]
    ):
        self._stream, self._wait, self._context, self._on_chunk = stream, wait, context, on_chunk

    def __iter__(self) -> Iterator[bytes]:
        with self._context:
            for chunk in self._stream:
                self._on_chunk()
                yield chunk
                self._wait.since = time.monotonic()

    def close(self) -> None:
        self._stream.close()
