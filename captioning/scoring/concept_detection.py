"""ImageCLEFmedical's other task: the concepts (CUIs) of each image, scored as its evaluator of 2026 does.

The formulas are those of `concept_detection/evaluator.py` in github.com/taubsity/clef-caption-evaluation-2026: case
does not count, and an image without concepts for which none is predicted scores 1.
"""

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from captioning.scoring.bootstrap import Score


MAX_CONCEPTS = 100  # of an image, in a submission
# ROCOv2's manual concepts. The official second score is of the first 15: modalities, body parts
NAMES = {
    "C0002978": "angiogram",
    "C0040405": "computed tomography",
    "C0024485": "magnetic resonance imaging",
    "C0032743": "positron emission tomography",
    "C0041618": "ultrasonography",
    "C1306645": "plain X-ray",
    "C0920367": "optical coherence tomography",
    "C1140618": "upper extremity",
    "C0037949": "vertebral column",
    "C0030797": "pelvis",
    "C0023216": "lower extremity",
    "C0037303": "cranium",
    "C0817096": "chest",
    "C0006141": "breast",
    "C0000726": "abdomen",
    "C1999039": "anterior-posterior",
    "C1996865": "postero-anterior",
    "C0205129": "sagittal",
}
MANUAL = frozenset([*NAMES][:15])
KINDS = {"concept_detection": None, "concept_detection_manual": MANUAL}
Concepts = Sequence[Set[str]]  # of each image


def detection_scores(predicted: Concepts, truth: Concepts, manual_truth: Concepts | None = None) -> dict[str, Score]:
    """Return F1, precision and recall of all concepts and of the `MANUAL` ones.

    F1 is the mean over images of the F1 of two sets, precision and recall are of all pairs of image and concept.
    Images without a manual concept do not count for the scores of these.

    Args:
        predicted: the concepts of N images.
        truth: those of the references.
        manual_truth: those of `concepts_manual.csv`; default: those of `truth`, which has them too.

    Raises:
        ValueError: there are not as many predictions as images, or more than `MAX_CONCEPTS` of one.
    """
    if max(map(len, predicted), default=0) > MAX_CONCEPTS:
        raise ValueError(f"an image has more than {MAX_CONCEPTS} concepts")
    scores = {}
    for name, kept in KINDS.items():
        pairs = zip(predicted, (kept and manual_truth) or truth, strict=True)
        pairs = [(_upper(ours, kept), _upper(theirs, kept)) for ours, theirs in pairs]
        both, ours, theirs = np.array([(len(a & b), len(a), len(b)) for a, b in pairs], float).reshape(-1, 3).T
        counted = theirs > 0 if kept else np.ones(len(pairs), bool)
        empty = counted & (ours + theirs == 0)
        f1 = np.where(empty, 1, 2 * both / np.maximum(ours + theirs, 1))
        parts = {"f1": (f1, np.ones(len(pairs))), "precision": (both, ours), "recall": (both, theirs)}
        for part, (above, below) in parts.items():
            scores[f"{name}_{part}"] = Score(np.stack([above * counted, below * counted], axis=1), _ratio)
    return scores


def _upper(concepts: Set[str], kept: Set[str] | None) -> frozenset[str]:
    found = frozenset(concept.upper() for concept in concepts)
    return found if kept is None else found & kept


def _ratio(sums: np.ndarray, number: int) -> np.ndarray:
    return sums[..., 0] / np.where(sums[..., 1] == 0, np.nan, sums[..., 1])


def concept_table(predicted: Concepts, truth: Concepts) -> list[dict[str, Any]]:
    """Return for each concept, the most frequent first, `cui`, `tp`, `fp`, `fn` and `support`, all in images."""
    pairs = [(_upper(ours, None), _upper(theirs, None)) for ours, theirs in zip(predicted, truth, strict=True)]
    right = Counter(cui for ours, theirs in pairs for cui in ours & theirs)
    found = Counter(cui for ours, _ in pairs for cui in ours)
    support = Counter(cui for _, theirs in pairs for cui in theirs)
    rows = [
        {"cui": cui, "tp": right[cui], "fp": found[cui] - right[cui], "fn": support[cui] - right[cui]}
        | {"support": support[cui]}
        for cui in found | support
    ]
    return sorted(rows, key=lambda row: (-row["support"], row["cui"]))


def frequent_concepts(training: Concepts) -> frozenset[str]:
    """Return the most frequent concepts, so many that their mean F1 on the training images is highest: a baseline."""
    counts = Counter(cui for known in training for cui in known)
    ranked = sorted(counts, key=lambda cui: (-counts[cui], cui))[:MAX_CONCEPTS]
    right = np.zeros(len(training))
    sizes = np.array([len(known) for known in training], float)
    best, number = float((sizes == 0).mean()) if len(training) else 0.0, 0
    for k, cui in enumerate(ranked, start=1):
        right += np.fromiter((cui in known for known in training), bool, len(training))
        if (f1 := float((2 * right / (k + sizes)).mean())) > best:
            best, number = f1, k
    return frozenset(ranked[:number])
