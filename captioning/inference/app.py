"""The demo: a Gradio page on this machine that captions one image at a time.

Nothing leaves the machine: the page loads nothing from elsewhere, analytics are off, and an uploaded file is deleted
as soon as it has been read. No state is shared between users: an image is held by the session that sent it.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from transformers import GenerationConfig

from captioning.command_line import on_stop_signals
from captioning.data.images import open_image
from captioning.data.phantoms import combinations, draw
from captioning.errors import UserError, printable
from captioning.inference.model import InferenceModel
from captioning.inference.page_parts import HEAD, STYLE, banner, caption_text, details, fault, picture
from captioning.inference.space import export_space
from captioning.inference.writer import Writer, Written


LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_FILE_SIZE = 2**28  # bytes of an upload; a tomosynthesis in DICOM may have 200 MB
MAX_NEW_TOKENS, MAX_BEAMS = 256, 10
MAX_MESSAGE = 300  # characters; it may quote a file
STATE_SECONDS = 3600  # after which an image that is still shown is forgotten
EXAMPLES = (("radiograph", "chest", "nodule"), ("CT", "abdomen", "cyst"), ("MRI", "head", "mass"))
SETTINGS = ("num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size")
# A browser that keeps to it asks no other server, whatever Gradio's scripts want
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def demo(arguments: argparse.Namespace) -> None:
    """Serve the page until a signal comes, or write it as a Space.

    Raises:
        UserError: gradio is not installed, the model or the data cannot be loaded, or the port is taken.
    """
    if arguments.export_space:
        export_space(arguments.model, arguments.revision, Path(arguments.export_space))
        return
    with tempfile.TemporaryDirectory(prefix="captioning-demo-") as folder:
        gradio = _import_gradio(folder)
        model = InferenceModel(arguments.model, arguments.revision, arguments.device)
        writer = Writer(model, arguments.train, arguments.train_images)
        page = build_page(gradio, writer, arguments.host in LOOPBACK)
        ended = Event()
        with on_stop_signals(lambda number: ended.set()):
            try:
                _, url, _ = page.launch(**_launch_options(gradio, arguments.host, arguments.port))
            except OSError as error:  # gradio's message names the ports that it tried
                raise UserError(f"the demo cannot listen at {arguments.host}: {error}; set --port") from error
            print(f"Demo: {url} (end it with Ctrl-C)", flush=True)
            ended.wait()
        page.close(verbose=False)


def _import_gradio(folder: str) -> ModuleType:
    """Import gradio with analytics off and `folder` for its uploads: it reads both when it is imported."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    # It asks its own page whether it is up, which a proxy would not find
    os.environ |= {name: ",".join([os.environ.get(name, ""), *LOOPBACK]) for name in ("NO_PROXY", "no_proxy")}
    try:
        import gradio
    except ImportError as error:
        raise UserError("the demo needs gradio; run `pip install -r requirements-demo.txt`") from error
    return gradio


def _launch_options(gradio: ModuleType, host: str, port: int | None) -> dict[str, Any]:
    off = ("share", "run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # not Google's
    look = {"theme": gradio.themes.Default(**fonts), "css": STYLE, "head": HEAD, "footer_links": []}
    server = {"server_name": host, "server_port": port, "max_file_size": MAX_FILE_SIZE}
    server["app_kwargs"] = {"middleware": [(_Policy, (), {})], "openapi_url": None}  # and no pages of the API
    return dict.fromkeys(off, False) | look | server | {"quiet": True, "prevent_thread_lock": True}


class _Policy:
    """Adds `POLICY` to each answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True, eq=False)
class _Shown:
    """An image on the page of a user.

    Attributes:
        image: as the model gets it.
        replaced: set when another takes its place, so that its caption ends.
        writing: held while its caption is written.
    """

    image: Image.Image
    replaced: Event = field(default_factory=Event)
    writing: Lock = field(default_factory=Lock)


def build_page(gradio: ModuleType, writer: Writer, is_local: bool) -> Any:
    """Return the page as `gradio.Blocks`.

    Args:
        gradio: the package.
        writer: of the model.
        is_local: whether it is reached from this machine alone.
    """
    own, name = writer.model.generation_config, writer.model.name
    title = f"{Path(name).resolve().name if Path(name).exists() else name}: captions of radiology images"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(60, 300)) as page:
        gradio.HTML(banner(title, is_local))
        image = gradio.State(time_to_live=STATE_SECONDS)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                upload = gradio.File(label="Image to caption: PNG, JPEG, TIFF, DICOM, ...", height=160)
                with gradio.Row(elem_classes="examples"):
                    button = partial(gradio.Button, size="sm", min_width=80)
                    examples = [(button(text), example) for text, example in _images_to_try(name)]
                with gradio.Accordion("Decode settings", open=False):
                    settings = _settings(gradio, own)
                    again = gradio.Button("Caption again", interactive=False)
            with gradio.Column(scale=3, min_width=300):
                place = gradio.HTML(picture(None), elem_id="picture")
                caption = gradio.HTML(elem_id="caption")
                found = gradio.HTML(elem_id="details")

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        model = {"inputs": [image, *settings], "outputs": [caption, found], "concurrency_id": "model"} | quiet
        views = {"outputs": [caption, found, place, image, upload, again], "concurrency_limit": None} | quiet
        show, write = partial(_show, gradio), partial(_write, gradio, writer)
        sent = upload.upload(lambda before, path: show(before, *_read_upload(path)), [image, upload], **views)
        tried = [button.click(partial(show, opened=example), image, **views) for button, example in examples]
        for event in (sent, *tried):
            event.then(write, **model)
        again.click(write, **model)
    return page


def _show(gradio: ModuleType, before: _Shown | None, opened: Image.Image | None, message: str = "") -> tuple[Any, ...]:
    """Return the page with another image, or with what is wrong with a file."""
    if before:  # or its caption would go on below another image
        before.replaced.set()
        with before.writing:
            pass
    told = fault(message) if message else caption_text("", "waiting for the model …")
    return told, "", picture(opened), opened and _Shown(opened), None, gradio.Button(interactive=opened is not None)


def _write(
    gradio: ModuleType, writer: Writer, shown: _Shown | None, *values: float | None
) -> Iterator[tuple[Any, Any]]:
    """Yield caption and details while the caption is written by the values of the `SETTINGS`."""
    if shown is None:  # the message of `_show` stays
        yield gradio.skip(), gradio.skip()
        return
    try:
        config = writer.settings(
            {key: value for key, value in zip(SETTINGS, values, strict=True) if value is not None}
        )
        with shown.writing:
            for step in writer.write(shown.image, config):
                if shown.replaced.is_set():
                    return
                if isinstance(step, Written):
                    yield caption_text(step.alternatives[0].caption), details(step)
                else:
                    yield caption_text(step, "…"), ""
    except (ValueError, RuntimeError) as error:  # such as of full memory
        yield fault(printable(str(error), MAX_MESSAGE)), ""


def _settings(gradio: ModuleType, own: GenerationConfig) -> list[Any]:
    """Return the fields of the `SETTINGS`, with the model's own values."""
    beams, tokens = max(MAX_BEAMS, own.num_beams), max(MAX_NEW_TOKENS, own.max_new_tokens)
    number = partial(gradio.Number, minimum=1, precision=0)
    return [
        number(own.num_beams, maximum=beams, label=f"Beams, 1 to {beams}; 1 is greedy search"),
        number(own.max_new_tokens, maximum=tokens, label=f"Most new tokens, 1 to {tokens}"),
        gradio.Number(own.length_penalty or 1.0, label="Length penalty; above 1, long captions win"),
        number(own.no_repeat_ngram_size or 0, minimum=0, label="No sequence of this many tokens twice; 0: allowed"),
    ]


def _images_to_try(name: str) -> list[tuple[str, Image.Image]]:
    """Return images to try with their names: that of the model's card, and drawings."""
    found = []
    with suppress(ValueError):
        found.append(("Sample of the card", open_image({"bytes": None, "path": str(Path(name) / "sample.png")})))
    drawings = {(one["modality"], one["region"], one["finding"]): one for one in combinations("test")}
    for study in EXAMPLES:
        drawing = Image.fromarray(draw(drawings[study], np.random.default_rng(0)))
        found.append((f"Drawing: {study[0]}, {study[1]}", drawing))
    return found


def _read_upload(path: str) -> tuple[Image.Image | None, str]:
    """Return the image of an upload, None if it is none, and what is wrong; the file is deleted."""
    try:
        content = Path(path).read_bytes()
        Path(path).unlink()
    except OSError:  # another user sent the same file at the same moment
        return None, "the file did not arrive; choose it again"
    try:
        return open_image({"bytes": content, "path": None}), ""
    except ValueError as error:
        return None, f"unusable file: {printable(str(error), MAX_MESSAGE)}"
    except Exception as error:  # a parser's fault must not end the session; its message may quote the file
        return None, f"unusable file: {type(error).__name__}"
