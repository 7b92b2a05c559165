"""Several processes share each batch of training so that every row counts once an epoch, as in one process.

Accelerate fills the last batch of an epoch with rows from its beginning, which are then learnt twice, and the loss of
that step is another than in one process. Here blank rows fill it, in which nothing is learnt.
"""

import logging
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
    """The rows of a tokenized split; all indices from its length up are blank rows.

    A blank row has a black image and no caption, so that all its labels are -100.

    Args:
        rows: N rows.
        prompt_row: the tokens of a row without a caption.
    """

    def __init__(self, rows: Dataset, prompt_row: list[int]):
        self.rows = rows
        self.prompt_row = prompt_row
        self.image = Image.new("L", (64, 64))  # none of the data: it may be unreadable, or far away

    def __len__(self) -> int:
        """Return N; blank rows are not counted."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row."""
        if index < len(self.rows):
            return self.rows[index]
        return {"image_id": "(blank)", "image": self.image, "input_ids": self.prompt_row}

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


logger = logging.getLogger(__name__)


# --- Order ----------------------------------------------------------------------------------------------------


class StreamingSampler(Sampler[int]):
    """The rows of a streamed split in a random order that reads each row group once, by one worker of one process.

    Batch j of all processes goes to process j mod P, and there its i-th batch to worker i mod W: to one of P x W
    slots, j mod (P x W). Row groups are shuffled and dealt to the slots; a slot mixes the rows of a window of row
    groups that fits in the memory of a worker. Only a row group on the border of two slots is read by both.

    The order follows from seed and epoch alone, so that a resumed run skips rows without reading them.

    Args:
        rows: a streamed split.
        batch_size: rows of a batch of one process.
        slots: P x W; no worker counts as one.
        seed: of the order, with the epoch.
    """

    def __init__(self, rows: Dataset, batch_size: int, slots: int, seed: int):
        self.batch_size, self.slots, self.seed, self.epoch = batch_size, slots, seed, 0
        places = rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks().flatten()
        shard, group, _, size = (place.to_numpy() for place in places)
        _, first, of_row = np.unique(shard.astype(np.int64) << 32 | group, return_index=True, return_inverse=True)
        self._sizes = size[first]
        self._rows = np.split(np.argsort(of_row, kind="stable"), np.cumsum(np.bincount(of_row))[:-1])

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = -(-len(self) // self.batch_size)
        rows_of_slot = [len(range(slot, batches, self.slots)) * self.batch_size for slot in range(self.slots)]
        rows_of_slot[(batches - 1) % self.slots] -= batches * self.batch_size - len(self)
        groups = rng.permutation(len(self._rows))
        dealt = np.split(np.concatenate([self._rows[group] for group in groups]), np.cumsum(rows_of_slot)[:-1])
        group_of_row = np.repeat(groups, [len(self._rows[group]) for group in groups])
        labels = np.split(group_of_row, np.cumsum(rows_of_slot)[:-1])
        mixed = [self._mix(rows, label, rng) for rows, label in zip(dealt, labels, strict=True)]
        for batch in range(batches):
            start = batch // self.slots * self.batch_size
            yield from mixed[batch % self.slots][start : start + self.batch_size].tolist()

    def _mix(self, rows: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shuffle rows within windows of their row groups."""
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        borders, number, size = [], 0, 0
        for start in starts.tolist():
            own = int(self._sizes[groups[start]])
            if number == WINDOW_GROUPS or (number and size + own > CACHE_BYTES):
                borders.append(start)
                number, size = 0, 0
            number, size = number + 1, size + own
        return np.concatenate([rng.permutation(window) for window in np.split(rows, borders)])


class SetEpoch(TrainerCallback):
    """Tell a sampler its epoch; after a resume the Trainer's own call ends at accelerate's wrappers."""

    def __init__(self, sampler: StreamingSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Choose the order of the epoch that begins, or goes on."""
        self.sampler.set_epoch(int(state.epoch))
