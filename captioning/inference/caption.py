"""The work of `python -m captioning caption`: images in, captions out, and a line for each image that has none."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from captioning.data.images import open_image
from captioning.errors import UserError, as_user_error, is_out_of_memory, printable
from captioning.hub.client import limit_waiting
from captioning.inference.caption_file import CaptionFile
from captioning.inference.find_images import find_images, image_ids
from captioning.inference.model import InferenceModel
from captioning.reporting.page_images import image_blocks
from captioning.reporting.render_page import PAGE_BUDGET, render_page
from captioning.training.decoding import DEFAULTS, in_words


MANY = 20  # images, from which on a progress bar is of use


def caption_images(arguments: argparse.Namespace) -> None:
    """Caption the images; those that cannot be used are a line each on standard error, and exit status 1 at the end.

    Raises:
        UserError: there is no image, an output is impossible, or the model cannot be used.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks a character
    found = find_images(arguments.images)
    ids = dict(zip(found.paths, image_ids(found.paths), strict=True))
    if arguments.html and any(os.path.realpath(arguments.html) == os.path.realpath(path) for path in ids):
        raise UserError(f"--html would overwrite '{arguments.html}', which is read; name another file")
    progress = Progress(found.faults)
    if found.passed_over:
        progress.write(f"passed over in the folders: {found.passed_over:,} files that are not images")
    if not ids:
        raise UserError("no images were found; name files or folders that hold some")
    limit_waiting()
    transformers_logging.disable_progress_bar()
    settings = {name: getattr(arguments, name) for name in DEFAULTS}
    model = InferenceModel(arguments.model, arguments.revision, arguments.device, settings, arguments.prompt)
    captions: dict[str, str] = {}
    with ExitStack() as stack:
        output = None
        if arguments.output:
            made_by = {"model": model.digest(), "decoding": in_words(model.generation_config), "prompt": model.prompt}
            output = stack.enter_context(CaptionFile(arguments.output, made_by))
            known = output.known_ids(ids)
            ids |= known
            captions = {path: output.captions[image_id] for path, image_id in known.items()}
        waiting = [path for path in ids if path not in captions]
        shows = len(waiting) >= MANY and (output or not sys.stdout.isatty())
        stack.enter_context(progress.bar(len(waiting), shown=shows))
        # The first alone, so that its caption is soon there
        starts = [0, *range(1, len(waiting), arguments.batch_size), len(waiting)]
        for start, end in pairwise(starts):
            new = dict(_caption_batch(model, waiting[start:end], progress))
            captions |= new
            if output:
                output.add((path, ids[path], caption) for path, caption in new.items())
            else:
                for path, caption in new.items():
                    print(printable(path), " ".join(printable(caption).split()), sep="\t")
                sys.stdout.flush()
            progress.update(end - start)
    if output:
        progress.write(f"'{arguments.output}': {len(captions):,} of these images, {len(output.captions):,} in all")
    if arguments.html:
        write_gallery(arguments.html, model, {path: captions[path] for path in ids if path in captions}, ids)
    if progress.failed:
        total = len(ids) + len(found.faults)
        sys.exit(f"error: {progress.failed:,} of {total:,} images could not be captioned")


class Progress:
    """Lines and a bar on standard error; `failed` counts the lines on images."""

    def __init__(self, faults: Mapping[str, str]):
        self.failed, self._bar = 0, tqdm(disable=True)
        for name, reason in faults.items():
            self.fail(name, reason)

    def bar(self, number: int, shown: bool) -> tqdm:
        """Return the bar, which `with` closes; it is only shown on a terminal."""
        self._bar = tqdm(total=number, unit=" images", disable=None if shown else True)
        return self._bar

    def update(self, number: int) -> None:
        """Advance the bar by some images."""
        self._bar.update(number)

    def write(self, text: str) -> None:
        """Print a line, above the bar."""
        self._bar.write(printable(" ".join(text.split())), file=sys.stderr)

    def fail(self, name: str, reason: object) -> None:
        """Say why an image has no caption."""
        self.failed += 1
        self.write(f"{name}: {reason}")


def _caption_batch(model: InferenceModel, paths: Sequence[str], progress: Progress) -> Iterator[tuple[str, str]]:
    """Yield the paths of a batch with their captions, without those that have none."""
    images: dict[str, Image.Image] = {}
    for path in paths:
        try:
            images[path] = open_image({"bytes": None, "path": path})
        except ValueError as error:
            progress.fail(path, error)
    try:
        yield from zip(images, model.caption(list(images.values())) if images else (), strict=True)
    except ValueError as error:
        if len(images) > 1:  # one of them cannot be processed: which?
            for path in images:
                yield from _caption_batch(model, [path], progress)
        else:
            progress.fail(paths[0], error)
    except Exception as error:
        if is_out_of_memory(error):
            mend = "a lower --batch_size" if len(images) > 1 else "fewer --num_beams, or --device cpu"
            raise UserError(f"out of memory with {len(images)} images at a time; set {mend}") from error
        raise


def write_gallery(file: str, model: InferenceModel, captions: Mapping[str, str], ids: Mapping[str, str]) -> None:
    """Write the page of some images and their captions, both by path; images are read again, one at a time.

    Raises:
        UserError: the page cannot be written.
    """
    unscored = {"modality": "", "reference": "", "tags": [[]], "kinds": [], "concepts": [], "scores": []}
    rows = [{"id": ids[path], "predictions": [caption]} | unscored for path, caption in captions.items()]
    gallery = {"systems": ["Caption"], "scores": [], "onCard": [], "kinds": {}, "highlights": [], "rows": rows}
    gallery |= {"attention": {}, "hasImages": True, "unscored": True}
    name = Path(model.name).resolve().name if os.path.exists(model.name) else model.name
    facts = {"model": name, "revision": model.revision, "prompt": model.prompt}
    facts |= {"decoding": in_words(model.generation_config), "images": f"{len(rows):,}"}
    with as_user_error(f"'{file}' cannot be written", "name another --html"):
        render_page(
            Path(file),
            gallery,
            lambda size: image_blocks(_images(captions), len(rows), PAGE_BUDGET - size),
            name=f"Captions by {name}",
            unscored=True,
            facts={key: value for key, value in facts.items() if value},
        )


def _images(paths: Mapping[str, str]) -> Iterator[Image.Image | None]:
    for path in paths:
        try:
            yield open_image({"bytes": None, "path": path})
        except ValueError:  # it is no longer there
            yield None
