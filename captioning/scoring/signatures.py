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
}
for _part, _of in (("f1", "images"), ("precision", "pairs"), ("recall", "pairs")):
    _SIGNATURES[f"concept_detection_{_part}"] = f"case:upper|mean:{_of}|concepts:all|imageclef:2026"
    _SIGNATURES[f"concept_detection_manual_{_part}"] = f"case:upper|mean:{_of}|concepts:15|imageclef:2026"
_CLINICAL = "reader:{clinical}"  # of all other names that end in _f1
# Of the metrics of COCO captions, the tokens by the beginning of the name and the rest by its end
_TOKENS = {
    "coco_": "case:lower|tok:ptb-3.4.1",
    "nlgeval_lower_": "case:lower|tok:whitespace",
    "nlgeval_": "case:mixed|tok:whitespace",
}
_METRICS = {
    **{f"bleu{n}": "pycocoevalcap:1.2" for n in range(1, 5)},
    "cider": "df:references|pycocoevalcap:1.2",
    "rougeL": "f:1.2|pycocoevalcap:1.2",
    "meteor": "norm:yes|meteor:1.5",
}
_PACKAGES = ("bert-score", "scikit-learn")


def signature(name: str, bertscore_model: str | None = None, num_training: int = 0) -> str:
    """Return the signature of a score, parts `key:value` joined by `|`.

    Our own readers are known by the hash of their code, so that two of them never share a signature.

    Args:
        name: of the score, as in `scores.json`.
        bertscore_model: folder or Hub id of the weights of BERTScore; its last part is shown.
        num_training: captions of the training split, from which concepts are learned.
    """
    for prefix, tokens in _TOKENS.items():
        if name.startswith(prefix):
            return f"{tokens}|{_METRICS[name.removeprefix(prefix)]}"
    text = _SIGNATURES.get(name) or {"f1": _CLINICAL}[name.split("_")[-1]]  # a new score needs a line above
    values = {key: version(key) for key in _PACKAGES if f"{{{key}}}" in text}  # bert-score may not be installed
    values |= {module.__name__.split(".")[-1]: _hash_of_code(module.__file__) for module in (clinical, concepts)}
    return text.format_map(values | {"model": Path(bertscore_model or "").name, "train": num_training})


def _hash_of_code(path: str) -> str:
    return hashlib.sha256(Path(path).read_text(encoding="utf-8").encode()).hexdigest()[:8]
