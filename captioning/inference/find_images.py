"""The images that a user names, by files, folders, patterns or a list, and what they are called in the results."""

import glob
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from captioning.data.images import IMAGE_ENDINGS
from captioning.errors import UserError, printable
from captioning.files import short_names


ENDINGS = IMAGE_ENDINGS | {".dcm", ".dicom"}
MAGIC, MAGIC_START = b"DICM", 128  # of a DICOM file


@dataclass
class FoundImages:
    """What was found by some names.

    Attributes:
        paths: the images, each once, in the order of the names, those of a folder sorted.
        faults: by name, why there is nothing to caption.
        passed_over: number of other files in folders.
    """

    paths: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0

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
                if os.path.splitext(path)[1].lower() in ENDINGS or _holds_dicom(path):
                    self.paths.append(path)
                else:
                    self.passed_over += 1


def find_images(names: Iterable[str]) -> FoundImages:
    """Find the images by the names of files and folders, by patterns, and by `-`, a list on standard input."""
    found = FoundImages()
    for name in names:
        if name == "-":
            text = os.fsdecode(sys.stdin.buffer.read())
            lines = text.split("\0") if "\0" in text else text.splitlines()  # `find -print0` writes the first
            for line in filter(None, lines):
                found.add(line)
        else:
            found.add(name)
    unique: dict[str, str] = {}
    for path in found.paths:
        unique.setdefault(os.path.abspath(path), path)
    found.paths = list(unique.values())
    return found


def _holds_dicom(path: str) -> bool:
    """Tell whether a file of any name is DICOM; the index of a medium has no pixels of its own."""
    with suppress(OSError):
        if os.path.basename(path) != "DICOMDIR" and stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                return file.read(MAGIC_START + len(MAGIC))[MAGIC_START:] == MAGIC
    return False


def image_ids(paths: Sequence[str]) -> list[str]:
    """Return an id for each image: the name of its file, with as many folders as tell it from the others.

    An id has no ending unless another file differs in nothing else, and can stand in a submission to ImageCLEF.

    Raises:
        UserError: two names differ only in characters that an id cannot hold.
    """
    whole = [printable(os.path.abspath(path)).translate({ord(","): "_", ord('"'): "_"}) for path in paths]
    stems = [stem if ending.lower() in ENDINGS else stem + ending for stem, ending in map(os.path.splitext, whole)]
    counts = Counter(stems)
    names = [stem if counts[stem] == 1 else path for stem, path in zip(stems, whole, strict=True)]
    short = short_names(names)
    ids = [short[name].strip() for name in names]
    if repeated := [image_id for image_id, number in Counter(ids).items() if number > 1]:
        raise UserError(f"two images would have the id '{repeated[0]}'; rename one")
    return ids
