"""What a run is made of, in digests: a resume and a rerun notice that data, tokenizer or start have changed.

A digest is the same on every machine, in any folder, and for any number of processes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict

from captioning.data.streaming import is_streamed
from captioning.data.zenodo import UNUSABLE
from captioning.errors import UserError, as_user_error
from captioning.hub.revisions import COMMIT_HASH
from captioning.models.captioner import Captioner
from captioning.training.arguments import ModelArguments


FINGERPRINT_FILE = "fingerprint.json"  # in each checkpoint
START_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin")
HASHED_IMAGES = 1000  # of a split whose bytes are hashed; of the others the size, which needs no reading
BATCH_SIZE = 1000


def fingerprint(
    dataset: DatasetDict, captioner: Captioner, model_args: ModelArguments, retriever: str | None = None
) -> dict[str, Any]:
    """Return the digests of a run: of each unchecked split, of the vocabulary and, where it is known, of the start.

    `model_args` have the commit or config of the start; `retriever` is the digest of what finds captions for prompts.
    """
    found: dict[str, Any] = {split: _of_rows(rows) for split, rows in dataset.items()}
    found["tokenizer"] = _digest(sorted(captioner.tokenizer.get_vocab().items()))
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if not name:
        found["model"] = _digest(model_args.model_config)
    elif COMMIT_HASH.fullmatch(revision or ""):
        found["model"] = revision
    elif os.path.isdir(name):
        files = sorted(path for pattern in START_FILES for path in Path(name).glob(pattern))
        found["model"] = hashlib.blake2b(b"".join(map(_of_file, files)), digest_size=16).hexdigest()
    return found | ({"retriever": retriever} if retriever else {})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words what differs of two fingerprints, of the parts that both have."""
    found = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if not isinstance(new, dict):
            found += [f"the {name} is another"] if old != new else []
        elif isinstance(old, dict):  # a recipe may come from anyone
            parts = [part for part in sorted(old.keys() & new.keys() - {"rows"}) if old[part] != new[part]]
            rows = f"{old.get('rows')} rows before, {new['rows']} now"
            found += [f"split '{name}' has changed ({rows}; other {', '.join(parts)})"] if parts else []
    return sorted(found)


def refuse_changes(checkpoint: str, now: Mapping[str, Any]) -> None:
    """Raise a UserError that says what has changed since a checkpoint, if that has a fingerprint."""
    path = Path(checkpoint) / FINGERPRINT_FILE
    if path.is_file():
        with as_user_error(f"'{path}' cannot be read", "delete it to resume without this check"):
            found = changes(json.loads(path.read_text(encoding="utf-8")), now)
        if found:
            mend = "undo this, or go on all the same with --resume_despite_changes true"
            raise UserError(f"cannot resume from '{checkpoint}': {', '.join(found)}; {mend}")


def _of_rows(rows: Dataset) -> dict[str, Any]:
    streamed = is_streamed(rows)  # then the places and sizes of row groups, not comparable with those of stored images
    ids, captions, images = (hashlib.blake2b(digest_size=16) for _ in range(3))
    columns = [column for column in ("image_id", "caption", "image", UNUSABLE) if column in rows.column_names]
    for number, batch in enumerate(rows.select_columns(columns).with_format("arrow").iter(BATCH_SIZE)):
        ids.update(json.dumps(batch["image_id"].to_pylist(), default=str).encode())
        captions.update(json.dumps(batch["caption"].to_pylist(), default=str).encode())
        if streamed:
            images.update(json.dumps(batch["image"].to_pylist()).encode())
            continue
        unusable = batch[UNUSABLE].to_pylist() if UNUSABLE in columns else [None] * len(batch)
        for row, (image, reason) in enumerate(zip(batch["image"], unusable, strict=True), number * BATCH_SIZE):
            is_hashed = row % -(-len(rows) // HASHED_IMAGES) == 0
            images.update(b"-" if reason else _of_image(image, is_hashed))
    found = {"ids": ids, "captions": captions, "row groups" if streamed else "images": images}
    return {"rows": len(rows)} | {part: digest.hexdigest() for part, digest in found.items()}


def _of_image(image: pa.StructScalar, is_hashed: bool) -> bytes:
    """Return the size of an encoded image, which is bytes or a file, and if asked for a digest of its content."""
    try:
        if image["bytes"].is_valid:
            content = image["bytes"].as_buffer()
            return b"%d " % content.size + (hashlib.blake2b(content).digest() if is_hashed else b"")
        path = image["path"].as_py()
        if not os.path.isfile(path):  # reading a pipe might never end
            return b"-"
        return b"%d " % os.path.getsize(path) + (_of_file(path) if is_hashed else b"")
    except (OSError, TypeError, ValueError):  # `check_rows` will say what is wrong with it
        return b"-"


def _of_file(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
