"""TODO."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from captioning.errors import UserError, as_user_error
from captioning.scoring.bootstrap import Score
from captioning.scoring.coco import MissingError, _check_pairs


BERTSCORE_MODEL = "microsoft/deberta-xlarge-mnli"

BERTSCORE_CHUNK = 512  # pairs at a time: bert-score keeps every token's embedding, 250 KB a sentence


# BERTScore


def bertscore(
    predictions: Sequence[str],
    references: Sequence[str],
    model: str = BERTSCORE_MODEL,
    num_layers: int | None = None,
) -> tuple[Score | None, str | None]:
    """Return the BERTScore F1 of N captions as the evaluator of ImageCLEFmedical Caption computes it, from 0 to 1.

    Captions are normalized (`metrics.imageclef_normalize`), tokens weigh by their idf over the references, scores are
    not rescaled, and two empty captions score 1. The evaluator scores pair by pair; here they are batched, which
    changes the float32 rounding only: padding has similarity 0, and would win only where a word's cosine to every
    token of the other caption is negative.

    Args:
        predictions: N captions.
        references: N captions.
        model: a model in the Hugging Face cache, or a local folder. It is never downloaded.
        num_layers: whose output is compared; bert-score knows it for its own models, by name.

    Returns:
        The score and None; or None and one line that says what is missing and the mend.

    Raises:
        ValueError: there are not as many predictions as references, or none.
    """
    from metrics import imageclef_normalize

    _check_pairs(predictions, references)
    empty = np.array([not p and not r for p, r in zip(predictions, references, strict=True)])
    predictions, references = ([imageclef_normalize(text) for text in texts] for texts in (predictions, references))
    quiet = io.StringIO()  # bert-score warns of empty captions, transformers shows a progress bar
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), _no_logs():
        try:
            scorer = _bert_scorer(model, num_layers)
        except UserError as error:
            return None, str(error)
        scorer.compute_idf(references)
        values = []
        for start in range(0, len(references), BERTSCORE_CHUNK):
            chunk = slice(start, start + BERTSCORE_CHUNK)
            values.append(scorer.score(predictions[chunk], references[chunk])[2].double().numpy())
    return Score.of(np.where(empty, 1.0, np.concatenate(values))), None


def _bert_scorer(model: str, num_layers: int | None):
    """Return a `bert_score.BERTScorer` of a model at hand, made to work with transformers 5.

    Raises:
        UserError: bert-score or the model is not there, or cannot be loaded.
    """
    missing, name = [], model if _is_hub_id(model) else Path(model).name  # scores are published, paths are not
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
    except ImportError:
        missing.append("bert-score is not installed: `pip install bert-score`")
    folder = _model_folder(model)
    if folder is None:
        mend = f"give a folder that has them, or `hf download {model if _is_hub_id(model) else BERTSCORE_MODEL}`"
        missing.append(f"the weights of {name} are not on this machine: {mend}")
    if missing:
        raise MissingError("; ".join(missing))

    if num_layers is None:  # the compared layer goes by the model's name, which a local folder is taken to keep
        num_layers = {name.split("/")[-1]: layers for name, layers in model2layers.items()}.get(Path(model).name)
        if num_layers is None:
            raise UserError(f"bert-score does not know which layer of {name} to compare: give num_layers")
    for file in ("config.json", "tokenizer_config.json"):
        with as_user_error(f"the BERTScore model {name}: {file} cannot be read"):
            settings = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).is_file() else {}
        if "auto_map" in settings:  # transformers would ask on the terminal whether to run it
            raise UserError(
                f"the BERTScore model {name} wants code of its own to be run, which is not done: take another"
            )
    with as_user_error(f"the BERTScore model {name} cannot be loaded"):
        # No processes for the idf: forked after torch has started its threads they can hang
        scorer = BERTScorer(model_type=str(folder), num_layers=num_layers, idf=True, nthreads=0)
    # transformers 4 loaded all weights as float32; 5 keeps the type they are stored in, which can be float16
    scorer._model.float()
    tokenizer = scorer._tokenizer
    # The official tokenizer names no longest input, and the number that stands for none overflows in transformers 5
    tokenizer.model_max_length = min(tokenizer.model_max_length, scorer._model.config.max_position_embeddings)
    # How bert-score encodes an empty caption; a method that transformers 5 no longer has
    tokenizer.build_inputs_with_special_tokens = lambda ids: tokenizer.encode("")
    return scorer


def _is_hub_id(model: str) -> bool:
    return not Path(model).is_dir() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) is not None


def _model_folder(model: str) -> Path | None:
    """Return the folder of a model, local or in the Hugging Face cache, or None if its weights are not there."""
    from huggingface_hub import snapshot_download

    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (ValueError, OSError):  # no name of a model, or not in the cache
            return None
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return folder if weights else None


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    """Silence what transformers logs below an error: the classification head that BERTScore has no use for."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
