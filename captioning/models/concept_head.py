"""`ConceptHead`: the concepts of an image, predicted from the features that a captioner has of it.

It lies beside the model, so that stock loads the captioner alone: `concept_head.safetensors` has its weights,
`concept_head.json` its concepts with their names and thresholds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from transformers.utils import cached_file

from captioning.errors import as_user_error
from captioning.files import to_json, write_whole
from captioning.models.optional_file import optional_file


CONFIG_FILE, WEIGHTS_FILE = "concept_head.json", "concept_head.safetensors"
DEFAULT_THRESHOLD = 0.5
MAX_CONCEPTS = 100  # of an image, in a submission to ImageCLEF


class ConceptHead(nn.Linear):
    """A linear layer from the normalized features of an image to a logit for each of C concepts.

    As a part of the model it is moved, trained and synchronized with it, but is in no state dict of the model: what
    is saved and loaded there is the captioner alone.

    Args:
        num_features: D of `Captioner.image_features`.
        concepts: C CUIs.
        names: those that are known, by CUI.
        thresholds: C probabilities from which a concept is predicted; None: not chosen yet.
    """

    def __init__(
        self,
        num_features: int,
        concepts: Sequence[str],
        names: dict[str, str] | None = None,
        thresholds: Sequence[float] | None = None,
    ):
        super().__init__(num_features, len(concepts), dtype=torch.float32)
        self.register_buffer("loss_weight", torch.tensor(0.0))  # of the next step, if it follows the losses
        self.concepts, self.names, self.thresholds = list(concepts), names or {}, thresholds
        nn.init.zeros_(self.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits float32 `[B, C]` of features `[B, D]`, also in mixed precision."""
        return super().forward(F.layer_norm(features.float(), features.shape[-1:])).float()

    @torch.no_grad()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the probabilities, float32 `[N, C]`, of features `[N, D]`."""
        return self(torch.from_numpy(features).to(self.weight.device)).sigmoid().cpu().numpy()

    def predict(self, features: np.ndarray) -> list[list[str]]:
        """Return the concepts of N images with features `[N, D]`, the most probable first."""
        return concepts_above(self.probabilities(features), self.concepts, self.thresholds or DEFAULT_THRESHOLD)

    def _save_to_state_dict(self, *args) -> None:
        pass

    def _load_from_state_dict(self, *args) -> None:
        pass

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight, "bias": self.bias, "loss_weight": self.loss_weight}

    # --- Files ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write both files, each whole or not at all."""
        self.save_config(folder)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}
        write_whole(Path(folder) / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))

    def save_config(self, folder: str | Path) -> None:
        """Write concepts, names and thresholds."""
        thresholds = self.thresholds or [None] * len(self.concepts)
        rows = [
            {"cui": cui, "name": self.names.get(cui), "threshold": threshold}
            for cui, threshold in zip(self.concepts, thresholds, strict=True)
        ]
        lines = ",\n".join(f"  {to_json(row, ensure_ascii=False)}" for row in rows)
        write_whole(Path(folder) / CONFIG_FILE, f'{{"concepts": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> "ConceptHead | None":
        """Return the head of a model on the Hub or in a folder, None if it has none; UserError: it cannot be used."""
        path = optional_file(name, CONFIG_FILE, revision)
        if path is None:
            return None
        with as_user_error(f"model '{name}': its concept head cannot be read", f"delete its {CONFIG_FILE}"):
            rows = json.loads(Path(path).read_text(encoding="utf-8"))["concepts"]
            concepts, thresholds = ([row[key] for row in rows] for key in ("cui", "threshold"))
            tensors = load_file(cached_file(name, WEIGHTS_FILE, revision=revision))
            names = {row["cui"]: row["name"] for row in rows if row["name"]}
            found = cls(tensors["weight"].shape[1], concepts, names, None if None in thresholds else thresholds)
            found.load_weights(tensors)
        return found

    @torch.no_grad()
    def load_weights(self, source: str | Path | dict[str, torch.Tensor]) -> None:
        """Take over the tensors of a file, or those given; UserError: they are of another head, NaN or infinite."""
        with as_user_error("the concept head cannot be loaded", "give the flags of concepts that it was trained with"):
            tensors = source if isinstance(source, dict) else load_file(source)
            for name, value in self._tensors().items():
                if value.shape != tensors[name].shape or not tensors[name].isfinite().all():
                    raise ValueError(f"its {name} is NaN or of another head")
                value.copy_(tensors[name])


def concepts_above(
    probabilities: np.ndarray, concepts: Sequence[str], thresholds: Sequence[float] | float
) -> list[list[str]]:
    """Return the concepts of N images whose probability `[N, C]` reaches the threshold: the best `MAX_CONCEPTS`."""
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :MAX_CONCEPTS]
    passes = probabilities >= np.asarray(thresholds)
    return [[concepts[c] for c in own if kept[c]] for own, kept in zip(ranked, passes, strict=True)]
