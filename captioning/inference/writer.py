"""What the demo asks of a model: a caption while it is written, then alternatives, attention and near captions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from captioning.data.images import open_image
from captioning.data.sources import load_source
from captioning.errors import UserError
from captioning.inference.model import InferenceModel
from captioning.models.captioner import WatchTokens
from captioning.models.retriever import similarities


BATCH = 8  # training images that are encoded at a time
NUM_NEIGHBORS = 3


@dataclass(frozen=True)
class Alternative:
    """A caption that the search has found."""

    caption: str  # in its surface form
    nll: float  # the negative log-likelihood of its tokens given the image, in nats
    num_tokens: int  # the end token included
    is_cut: bool  # it ended at the most tokens, without an end token

    @property
    def token_probability(self) -> float:
        """The geometric mean of the probabilities of its tokens, from 0 to 1."""
        return float(np.exp(-self.nll / max(self.num_tokens, 1)))


@dataclass(frozen=True)
class Written:
    """All that is shown of an image."""

    alternatives: Sequence[Alternative]  # by the rank of the search; the first is the caption
    words: Sequence[tuple[str, np.ndarray]] | None  # each with its map `[H, W]`; None where the family has none
    neighbors: Sequence[tuple[str, float]]  # captions of the nearest training images, each with the cosine
    concepts: Sequence[str] | None = None  # names of those that the concept head predicts; None without one

    @property
    def shares(self) -> list[float]:
        """The probability of each alternative among them all; the sum is 1."""
        log_probs = -np.array([one.nll for one in self.alternatives])
        probs = np.exp(log_probs - log_probs.max())
        return list(probs / probs.sum())


class Writer:
    """Writes captions one at a time, whoever asks: one thread alone uses the model.

    The nearest images are looked for among the first `train_images` of the source `train`, if there is one.

    Raises:
        UserError: the source cannot be read.
    """

    def __init__(self, model: InferenceModel, train: str | None = None, train_images: int = 0):
        self.model = model
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._train = _training_features(model, train, train_images) if train else ([], np.zeros((0, 1)))

    def settings(self, changes: Mapping[str, Any]) -> GenerationConfig:
        """Return the model's own decode settings with changes; UserError: too many tokens."""
        config = copy(self.model.generation_config)
        for name, value in changes.items():
            setattr(config, name, value)
        self.model.captioner.check_lengths(1, config.max_new_tokens)
        return config

    def write(self, image: Image.Image, config: GenerationConfig) -> Iterator[str | Written]:
        """Yield the caption of an image after each token, then what else is known of it.

        With several beams it is the most probable one so far, which need not win. The last caption is that of
        `InferenceModel.describe` by these settings. When the iterator is closed, the model stops.
        """
        texts, closed = SimpleQueue[str | None](), Event()

        def show(tokens: torch.Tensor) -> None:
            if closed.is_set():
                raise InterruptedError
            texts.put(self.model.captioner.decode(tokens[None].cpu().numpy())[0])

        written = self._thread.submit(self._write, image, config, show)
        written.add_done_callback(lambda _: texts.put(None))
        try:
            while (text := texts.get()) is not None:
                yield text
            yield written.result()
        finally:
            closed.set()
            written.cancel()

    def _write(self, image: Image.Image, config: GenerationConfig, show: Callable[[torch.Tensor], None]) -> Written:
        captioner, config = self.model.captioner, copy(config)
        config.num_return_sequences = config.num_beams
        with self.model.computing():
            batch = self.model.collate([image])
            encoded = captioner.encode_images(batch)
            tokens = captioner.generate(encoded, config, WatchTokens(show)).cpu().numpy()
            rows = [captioner.without_padding(row) for row in tokens]
            whole = [[*captioner.prompt_row, *row.tolist()] for row in rows]
            nll = captioner.nll_of_captions(captioner.model, batch, whole).tolist()
            words = captioner.word_attention(encoded, torch.from_numpy(rows[0]).to(self.model.device))
            features = captioner.image_features(encoded).float().cpu().numpy()
            concepts = self.model.concepts(encoded)
        cut = [not np.isin(captioner.end_token_ids, row).any() for row in rows]
        found = zip(captioner.decode(tokens), nll, map(len, rows), cut, strict=True)
        names = concepts and self.model.names(concepts[0])
        return Written([Alternative(*one) for one in found], words, self._nearest(features), names)

    def _nearest(self, features: np.ndarray) -> list[tuple[str, float]]:
        """Return the captions of the training images nearest to one with features `[1, D]`, each with the cosine."""
        captions, train = self._train
        if not captions:
            return []
        _, cosines = next(similarities(features, train))
        return [(captions[i], float(cosines[0, i])) for i in np.argsort(-cosines[0])[:NUM_NEIGHBORS]]


def _training_features(model: InferenceModel, source: str, number: int) -> tuple[list[str], np.ndarray]:
    """Return N captions of training images that can be read, and their features `[N, D]`."""
    splits, captions, features = load_source(source), [], []
    if "train" not in splits:
        raise UserError(f"train '{source}' has no split 'train', but {', '.join(splits)}")
    rows = splits["train"].select(range(min(number, len(splits["train"]))))
    for batch in rows.iter(BATCH):
        images = []
        for image, caption in zip(batch["image"], batch["caption"], strict=True):
            try:
                images.append(open_image(image))
                captions.append(caption)
            except ValueError:  # the nearest is looked for among the others
                continue
        if images:
            with model.computing():
                features.append(model.captioner.image_features(model.encode(images)).float().cpu().numpy())
    if not captions:
        raise UserError(f"train '{source}': none of the first {number} training images can be read")
    return captions, np.concatenate(features)
