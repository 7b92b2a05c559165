"""BLIP behind the interface of `captioner.py`; stock `BlipForConditionalGeneration` loads what is saved."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor, GenerationConfig, LogitsProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils import ModelOutput

from captioning.errors import UserError, as_user_error
from captioning.models.captioner import IGNORE_INDEX, Batch, Captioner, Rows, sum_nll
from captioning.models.card_facts import BY_DECODER, SUFFICES, USAGE, CardFacts
from captioning.models.fast_blip.decoder import CrossAttention, decoder_class, project_images
from captioning.models.fast_blip.decoding import can_decode, decode_captions
from captioning.models.fast_blip.modules import has_shipped_layers, use_fast_blip
from captioning.models.fast_blip.packed_weights import packed_weights
from captioning.models.fast_blip.pixel_values import fast_pixel_values
from captioning.models.tokenizer import add_blip_tokens, load_tokenizer, match_special_tokens, train_tokenizer
from captioning.models.weights import refuse_missing_weights


logger = logging.getLogger(__name__)

# BLIP initializes its position embedding like a weight, at less than a tenth of the patch embeddings that it is added
# to, so a model trained from random weights learns late where in the image something is. Without this factor the
# quickstart ends with the right side in .83 and the right place in .45 of the test captions.
POSITION_SCALE = 10
# Images that a CPU encodes at a time without gradients: their activations stay in its caches. At BLIP-base, 2 to
# 4 images are 1.35 times as fast as 16, see docs/performance.md
CPU_IMAGES = 4
MAX_PARAMETERS = 2**32  # 16 GB in float32; BLIP-large has 470 million
MAX_LAYERS = 1000

CARD = CardFacts(
    kind="BLIP model",
    tags=("blip",),
    transformers="5.4",
    license_note="BLIP's own weights are BSD-3-Clause.",
    citation="""@inproceedings{li2022blip,
  title     = {{BLIP}: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding
               and Generation},
  author    = {Li, Junnan and Li, Dongxu and Xiong, Caiming and Hoi, Steven},
  booktitle = {International Conference on Machine Learning},
  year      = {2022}
}""",
    usage="{% set tokens = None %}"
    "{% set arguments = prompt and 'text=' ~ prompt %}"
    "{% set num_unread = 1 %}"  # stock `generate` takes the end token, which the processor adds to the prompt, off
    + USAGE,
    plain_generate=f"{{% if suffices %}}{SUFFICES}{{% else %}}{BY_DECODER}{{% endif %}}",
)


@dataclass
class EncodedImages:
    """B images, encoded: embeddings `[B, P + 1, D]` of `[CLS]` and P patches, and what the fast path makes of them."""

    image_embeds: torch.Tensor
    cross_attention: CrossAttention | None = None  # made once; `generate` overwrites and drops it


class BlipCaptioner(Captioner):
    """`BlipForConditionalGeneration` with its `BlipProcessor`."""

    card = CARD
    uses_all_parameters = True
    loses_surface_form = True

    def __init__(self, model: BlipForConditionalGeneration, processor: BlipProcessor):
        super().__init__(model, processor)
        self.end_token_ids = [self.tokenizer.sep_token_id]
        self.fast = False

    # --- Load and adapt ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """See `Captioner.from_pretrained`; images are processed by PIL whatever is installed (T11)."""
        with as_user_error(f"model '{name}' cannot be loaded", "give the folder of a saved BLIP or a Hub id"):
            _check_size(BlipConfig.from_pretrained(name, revision=revision), name)
            # A checkpoint saved in half precision would otherwise be trained in it
            model, loading = BlipForConditionalGeneration.from_pretrained(
                name, revision=revision, dtype=dtype, output_loading_info=True
            )
            image_processor = BlipImageProcessorPil.from_pretrained(name, revision=revision)
        refuse_missing_weights(loading["missing_keys"], f"model '{name}'")
        side, size = model.config.vision_config.image_size, image_processor.size
        if size != {"height": side, "width": side}:
            # The position embedding decides: the model cannot take images of another size
            logger.warning("the processor of '%s' is for %s; images are resized to %d pixels", name, size, side)
            image_processor.size = {"height": side, "width": side}
        tokenizer = match_special_tokens(load_tokenizer(name, revision), model.config)
        return cls(model, BlipProcessor(image_processor, tokenizer))

    @classmethod
    def from_config(
        cls, config: dict, name: str, seed: int, tokenizer_name: str | None, captions: Iterable[str], vocab_size: int
    ) -> Self:
        """See `Captioner.from_config`; vocabulary size and special tokens come from the tokenizer."""
        with as_user_error(f"config '{name}' cannot be loaded", "recipes/configs/ has examples"):
            if not config.keys() & {"text_config", "vision_config"}:
                # Stock would build what its defaults say
                raise UserError(f"config '{name}' does not describe a BLIP; recipes/configs/ has examples")
            config = BlipConfig.from_dict(deepcopy(config))
            _check_size(config, name)
        # After the config, whose faults need not wait until the captions are checked
        tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else train_tokenizer(captions, vocab_size)
        add_blip_tokens(tokenizer)
        if config.vision_config.initializer_range < 1e-4:
            # The default of BlipVisionConfig is 1e-10: harmless when weights are loaded, a dead encoder when not
            config.vision_config.initializer_range = config.initializer_range
        text = config.text_config
        text.vocab_size, text.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        text.bos_token_id, text.sep_token_id = tokenizer.bos_token_id, tokenizer.sep_token_id
        text.eos_token_id = text.sep_token_id
        torch.manual_seed(seed)
        with as_user_error(f"config '{name}' builds no model", "recipes/configs/ has examples"):
            model = BlipForConditionalGeneration(config).eval()  # as `from_pretrained` leaves it
        with torch.no_grad():
            model.vision_model.embeddings.position_embedding *= POSITION_SCALE
        side = config.vision_config.image_size
        return cls(model, BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), tokenizer))

    def set_label_smoothing(self, weight: float) -> None:
        """Set that of the config; the Trainer's does not shift the labels (T5)."""
        self.config.text_config.label_smoothing = self.model.text_decoder.label_smoothing = weight

    def use_fast_code(self, fast: bool) -> None:
        """See `fast_blip`."""
        self.fast = fast
        use_fast_blip(self.model, fast)

    @property
    def vision_model(self) -> nn.Module:
        """See `Captioner.vision_model`."""
        return self.model.vision_model

    @property
    def text_model(self) -> nn.Module:
        """See `Captioner.text_model`; without the head, which is tied to the embedding."""
        return self.model.text_decoder.bert

    def resize_images(self, side: int) -> None:
        """Make model and processor take square images of another side in pixels.

        Positions are interpolated once in the weights, by the model's own code: what is saved is plain BLIP, which
        needs no `interpolate_pos_encoding=True`.
        """
        vision = self.config.vision_config
        if side < vision.patch_size or side % vision.patch_size:
            raise UserError(
                f"image_size {side} is not a multiple of the model's patch size {vision.patch_size}; "
                f"set --image_size to {max(1, round(side / vision.patch_size)) * vision.patch_size}"
            )
        embeddings = self.model.vision_model.embeddings
        num_patches = (side // vision.patch_size) ** 2
        tokens = torch.empty(1, 1 + num_patches, embeddings.embed_dim)  # only its shape is read
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(tokens, side, side)
        embeddings.position_embedding = nn.Parameter(positions)
        embeddings.num_patches, embeddings.num_positions = num_patches, 1 + num_patches
        embeddings.image_size = vision.image_size = side
        self.processor.image_processor.size = {"height": side, "width": side}

    def set_generation_config(self, config: GenerationConfig) -> None:
        """See `Captioner.set_generation_config`: they go into the text config as far as possible.

        Stock makes the settings of the text decoder, which generates (T7), of the text config, and drops `num_beams`
        and others from that, but not the numbers of new tokens (transformers 5.23.0, `PreTrainedConfig.__init__`). So
        a plain `model.generate(**inputs)` can be made to search greedily as evaluated, but not by beams.
        """
        text = self.config.text_config
        plain = self.plain_generate_suffices(config)
        for name in ("max_new_tokens", "min_new_tokens"):
            vars(text).pop(name, None)  # those of an earlier fine-tune
            if plain and getattr(config, name) is not None:
                setattr(text, name, getattr(config, name))
        self.model.text_decoder.generation_config = GenerationConfig.from_model_config(text)
        self.plain_model.generation_config = self._with_special_tokens(config)
        self.plain_model.generation_config.bos_token_id = text.bos_token_id

    @classmethod
    def plain_generate_suffices(cls, config: GenerationConfig) -> bool:
        """See `Captioner.plain_generate_suffices` and `set_generation_config`."""
        return config.num_beams == 1 and not config.no_repeat_ngram_size

    def _with_special_tokens(self, config: GenerationConfig) -> GenerationConfig:
        text, config = self.config.text_config, deepcopy(config)
        config.eos_token_id, config.pad_token_id = text.sep_token_id, text.pad_token_id
        return config

    # --- Captions and tokens ----------------------------------------------------------------------------------

    @property
    def prompt_row(self) -> list[int]:
        """`[DEC]` and the prompt.

        The tokenizer would start with `[CLS]`, but `generate` starts from `[DEC]` (T3), and so did BLIP's own training
        (github.com/salesforce/BLIP, models/blip.py, `text.input_ids[:, 0] = self.tokenizer.bos_token_id`).
        """
        return [self.config.text_config.bos_token_id, *self.prompt_ids]

    # --- Batches ----------------------------------------------------------------------------------------------

    def collate(self, images: Sequence[Image.Image], rows: Rows) -> Batch:
        """Return `pixel_values` float32 `[B, 3, H, W]` and `input_ids`, `attention_mask`, `labels` int64 `[B, L]`.

        A label is at the position of its token: BLIP shifts them itself.
        """
        return {"pixel_values": self.pixel_values(images)} | self._text_inputs(rows)

    def _text_inputs(self, rows: Rows) -> Batch:
        tokens = [torch.tensor(row) for row in rows]
        input_ids = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        labels = pad_sequence(tokens, batch_first=True, padding_value=IGNORE_INDEX)
        attention_mask = (labels != IGNORE_INDEX).long()
        labels[:, : len(self.prompt_row)] = IGNORE_INDEX
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Resize and normalize images into float32 `[B, 3, H, W]`: the values of the image processor."""
        if self.fast:
            return fast_pixel_values(list(images), self.processor.image_processor)
        return self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]

    def nll_of_captions(self, model: nn.Module, batch: Batch, rows: Rows) -> torch.Tensor:
        """See `Captioner.nll_of_captions`; each image is encoded once."""
        pixel_values = batch["pixel_values"]
        copies, texts = len(rows) // len(pixel_values), self._text_inputs(rows)
        batch = {name: value.to(pixel_values.device) for name, value in texts.items()} | {"pixel_values": pixel_values}

        def copy_embeds(module: nn.Module, args: tuple, outputs: ModelOutput) -> None:
            outputs.last_hidden_state = outputs.last_hidden_state.repeat(copies, 1, 1)

        with self.vision_model.register_forward_hook(copy_embeds):
            return self._nll(self.forward(model, batch).logits, batch["labels"])

    def _nll(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum the negative log-likelihoods by caption; `logits` are `[B, L, V]`, or those of the N targets alone."""
        predicts = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
        return sum_nll(logits if logits.dim() == 2 else logits[:, :-1][predicts], labels)

    def watch_features(self, batch: Batch, keep: Callable[[torch.Tensor], None]) -> AbstractContextManager[Any]:
        """See `Captioner.watch_features`."""

        def pool(module: nn.Module, args: tuple, outputs: ModelOutput) -> None:
            keep(self.image_features(EncodedImages(outputs.last_hidden_state)))

        return self.vision_model.register_forward_hook(pool)

    # --- Evaluation -------------------------------------------------------------------------------------------

    def evaluation(self) -> AbstractContextManager[None]:
        """Lay out the weights that captions pass, on a CPU, once for scoring and generation."""
        return packed_weights(self.model.text_decoder) if self._decodes_fast else nullcontext()

    @property
    def _decodes_fast(self) -> bool:
        """Whether `decoder.py` may call the parts of the text decoder's layers instead of the layers."""
        decoder = self.model.text_decoder
        return self.fast and not decoder.training and has_shipped_layers(decoder)

    def _cross_attention(self, encoded: EncodedImages) -> CrossAttention | None:
        """Project the images for the fast path, once for scoring and generation; None where stock code runs."""
        if encoded.cross_attention is None and self._decodes_fast:
            encoded.cross_attention = project_images(self.model.text_decoder, encoded.image_embeds)
        return encoded.cross_attention

    def encode_images(self, batch: Batch) -> EncodedImages:
        """Encode `pixel_values` `[B, 3, H, W]`."""
        pixel_values = batch["pixel_values"]
        in_parts = self.fast and pixel_values.is_cpu and not torch.is_grad_enabled()
        parts = pixel_values.split(CPU_IMAGES if in_parts else len(pixel_values))
        return EncodedImages(torch.cat([self.model.vision_model(pixel_values=p).last_hidden_state for p in parts]))

    def caption_nll(self, encoded: EncodedImages, batch: Batch) -> torch.Tensor:
        """See `Captioner.caption_nll`; padding is on the right.

        The fast path on a CPU takes one caption at a time, without padding. That is as fast, and the loss of a caption
        does not depend, in any digit, on the others in its batch.
        """
        decoder, input_ids, labels = self.model.text_decoder, batch["input_ids"], batch["labels"]
        predicts = labels[:, 1:] != IGNORE_INDEX  # position i predicts token i + 1
        cross_attention = self._cross_attention(encoded)
        if cross_attention is None:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = decoder(**inputs, encoder_hidden_states=encoded.image_embeds, use_cache=False).logits
        else:
            logits, step = [], 1 if labels.is_cpu else len(labels)
            for row in range(0, len(labels), step):
                rows = slice(row, row + step)
                length = int(batch["attention_mask"][rows].sum(dim=1).max())
                images = [(keys[rows], values[rows]) for keys, values in cross_attention]
                hidden = decoder_class(labels.device)(decoder, images, length).read(input_ids[rows, :length])
                logits.append(decoder.cls(hidden[:, :-1][predicts[rows, : length - 1]]))
            logits = torch.cat(logits)
        return self._nll(logits, labels)

    def generate_each(self, encoded: EncodedImages, configs: Sequence[GenerationConfig]) -> list[torch.Tensor]:
        """See `Captioner.generate_each`; on the fast path, beam searches by several length penalties are one."""
        if not (self._decodes_fast and all(map(can_decode, configs))):
            return super().generate_each(encoded, configs)
        searches: dict[str, list[int]] = {}  # by all settings but the length penalty
        for place, config in enumerate(configs):
            searches.setdefault(repr(config.to_diff_dict() | {"length_penalty": 0}), []).append(place)
        found: dict[int, torch.Tensor] = {}
        for places in searches.values():
            penalties = [configs[place].length_penalty for place in places]
            tokens = self.generate(encoded, configs[places[0]], length_penalties=penalties)
            found.update(zip(places, tokens.split(len(encoded.image_embeds)), strict=True))
        return [found[place] for place in range(len(configs))]

    @torch.no_grad()
    def generate(
        self,
        encoded: EncodedImages,
        config: GenerationConfig,
        *processors: LogitsProcessor,
        length_penalties: Sequence[float] = (),
    ) -> torch.Tensor:
        """See `Captioner.generate`: the tokens of stock `generate(pixel_values, prompt)`.

        The settings go to the text decoder, which ignores those of the whole model (T7). `length_penalties`, on the
        fast path: see `decode_captions`.
        """
        embeds, config = encoded.image_embeds, self._with_special_tokens(config)
        # A new tensor for each call: `generate` may write into it (T10)
        input_ids = torch.tensor([self.prompt_row], device=embeds.device).repeat(len(embeds), 1)
        if can_decode(config, *processors) and (cross_attention := self._cross_attention(encoded)):
            encoded.cross_attention = None
            images = {"custom_generate": decode_captions, "cross_attention": cross_attention}
            images["length_penalties"] = length_penalties
        else:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            images = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        start = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        settings = {"generation_config": config, "logits_processor": list(processors)}
        generated = self.model.text_decoder.generate(**start, **images, **settings)
        return generated[:, input_ids.shape[1] :]

    def image_features(self, encoded: EncodedImages) -> torch.Tensor:
        """Return the mean of the patch embeddings of each image, float32 `[B, D]`.

        In a model trained on captions alone, the embedding of `[CLS]` need not summarize the image.
        """
        return encoded.image_embeds[:, 1:].mean(dim=1).float()

    def word_attention(self, encoded: EncodedImages, tokens: torch.Tensor) -> list[tuple[str, np.ndarray]]:
        """Return the words of one caption, each with the mean of the maps `[H, W]` of its tokens."""
        words: list[tuple[str, list[np.ndarray]]] = []
        maps = self.attention_maps(encoded, tokens).cpu().numpy()
        for name, attention in zip(self.tokenizer.convert_ids_to_tokens(tokens.tolist()), maps, strict=True):
            if name.startswith("##") and words:
                word, pieces = words.pop()
                words.append((word + name.removeprefix("##"), [*pieces, attention]))
            elif name not in self.tokenizer.all_special_tokens:
                words.append((name, [attention]))
        return [(word, np.mean(pieces, axis=0)) for word, pieces in words]

    def attention_maps(self, encoded: EncodedImages, tokens: torch.Tensor) -> torch.Tensor:
        """Return the cross-attention over the patches of one image with which each token `[T]` was written.

        Float `[T, H, W]`: the mean over layers and heads, without the weight of the `[CLS]` embedding.
        """
        start = torch.tensor(self.prompt_row, device=tokens.device)
        input_ids = torch.cat([start, tokens])[None, :-1]
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
        inputs |= {"encoder_hidden_states": encoded.image_embeds, "output_attentions": True}
        attention = torch.stack(self.model.text_decoder(**inputs).cross_attentions).float().mean(dim=(0, 2))[0]
        side = math.isqrt(attention.shape[-1] - 1)
        # The position before a token is the one that wrote it
        return attention[len(start) - 1 :, 1:].unflatten(-1, (side, side))


def _check_size(config: BlipConfig, name: str) -> None:
    """Raise UserError if a config describes a giant, before any of its weights is allocated."""
    num_layers = max(int(part.num_hidden_layers) for part in (config.text_config, config.vision_config))
    if num_layers <= MAX_LAYERS:
        with torch.device("meta"):
            num_parameters = BlipForConditionalGeneration(config).num_parameters()
    if num_layers > MAX_LAYERS or num_parameters > MAX_PARAMETERS:
        raise UserError(
            f"config of '{name}': more than {MAX_LAYERS:,} layers or {MAX_PARAMETERS:,} weights; lower hidden_size, "
            "num_hidden_layers or others, recipes/configs/ has examples"
        )
