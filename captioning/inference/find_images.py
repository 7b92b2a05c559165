"""The images that a user names, by files, folders, patterns or a list, and what they are called in the results."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from captioning.data.dicom import count_frames, is_dicom
from captioning.data.images import IMAGE_ENDINGS, open_image
from captioning.errors import UserError, printable
from captioning.files import short_names


NO_IMAGE = "DICOMDIR"  # the index of a medium, a DICOM itself


class OwnImage(NamedTuple):
    """An image of the user."""

    id: str  # the name of its file without its ending, with as many folders as tell it from the others
    path: str
    frame: int | str  # of a DICOM, see `open_dicom`; a number where each frame has a caption

    def open(self) -> Image.Image:
        """See `open_image`."""
        return open_image({"bytes": None, "path": self.path}, self.frame)

    def __str__(self) -> str:
        return f"{self.path}#{self.frame}" if isinstance(self.frame, int) else self.path


@dataclass
class FoundFiles:
    """What was found by some names."""

    paths: list[str] = field(default_factory=list)  # in the order of the names, those of a folder sorted
    faults: dict[str, str] = field(default_factory=dict)  # by name, why there is nothing to caption
    passed_over: int = 0  # number of other files in folders

    def add(self, name: str) -> None:
        """Add what a name stands for: a folder's images, a file whatever it is, or the matches of a pattern."""
        if os.path.isdir(name):
            self._add_folder(name)
        elif os.path.lexists(name):
            self.paths.append(name)
        elif matches := sorted(glob.glob(name, recursive=True)):
            for match in matches:
                self.add(match)
        else:
            self.faults[name] = "there is no such file or folder, and as a pattern it matches none"

    def _add_folder(self, name: str) -> None:
        def keep(error: OSError) -> None:
            self.faults[error.filename] = f"the folder cannot be read: {error.strerror}"

        for folder, folders, files in os.walk(name, onerror=keep):
            folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
            for path in (os.path.join(folder, file) for file in sorted(files) if not file.startswith(".")):
                is_image = os.path.splitext(path)[1].lower() in IMAGE_ENDINGS - {""}
                with suppress(OSError):
                    is_image |= os.path.basename(path) != NO_IMAGE and is_dicom(path)
                self.paths += [path] if is_image else []
                self.passed_over += not is_image


def find_files(names: Iterable[str]) -> FoundFiles:
    """Find files by names of files and folders, by patterns, and by `-`, a list of these on standard input."""
    found = FoundFiles()
    for name in names:
        if name == "-":
            text = os.fsdecode(sys.stdin.buffer.read())
            lines = text.split("\0") if "\0" in text else text.splitlines()  # `find -print0` writes the first
        else:
            lines = [name]
        for line in filter(None, lines):
            found.add(line)
    found.paths = list({os.path.abspath(path): path for path in found.paths}.values())
    return found


def own_images(paths: Sequence[str], frame: str) -> list[OwnImage]:
    """Return the images of some files; with frame "all", each frame of a DICOM that has several.

    An id has the ending where another file differs in nothing else, and can stand in a submission to ImageCLEF.

    Raises:
        UserError: two names differ only in characters that an id cannot hold.
    """
    names = [printable(os.path.abspath(path)).translate({ord(","): "_", ord('"'): "_"}) for path in paths]
    stems = [stem if end.lower() in IMAGE_ENDINGS else stem + end for stem, end in map(os.path.splitext, names)]
    counts = Counter(stems)
    names = [stem if counts[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]
    short, images = short_names(names), []
    for path, name in zip(paths, names, strict=True):
        image_id, number = short[name].strip(), 1
        if frame == "all":
            with suppress(OSError, ValueError):  # `open` will say what is wrong with it
                number = count_frames(path) if is_dicom(path) else 1
        if number > 1:
            images += [OwnImage(f"{image_id}#{i}", path, i) for i in range(1, number + 1)]
        else:
            images.append(OwnImage(image_id, path, "middle" if frame == "all" else frame))
    if repeated := [name for name, count in Counter(image.id for image in images).items() if count > 1]:
        raise UserError(f"two images would have the id '{repeated[0]}'; rename one")
    return images
