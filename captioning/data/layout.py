"""What the user says about columns, files and splits, as flags of `prepare` and of a run."""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from captioning.errors import UserError


def flag(default: Any, text: str) -> Any:
    """Return a field with a help text; `transformers.hf_argparser.HfArg` does the same, and takes long to import."""
    return field(default=default, metadata={"help": text})


@dataclass
class Layout:
    """What the user says about columns, files and splits."""

    image_column: str | None = flag(None, "Column of images or their paths. Default: a usual name.")
    caption_column: str | None = flag(None, "Column of captions. Default: a usual name, such as report.")
    id_column: str | None = flag(None, "Column of image ids. Default: image_id, id, or names of files.")
    group_column: str | None = flag(None, "Column of what must not be in two splits. Default: patient_id or the like.")
    image_folder: str | None = flag(None, "Folder of the images that a table names. Default: its own.")
    validation_fraction: float | None = flag(None, "Share of rows to validate on. Without splits by default 0.1.")
    test_fraction: float | None = flag(None, "The same for the test split.")
    concepts: str | None = flag(None, "Of Zenodo's tables: manual or all. Default: all, where there are such tables.")
    split_seed: int = flag(0, "Another number draws other rows for these; --seed does not.")

    def __post_init__(self):
        """Check the values that can be checked alone."""
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; set --{name} from 0 to below 1")
        if (self.validation_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise UserError("validation_fraction and test_fraction leave nothing for the training; lower one")
        if self.concepts not in (None, "manual", "all"):
            raise UserError(f"concepts is '{self.concepts}'; set --concepts to manual or all")
        if self.image_folder is not None and not os.path.isdir(self.image_folder):
            raise UserError(f"image_folder '{self.image_folder}' is not a folder; set --image_folder")

    def given(self) -> list[str]:
        """Return the names of the fields that the user has set."""
        return [item.name for item in fields(Layout) if getattr(self, item.name) != item.default]
