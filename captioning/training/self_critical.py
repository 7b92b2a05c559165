"""Self-critical training: learn from the scores of the model's own sampled captions (`--objective self_critical`).

The loss is that of REINFORCE (Rennie et al., Self-critical Sequence Training for Image Captioning, 2017) with a
leave-one-out baseline (Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019): for K captions y of each
of the N images of an accumulated batch, with rewards r,

    1 / (N K) * sum of (r_k - mean of r_j over j != k) * -log p(y_k)

Samples come from the truncated distribution, log p from the whole one.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig

from captioning.errors import UserError, as_user_error
from captioning.models.captioner import IGNORE_INDEX, Batch, Captioner
from captioning.scoring.clinical import ATTRIBUTES, item_agreement, stated_attributes
from captioning.scoring.concepts import ConceptExtractor, concept_f1, known_concepts
from metrics import rouge_tokens, wording_scores


REWARDS = ("rouge1", "rouge2", "rougeL", "imageclef_rouge1", *(f"{name}_f1" for name in ATTRIBUTES), "concept_f1")
# Collapse: so many of the images since the last log, or of `MIN_JUDGED`, have one greedy caption, or one without end
COLLAPSED, MIN_JUDGED = 0.9, 64
MEASURED = ("greedy_reward", "reward", "sample_length", "repeated_trigrams")  # means over images, and over samples


def parse_reward(text: str) -> dict[str, float]:
    """Return the weight of each score of a reward such as "imageclef_rouge1=0.5,concept_f1=0.5"; the default is 1.

    An unknown score, and a weight that is not a positive number, are UserErrors.
    """
    parts = [part.partition("=") for part in text.split(",")]
    with as_user_error(f"reward '{text}'", "write it as rougeL=0.5,concept_f1=0.5"):
        weights = {name.strip(): float(weight or 1) for name, _, weight in parts}
        if len(weights) < len(parts):
            raise ValueError("a score is named twice")
    for name, weight in weights.items():
        if name not in REWARDS or not 0 < weight < float("inf"):
            raise UserError(f"reward '{text}': {name}={weight}; scores are {', '.join(REWARDS)}, weights are positive")
    return weights


class Reward:
    """A weighted sum of scores of captions of the training split `rows`; each score is from 0 to 1.

    Ids that are not unique, and rewarded concepts that cannot be learned from the split, are UserErrors.
    """

    def __init__(self, weights: dict[str, float], rows: Dataset):
        self.weights, columns = weights, [list(rows[column]) for column in ("image_id", "caption", "cui")]
        self._known = {image_id: (caption, cuis) for image_id, caption, cuis in zip(*columns, strict=True)}
        if len(self._known) < len(rows):
            raise UserError("split 'train': some images share an image_id, by which a reward finds the reference")
        self._extractor = ConceptExtractor(*columns[1:]) if "concept_f1" in weights else None
        if self._extractor and self._extractor.reason:
            raise UserError(f"reward: concept_f1 cannot be measured, {self._extractor.reason}; leave it out")

    def __call__(self, captions: Sequence[str], image_ids: Sequence[str]) -> np.ndarray:
        """Return the rewards of N captions, float64 `[N]`; a pair that states no attribute or concept agrees: 1."""
        known = [self._known.get(image_id, ("", [])) for image_id in image_ids]  # there are blank rows
        references = [reference for reference, _ in known]
        scores = dict(wording_scores(tuple(captions), tuple(references)))
        for name in self.weights.keys() - scores.keys():
            if name == "concept_f1":
                truth = [known_concepts(cuis) for _, cuis in known]
                scores[name] = concept_f1(self._extractor.predict(captions), truth).statistics[:, 0]
            else:
                attribute, texts = name.removesuffix("_f1"), (captions, references)
                items = ([stated_attributes(text)[attribute] for text in each] for each in texts)
                both, said, stated = item_agreement(attribute, *items).statistics.T
                scores[name] = np.where(said + stated, 2 * both / np.maximum(said + stated, 1), 1)
        return sum(weight * scores[name] for name, weight in self.weights.items())


class SelfCritical:
    """The objective of a `CaptioningTrainer`, in place of its own loss, with the `args` of a run.

    `reward` is called with N captions and the ids of their images, and returns float `[N]`.
    """

    def __init__(self, captioner: Captioner, args, reward: Callable[[Sequence[str], Sequence[str]], np.ndarray]):
        self.captioner, self.args, self.reward = captioner, args, reward
        self._seen: list[tuple[str, bool, list[float]]] = []  # of each image since the last log

    def num_images(self, batch: Batch) -> torch.Tensor:
        """Count the images of a batch with captions."""
        return (batch["labels"] != IGNORE_INDEX).any(dim=1).sum()

    def loss(self, trainer, model: torch.nn.Module, batch: Batch, beside: Mapping, num_items: torch.Tensor):
        """Return the loss of a micro-batch of B images, whose ids are in `beside`; those without labels do not count.

        `num_items` are the caption tokens and the images of the whole accumulated batch, in all processes.
        """
        captioner, labels, image_ids = self.captioner, batch["labels"].cpu().numpy(), beside["image_id"]
        tokens = self._sample(trainer, batch, image_ids)  # [B, 1 + K, T], greedy search first
        texts = captioner.decode(tokens.reshape(-1, tokens.shape[-1]))
        rewards = self.reward(texts, np.repeat(image_ids, tokens.shape[1])).reshape(tokens.shape[:2])
        rows = [[captioner.without_padding(row) for row in of_image] for of_image in tokens]

        counts = (labels != IGNORE_INDEX).any(axis=1)
        for i in np.flatnonzero(counts):
            own, ends = texts[i * len(rows[i]) :][: len(rows[i])], np.isin(rows[i][0], captioner.end_token_ids).any()
            each = [rewards[i, 1:], [len(row) for row in rows[i][1:]], [_repeated_trigrams(text) for text in own[1:]]]
            self._seen.append((own[0], bool(ends), [rewards[i, 0], *(float(np.mean(values)) for values in each)]))

        num_tokens, num_images = num_items.tolist()
        rewards, rows = rewards[:, 1:], [of_image[1:] for of_image in rows]
        others = (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
        weights = (rewards - others) / (rewards.shape[1] * num_images)
        if self.args.caption_loss_weight:
            weights = np.pad(weights, ((0, 0), (0, 1)), constant_values=self.args.caption_loss_weight / num_tokens)
            rows = [[*samples, row[row != IGNORE_INDEX]] for samples, row in zip(rows, labels, strict=True)]
        flat = [[*captioner.prompt_row, *row.tolist()] for each in zip(*rows, strict=True) for row in each]
        nll = captioner.nll_of_captions(model, batch, flat)
        return (nll * torch.from_numpy((weights * counts[:, None]).T.flatten()).to(nll)).sum().float()

    @torch.no_grad()
    def _sample(self, trainer, batch: Batch, image_ids: Sequence[str]) -> np.ndarray:
        """Return new tokens int64 `[B, 1 + K, T]`: of greedy search, and K samples."""
        captioner, args, shape = self.captioner, self.args, (self.args.num_samples, self.args.max_new_tokens)
        uniforms = np.zeros((len(image_ids), 1 + shape[0], shape[1]), dtype=np.float32)
        for of_image, image_id in zip(uniforms, image_ids, strict=True):
            seed = (args.seed, trainer.state.global_step, zlib.crc32(image_id.encode()))
            of_image[1:] = np.random.default_rng(seed).random(shape, dtype=np.float32)
        temperature, top_k, top_p = args.sampling_temperature, args.sampling_top_k, args.sampling_top_p
        settings = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        captioner.model.eval()
        with trainer.accelerator.autocast(), captioner.evaluation():
            uniforms = torch.from_numpy(uniforms).to(batch["labels"].device)
            tokens = captioner.sample(captioner.encode_images(batch), settings, uniforms)
        captioner.model.train()
        return tokens.cpu().numpy()

    def measured(self, trainer=None) -> dict[str, float]:
        """Return what all processes have seen since the last call, which all make; a collapse is a UserError."""
        seen, self._seen = gather_object(self._seen), []
        if not seen:
            return {}
        captions, ends, values = zip(*seen, strict=True)
        caption, number = Counter(captions).most_common(1)[0]
        unended = f"a caption that does not end within {self.args.max_new_tokens} tokens"
        number, what = max((number, f"the caption '{caption[:80]}'"), (ends.count(False), unended))
        if number > COLLAPSED * max(len(seen), MIN_JUDGED):
            mend = "start again with a lower --learning_rate, a --caption_loss_weight, or from a better trained model"
            images = f"{number} of the last {len(seen)} images"
            raise UserError(f"self-critical training has collapsed: {images} get {what}; {mend}")
        means = dict(zip(MEASURED, np.mean(values, axis=0).tolist(), strict=True))
        return means | {"distinct_captions": len(set(captions)) / len(seen)}


def _repeated_trigrams(caption: str) -> float:
    """Return the share of the trigrams of words that occurred before."""
    trigrams = list(pairwise(pairwise(rouge_tokens(caption))))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
