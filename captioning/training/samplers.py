"""The order in which rows are trained on: the same in one process and in several, and streamed.

Accelerate fills the last global batch of an epoch with rows that then count twice. Here blank rows fill it, whose
tokens are masked from the loss, as if one process had trained.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from PIL import Image
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback

from captioning.data.streaming import CACHE_BYTES, WINDOW_GROUPS


class PaddedRows:
    """The N `rows` of a tokenized split; index N is a blank row: a black image, and `prompt_row` without a caption."""

    def __init__(self, rows: Dataset, prompt_row: list[int]):
        self.rows = rows
        # An image of the data might be unreadable, or on the Hub
        self.blank = {"image_id": "(blank)", "image": Image.new("L", (64, 64)), "input_ids": prompt_row}

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch, those of the split in one read."""
        real = [index for index in indices if index < len(self.rows)]
        found = iter(self.rows.__getitems__(real) if real else [])
        return [next(found) if index < len(self.rows) else self.blank for index in indices]


class PaddedSampler(Sampler[int]):
    """The indices of a sampler of `num_rows` rows, then that of the blank row up to a whole number of global batches.

    A `RandomSampler` gets the order that accelerate gives it in one process. `multiple`: rows of a global batch;
    `data_seed`: the Trainer's, None for torch's.
    """

    def __init__(self, sampler: Sampler[int], num_rows: int, multiple: int, data_seed: int | None = None):
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, generator=sampler.generator, data_seed=data_seed)
        self.sampler, self.num_rows, self.multiple = sampler, num_rows, multiple

    def __len__(self) -> int:
        """Return the number of indices, those of blank rows included."""
        return math.ceil(len(self.sampler) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch."""
        yield from self.sampler
        yield from [self.num_rows] * (len(self) - len(self.sampler))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class StreamingSampler(Sampler[int], TrainerCallback):
    """The `rows` of a streamed split in a random order in which each row group is in use for a short part of an epoch.

    Row groups are shuffled, and the rows of each are spread at random over the places of those around it, of as many
    as fit in the memory that `data.streaming` allows. The order follows from `seed` and epoch alone, whatever the
    number of processes and workers, and a resumed run skips rows without reading them.
    """

    def __init__(self, rows: Dataset, seed: int):
        self.seed, self.epoch = seed, 0
        places = rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks().flatten()
        shard, group, _, size = (place.to_numpy() for place in places)
        _, first, of_row = np.unique(shard.astype(np.int64) << 32 | group, return_index=True, return_inverse=True)
        self._sizes = size[first]
        self._rows = np.split(np.argsort(of_row, kind="stable"), np.cumsum(np.bincount(of_row))[:-1])

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Choose the order of the epoch: the Trainer's `set_epoch` does not get through accelerate's wrappers."""
        self.epoch = int(state.epoch)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        groups = rng.permutation(len(self._rows))
        # Of the memory, which is 1 long: the row groups whose centers are within 1/2 of a place are in use there
        lengths = np.maximum(self._sizes[groups] / CACHE_BYTES, 1 / WINDOW_GROUPS)
        ends = np.cumsum(lengths)
        rows, places = [], []
        for group, center in zip(groups, ends - lengths / 2, strict=True):
            number, low, high = len(self._rows[group]), max(center - 0.5, 0), min(center + 0.5, ends[-1])
            rows.append(rng.permutation(self._rows[group]))
            places.append(low + (high - low) * (np.arange(number) + rng.random(number)) / number)
        yield from np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")].tolist()
