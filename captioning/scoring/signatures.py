"""What decides the number of a score, in one short line, as sacreBLEU's signature does (Post, 2018, arXiv:1804.08771).

    rouge1         case:lower|tok:ascii|stem:no|f:1|rouge_score:0.1.2
    nlgeval_cider  case:mixed|tok:whitespace|df:references|pycocoevalcap:1.2

Compare two numbers only if their signatures are equal.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

from captioning.scoring import clinical, concepts


_ROUGE = "case:lower|tok:ascii|stem:no|f:1|rouge_score:0.1.2"
_SIGNATURES = {
    "rouge1": _ROUGE,
    "rouge2": _ROUGE,
    "rougeL": _ROUGE,
    "imageclef_rouge1": f"norm:imageclef|{_ROUGE}",
    "imageclef_bertscore": "norm:imageclef|model:{model}|idf:references|rescale:no|bert-score:{bert-score}",
    "concept_f1": "reader:{concepts}|words:{clinical}|train:{train}|scikit-learn:{scikit-learn}",
    **{f"{name}_f1": "reader:{clinical}" for name in clinical.ATTRIBUTES},
}
for _part, _of in (("f1", "images"), ("precision", "pairs"), ("recall", "pairs")):
    _SIGNATURES[f"concept_detection_{_part}"] = f"case:upper|mean:{_of}|concepts:all|imageclef:2026"
    _SIGNATURES[f"concept_detection_manual_{_part}"] = f"case:upper|mean:{_of}|concepts:15|imageclef:2026"
# Of the metrics of COCO captions: the tokens by the prefix of the name, and the rest
_METRICS = {f"bleu{n}": "pycocoevalcap:1.2" for n in range(1, 5)} | {
    "cider": "df:references|pycocoevalcap:1.2",
    "rougeL": "f:1.2|pycocoevalcap:1.2",
    "meteor": "norm:yes|meteor:1.5",
}
for _prefix, _tokens in (
    ("coco", "case:lower|tok:ptb-3.4.1"),
    ("nlgeval", "case:mixed|tok:whitespace"),
    ("nlgeval_lower", "case:lower|tok:whitespace"),
):
    _SIGNATURES |= {f"{_prefix}_{name}": f"{_tokens}|{rest}" for name, rest in _METRICS.items()}


def signature(name: str, bertscore_model: str | None = None, num_training: int = 0) -> str:
    """Return the signature of a score by its name in `scores.json`: parts `key:value`, joined by `|`.

    Our own readers are known by the hash of their code, so that two of them never share a signature. Of the folder or
    Hub id of BERTScore's weights the last part is shown. Concepts are learned from `num_training` captions.
    """
    text = _SIGNATURES[name]
    values = {key: version(key) for key in ("bert-score", "scikit-learn") if f"{{{key}}}" in text}  # may be missing
    values |= {module.__name__.split(".")[-1]: _hash_of_code(module.__file__) for module in (clinical, concepts)}
    return text.format_map(values | {"model": Path(bertscore_model or "").name, "train": num_training})


def _hash_of_code(path: str) -> str:
    return hashlib.sha256(Path(path).read_text(encoding="utf-8").encode()).hexdigest()[:8]
