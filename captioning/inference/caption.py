"""The work of `python -m captioning caption`: images in, captions out, and a line for each image that has none."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from captioning.data.dicom import burned_in
from captioning.errors import UserError, as_user_error, is_out_of_memory, printable
from captioning.files import refuse_to_replace
from captioning.hub.client import limit_waiting
from captioning.inference.caption_file import CaptionFile
from captioning.inference.find_images import OwnImage, find_files, own_images
from captioning.inference.model import Description, InferenceModel
from captioning.reporting.page_images import image_blocks
from captioning.reporting.render_page import PAGE_BUDGET, render_page
from captioning.training.decoding import DEFAULTS, in_words


PREDICTED_CONCEPT = 7  # its place in `PLACES` of the page's script
MANY = 20  # images, from which on a progress bar is of use


def caption_images(arguments: argparse.Namespace) -> None:
    """Caption the images; those that cannot be used are a line each on standard error, and exit status 1 at the end.

    Raises:
        UserError: there is no image, an output is impossible, or the model cannot be used.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks a character
    found = find_files(arguments.images)
    images, faults = own_images(found.paths, arguments.frame), Faults()
    refuse_to_replace(found.paths, arguments.html)
    for name, reason in found.faults.items():
        faults.add(name, reason)
    if found.passed_over:
        say(f"files in the folders that are not images, and are passed over: {found.passed_over:,}")
    if not images:
        raise UserError("no images were found; name files or folders that hold some")
    limit_waiting()
    transformers_logging.disable_progress_bar()
    settings = {name: getattr(arguments, name) for name in DEFAULTS}
    model = InferenceModel(arguments.model, arguments.revision, arguments.device, settings, arguments.prompt)
    if arguments.output:
        made_by = {"model": model.digest(), "decoding": in_words(model.generation_config)}
        with CaptionFile(arguments.output, made_by | {"prompt": model.prompt, "frame": arguments.frame}) as file:
            images = file.with_known_ids(images)
            missing = [image for image in images if image.id not in file.captions]
            for captions in _in_batches(model, missing, arguments.batch_size, faults, shows_bar=True):
                file.add(captions)
        captions = {image: file.captions[image.id] for image in images if image.id in file.captions}
        say(f"'{arguments.output}': {len(captions):,} of these images, {len(file.captions):,} in all")
    else:
        captions = {}
        for new in _in_batches(model, images, arguments.batch_size, faults, shows_bar=not sys.stdout.isatty()):
            captions |= new
            for image, (caption, concepts) in new.items():
                parts = [caption, *([] if concepts is None else ["; ".join(model.names(concepts))])]
                print(printable(str(image)), *(" ".join(printable(part).split()) for part in parts), sep="\t")
            sys.stdout.flush()
    if arguments.html:
        write_gallery(arguments.html, model, captions)
    if number := faults.burned_in:
        say(f"{number:,} images have text burned into the pixels, as their headers say: it may name patients")
    if faults.count:
        say(f"error: {faults.count:,} of {len(images) + len(found.faults):,} images could not be captioned")
        sys.exit(1)


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar."""
    tqdm.write(printable(" ".join(text.split())), file=sys.stderr)


class Faults:
    """Counts the images that could not be captioned, and those that may name patients."""

    count = burned_in = 0

    def add(self, name: OwnImage | str, reason: object) -> None:
        """Say why an image has no caption."""
        self.count += 1
        say(f"{name}: {reason}")


def _in_batches(
    model: InferenceModel, images: Sequence[OwnImage], size: int, faults: Faults, shows_bar: bool
) -> Iterator[dict[OwnImage, Description]]:
    """Yield the captions of each batch, the first image alone, so that its caption is soon there."""
    starts = [0, *range(1, len(images), size), len(images)]
    with tqdm(total=len(images), unit=" images", disable=None if shows_bar and len(images) >= MANY else True) as bar:
        for start, end in pairwise(starts):
            opened: dict[OwnImage, Image.Image] = {}
            for image in images[start:end]:
                try:
                    opened[image] = image.open()
                    faults.burned_in += burned_in(opened[image])
                except ValueError as error:
                    faults.add(image, error)
            yield _captions(model, opened, faults)
            bar.update(end - start)


def _captions(
    model: InferenceModel, opened: Mapping[OwnImage, Image.Image], faults: Faults
) -> dict[OwnImage, Description]:
    try:
        return dict(zip(opened, model.describe(list(opened.values())) if opened else (), strict=True))
    except ValueError as error:
        if len(opened) == 1:
            faults.add(*opened, error)
            return {}
        # One of them cannot be processed: which?
        each = [_captions(model, {image: pixels}, faults) for image, pixels in opened.items()]
        return {image: caption for found in each for image, caption in found.items()}
    except Exception as error:
        if is_out_of_memory(error):
            mend = "a lower --batch_size" if len(opened) > 1 else "fewer --num_beams, or --device cpu"
            raise UserError(f"out of memory with a batch of {len(opened)}; set {mend}") from error
        raise


def write_gallery(file: str, model: InferenceModel, captions: Mapping[OwnImage, Description]) -> None:
    """Write the page of some images, which are opened again, with their captions.

    Raises:
        UserError: the page cannot be written.
    """
    rows = []
    for image, found in captions.items():
        tags = [(name, PREDICTED_CONCEPT) for name in model.names(found.concepts or ())]
        rows.append({"id": image.id, "predictions": [found.caption], "tags": [tags]})
    name = Path(model.name).resolve().name if os.path.exists(model.name) else model.name
    facts = {"model": name, "revision": model.revision, "prompt": model.prompt}
    facts |= {"decoding": in_words(model.generation_config), "images": f"{len(rows):,}"}
    with as_user_error(f"'{file}' cannot be written", "name another --html"):
        render_page(
            Path(file),
            {"systems": ["Caption"], "rows": rows},
            lambda size: image_blocks(_opened_again(captions), len(rows), PAGE_BUDGET - size),
            name=f"Captions by {name}",
            unscored=True,
            facts={key: value for key, value in facts.items() if value},
        )


def _opened_again(images: Iterable[OwnImage]) -> Iterator[Image.Image | None]:
    for image in images:
        try:
            yield image.open()
        except ValueError:  # it is no longer there, or has changed
            yield None
