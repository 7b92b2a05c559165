"""BERT's WordPiece tokenizer as BLIP uses it: loaded, or trained on the captions."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertTokenizer, BlipConfig, PreTrainedTokenizerBase

from captioning.errors import UserError
from captioning.hub.faults import reading_from_hub


BERT_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_WORD = 100  # characters; WordPiece reads a longer word as [UNK]


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the Hub, from a saved folder, or from a folder with a WordPiece `vocab.txt` alone.

    Raises:
        UserError: there is none, or it has no `[CLS]` and `[SEP]`.
    """
    vocab_file = Path(name) / "vocab.txt"
    with reading_from_hub(f"tokenizer '{name}' cannot be loaded", "give a folder, with a vocab.txt at least"):
        if vocab_file.is_file() and not (Path(name) / "tokenizer.json").is_file():
            # T13: `BertTokenizerFast(vocab_file=...)` is silently ignored in transformers 5
            tokens = vocab_file.read_text(encoding="utf-8").splitlines()
            if missing := set(BERT_SPECIAL_TOKENS) - set(tokens):
                raise UserError(f"'{vocab_file}' lacks {sorted(missing)[0]}; give a BERT vocabulary, one entry a line")
            return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
        # False: refuse a tokenizer that brings code, instead of asking on the terminal
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError(f"tokenizer '{name}' has no [CLS] or [SEP]; BLIP needs a BERT tokenizer")
    if len(tokenizer) <= len(BERT_SPECIAL_TOKENS) + 2:  # T13: a folder without tokenizer files gives an empty one
        raise UserError(f"tokenizer '{name}' has no words: tokenizer.json and vocab.txt are missing")
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a lower-casing WordPiece tokenizer of at most `vocab_size` entries on `captions`, the same each time.

    To that end the continuation characters (`##a`) are given in order: `tokenizers` would number them by a randomly
    seeded hash map, and break ties between merges by these numbers. Words over `MAX_WORD` are left out: no entry would
    help them, and the time grows with the square of a word's length.
    """
    trainer = BertWordPieceTokenizer(lowercase=True)
    continuations, texts = set(), []
    for caption in captions:
        found = trainer.pre_tokenizer.pre_tokenize_str(trainer.normalizer.normalize_str(caption))
        words = [word for word, _ in found if len(word) <= MAX_WORD]
        continuations.update(f"##{character}" for word in words for character in word[1:])
        texts.append(caption if len(words) == len(found) else " ".join(words))
    special = BERT_SPECIAL_TOKENS + sorted(continuations)
    trainer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    return BertTokenizer(vocab=trainer.get_vocab())


def add_blip_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Append BLIP's `[DEC]` (the start of a caption) and `[ENC]` to a BERT tokenizer that lacks them."""
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def match_special_tokens(tokenizer: PreTrainedTokenizerBase, config: BlipConfig) -> PreTrainedTokenizerBase:
    """Drop a start or end token that is not the model's: the Trainer would write it into the config (T3)."""
    if tokenizer.bos_token_id != config.text_config.bos_token_id:
        tokenizer.bos_token = None
    if tokenizer.eos_token_id != config.text_config.sep_token_id:
        tokenizer.eos_token = None
    return tokenizer
