"""The demo: a Gradio page on this machine that captions one image at a time.

Nothing leaves the machine: the page loads nothing from elsewhere, analytics are off, and an uploaded file is deleted
as soon as it has been read. No state is shared between users: an image is held by the session that sent it.
"""

import argparse
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

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
from captioning.training.decoding import DEFAULTS


LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_FILE_SIZE = 2**28  # bytes of an upload; a tomosynthesis in DICOM may have 200 MB
MAX_MESSAGE = 300  # characters; it may quote a file
STATE_SECONDS = 3600  # after which an image that is still shown is forgotten
EXAMPLES = (("radiograph", "chest", "nodule"), ("CT", "abdomen", "cyst"), ("MRI", "head", "mass"))
# Decode settings: the field's label, the least and the most
SETTINGS = {
    "num_beams": ("Beams; 1 is greedy search", 1, 10),
    "max_new_tokens": ("Most new tokens", 1, 256),
    "length_penalty": ("Length penalty; above 1, long captions win", -100, 100),
    "no_repeat_ngram_size": ("No sequence of this many tokens twice; 0: allowed", 0, 256),
}
# A browser that keeps to it asks no other server, whatever Gradio's scripts want
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def demo(arguments: argparse.Namespace) -> None:
    """Serve the page until a signal comes, or write it as a Space.

    Raises:
        UserError: gradio is not installed, the address is taken, or the model or the data cannot be loaded.
    """
    if arguments.export_space:
        export_space(arguments.model, arguments.revision, Path(arguments.export_space))
        return
    with tempfile.TemporaryDirectory(prefix="captioning-demo-") as folder:
        gradio = _import_gradio(folder)
        _check_address(arguments.host, arguments.port)
        model = InferenceModel(arguments.model, arguments.revision, arguments.device)
        writer = Writer(model, arguments.train, arguments.train_images)
        page = build_page(gradio, writer, arguments.host in LOOPBACK)
        ended = Event()
        with on_stop_signals(lambda number: ended.set()):
            _, url, _ = page.launch(**_launch_options(gradio, arguments.host, arguments.port))
            if arguments.host not in LOOPBACK:
                print("Warning: whoever reaches this address may use the page, without password or encryption")
            print(f"Demo: {url} (end it with Ctrl-C)", flush=True)
            ended.wait()
        # Open pages are not waited for, and that they are cut off is not an error
        page.server.force_exit = logging.getLogger("uvicorn.error").disabled = True
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


def _check_address(host: str, port: int | None) -> None:
    """Raise a UserError if nobody can listen there: gradio asks for a name or a port for minutes."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port or 0))
    except (OSError, OverflowError) as error:
        what = f"the demo cannot listen at {host}" + f", port {port}" * bool(port)
        raise UserError(f"{what}: {error}; set another --host or --port") from error


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


# Images on the page of any user, by the path of the file. Gradio names it by its content: of two users who send the
# same at the same moment, one finds it deleted
_OPENED: WeakValueDictionary[str, Image.Image] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class _Shown:
    """An image on the page of a user."""

    image: Image.Image  # as the model gets it
    replaced: Event = field(default_factory=Event)  # set when another takes its place, so that its caption ends
    writing: Lock = field(default_factory=Lock)  # held while its caption is written


def build_page(gradio: ModuleType, writer: Writer, is_local: bool) -> Any:
    """Return the page as `gradio.Blocks`; `is_local`: it is reached from this machine alone."""
    own, name = writer.model.generation_config, writer.model.name
    title = f"{Path(name).resolve().name if Path(name).exists() else name}: captions of radiology images"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(60, 300)) as page:
        gradio.HTML(banner(title, is_local))
        image = gradio.State(time_to_live=STATE_SECONDS)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                upload = gradio.File(label="Image to caption: PNG, JPEG, TIFF, DICOM, ...", height=160)
                with gradio.Row(elem_classes="examples"):
                    button = partial(gradio.Button, size="sm", min_width=150)
                    examples = [(button(text), example) for text, example in _images_to_try(name)]
                with gradio.Accordion("Decode settings", open=False):
                    settings = []
                    for key, (label, *_) in SETTINGS.items():
                        precision = None if key == "length_penalty" else 0
                        value = getattr(own, key) or DEFAULTS[key]
                        settings.append(gradio.Number(value, label=label, precision=precision))
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
        config = writer.settings(_checked(writer.model.generation_config, values))
        with shown.writing:
            for step in writer.write(shown.image, config):
                if shown.replaced.is_set():
                    return
                if isinstance(step, Written):
                    yield caption_text(step.alternatives[0].caption), details(step)
                else:
                    yield caption_text(step, "…"), ""
    except (ValueError, RuntimeError) as error:  # a setting is out of range, memory is full
        yield fault(printable(str(error), MAX_MESSAGE)), ""


def _checked(own: GenerationConfig, values: Sequence[float | None]) -> dict[str, float]:
    """Return the given values of the `SETTINGS` by name; ValueError: one is out of range, the model's own is not."""
    given = {key: value for key, value in zip(SETTINGS, values, strict=True) if value is not None}
    for key, value in given.items():
        label, least, most = SETTINGS[key]
        if value != getattr(own, key) and not least <= value <= most:
            raise ValueError(f"{label.partition(';')[0]}: {value:g} is not from {least} to {most}")
    return given


def _images_to_try(name: str) -> list[tuple[str, Image.Image]]:
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
    except OSError:
        image = _OPENED.get(path)
        return image, "" if image else "the file did not arrive; choose it again"
    try:
        image = _OPENED[path] = open_image({"bytes": content, "path": None})
        return image, ""
    except ValueError as error:
        return None, f"unusable file: {printable(str(error), MAX_MESSAGE)}"
    except Exception as error:  # a parser's fault must not end the session; its message may quote the file
        return None, f"unusable file: {type(error).__name__}"
    finally:  # not before the image is in `_OPENED`, where another user looks then
        Path(path).unlink(missing_ok=True)
