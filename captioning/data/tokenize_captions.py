"""Captions to tokens: the column `input_ids`."""

import logging

from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets.fingerprint import Hasher

from captioning.models.captioner import Captioner
from captioning.stages import stage


logger = logging.getLogger(__name__)


@stage("tokenize")
def tokenize(dataset: DatasetDict, captioner: Captioner, max_length: int) -> DatasetDict:
    """Add the column `input_ids`: the start, the prompt, the caption cut to `max_length` tokens in all, the end token.

    Raises:
        UserError: `max_length` leaves no room for a caption.
    """
    captioner.tokenize([""], max_length)  # raises before the first row
    return DatasetDict({split: _tokenize_split(rows, split, captioner, max_length) for split, rows in dataset.items()})


def _tokenize_split(rows: Dataset, split: str, captioner: Captioner, max_length: int) -> Dataset:
    def tokenize_batch(batch: dict[str, list[str]]) -> dict[str, list]:
        return dict(zip(("input_ids", "cut"), captioner.tokenize(batch["caption"], max_length), strict=True))

    captions = rows.select_columns("caption")
    # All that the tokens depend on; to hash the function itself, `datasets` would hash all weights of the model
    probe = captioner.tokenize(["A b"], max_length)
    depends = (captions._fingerprint, type(captioner).__name__, captioner.tokenizer, probe, max_length)
    tokens = captions.map(
        tokenize_batch,
        batched=True,
        remove_columns="caption",
        new_fingerprint=Hasher.hash(depends),
        desc=f"Tokenizing {split}",
    )
    if cut := sum(tokens["cut"]):
        logger.info("%s: %d of %d captions are cut to %d tokens", split, cut, len(rows), max_length)
    return concatenate_datasets([rows, tokens.remove_columns("cut")], axis=1)
