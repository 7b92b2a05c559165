"""`Captioner`: all that the rest of the recipe asks of an image captioning model.

The trainer, the collator, the card and the page call these methods and know nothing else of a model. A family that
stock `AutoModelForImageTextToText` loads is an entry of `families.py`; another is a file beside `blip.py`, named in
`load.py`. `tests/test_captioner.py` is a small example.

Shapes: B images or captions of a batch, L tokens of its longest row, T new tokens, D features of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ModelOutput

from captioning.errors import UserError
from captioning.models.card_facts import CardFacts
from captioning.models.concept_head import ConceptHead
from captioning.models.surface_form import SurfaceForm


IGNORE_INDEX = -100  # the label that `torch.nn.functional.cross_entropy` leaves out
WITHOUT_FLOAT64 = {"mps"}  # types of devices: Apple's GPUs; tests set it

Batch = dict[str, torch.Tensor]
Rows = Sequence[Sequence[int]]  # of tokens


class DrawTokens(LogitsProcessor):
    """Draws each token by a given random number, so that the samples of an image are the same in any batch.

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
        show: called before each token but the first with the new tokens so far, int64 `[t]`, of the most probable
            beam that goes on. What it raises ends the search.
    """

    def __init__(self, show: Callable[[torch.Tensor], None]):
        self.show = show
        self.num_prompt_tokens: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores; both searches keep beams in the order of their probability."""
        if self.num_prompt_tokens is None:
            self.num_prompt_tokens = input_ids.shape[1]
        else:
            self.show(input_ids[0, self.num_prompt_tokens :])
        return scores


class Captioner(ABC):
    """A model and its processor."""

    card: ClassVar[CardFacts]  # of the family, if it is the only one of its class: see `card_facts`
    uses_all_parameters: ClassVar[bool] = False  # in each training step; True makes several processes faster
    loses_surface_form: ClassVar[bool] = False  # the tokenizer, which lower-cases and spaces out punctuation

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model, self.config = model, model.config
        self.processor = processor  # image processor and tokenizer, saved beside the model
        self.prompt: str | None = None  # text that every caption continues
        self.prompt_ids: list[int] = []  # its tokens, without special tokens
        self.prompt_arguments: dict[str, Any] = {}  # with which the processor makes it, for the card
        self.retrieved_captions = 0  # how many captions of other images it may hold, see `collate`
        self.surface_form: SurfaceForm | None = None  # restores the case and spacing of decoded captions
        self.end_token_ids: list[int] = [self.tokenizer.eos_token_id]  # a caption learns to end with the first

    def without_weights(self) -> "Captioner":
        """Return a copy without a model, for a process that loads data: it can tokenize, collate and decode."""
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
        self.plain_model.concept_head = head and head.to(self.model.device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @classmethod
    def card_facts(cls, model_type: str) -> CardFacts:
        """Return what the model card says of a model with this `model_type` in its config."""
        return cls.card

    # --- Load and adapt ---------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_pretrained(cls, name: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """Load a checkpoint from the Hub or a folder; a type other than float32 is for weights that do not learn.

        Raises:
            UserError: there is no such checkpoint, or it is not one of this family.
        """

    @classmethod
    def from_config(
        cls, config: dict, name: str, seed: int, tokenizer_name: str | None, captions: Iterable[str], vocab_size: int
    ) -> Self:
        """Build a model from the content of a config that came from `name`: random weights, in evaluation mode.

        Without a `tokenizer_name`, one of up to `vocab_size` entries is trained on `captions`.

        Raises:
            UserError: config or tokenizer cannot be read, or the family is not trained from random weights.
        """
        what = f"config '{name}' is of model type {config['model_type']}, which is fine-tuned only"
        raise UserError(f"{what}; give a checkpoint by --model_name_or_path")

    def adapt(
        self,
        image_size: int | None = None,
        label_smoothing: float | None = None,
        freeze_vision_model: bool = False,
        fast: bool = True,
    ) -> None:
        """Adapt the model to a run, in place; None keeps what the checkpoint has.

        Args:
            image_size: side of the images in pixels; UserError: the model cannot take them.
            label_smoothing: weight of the uniform distribution in the training loss, never in evaluation.
            freeze_vision_model: train the rest of the model alone.
            fast: compute the same numbers by faster code, where the family has such code.
        """
        if image_size:
            self.resize_images(image_size)
        if label_smoothing is not None:
            self.set_label_smoothing(label_smoothing)
        if freeze_vision_model:
            self.vision_model.requires_grad_(False)
        self.use_fast_code(fast)

    def resize_images(self, side: int) -> None:
        """See `adapt`."""
        raise UserError(f"a {self.config.model_type} takes images of one size only; leave out --image_size")

    def set_label_smoothing(self, weight: float) -> None:
        """See `adapt`."""
        raise UserError(f"a {self.config.model_type} has no such loss; leave out --label_smoothing")

    def use_fast_code(self, fast: bool) -> None:  # noqa: B027
        """See `adapt`; by default there is none."""

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

    @property
    def num_tokens_before_row(self) -> int:
        """How many tokens the model reads before a row of `tokenize`, those of the image among them."""
        return 0

    def check_lengths(self, max_caption_length: int, max_new_tokens: int) -> None:
        """Raise UserError if rows of this many tokens, or so many new ones, do not fit into the model's positions."""
        text = self.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        before = self.num_tokens_before_row
        new = ("max_new_tokens", max_new_tokens, before + len(self.prompt_row))
        for flag, number, start in (("max_caption_length", max_caption_length, before), new):
            if positions and start + number > positions:
                after = f" after {start} tokens of the prompt" if start else ""
                mends = [f"set --{flag} to {positions - start} or less"] if start + 1 < positions else []
                mends += ["set fewer --retrieved_captions"] if self.retrieved_captions else []
                mends += ["shorten --prompt"] if self.prompt else []
                exceeds = f"{flag} {number}{after} exceeds the model's {positions} text positions"
                raise UserError(f"{exceeds}; {' or '.join(mends) or 'take a model with more'}")

    @abstractmethod
    def set_generation_config(self, config: GenerationConfig) -> None:
        """Write the decode settings into the model, so that they are saved with it and stock `generate` finds them."""

    @classmethod
    def plain_generate_suffices(cls, config: GenerationConfig) -> bool:
        """Tell whether stock `generate` of a saved model decodes by these settings without being given them."""
        return True

    # --- Captions and tokens ----------------------------------------------------------------------------------

    @property
    def prompt_row(self) -> list[int]:
        """The tokens before a caption, none of them a target: the start token, where there is one, and the prompt."""
        return self.prompt_ids

    def tokenize(self, captions: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Return N rows of tokens, `prompt_row`, caption, end token, and whether the caption of each was cut.

        Raises:
            UserError: `max_length`, the most tokens of a row, leaves no room for a caption.
        """
        start = self.prompt_row
        room = max_length - len(start) - 1
        if room < 1:
            mend = f"set --max_caption_length to {len(start) + 2} or more"
            raise UserError(f"max_caption_length {max_length} leaves no room for a caption; {mend}")
        tokens = self.caption_tokens(captions)
        return [[*start, *own[:room], self.end_token_id] for own in tokens], [len(own) > room for own in tokens]

    def caption_tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return all tokens of each caption, without special ones."""
        return self.tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Turn new tokens int `[N, T]`, padded by the padding token or -100, into N captions."""
        return self._texts(np.where(tokens < 0, self.tokenizer.pad_token_id, tokens))

    def round_trip(self, captions: Sequence[str]) -> list[str]:
        """Return what is decoded from all tokens of each caption: the most that a model can write of it."""
        return self._texts(self.caption_tokens(captions))

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
        """The token that a caption learns to end with."""
        return self.end_token_ids[0]

    def without_padding(self, tokens: np.ndarray) -> np.ndarray:
        """Return the new tokens `[T]` of one caption up to its end token, or else to its padding."""
        tokens = tokens[tokens >= 0]
        ends = np.flatnonzero(np.isin(tokens, self.end_token_ids))
        if len(ends):
            return tokens[: ends[0] + 1]
        written = np.flatnonzero(tokens != self.tokenizer.pad_token_id)
        return tokens[: written[-1] + 1] if len(written) else tokens[:0]

    # --- Batches ----------------------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, images: Sequence[Image.Image], rows: Rows) -> Batch:
        """Make the model's batch of B images and their rows of tokens.

        Families with `Family.image_start` also take `retrieved`: for each image the captions of similar ones, which
        become a part of its prompt.

        Returns:
            The keyword arguments of the model's `forward`, with `labels` int64 `[B, L]`: -100 where a token is not a
            target, as in the prompt and in padding. The Trainer takes B from the first tensor.

        Raises:
            ValueError: an image cannot be processed.
        """

    def forward(self, model: Callable[..., ModelOutput], batch: Batch) -> ModelOutput:
        """Run a training step's forward pass of `self.model`, or of `model`, which wraps or calls it.

        Returns:
            `loss`, the mean over the targets, smoothed if the run says so, and `logits` of any shape.
        """
        return model(**batch, use_cache=False)

    def forward_with_concepts(self, model: torch.nn.Module, batch: Batch) -> tuple[ModelOutput, torch.Tensor]:
        """Return what `forward` does, and the logits of the concepts float32 `[B, C]`, from the same pass."""
        features, logits = [], []

        def add_logits(module: torch.nn.Module, args: tuple, outputs: ModelOutput) -> tuple[ModelOutput, torch.Tensor]:
            # Among the outputs, where DDP looks for the parameters that are in use
            return outputs, self.concept_head(features.pop())

        def without_logits(**inputs) -> ModelOutput:
            outputs, found = model(**inputs)
            logits.append(found)
            return outputs

        with self.model.register_forward_hook(add_logits), self.watch_features(batch, features.append):
            return self.forward(without_logits, batch), logits.pop()

    def watch_features(self, batch: Batch, keep: Callable[[torch.Tensor], None]) -> AbstractContextManager[Any]:
        """Return a context in which a forward pass calls `keep` with the `image_features` of a batch, with gradients.

        UserError: the family does not have this.
        """
        raise UserError(f"a {self.config.model_type} cannot learn concepts; leave out --concept_loss_weight")

    def num_targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Count the targets of each row of `labels` `[B, L]`: int64 `[B]`."""
        return (labels != IGNORE_INDEX).sum(dim=1)

    def nll_of_captions(self, model: torch.nn.Module, batch: Batch, rows: Rows) -> torch.Tensor:
        """Return the negative log-likelihoods of other captions of B images, as `caption_nll` does, with gradients.

        `rows` are K * B rows as of `tokenize`, and so are the float64 `[K * B]` returned: the first captions of all
        images, then the second. `model` is that of `forward`. UserError: the family does not have this.
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
        """Return the negative log-likelihood of each caption: float64 `[B]`, in nats, without label smoothing."""

    @abstractmethod
    def generate(self, encoded: Any, config: GenerationConfig, *processors: LogitsProcessor) -> torch.Tensor:
        """Generate captions from the images and the prompt, never from a reference (T1).

        `processors` may be `DrawTokens`, with which `config` must sample, or `WatchTokens`, which takes one image.

        Returns:
            The new tokens int64 `[B, T]`, without the prompt, padded after the end token.
        """

    def sample(self, encoded: Any, config: GenerationConfig, uniforms: torch.Tensor) -> torch.Tensor:
        """Return K samples of each of B images, as `generate` does, in int64 `[B, K, up to T]`.

        See `DrawTokens` for `config` and `uniforms`, float `[B, K, T]`; zeros make the caption of greedy search.
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
        """Return what `generate` does by each of some decode settings, but for padding; they may share work."""
        return [self.generate(encoded, config) for config in configs]

    @abstractmethod
    def image_features(self, encoded: Any) -> torch.Tensor:
        """Return one vector an image, float32 `[B, D]`; of images that look alike the cosine is high."""

    def word_attention(self, encoded: Any, tokens: torch.Tensor) -> list[tuple[str, np.ndarray]] | None:
        """Return the words of the caption of one image, each with its attention over the image, float `[H, W]`.

        `tokens` int64 `[T]` are those of the caption without padding. None: the family has no such maps.
        """
        return None


def sum_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each caption, `[B]`, in nats, without label smoothing.

    `logits` `[N, V]` predict, in order, the N targets among `labels` `[B, L]`. They are summed in float64 where the
    device has it.
    """
    is_target = labels != IGNORE_INDEX
    dtype = torch.float32 if labels.device.type in WITHOUT_FLOAT64 else torch.float64
    nll = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    nll[is_target] = F.cross_entropy(logits.float(), labels[is_target], reduction="none").to(nll)
    return nll.sum(dim=1)
