"""Concepts learned beside the caption (`--concept_loss_weight`): the head, its loss, and the objective of both.

The loss of an image is summed over its concepts, then averaged over the labeled images of an accumulated batch:

    caption loss + weight * 1 / N * sum over N images and C concepts of the loss of a logit
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from captioning.errors import UserError
from captioning.models.captioner import IGNORE_INDEX, Batch, Captioner
from captioning.models.concept_head import ConceptHead
from captioning.scoring.concept_detection import NAMES
from captioning.scoring.concepts import known_concepts


logger = logging.getLogger(__name__)

# Of the asymmetric loss: Ridnik and others, Asymmetric Loss For Multi-Label Classification, 2021, section 3.2
GAMMA_NEGATIVE, MARGIN = 4, 0.05
# The weight `auto`: this share of the caption loss, within limits
AUTO_SHARE, AUTO_RANGE = 0.1, (0.05, 5.0)


def set_up_concept_head(captioner: Captioner, rows: Dataset | None, args, names: Mapping[str, str] = {}) -> None:
    """Give the model of a run that learns concepts from `rows` a head, unless it was loaded with one.

    `names` of concepts go before those of `NAMES`. A training without concepts leaves out a head: features change. If
    no concept has enough images, or the head has others, that is a UserError.
    """
    if not args.do_train:
        return
    if not args.learns_concepts:
        if captioner.concept_head:
            logger.warning("The concept head of the model is left out: --concept_loss_weight is 0")
        captioner.concept_head = None
        return
    counts, labeled = count_concepts(rows["cui"], args.unlabeled_are_negative)
    concepts = sorted(cui for cui, number in counts.items() if number >= args.min_concept_count)
    if not concepts:
        raise UserError(
            f"concept_loss_weight: no concept has {args.min_concept_count} training images (column cui); "
            "set --min_concept_count or leave out --concept_loss_weight"
        )
    head = captioner.concept_head
    if head and head.concepts != concepts:
        raise UserError(
            f"the model's concept head has {len(head.concepts)} concepts, the training split {len(concepts)} others "
            f"of {args.min_concept_count} images; set --min_concept_count, or --concept_loss_weight 0"
        )
    if head is None:
        names = NAMES | dict(names)
        head = ConceptHead(_num_features(captioner), concepts, {cui: names[cui] for cui in concepts if cui in names})
        share = torch.tensor([counts[cui] / labeled for cui in concepts]).clamp(max=0.99)
        with torch.no_grad():  # an untrained head predicts how frequent a concept is
            head.bias.copy_(torch.logit(share))
        captioner.concept_head = head
    head.thresholds = None
    logger.info("%d concepts are learned, on %d of %d training images", len(concepts), labeled, len(rows))


def count_concepts(cuis: Sequence[Sequence[str]], unlabeled_are_negative: bool = False) -> tuple[Counter[str], int]:
    """Return how many images have each concept, and how many images count."""
    known = [known_concepts(own) for own in cuis]
    labeled = len(known) if unlabeled_are_negative else sum(map(bool, known))
    return Counter(cui for own in known for cui in own), labeled


@torch.no_grad()
def _num_features(captioner: Captioner) -> int:
    batch = captioner.collate([Image.new("L", (64, 64))], [captioner.prompt_row])
    batch = {name: value.to(captioner.model.device) for name, value in batch.items()}
    return captioner.image_features(captioner.encode_images(batch)).shape[1]


def asymmetric_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the asymmetric loss of each logit, of the shape of `logits`; `labels` are 0 or 1.

    With p the probability and q = max(p - 0.05, 0): -log p of a concept that the image has, else -q^4 log(1 - q), so
    that easy negatives count little.
    """
    shifted = (logits.sigmoid() - MARGIN).clamp(min=0)
    return -labels * F.logsigmoid(logits) - (1 - labels) * shifted**GAMMA_NEGATIVE * torch.log1p(-shifted)


class CaptionAndConceptLoss:
    """The objective of a `CaptioningTrainer` that learns concepts beside captions, with the `args` of a run on `rows`.

    In `bce` a label 1 of a concept of n among N images weighs sqrt((N - n) / n).
    """

    def __init__(self, captioner: Captioner, args, rows: Dataset):
        self.captioner, self.weight = captioner, args.concept_weight()
        self._loss = asymmetric_loss if args.concept_loss == "asymmetric" else self._weighted_bce
        counts, labeled = count_concepts(rows["cui"], args.unlabeled_are_negative)
        numbers = torch.tensor([counts[cui] for cui in captioner.concept_head.concepts], dtype=torch.float64)
        self._positive_weights = ((labeled - numbers).clamp(min=1) / numbers).sqrt().float()
        self._step, self._seen, self._num_steps = torch.zeros(2), torch.zeros(2), 0  # losses of captions and concepts

    def _weighted_bce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights = {"pos_weight": self._positive_weights.to(logits.device)}
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none", **weights)

    def num_images(self, batch: Batch) -> torch.Tensor:
        """Count the images of a batch whose concepts are known."""
        return (batch["concept_labels"][:, 0] != IGNORE_INDEX).sum()

    def loss(self, trainer, model: torch.nn.Module, batch: Batch, beside: Batch, num_items: torch.Tensor):
        """Return the loss of a micro-batch of B images; `beside` has their `concept_labels` `[B, C]`.

        `num_items` are the caption tokens and the labeled images of the whole accumulated batch, in all processes.
        """
        labels = beside["concept_labels"].to(batch["labels"].device)
        outputs, logits = self.captioner.forward_with_concepts(model, batch)
        captions = trainer.caption_loss(outputs, batch["labels"], num_items[0])
        of_images = self._loss(logits, labels.clamp(min=0)).sum(dim=1)
        # Without labels it is zero, and keeps the graph, so that DDP's all-reduce still runs
        concepts = (of_images * (labels[:, 0] != IGNORE_INDEX)).sum() / num_items[1].clamp(min=1)
        head = self.captioner.concept_head
        weight = head.loss_weight.clamp(*AUTO_RANGE) if self.weight is None else self.weight  # a copy
        self._step += torch.stack([captions.detach(), concepts.detach()]).float().cpu()
        if trainer.accelerator.sync_gradients:
            self._end_step(trainer, head)
        return captions + weight * concepts

    def _end_step(self, trainer, head: ConceptHead) -> None:
        """Keep the losses of an optimizer step; if it is `auto`, the weight of the next one follows them."""
        step, self._step = self._step, torch.zeros(2)
        if self.weight is None:  # the weight of this step would depend on how its batch is split
            captions, concepts = self._of_all_processes(trainer, step)
            if concepts > 0:
                head.loss_weight.copy_((AUTO_SHARE * captions / concepts).clamp(*AUTO_RANGE))
        self._seen += step
        self._num_steps += 1

    @staticmethod
    def _of_all_processes(trainer, values: torch.Tensor) -> torch.Tensor:
        """Return losses of the whole batch; without the flag, each process has normalized its part by itself."""
        how = "sum" if trainer.args.average_tokens_across_devices else "mean"
        return trainer.accelerator.reduce(values.to(trainer.args.device), how).cpu()

    def measured(self, trainer) -> dict[str, float]:
        """Return the mean losses of the steps since the last call, and the weight; all processes call it."""
        seen, number = self._of_all_processes(trainer, self._seen), self._num_steps
        self._seen, self._num_steps = torch.zeros(2), 0
        if not number:
            return {}
        means = dict(zip(("caption_loss", "concept_loss"), (seen / number).tolist(), strict=True))
        weight = self.captioner.concept_head.loss_weight.item() if self.weight is None else self.weight
        return means | {"concept_loss_weight": weight}
