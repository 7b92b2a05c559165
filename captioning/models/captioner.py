"""`Captioner`: all that the rest of the recipe asks of an image captioning model.

The trainer, the collator, the card and the page call these methods and know nothing else of a model. To add a family
that stock `AutoModelForImageTextToText` loads, add an entry to `families.py`. For another, implement them in a file
beside `blip.py` and add it to the table in `load.py`; `tests/test_captioner.py` is a small example.

Shapes: B images or captions of a batch, L tokens of its longest row, T new tokens, D features of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ModelOutput

from captioning.errors import UserError
from captioning.models.concept_head import ConceptHead
from captioning.models.surface_form import SurfaceForm


IGNORE_INDEX = -100  # the label that `torch.nn.functional.cross_entropy` leaves out

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CardFacts:
    """What the model card says of a family.

    Attributes:
        kind: fills "A ... that writes a caption for a radiology image".
        tags: of the card's metadata.
        transformers: the first version in which the code of `usage` runs.
        license_note: a sentence on the license of the pretrained weights.
        citation: BibTeX of the family's paper.
        usage: Jinja template of Python code that repeats the predictions. It is given `name` (quoted), `settings`
            (keyword arguments of `generate`, as Python code), `holder` (Python code of the name of the
            repository or folder that holds `sample.png`), `prompt` (quoted, or None) and `autocast` (a torch type, or
            None).
        plain_generate: Jinja template of what to say of a call of `generate` without settings. It is given `prompt`
            and `suffices`, whether that call repeats the predictions too.
    """

    kind: str
    tags: tuple[str, ...]
    transformers: str
    license_note: str
    citation: str
    usage: str
    plain_generate: str


# For `CardFacts.usage`: the call of `generate`
GENERATE_CODE = """{% if autocast -%}
device = "cuda" if torch.cuda.is_available() else "cpu"
with torch.autocast(device, torch.{{ autocast }}, enabled=device == "cuda"):  # as in the evaluation
    tokens = model.to(device).generate(**inputs.to(device), **settings)
{% else -%}
tokens = model.generate(**inputs, **settings)
{% endif -%}
"""


class DrawTokens(LogitsProcessor):
    """Draws a token for each row by a given random number, and leaves of the scores that one alone to be taken.

    So the samples of an image are the same in any batch, but for rounding.

    Args:
        config: `temperature`, `top_k` (0: all) and `top_p`, with the meaning of stock's `generate`.
        uniforms: float `[R, T]` from 0 to 1, for T tokens of R captions; at 0 the most probable token is drawn.
    """

    def __init__(self, config: GenerationConfig, uniforms: torch.Tensor):
        self.config, self.uniforms = config, uniforms
        self.rows: slice | torch.Tensor = slice(None)  # that are still decoded; `decode_captions` sets it
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores `[R, V]` that are 0 for the drawn tokens, elsewhere -inf."""
        number = min(self.config.top_k or scores.shape[1], scores.shape[1])
        ranked, tokens = (scores.float() / self.config.temperature).topk(number)  # the most probable first
        probs = ranked.softmax(dim=-1)
        kept = probs.cumsum(dim=-1) - probs < self.config.top_p
        cumulative = (probs * kept).cumsum(dim=-1)
        place = self.uniforms[self.rows, self.step, None] * cumulative[:, -1:]
        self.step += 1
        index = (cumulative <= place).sum(dim=-1, keepdim=True)
        index = torch.minimum(index, kept.sum(dim=-1, keepdim=True) - 1)  # where rounding has made the place the last
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.gather(1, index), 0.0)


class WatchTokens(LogitsProcessor):
    """Shows the caption of one image while it is written, and changes no score.

    Args:
        show: called before each token but the first with the new tokens so far, int64 `[t]`; of several beams, those
            of the most probable one that goes on. What it raises ends the search.
    """

    def __init__(self, show: Callable[[torch.Tensor], None]):
        self.show = show
        self.start: int | None = None  # tokens of the prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores; both searches keep beams in the order of their probability."""
        if self.start is None:
            self.start = input_ids.shape[1]
        else:
            self.show(input_ids[0, self.start :])
        return scores


class Captioner(ABC):
    """A model and its processor.

    Attributes:
        model: what is trained, evaluated and saved; None in a process that loads data.
        config: the model's.
        processor: image processor and tokenizer, saved beside the model.
        prompt: text that every caption continues.
        prompt_ids: its tokens, without special tokens.
        prompt_arguments: what the processor is called with beside an image to make the prompt, for the card.
        retrieved_captions: how many captions of other images a prompt may hold, see `takes_retrieved`.
        surface_form: restores the case and spacing of decoded captions; None: they stay as the tokenizer decodes them.
        card: what the model card says of the family, if it is the only one of its class: see `card_facts`.
    """

    card: ClassVar[CardFacts]
    uses_all_parameters: ClassVar[bool] = False  # in each training step; True makes several processes faster
    loses_surface_form: ClassVar[bool] = False  # the tokenizer, which lower-cases and spaces out punctuation

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model = model
        self.config = model.config
        self.processor = processor
        self.prompt: str | None = None
        self.prompt_ids: list[int] = []
        self.prompt_arguments: dict[str, Any] = {}
        self.retrieved_captions = 0
        self.surface_form: SurfaceForm | None = None

    def without_weights(self) -> "Captioner":
        """Return a copy that can tokenize, collate and decode, for a process that loads data."""
        light = copy(self)
        light.model = None
        return light

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model itself, without what peft wraps around it: attributes set on that would not reach it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def concept_head(self) -> ConceptHead | None:
        """What predicts the concepts of an image; None: nothing does. It is a part of the model, see `ConceptHead`."""
        return getattr(self.plain_model, "concept_head", None)

    @concept_head.setter
    def concept_head(self, head: ConceptHead | None) -> None:
        if self.concept_head is not None:
            del self.plain_model.concept_head
        if head is not None:
            self.plain_model.concept_head = head.to(self.model.device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @classmethod
    def card_facts(cls, model_type: str) -> CardFacts:
        """Return what the model card says of a model with this `model_type` in its config."""
        return cls.card

    @classmethod
    def takes_retrieved(cls, model_type: str) -> bool:
        """Tell whether the `collate` of a model with this `model_type` takes captions of similar images, too."""
        return False

    # --- Load and adapt ---------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, name: str, revision: str | None = None, dtype: torch.dtype = torch.float32
    ) -> "Captioner":
        """Load a checkpoint from the Hub or a folder; a type other than float32 is for weights that do not learn.

        Raises:
            UserError: there is no such checkpoint, or it is not one of this family.
        """

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        config: dict[str, Any],
        name: str,
        seed: int,
        tokenizer_name: str | None,
        captions: Iterable[str],
        vocab_size: int,
    ) -> "Captioner":
        """Build a model with random weights, in evaluation mode.

        Args:
            config: the content of a config.
            name: where it came from, for messages.
            seed: of the weights.
            tokenizer_name: Hub id or folder of a tokenizer; None trains one.
            captions: what the tokenizer is trained on, if it is.
            vocab_size: the most entries of a trained tokenizer.

        Raises:
            UserError: config or tokenizer cannot be read, or do not describe a model of this family.
        """

    @abstractmethod
    def adapt(
        self,
        image_size: int | None = None,
        label_smoothing: float | None = None,
        freeze_vision_model: bool = False,
        fast: bool = True,
    ) -> None:
        """Adapt the model to a run, in place.

        Args:
            image_size: side of the images in pixels; None keeps the checkpoint's.
            label_smoothing: weight of the uniform distribution in the training loss (never in evaluation); None keeps
                the checkpoint's.
            freeze_vision_model: train the rest of the model alone.
            fast: compute the same numbers by faster code, where the family has such code.

        Raises:
            UserError: the model cannot be adapted in this way.
        """

    @property
    @abstractmethod
    def vision_model(self) -> torch.nn.Module:
        """The part of the model that encodes images."""

    @property
    @abstractmethod
    def text_model(self) -> torch.nn.Module:
        """The part of the model that writes, which adapters are put into."""

    def set_prompt(self, prompt: str | None) -> None:
        """Set the text that every caption continues; it is neither learned nor scored. None: the family's default."""
        self.prompt = prompt
        self.prompt_ids = self.tokenizer(prompt or "", add_special_tokens=False)["input_ids"]

    @abstractmethod
    def check_lengths(self, max_caption_length: int, max_new_tokens: int) -> None:
        """Check that rows of this many tokens can be trained on, and this many tokens generated.

        Raises:
            UserError: they do not fit into the model's positions.
        """

    @abstractmethod
    def set_generation_config(self, config: GenerationConfig) -> None:
        """Write the decode settings into the model, so that they are saved with it and stock `generate` finds them."""

    @classmethod
    @abstractmethod
    def plain_generate_suffices(cls, config: GenerationConfig) -> bool:
        """Tell whether stock `generate` of a saved model decodes by these settings without being given them."""

    # --- Captions and tokens ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def prompt_row(self) -> list[int]:
        """The tokens before a caption, none of them a target: the start token, where there is one, and the prompt."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Turn captions into rows of tokens: `prompt_row`, the caption, the end token.

        Args:
            captions: N captions.
            max_length: the most tokens of a row; a longer caption is cut, the end token is kept.

        Returns:
            The N rows, and whether the caption of each was cut.

        Raises:
            UserError: `max_length` leaves no room for a caption.
        """

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Turn new tokens int `[N, T]`, padded by the padding token or -100, into N captions."""
        return self._texts(np.where(tokens < 0, self.tokenizer.pad_token_id, tokens))

    def round_trip(self, captions: Sequence[str]) -> list[str]:
        """Return what is decoded from all tokens of each caption: the most that a model can write of it."""
        return self._texts([row[len(self.prompt_row) :] for row in self.tokenize(captions, 10**9)[0]])

    def _texts(self, rows: np.ndarray | list[list[int]]) -> list[str]:
        texts = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return [self.surface_form.restore(text) for text in texts] if self.surface_form else texts

    def learn_surface_form(self, captions: Iterable[str]) -> None:
        """Learn case and spacing from the training captions."""
        captions, self.surface_form = list(captions), None
        self.surface_form = SurfaceForm.learn(captions, self.round_trip(captions))

    def num_new_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Count the new tokens of each caption, int `[N]`, the end token included; `tokens` are those of `decode`."""
        return np.array([len(self.without_padding(row)) for row in tokens], dtype=np.int64)

    @property
    def end_token_id(self) -> int:
        """The token that ends a caption."""
        return self.tokenizer.eos_token_id

    @property
    def end_token_ids(self) -> list[int]:
        """All tokens at which generation stops."""
        return [self.end_token_id]

    def without_padding(self, tokens: np.ndarray) -> np.ndarray:
        """Return the new tokens `[T]` of one caption up to its end token; without one, up to its padding."""
        tokens = tokens[tokens >= 0]
        ends = np.flatnonzero(np.isin(tokens, self.end_token_ids))
        if len(ends):
            return tokens[: ends[0] + 1]
        written = np.flatnonzero(tokens != self.tokenizer.pad_token_id)
        return tokens[: written[-1] + 1] if len(written) else tokens[:0]

    # --- Batches ----------------------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, images: Sequence[Image.Image], rows: Sequence[Sequence[int]]) -> Batch:
        """Make the model's batch of B images and their rows of tokens.

        Where the family `takes_retrieved`, there is a third argument `retrieved`: for each image the captions of
        similar ones, which become a part of its prompt; by default there are none.

        Returns:
            The keyword arguments of the model's `forward`, `labels` int64 `[B, L]` among them: -100 where a token is
            not a target, as in the prompt and in padding. The Trainer takes B from the first tensor.

        Raises:
            ValueError: an image cannot be processed.
        """

    def forward(self, model: Callable[..., ModelOutput], batch: Batch) -> ModelOutput:
        """Run a training step's forward pass.

        Args:
            model: `self.model`, what the Trainer has wrapped it in, or a function that calls it.
            batch: from `collate`.

        Returns:
            `loss`, the mean over the targets, smoothed if the run says so, and `logits` of any shape.
        """
        return model(**batch, use_cache=False)

    def forward_with_concepts(self, model: torch.nn.Module, batch: Batch) -> tuple[ModelOutput, torch.Tensor]:
        """Run `forward`, and `concept_head` on the features that it has of the images.

        Returns:
            What `forward` returns, and the logits of the concepts float32 `[B, C]`.
        """
        features, logits = [], []

        def add_logits(module: torch.nn.Module, args: tuple, outputs: ModelOutput) -> tuple[ModelOutput, torch.Tensor]:
            # Among the outputs, where DDP looks for the parameters that are in use
            return outputs, self.concept_head(features.pop())

        def without_logits(**inputs) -> ModelOutput:
            outputs, found = model(**inputs)
            logits.append(found)
            return outputs

        hook = self.model.register_forward_hook(add_logits)
        try:
            with self.watch_features(batch, features.append):
                return self.forward(without_logits, batch), logits.pop()
        finally:
            hook.remove()

    def watch_features(self, batch: Batch, keep: Callable[[torch.Tensor], None]) -> AbstractContextManager[None]:
        """Return a context in which a forward pass of the batch calls `keep` with the features of its images.

        They are those of `image_features`, float32 `[B, D]`, with gradients.

        Raises:
            UserError: the family does not have this.
        """
        raise UserError(f"a {self.config.model_type} cannot learn concepts; leave out --concept_loss_weight")

    def num_targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Count the targets of each row of `labels` `[B, L]`: int64 `[B]`."""
        return (labels != IGNORE_INDEX).sum(dim=1)

    def nll_of_captions(self, model: torch.nn.Module, batch: Batch, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the negative log-likelihoods of other captions of B images, as `caption_nll` does, with gradients.

        `rows` are K * B rows of tokens as those of `tokenize`: the first captions of all images, then the second. So
        are the float64 `[K * B]` returned. `model` is that of `forward`.

        Raises:
            UserError: the family does not have this.
        """
        raise UserError(f"a {self.config.model_type} cannot learn from samples; leave out --objective self_critical")

    # --- Evaluation -------------------------------------------------------------------------------------------

    def evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the methods below are called for one batch; it may prepare the weights."""
        return nullcontext()

    @abstractmethod
    def encode_images(self, batch: Batch) -> Any:
        """Encode the images of a batch, once for all methods below, which alone know what is returned."""

    @abstractmethod
    def caption_nll(self, encoded: Any, batch: Batch) -> torch.Tensor:
        """Return the negative log-likelihood of each caption, without label smoothing.

        Returns:
            float64 `[B]`, in nats, summed over the targets of a caption.
        """

    @abstractmethod
    def generate(self, encoded: Any, config: GenerationConfig, *processors: LogitsProcessor) -> torch.Tensor:
        """Generate captions from the images and the prompt, never from a reference (T1).

        Args:
            encoded: from `encode_images`.
            config: decode settings.
            processors: `DrawTokens`, with which `config` must sample, or `WatchTokens`, which takes one image.

        Returns:
            The new tokens int64 `[B, T]`, without the prompt, padded after the end token.
        """

    def sample(self, encoded: Any, config: GenerationConfig, uniforms: torch.Tensor) -> torch.Tensor:
        """Return K samples of each of B images, as `generate` does, in int64 `[B, K, up to T]`.

        `temperature`, `top_k` and `top_p` of `config` say what they are drawn from, `uniforms`, float `[B, K, T]` from
        0 to 1, by which random numbers; zeros make the caption of greedy search.
        """
        number, length = uniforms.shape[1:]
        plain = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        plain |= {"min_new_tokens": 0, "no_repeat_ngram_size": 0}  # else those of the model
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        plain["suppress_tokens"] = sorted(special.difference(self.end_token_ids))  # such as the place of an image
        settings = GenerationConfig(num_return_sequences=number, max_new_tokens=length, **plain)
        draw = DrawTokens(config, uniforms.flatten(0, 1))
        return self.generate(encoded, settings, draw).unflatten(0, (-1, number))

    def generate_each(self, encoded: Any, configs: Sequence[GenerationConfig]) -> list[torch.Tensor]:
        """Return what `generate` returns by each of some decode settings, but for padding; they may share work."""
        return [self.generate(encoded, config) for config in configs]

    @abstractmethod
    def image_features(self, encoded: Any) -> torch.Tensor:
        """Return one vector an image, float32 `[B, D]`; of images that look alike the cosine is high."""

    def word_attention(self, encoded: Any, tokens: torch.Tensor) -> list[tuple[str, np.ndarray]] | None:
        """Return an attention map of one image for each word of its caption.

        Args:
            encoded: a batch of one image.
            tokens: int64 `[T]`, its new tokens without padding.

        Returns:
            The words, each with a float map `[H, W]` over the image; None if the family has no such maps.
        """
        return None


def sum_nll(logits: torch.Tensor, labels: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each caption, float64 `[B]`, in nats, without label smoothing.

    Args:
        logits: `[N, V]`, from which the N targets of the batch are predicted, in order.
        labels: `[B, L]`.
        is_target: bool `[B, L]`, true at the N targets.
    """
    nll = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    nll[is_target] = F.cross_entropy(logits.float(), labels[is_target], reduction="none").double()
    return nll.sum(dim=1)
