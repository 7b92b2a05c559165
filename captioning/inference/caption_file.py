"""A file of captions that grows batch by batch, and that a later call completes.

Beside `captions.csv` lies `captions.csv.state`: a line on model and settings, then a line with the id and the digest
of each image, which is written before its caption. So the CSV stays one of `ID,Caption`, and a later call knows which
images are done, also those that it calls otherwise.
"""

import csv
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

from captioning.errors import UserError, as_user_error, printable
from captioning.inference.find_images import OwnImage
from captioning.inference.model import Description


CSV_HEADER = "ID,Caption\n"
OTHER = "name another --output"


class CaptionFile:
    """The captions of images, in the CSV form of ImageCLEF or as JSON lines, by the ending of the name.

    `made_by` is what the captions depend on beside the image, by name. The attribute `captions` has those that the
    file holds, by id; a CSV has no concepts.

    Raises:
        UserError: the file is not one of ours, holds captions of another model or settings, is broken, or is being
            written by another process.
    """

    def __init__(self, path: str, made_by: Mapping[str, Any]):
        self.path, self._is_csv, self._stack = path, path.lower().endswith(".csv"), ExitStack()
        state = f"{path}.state"
        if not _is_empty(path) and _is_empty(state):
            raise UserError(f"'{path}' was not written by this command, for lack of '{state}'; {OTHER}")
        with as_user_error(f"'{path}' cannot be continued", OTHER):
            self._state = self._stack.enter_context(open(state, "a+b", 0))  # noqa: SIM115
            self._rows = self._stack.enter_context(open(path, "a+b", 0))  # noqa: SIM115
            try:
                fcntl.flock(self._state, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"'{path}' is being written by another process; wait for it, or {OTHER}") from None
            header, *images = [json.loads(line) for line in _whole_lines(self._state)] or [{}]
            self._digests = {image["id"]: image["digest"] for image in images}
            self.captions = self._read_rows()
        if unknown := self.captions.keys() - self._digests.keys():
            raise UserError(f"'{path}' has a row '{min(unknown)}' that this command did not write; {OTHER}")
        if self.captions:
            for key, now in made_by.items():
                if header.get(key) != now:
                    values = "" if key == "model" else f" ('{header.get(key)}', now '{now}')"
                    raise UserError(f"'{path}' holds captions by another {key}{values}; {OTHER}")
        else:  # also where the file was deleted
            for file in (self._state, self._rows):
                file.truncate(0)
            _append(self._state, json.dumps(made_by) + "\n")
            _append(self._rows, CSV_HEADER if self._is_csv else "")

    def __enter__(self) -> "CaptionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _read_rows(self) -> dict[str, Description]:
        lines = _whole_lines(self._rows)
        if self._is_csv:
            return {image_id: Description(text) for image_id, text in csv.reader(map(bytes.decode, lines[1:]))}
        return {row["id"]: Description(row["caption"], row.get("concepts")) for row in map(json.loads, lines)}

    def with_known_ids(self, images: Sequence[OwnImage]) -> list[OwnImage]:
        """Return the images, with the earlier id where the file has the caption under one: other images change ids.

        Raises:
            UserError: the caption of an id is that of another image.
        """
        others = self.captions.keys() - {image.id for image in images}
        earlier = {(_stem(name), self._digests[name]): name for name in others}
        found = []
        for image in images:
            is_known = image.id in self.captions
            digest = _digest_of(image) if is_known or earlier else None
            if is_known and digest not in (None, self._digests[image.id]):
                what = f"'{self.path}' holds the caption of another image '{image.id}' than '{image}'"
                raise UserError(f"{what}, or that has changed; {OTHER}")
            found.append(image if is_known else image._replace(id=earlier.pop((_stem(image.id), digest), image.id)))
        return found

    def add(self, captions: Mapping[OwnImage, Description]) -> None:
        """Append the captions of some images; they are on their way to the disk when this returns."""
        images = rows = ""
        for image, (caption, concepts) in captions.items():
            images += json.dumps({"id": image.id, "digest": _digest_of(image)}) + "\n"
            if self._is_csv:
                quoted = " ".join(caption.replace("\0", " ").split()).replace('"', '""')
                rows += f'{image.id},"{quoted}"\n'
            else:
                file = "/".join(os.path.abspath(image.path).split(os.sep)[-1 - image.id.count("/") :])
                row = {"id": image.id, "file": printable(file), "caption": caption}
                rows += json.dumps(row | ({} if concepts is None else {"concepts": concepts})) + "\n"
        _append(self._state, images)
        _append(self._rows, rows)
        self.captions |= {image.id: found for image, found in captions.items()}


def _is_empty(path: str) -> bool:
    return not os.path.exists(path) or os.path.getsize(path) == 0


def _append(file: BinaryIO, text: str) -> None:
    left = text.encode()
    try:
        while left:  # on a disk that is almost full, only a part is written at first
            left = left[file.write(left) :]
    except OSError as error:
        error.filename = file.name
        raise


def _stem(image_id: str) -> str:
    """Return what an id keeps when other images come: the name of the file, without folders and ending."""
    return os.path.splitext(image_id.rpartition("/")[2])[0]


def _digest_of(image: OwnImage) -> str | None:
    """Return a digest of the file of an image, with the frame where it has several; None if it is not there."""
    if not os.path.isfile(image.path):
        return None
    with open(image.path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return f"{digest}#{image.frame}" if isinstance(image.frame, int) else digest


def _whole_lines(file: BinaryIO) -> list[bytes]:
    """Return the lines of a file, and cut off a last one that has no end, since the process was killed."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return content[:whole].split(b"\n")[:-1]
