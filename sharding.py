"""Several processes share each batch of training so that every row counts once an epoch, as in one process.

Accelerate fills the last batch of an epoch with rows from its beginning, which are then learnt twice, and the loss of
that step is another than in one process. Here blank rows fill it, in which nothing is learnt.
"""

import math
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from PIL import Image
from torch.utils.data import RandomSampler, Sampler


class PaddedRows:
    """The rows of a tokenized split; all indices from its length up are blank rows.

    A blank row has a black image and the first row's tokens up to the caption, so that all its labels are -100.

    Args:
        rows: N rows.
        prompt_length: the prompt tokens that follow the start token of each.
    """

    def __init__(self, rows: Dataset, prompt_length: int):
        self.rows = rows
        self.prompt_length = prompt_length
        self.image = Image.new("L", (64, 64))  # none of the data: it may be unreadable, or far away

    def __len__(self) -> int:
        """Return N; blank rows are not counted."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row."""
        if index < len(self.rows):
            return self.rows[index]
        tokens = self.rows.select_columns("input_ids")[0]["input_ids"]
        return {"image_id": "(blank)", "image": self.image, "input_ids": tokens[: 1 + self.prompt_length]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch; the rows of the split are read at once."""
        real = [index for index in indices if index < len(self.rows)]
        found = iter(self.rows.__getitems__(real) if real else [])
        return [next(found) if index < len(self.rows) else self[index] for index in indices]


class PaddedSampler(Sampler[int]):
    """A sampler whose order is continued by indices of blank rows up to a whole number of global batches.

    Args:
        sampler: of N rows; a `RandomSampler` gives the order that accelerate would make of it in one process.
        num_rows: N, also the index of a blank row.
        multiple: rows of a global batch.
        data_seed: the Trainer's; None for that of torch.
    """

    def __init__(self, sampler: Sampler[int], num_rows: int, multiple: int, data_seed: int | None = None):
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, generator=sampler.generator, data_seed=data_seed)
        self.sampler = sampler
        self.num_rows = num_rows
        self.multiple = multiple

    def __len__(self) -> int:
        """Return the number of indices, those of blank rows among them."""
        return math.ceil(len(self.sampler) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch."""
        yield from self.sampler
        for _ in range(len(self) - len(self.sampler)):
            yield self.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, whose order is its own."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
