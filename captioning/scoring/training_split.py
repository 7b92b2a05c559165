"""What scoring learns from the training split: the best constant captions, and how to read concepts from a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from captioning.errors import UserError
from captioning.models.retriever import Retriever
from captioning.scoring.captions import check_ids, read_csv, split_cuis
from captioning.scoring.clinical import UNKNOWN, modality_of
from captioning.scoring.concepts import ConceptExtractor
from captioning.scoring.constants import Constants, find_constants, typical_captions
from captioning.stages import stage


@dataclass(frozen=True)
class Training:
    """The M captions of the training split, and the concepts of each image, empty where none are known.

    `features`, float `[K, H]`, are those of the images whose captions, concepts and ids are `neighbors`; None without
    a model. For the concepts of the nearest images a `retriever` can make others, `retrieved`, float `[K, D]`. With
    `is_scored` there is no training split: these are the references that are scored.
    """

    captions: Sequence[str]
    cuis: Sequence[Sequence[str]]
    features: np.ndarray | None = None
    neighbors: Sequence[str] = ()
    neighbor_cuis: Sequence[Sequence[str]] = ()
    neighbor_ids: Sequence[str] = ()
    retriever: Retriever | None = None
    retrieved: np.ndarray | None = None
    is_scored: bool = False

    @property
    def source(self) -> str:
        """What constant captions are found among, in words."""
        number = f"{len(self.captions):,}"
        return f"the references themselves ({number})" if self.is_scored else f"{number} training captions"

    @cached_property
    def _constants(self) -> dict[str | None, Constants]:
        return {}

    @stage("baselines")
    def constants(self, tokenizer: str | None) -> Constants:
        """Return the best constant for each score, see `find_constants`; they are searched once."""
        if tokenizer not in self._constants:
            self._constants[tokenizer] = find_constants(self.captions, self.cuis, tokenizer)
        return self._constants[tokenizer]

    @cached_property
    def typical(self) -> dict[str, str]:
        """The best constant caption of each modality for ROUGE-L, among its own captions."""
        modalities = [modality_of(cuis, caption) for cuis, caption in zip(self.cuis, self.captions, strict=True)]
        known = [row for row, modality in enumerate(modalities) if modality != UNKNOWN]
        return typical_captions([self.captions[row] for row in known], [modalities[row] for row in known])

    @cached_property
    def extractor(self) -> ConceptExtractor:
        """A reader of concepts, fitted to the pairs of the training split."""
        return ConceptExtractor(self.captions, self.cuis)


def read_training(captions_file: str | None, concepts_file: str | None = None) -> Training | None:
    """Read the training split from a CSV of `ID,Caption` and, for concepts, one of `ID,CUIs`; None without the first.

    Raises:
        UserError: a file cannot be read, or their ids differ.
    """
    if not captions_file:
        if concepts_file:
            raise UserError("--train_concepts goes with --train, the CSV of ID,Caption of the training split")
        return None
    captions = read_csv(captions_file, "Caption")
    cuis = read_csv(concepts_file, "CUIs") if concepts_file else {}
    if cuis:
        check_ids(cuis, captions, concepts_file, captions_file, more=True)
    return Training(list(captions.values()), [split_cuis(cuis.get(image_id, "")) for image_id in captions])
