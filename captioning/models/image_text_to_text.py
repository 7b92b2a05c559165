"""Other captioners than BLIP: the families of `families.py`, which stock `AutoModelForImageTextToText` loads.

Most put the image into the prompt of a language model, which continues it: `ImageTextToTextCaptioner`. In others an
encoder reads image and prompt, and a decoder writes: `EncoderDecoderCaptioner`. All computing is stock's.

Shapes, beside those of `captioner.py`: P tokens of the prompt, those of the image among them; C tokens of the longest
caption, so that L is P + C.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from captioning.errors import UserError, as_user_error
from captioning.models.captioner import IGNORE_INDEX, Batch, Captioner, Rows, sum_nll
from captioning.models.card_facts import CardFacts
from captioning.models.families import FAMILIES, Family
from captioning.models.processor import load_processor
from captioning.models.weights import refuse_missing_weights


RETRIEVED = "Captions of similar images:\n{}\n"  # written before the image; a line for each, after a dash
RETRIEVED_TOKENS = 64  # of each, what is longer is cut
# Inputs with one value a token; those of a caption, where 1 has another meaning than "attend to it"
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass
class EncodedBatch:
    """A batch as the model takes it; after a forward pass the last of `features` are those of its images, `[B, D]`."""

    batch: Batch
    features: list[torch.Tensor] = field(default_factory=list)


class _SeenEnough(Exception):
    """Ends a forward pass whose further layers nobody asks for."""


class ImageTextToTextCaptioner(Captioner):
    """A decoder that continues a prompt in which the image is."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        super().__init__(model, processor)
        self.family: Family = FAMILIES[self.config.model_type]
        self.label_smoothing = 0.0
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.end_token_ids = self._find_end_tokens()
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({*special, *self._image_tokens()}, key=len, reverse=True)
        self._special_tokens = re.compile("|".join(map(re.escape, special)))
        self.set_prompt(None)

    # --- Load and adapt ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """See `Captioner.from_pretrained`."""
        with as_user_error(f"model '{name}' cannot be loaded", "give the folder of a saved model or a Hub id"):
            config = AutoConfig.from_pretrained(name, revision=revision)
            processor = load_processor(name, revision, config)
            model, loading = AutoModelForImageTextToText.from_pretrained(
                name, revision=revision, config=config, dtype=dtype, output_loading_info=True
            )
        refuse_missing_weights(loading["missing_keys"], f"model '{name}'")
        _match_ids(model.config, processor)
        has_encoder = config.is_encoder_decoder or config.get_text_config(decoder=True).is_encoder_decoder
        writes = EncoderDecoderCaptioner if has_encoder else ImageTextToTextCaptioner
        mend = "it needs a whole processor_config.json, and a chat template of images and text or none"
        with as_user_error(f"model '{name}': its processor makes no prompt", mend):
            return writes(model, processor)

    def set_label_smoothing(self, weight: float) -> None:
        """Set that of `forward`."""
        self.label_smoothing = weight

    def resize_images(self, side: int) -> None:
        """Limit the images, whose size these families choose by themselves, to about `side` x `side` pixels."""
        images = self.processor.image_processor
        if self.family.image_size == "area":
            smallest = min(images.size["shortest_edge"], side**2)
            images.size = {"shortest_edge": smallest, "longest_edge": side**2}
        elif self.family.image_size == "longest_edge":
            images.size = {"longest_edge": side}
        elif images.size not in ({"height": side, "width": side}, {"shortest_edge": side}):
            kind = self.config.model_type
            raise UserError(f"a {kind} takes images of {dict(images.size)} only; leave out --image_size")
        self.set_prompt(self.prompt)  # it may hold another number of image tokens

    @property
    def vision_model(self) -> nn.Module:
        """See `Captioner.vision_model`."""
        path = self.family.vision
        return self.model.get_submodule(path) if path else self.model.get_encoder("image")

    @property
    def text_model(self) -> nn.Module:
        """See `Captioner.text_model`."""
        path = self.family.text
        return self.model.get_submodule(path) if path else self.model.get_decoder()

    @property
    def num_tokens_before_row(self) -> int:
        """The tokens of the prompt, with as many retrieved captions as it may hold."""
        if not self.retrieved_captions:
            return self.prompt_length
        of_each = RETRIEVED_TOKENS + 3  # with a dash and the end of the line
        return self.prompt_length + len(self._tokens([RETRIEVED])[0]) + self.retrieved_captions * of_each

    def set_generation_config(self, config: GenerationConfig) -> None:
        """See `Captioner.set_generation_config`; what a checkpoint samples by does not stay."""
        self.plain_model.generation_config = self._with_special_tokens(config)
        if self.family.generates_by_decoder:  # `generate` of the whole model is that of its decoder (T7)
            self.model.language_model.generation_config = deepcopy(self.model.generation_config)

    @classmethod
    def card_facts(cls, model_type: str) -> CardFacts:
        """See `Captioner.card_facts`."""
        return FAMILIES[model_type].card_facts(model_type)

    def _with_special_tokens(self, config: GenerationConfig) -> GenerationConfig:
        config, text = deepcopy(config), self.config.get_text_config(decoder=True)
        config.eos_token_id, config.pad_token_id = self.end_token_ids, self.tokenizer.pad_token_id
        config.bos_token_id = getattr(text, "bos_token_id", None)
        starts = (getattr(known, "decoder_start_token_id", None) for known in (self.config, text))
        config.decoder_start_token_id = next((start for start in starts if start is not None), None)
        return config

    def _find_end_tokens(self) -> list[int]:
        """Return the tokens that end a caption: the one that is learned, then those at which the model stops, too."""
        by_text = getattr(self.config.get_text_config(decoder=True), "eos_token_id", None)
        by_model = self.model.generation_config.eos_token_id
        known = (by_text or by_model) if self.family.generates_by_decoder else (by_model or by_text)
        own = self.tokenizer.eos_token_id
        own = self.tokenizer.sep_token_id if own is None else own  # BERT's ends a text by [SEP]
        known = [known] if isinstance(known, int) else list(known or [own])
        learned = self.tokenizer.convert_tokens_to_ids(self.family.end) if self.family.end else None
        if learned in (None, self.tokenizer.unk_token_id):
            learned = own if own in known else known[0]
        if learned is None:
            kind = self.config.model_type
            raise UserError(f"neither tokenizer nor config of this {kind} has a token that ends a caption; set one")
        return list(dict.fromkeys([learned, *known]))

    # --- Captions and tokens ----------------------------------------------------------------------------------

    def set_prompt(self, prompt: str | None) -> None:
        """See `Captioner.set_prompt`; None takes the family's prompt.

        Raises:
            UserError: the prompt holds no place for the image, or for retrieved captions.
        """
        self.prompt = self.family.prompt if prompt is None else prompt
        if written := [token for token in self._image_tokens() if token in self.prompt]:
            raise UserError(f"the prompt '{prompt}' holds '{written[0]}', which is put there anyway; leave it out")
        self.prompt_text = text = self._render(self.prompt)
        if self.retrieved_captions and self.family.image_start not in text:
            before = f"'{self.family.image_start}', before which retrieved captions are written"
            raise UserError(f"the prompt '{text}' has no {before}; leave out --retrieved_captions")
        starts = (self.tokenizer.bos_token, self.tokenizer.cls_token)  # a template may have written it
        adds = not any(token and text.startswith(token) for token in starts)
        self.prompt_arguments = {"text": [text]} | ({} if adds else {"add_special_tokens": False})
        ids = self._prompt_inputs([Image.new("RGB", (64, 64))])["input_ids"][0]
        is_image = [place for place, token in enumerate(ids.tolist()) if token == self._image_token_id]
        if self._image_token_id is not None and not is_image:
            raise UserError(f"the prompt '{text}' of this {self.config.model_type} has no place for the image")
        self.prompt_length = len(ids)
        after_image = ids[is_image[-1] + 1 if is_image else 0 :]
        self._length_after_image = len(after_image)
        self._last_word = re.search(r"\S*\Z", self.tokenizer.decode(after_image, skip_special_tokens=True))[0]

    @property
    def _image_token_id(self) -> int | None:
        known = (getattr(self.config, name, None) for name in ("image_token_id", "image_token_index"))
        return next((token for token in known if token is not None), None)

    def _image_tokens(self) -> list[str]:
        """Return the tokens that stand for an image or a video, as far as the family has them."""
        ids = [self._image_token_id, getattr(self.config, "video_token_id", None)]
        known = [getattr(self.processor, name, None) for name in ("image_token", "boi_token", "video_token")]
        known += [self.tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
        return [str(token) for token in known if token]

    def _render(self, prompt: str) -> str:
        template = getattr(self.processor, "chat_template", None)
        if not template:
            image, start = getattr(self.processor, "image_token", ""), self.tokenizer.cls_token
            return self.family.template.format(prompt=prompt, image=image, start=start).strip()
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        # Of the base class: SmolVLM's own asks for the part for videos
        return ProcessorMixin.apply_chat_template(
            self.processor, [{"role": "user", "content": content}], template, add_generation_prompt=True
        )

    def caption_tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each caption as they follow the last word of the prompt.

        What would be read as a special token, such as the one that stands for an image, is left out.
        """
        texts, word = [self._special_tokens.sub(" ", caption).strip() for caption in captions], self._last_word
        if not word:
            return self._tokens(texts)
        start = len(self._tokens([word])[0])
        return [tokens[start:] for tokens in self._tokens([f"{word} {text}" for text in texts])]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return super().caption_tokens(texts)

    # --- Batches ----------------------------------------------------------------------------------------------

    def collate(self, images: Sequence[Image.Image], rows: Rows, retrieved: Sequence[Sequence[str]] = ()) -> Batch:
        """Return the inputs of the processor, and `input_ids`, `attention_mask`, `labels` int64 `[B, P + C]`.

        Prompts are padded on the left and captions on the right, so that all captions start at the same place. A
        label is at the position of its token: these models shift them themselves.
        """
        return self._joined(self._prompt_inputs(images, retrieved), rows)

    def _joined(self, inputs: Batch, rows: Rows) -> Batch:
        """Return what `collate` does from what the processor made of images and prompt."""
        captions = self._padded(rows)
        of_captions = {
            "input_ids": captions.masked_fill(captions == IGNORE_INDEX, self.tokenizer.pad_token_id),
            "attention_mask": (captions != IGNORE_INDEX).long(),
            "token_type_ids": torch.full_like(captions, self.family.caption_type),
            "mm_token_type_ids": torch.zeros_like(captions),
        }
        labels = torch.cat([torch.full_like(inputs["input_ids"], IGNORE_INDEX), captions], dim=1)
        joined = {name: torch.cat([inputs[name], of_captions[name]], dim=1) for name in TOKEN_INPUTS if name in inputs}
        return joined | {name: value for name, value in inputs.items() if name not in joined} | {"labels": labels}

    def _padded(self, rows: Rows) -> torch.Tensor:
        """Return rows of tokens as `[B, C]`, padded by -100; C is 1 or more."""
        rows = [torch.tensor(row or [IGNORE_INDEX], dtype=torch.long) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)

    def _prompt_inputs(self, images: Sequence[Image.Image], retrieved: Sequence[Sequence[str]] = ()) -> Batch:
        """Return what the processor makes of B images and their prompts; each token input is `[B, P]`."""
        texts = [self._prompt_with(captions) for captions in retrieved] or [self.prompt_text] * len(images)
        images, options = [[image.convert("RGB")] for image in images], {"padding": True, "padding_side": "left"}
        ours = self.prompt_arguments | {"text": texts}
        inputs = self.processor(images=images, **ours, **options, return_tensors="pt")
        unasked = {"labels"} if self.family.has_token_types else {"labels", "token_type_ids"}
        return {name: value for name, value in inputs.items() if name not in unasked}

    def _prompt_with(self, captions: Sequence[str]) -> str:
        """Return the prompt with captions of similar images, before the image: what follows it is as in any row."""
        if not captions:
            return self.prompt_text
        place = self.prompt_text.index(self.family.image_start)
        lines = RETRIEVED.format("\n".join(f"- {self._quoted(caption)}" for caption in captions))
        return self.prompt_text[:place] + lines + self.prompt_text[place:]

    def _quoted(self, caption: str) -> str:
        """Return a caption as one line of `RETRIEVED_TOKENS` at most, without what would be read as special tokens."""
        text = " ".join(self._special_tokens.sub(" ", caption).split())
        tokens = self._tokens([text])[0]
        if len(tokens) <= RETRIEVED_TOKENS:
            return text
        return self.tokenizer.decode(tokens[:RETRIEVED_TOKENS]).rstrip("\ufffd").strip()  # a part of a character

    def _without_captions(self, batch: Batch) -> Batch:
        """Return a batch of `collate` without its captions: copies, since `generate` may write into them (T10)."""
        number = self._num_prompt_tokens(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return {name: (value[:, :number] if name in TOKEN_INPUTS else value).clone() for name, value in inputs.items()}

    # --- Training ---------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: Batch) -> CausalLMOutput:
        """See `Captioner.forward`; `logits` `[B, C, V]` are those of the captions alone.

        With a vocabulary of 150,000 or more, logits of the prompt would take more memory than all the rest.
        """
        logits = self._caption_logits(model, batch)
        labels = batch["labels"][:, -logits.shape[1] :]
        scale = {"ignore_index": IGNORE_INDEX, "label_smoothing": self.label_smoothing}
        return CausalLMOutput(F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), **scale), logits)

    def _caption_logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits `[B, C, V]` that predict the tokens of the captions."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        length = batch["labels"].shape[1] - self._num_prompt_tokens(batch)
        if self.takes_logits_to_keep:
            inputs["logits_to_keep"] = length + 1
        return model(**inputs, use_cache=False).logits[:, -length - 1 : -1]

    def nll_of_captions(self, model: nn.Module, batch: Batch, rows: Rows) -> torch.Tensor:
        """See `Captioner.nll_of_captions`; an image is encoded once for each of its captions."""
        copies, device = len(rows) // len(batch["labels"]), batch["labels"].device
        prompts = {name: value.cpu() for name, value in self._without_captions(batch).items()}
        prompts = {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in prompts.items()}
        batch = {name: value.to(device) for name, value in self._joined(prompts, rows).items()}
        return self._nll(self._caption_logits(model, batch), batch["labels"])

    def _num_prompt_tokens(self, batch: Batch) -> int:
        """Return P, which depends on the size of the images."""
        if self._image_token_id is None:
            return self.prompt_length
        return int((batch["input_ids"][0] == self._image_token_id).nonzero()[-1]) + 1 + self._length_after_image

    # --- Evaluation -------------------------------------------------------------------------------------------

    def encode_images(self, batch: Batch) -> EncodedBatch:
        """Return the batch: stock passes images and tokens through the model at once."""
        return EncodedBatch(batch)

    def caption_nll(self, encoded: EncodedBatch, batch: Batch) -> torch.Tensor:
        """See `Captioner.caption_nll`."""
        with self.watch_features(encoded.batch, encoded.features.append):
            logits = self._caption_logits(self.model, batch)
        return self._nll(logits, batch["labels"])

    def _nll(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels[:, -logits.shape[1] :]
        return sum_nll(logits[labels != IGNORE_INDEX], labels)

    @torch.no_grad()
    def generate(self, encoded: EncodedBatch, config: GenerationConfig, *processors: LogitsProcessor) -> torch.Tensor:
        """Generate by stock `generate` from images and prompt."""
        inputs, config = self._without_captions(encoded.batch), self._with_special_tokens(config)
        generated = self.model.generate(**inputs, generation_config=config, logits_processor=list(processors))
        return generated[:, self._num_prompt_tokens(encoded.batch) :]

    def image_features(self, encoded: EncodedBatch) -> torch.Tensor:
        """Return the mean of the embeddings of each image as they enter the language model."""
        if not encoded.features:

            def stop(features: torch.Tensor) -> None:
                encoded.features.append(features)
                raise _SeenEnough

            with suppress(_SeenEnough), self.watch_features(encoded.batch, stop):
                self._caption_logits(self.model, encoded.batch)
        return encoded.features[-1]

    def watch_features(self, batch: Batch, keep: Callable[[torch.Tensor], None]) -> AbstractContextManager[Any]:
        """See `Captioner.watch_features`."""
        if self._image_token_id is None:  # the image is not among the tokens

            def pool(module: nn.Module, args: tuple, outputs: ModelOutput) -> None:
                keep(outputs.last_hidden_state.float().mean(dim=1))

            return self.vision_model.register_forward_hook(pool)
        is_image = (batch["input_ids"] == self._image_token_id).unsqueeze(-1)

        def pool_inputs(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
            embeds = inputs["inputs_embeds"][:, : is_image.shape[1]].float()
            keep((embeds * is_image).sum(dim=1) / is_image.sum(dim=1))

        return self.text_model.register_forward_pre_hook(pool_inputs, with_kwargs=True)


class EncoderDecoderCaptioner(ImageTextToTextCaptioner):
    """An encoder reads image and prompt, a decoder writes the caption; labels are not shifted."""

    def set_prompt(self, prompt: str | None) -> None:
        """See `Captioner.set_prompt`; it is read by the encoder, where that reads text."""
        self.prompt = ""
        if self.family.takes_prompt:
            super().set_prompt(prompt)
        elif prompt:
            raise UserError(f"a {self.config.model_type} takes no prompt; leave out --prompt")
        self.prompt_length, self._last_word = 1, ""  # the decoder begins with its start token

    def _prompt_inputs(self, images: Sequence[Image.Image], retrieved: Sequence[Sequence[str]] = ()) -> Batch:
        if self.family.takes_prompt:
            return super()._prompt_inputs(images)
        images = [image.convert("RGB") for image in images]
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}

    def _joined(self, inputs: Batch, rows: Rows) -> Batch:
        return inputs | {"labels": self._padded(rows)}

    def _without_captions(self, batch: Batch) -> Batch:
        return {name: value.clone() for name, value in batch.items() if name != "labels"}

    def _num_prompt_tokens(self, batch: Batch) -> int:
        return 1  # of what is generated: the start token of the decoder

    def _caption_logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(**batch, use_cache=False).logits  # stock makes the inputs of the decoder of the labels


def _match_ids(config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Set the ids that an old config lacks, without which the model would not find the image, or not start."""
    tokenizer = processor.tokenizer
    if getattr(config, "image_token_id", 0) is None:
        config.image_token_id = tokenizer.convert_tokens_to_ids(str(processor.image_token))
    if hasattr(config, "decoder"):
        start = getattr(config.decoder, "bos_token_id", None) or tokenizer.bos_token_id or tokenizer.cls_token_id
        for name, value in {"decoder_start_token_id": start, "pad_token_id": tokenizer.pad_token_id}.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
