"""Captions to tokens: the column `input_ids`."""

import logging
from typing import Any

from datasets import DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from captioning.errors import UserError


logger = logging.getLogger(__name__)


def tokenize(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_caption_length: int,
    prompt_ids: list[int],
) -> DatasetDict:
    """Add the column `input_ids`: `[CLS]`, the prompt, the caption, `[SEP]`; the collator writes `[DEC]` over `[CLS]`.

    Args:
        dataset: what `check_rows` returned.
        tokenizer: a WordPiece tokenizer with `[CLS]` and `[SEP]`.
        max_caption_length: most tokens of a row, start, prompt and `[SEP]` included; a longer caption is cut.
        prompt_ids: tokens of the prompt, without special tokens.

    Raises:
        UserError: `max_caption_length` leaves no room for a caption token.
    """
    room = max_caption_length - len(prompt_ids) - 2
    if room < 1:
        raise UserError(
            f"max_caption_length {max_caption_length} leaves no room for a caption beside [DEC], [SEP] and "
            f"{len(prompt_ids)} prompt tokens; set --max_caption_length to {len(prompt_ids) + 3} or more"
        )
    start, end = [tokenizer.cls_token_id, *prompt_ids], [tokenizer.sep_token_id]
    tokenized = DatasetDict()
    for split, rows in dataset.items():
        tokens = rows.select_columns("caption").map(
            _tokenize_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "start": start, "end": end, "room": room},
            remove_columns="caption",
            desc=f"Tokenizing {split}",
        )
        cut = sum(tokens["cut"])
        if cut:
            logger.info("%s: %d of %d captions are cut to %d tokens", split, cut, len(rows), max_caption_length)
        tokenized[split] = concatenate_datasets([rows, tokens.remove_columns("cut")], axis=1)
    return tokenized


def _tokenize_batch(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, start: list[int], end: list[int], room: int
) -> dict[str, list[Any]]:
    captions = tokenizer(batch["caption"], add_special_tokens=False, verbose=False)["input_ids"]
    return {
        "input_ids": [start + tokens[:room] + end for tokens in captions],
        "cut": [len(tokens) > room for tokens in captions],
    }
