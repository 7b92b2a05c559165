"""BERTScore as ImageCLEFmedical Caption computes it, by `bert-score` 0.3.13 from weights that are already here.

`bert-score` is not installed by default, and its weights take 3 GB: nothing is downloaded, what is missing is named.
The rest of ImageCLEF's table is only named: no maintained package computes it from weights that anyone can get.
"""

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from transformers.utils import logging

from captioning.errors import UserError, as_user_error
from captioning.scoring.bootstrap import Score
from metrics import imageclef_normalize


BERTSCORE_MODEL = "microsoft/deberta-xlarge-mnli"
# What the evaluator of 2026 computes its other scores with (evaluator.py at commit 15c4091)
_EVALUATOR = (
    "; run ImageCLEF's evaluator, github.com/taubsity/clef-caption-evaluation-2026, on submission.csv, in an "
    "environment of its own (torch 2.1.2, transformers 4.49)"
)
NOT_COMPUTED = {
    "imageclef_bertscore": f"`pip install bert-score`; --bertscore_model, a folder or cached {BERTSCORE_MODEL}",
    "imageclef_similarity": f"needs MedImageInsight (lion-ai/MedImageInsights), the images and a GPU{_EVALUATOR}",
    "imageclef_bleurt": f"needs lucadiliello/BLEURT-20-D12 and bleurt-pytorch{_EVALUATOR}",
    "imageclef_alignscore": f"needs AlignScore-base.ckpt of yzha/AlignScore and its package{_EVALUATOR}",
    "imageclef_medcat_f1": f"needs medcat below 2 and its model pack, which needs a license of UMLS{_EVALUATOR}",
}
BERTSCORE_CHUNK = 512  # pairs at a time: bert-score keeps every token's embedding, 250 KB a sentence


def bertscore(predictions: Sequence[str], references: Sequence[str], model: str = BERTSCORE_MODEL) -> Score:
    """Return the BERTScore F1 of N captions, from 0 to 1.

    As in the official evaluator, captions are normalized (`metrics.imageclef_normalize`), tokens are weighted by their
    idf over the references, scores are not rescaled, and two empty captions score 1. The evaluator scores one pair at
    a time; here pairs are batched, which changes the float32 rounding only: padding has similarity 0, and would matter
    only where a word's cosine to every token of the other caption is negative.

    `model` is a local folder, or in the Hugging Face cache; its name tells bert-score which layer to compare.

    Raises:
        UserError: bert-score or the model is missing, or cannot be loaded; the message says how to get it.
        ValueError: there are not as many predictions as references.
    """
    empty = np.array([not p and not r for p, r in zip(predictions, references, strict=True)])
    predictions, references = ([imageclef_normalize(text) for text in texts] for texts in (predictions, references))
    with contextlib.ExitStack() as quiet:
        # bert-score warns of empty captions, transformers shows a progress bar and logs that weights are not used
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            quiet.enter_context(redirect(io.StringIO()))
        quiet.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
        scorer = _bert_scorer(model)
        scorer.compute_idf(references)
        values = []
        for start in range(0, len(references), BERTSCORE_CHUNK):
            chunk = slice(start, start + BERTSCORE_CHUNK)
            values.append(scorer.score(predictions[chunk], references[chunk])[2].double().numpy())
    return Score.of(np.where(empty, 1.0, np.concatenate(values)))


def _bert_scorer(model: str):
    """Return a `bert_score.BERTScorer` of a model on this machine, adapted to transformers 5."""
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
    except ImportError as error:
        raise UserError("bert-score is not installed: `pip install bert-score`") from error
    folder = Path(model)
    is_hub_id = not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)
    name = model if is_hub_id else folder.name  # scores are published, paths are not
    if is_hub_id:
        with contextlib.suppress(ValueError, OSError):  # not in the cache
            folder = Path(snapshot_download(model, local_files_only=True))
    if not [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        mend = f"give a folder that has them, or `hf download {model if is_hub_id else BERTSCORE_MODEL}`"
        raise UserError(f"the weights of {name} are not on this machine: {mend}")

    num_layers = {known.split("/")[-1]: layers for known, layers in model2layers.items()}.get(Path(model).name)
    if num_layers is None:
        raise UserError(
            f"bert-score does not know which layer of {name} to compare: give a model that it knows, in a folder of "
            f"the model's name, such as {Path(BERTSCORE_MODEL).name}"
        )
    for file in ("config.json", "tokenizer_config.json"):
        with as_user_error(f"the BERTScore model {name}: {file} cannot be read"):
            settings = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).is_file() else {}
        if "auto_map" in settings:  # transformers would ask on the terminal whether to run it
            raise UserError(f"the BERTScore model {name} needs custom code, which is never run: give another model")
    with as_user_error(f"the BERTScore model {name} cannot be loaded"):
        # No processes for the idf: forked after torch has started its threads they can hang
        scorer = BERTScorer(model_type=str(folder), num_layers=num_layers, idf=True, nthreads=0)
    # transformers 4 loaded all weights as float32; 5 keeps the stored type, which can be float16
    scorer._model.float()
    tokenizer = scorer._tokenizer
    # The official tokenizer sets no maximum length, and the placeholder for that overflows in transformers 5
    tokenizer.model_max_length = min(tokenizer.model_max_length, scorer._model.config.max_position_embeddings)
    # bert-score encodes an empty caption by a method that transformers 5 no longer has
    tokenizer.build_inputs_with_special_tokens = lambda ids: tokenizer.encode("")
    return scorer
