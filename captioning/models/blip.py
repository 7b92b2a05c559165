"""Load BLIP from the Hub or a folder, or build one from a config; encode images, score and generate captions.

Weights on disk stay plain BLIP: stock `BlipForConditionalGeneration` and `BlipProcessor` load what is saved.
"""

import functools
import logging
import math
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioning.errors import UserError, as_user_error
from captioning.files import PROJECT
from captioning.models.fast_blip.decoding import CrossAttention, caption_hidden_states, project_images
from captioning.models.fast_blip.modules import has_shipped_layers, is_fast
from captioning.models.fast_blip.packed_weights import caption_layers, packed_weights
from captioning.models.tokenizer import load_tokenizer


logger = logging.getLogger(__name__)

EXAMPLE_CHECKPOINT = "Salesforce/blip-image-captioning-base"
# BLIP starts its position embedding as small as a weight, below a tenth of the patch embeddings that it is added to:
# a model trained from nothing finds out late where in the image a thing is. Without this factor the quickstart ends
# with side right in .83 and place right in .45 of the test captions, at 94 % of the oracle's ROUGE-L.
POSITION_SCALE = 10
# Images that a CPU encodes at a time without gradients: activations of more than these leave its caches, and the
# allocator hands back and clears their memory again and again. Measured at BLIP-base: 2 to 4 images are 1.35 times as
# fast as 16, see benchmarks/README.md
CPU_IMAGES = 4
MAX_PARAMETERS = 2**31  # of each half of a model, 8 GB; BLIP-large has 470 million in both
MAX_LAYERS = 1000


# --- Load and build -------------------------------------------------------------------------------------------


def load_blip(name: str, revision: str | None = None) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """Load a captioning checkpoint and its processor from the Hub or a folder, in float32.

    The image processor is the PIL one whatever is installed: torchvision resizes to other pixels, which gives
    other scores (T11).

    Raises:
        UserError: there is no such checkpoint, or it is not one of `BlipForConditionalGeneration`.
    """
    with as_user_error(f"model '{name}' cannot be loaded", "give a folder of a saved BLIP or a Hub id"):
        model_type = BlipConfig.get_config_dict(name, revision=revision)[0].get("model_type")
        if model_type != "blip":
            raise UserError(f"model '{name}' is no BLIP but {model_type}; give one such as {EXAMPLE_CHECKPOINT}")
        _check_size(BlipConfig.from_pretrained(name, revision=revision), name)
        # float32: a checkpoint saved in half precision would otherwise be trained in it
        model, loading = BlipForConditionalGeneration.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        image_processor = BlipImageProcessorPil.from_pretrained(name, revision=revision)
    side = model.config.vision_config.image_size
    if image_processor.size != {"height": side, "width": side}:
        # The position embedding decides: the model cannot take images of another size
        logger.warning("The processor of '%s' is for %s; images are made %d pixels", name, image_processor.size, side)
        image_processor.size = {"height": side, "width": side}
    tokenizer = load_tokenizer(name, revision)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise UserError(
            f"model '{name}': its tokenizer has {len(tokenizer)} entries, its embedding "
            f"{model.config.text_config.vocab_size}; give the tokenizer that it was trained with"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model '{name}' lacks {len(missing)} weights of a captioning BLIP ('{missing[0]}', ...); "
            f"give a BlipForConditionalGeneration checkpoint such as {EXAMPLE_CHECKPOINT}"
        )
    return model, BlipProcessor(image_processor, _match_special_tokens(tokenizer, model.config))


def _check_size(config: BlipConfig, name: str) -> None:
    """Raise UserError if a config describes more than `MAX_PARAMETERS`, before any of them is made."""
    for part in (config.text_config, config.vision_config):
        sizes = [part.num_hidden_layers, part.hidden_size, part.intermediate_size]
        layers, width, inner = (int(size) for size in sizes)
        words = getattr(part, "vocab_size", 0) + getattr(part, "max_position_embeddings", 0)
        patches = (getattr(part, "image_size", 0) // max(getattr(part, "patch_size", 1), 1)) ** 2
        number = layers * width * (4 * width + 2 * inner) + width * (words + patches)
        if layers > MAX_LAYERS or number > MAX_PARAMETERS:
            raise UserError(
                f"config of '{name}': {layers:,} layers of {width:,} are more than {MAX_LAYERS:,} layers or "
                f"{MAX_PARAMETERS:,} weights; lower them, recipes/configs/ has examples"
            )


def build_blip(
    config_name: str, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """Build a BLIP with random weights from a `BlipConfig` JSON file, folder or Hub id, in evaluation mode.

    Vocabulary size and special tokens come from `tokenizer`, which must hold `[DEC]` as its `bos_token`.

    Raises:
        UserError: the config cannot be read, or describes no model.
    """
    path = config_name if os.path.exists(config_name) else PROJECT / config_name
    with as_user_error(f"config '{config_name}' cannot be loaded", "recipes/configs/ has examples"):
        path = path if os.path.exists(path) else config_name
        given = BlipConfig.get_config_dict(path)[0]
        if given.get("model_type", "blip") != "blip" or not given.keys() & {"text_config", "vision_config"}:
            # Stock would build what its defaults say
            raise UserError(f"config '{config_name}' describes no BLIP; recipes/configs/ has examples")
        config = BlipConfig.from_pretrained(path)
        _check_size(config, config_name)
    if config.vision_config.initializer_range < 1e-4:
        # The default of BlipVisionConfig is 1e-10: harmless when weights are loaded, a dead encoder when not
        config.vision_config.initializer_range = config.initializer_range
    text = config.text_config
    text.vocab_size = len(tokenizer)
    text.bos_token_id = tokenizer.bos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    text.sep_token_id = text.eos_token_id = tokenizer.sep_token_id
    torch.manual_seed(seed)
    with as_user_error(f"config '{config_name}' builds no model", "recipes/configs/ has examples"):
        model = BlipForConditionalGeneration(config).eval()  # as `from_pretrained` leaves it
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding *= POSITION_SCALE
    side = config.vision_config.image_size
    image_processor = BlipImageProcessorPil(size={"height": side, "width": side})
    return model, BlipProcessor(image_processor, tokenizer)


def _match_special_tokens(tokenizer: PreTrainedTokenizerBase, config: BlipConfig) -> PreTrainedTokenizerBase:
    """Drop a start or end token of the tokenizer that is not the model's.

    The Trainer overwrites the ids of the text config with those of the tokenizer: a tokenizer that calls `[CLS]`
    its `bos_token` would move the start of generation away from the start of training (T3).
    """
    if tokenizer.bos_token_id != config.text_config.bos_token_id:
        tokenizer.bos_token = None
    if tokenizer.eos_token_id != config.text_config.sep_token_id:
        tokenizer.eos_token = None
    return tokenizer


# --- Adapt to the run -----------------------------------------------------------------------------------------


def check_lengths(model: BlipForConditionalGeneration, max_caption_length: int, start_length: int, new_tokens: int):
    """Raise UserError if a caption in training or generation would outgrow the model's position embeddings."""
    positions = model.config.text_config.max_position_embeddings
    if max_caption_length > positions:
        raise UserError(
            f"max_caption_length {max_caption_length} exceeds the model's {positions} text positions; "
            f"set --max_caption_length to {positions} or less"
        )
    if start_length + new_tokens > positions:
        room = positions - start_length
        mend = f"set --max_new_tokens to {room} or less" if room > 0 else "shorten --prompt"
        raise UserError(
            f"max_new_tokens {new_tokens} after {start_length} start and prompt tokens exceeds the model's "
            f"{positions} text positions; {mend}"
        )


def resize_images(model: BlipForConditionalGeneration, processor: BlipProcessor, image_size: int) -> None:
    """Make model and processor take square images of another side, by interpolating the position embedding.

    Done once in the weights, with the model's own bicubic interpolation, instead of in every `forward`: so the
    saved model is plain BLIP at its new size and nobody needs `interpolate_pos_encoding=True`.

    Raises:
        UserError: `image_size` (pixels) is no multiple of the patch size.
    """
    vision = model.config.vision_config
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise UserError(
            f"image_size {image_size} is not a multiple of the model's patch size {vision.patch_size}; "
            f"set --image_size to {max(1, round(image_size / vision.patch_size)) * vision.patch_size}"
        )
    embeddings = model.vision_model.embeddings
    num_patches = (image_size // vision.patch_size) ** 2
    if num_patches != embeddings.num_patches:
        tokens = torch.empty(1, 1 + num_patches, embeddings.embed_dim)  # only its shape is read
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
        embeddings.position_embedding = nn.Parameter(positions.detach().clone())
        embeddings.num_patches, embeddings.num_positions = num_patches, 1 + num_patches
    embeddings.image_size = vision.image_size = image_size
    processor.image_processor.size = {"height": image_size, "width": image_size}


def set_label_smoothing(model: BlipForConditionalGeneration, label_smoothing: float) -> None:
    """Set the smoothing of the training loss where BLIP keeps it (T5); the evaluation loss never has any."""
    model.config.text_config.label_smoothing = model.text_decoder.label_smoothing = label_smoothing


def set_decoding(model: BlipForConditionalGeneration, settings: dict[str, Any]) -> None:
    """Write the decode settings where a stranger, and stock `generate`, find them in the saved model.

    `generation_config.json` has all of them, but stock BLIP generates by its text decoder, whose own settings are
    made from the text config when the model is loaded (T7). Loading drops `num_beams` and the other old generation
    parameters from a config (transformers 5.23.0, `PreTrainedConfig.__init__`) and leaves the numbers of new tokens:
    so a greedy search can be made what `model.generate(pixel_values=...)` does, a beam search cannot.
    """
    text = model.config.text_config
    plain = plain_generate_suffices(settings)
    for name in ("max_new_tokens", "min_new_tokens"):
        vars(text).pop(name, None)  # those of an earlier fine-tune
        if plain and name in settings:
            setattr(text, name, settings[name])
    model.text_decoder.generation_config = GenerationConfig.from_model_config(text)
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id, **settings
    )


def plain_generate_suffices(settings: dict[str, Any]) -> bool:
    """Tell whether a saved model decodes by these settings without being handed them: see `set_decoding`."""
    return settings["num_beams"] == 1 and not settings.get("no_repeat_ngram_size")


def tell_other_decoding(model: BlipForConditionalGeneration, settings: dict[str, Any]) -> None:
    """Log where the settings that a checkpoint was evaluated with, by its own record, are not those of this run."""
    recorded = model.generation_config.to_dict()
    if not recorded.get("num_beams"):
        return
    unset = {
        "num_beams": 1,
        "max_new_tokens": 0,
        "min_new_tokens": 0,
        "no_repeat_ngram_size": 0,
        "length_penalty": 1.0,
    }
    for name, default in unset.items():
        was, now = recorded.get(name) or default, settings.get(name) or default
        if was != now:
            logger.warning(
                "The model's own scores are with %s %s, not %s; for them, --%s %s", name, was, now, name, was
            )


# --- Encode, score, generate ----------------------------------------------------------------------------------


def encode_images(model: BlipForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encode `pixel_values` `[B, 3, H, W]` into `image_embeds` `[B, P + 1, D]`."""
    whole = len(pixel_values)
    number = CPU_IMAGES if is_fast(model) and pixel_values.is_cpu and not torch.is_grad_enabled() else whole
    parts = [model.vision_model(pixel_values=part).last_hidden_state for part in pixel_values.split(number)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def packed_for_evaluation(model: BlipForConditionalGeneration) -> AbstractContextManager[None]:
    """Return a context in which a fast model on a CPU has its weights laid out for products without gradients.

    What captions pass gains everywhere; what hundreds of patches pass only on AMD's processors, where MKL, which
    computes plain layers, is slower than oneDNN: 2,308 x 768 x 3,072 at 164 GFLOP/s against 217 on an EPYC of 2 cores.
    """
    if not is_fast(model):
        return nullcontext()
    return packed_weights(model.modules() if _is_amd() else caption_layers(model.text_decoder))


@functools.cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in platform.processor() + Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()


def cross_attention_of(model: BlipForConditionalGeneration, image_embeds: torch.Tensor) -> CrossAttention | None:
    """Return what scoring and generation both need of `image_embeds` `[B, P + 1, D]`; None if stock does them."""
    if not is_fast(model) or not has_shipped_layers(model.text_decoder):
        return None
    return project_images(model.text_decoder, image_embeds)


def caption_logits(
    model: BlipForConditionalGeneration,
    image_embeds: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    is_label: torch.Tensor,
    cross_attention: CrossAttention | None = None,
) -> torch.Tensor:
    """Return the logits `[N, V]` from which the N labels of a batch are predicted, in their order.

    Args:
        model: the model.
        image_embeds: `[B, P + 1, D]`, from `encode_images`.
        input_ids: `[B, L]`, captions padded at their right.
        attention_mask: `[B, L]`, 0 on padding.
        is_label: bool `[B, L]`, true where N tokens in all are to be predicted; never at position 0.
        cross_attention: `cross_attention_of` the images.
    """
    before = is_label[:, 1:]  # position i predicts token i + 1
    if cross_attention is None:
        logits = model.text_decoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds, use_cache=False
        ).logits
        return logits[:, :-1][before]
    # A CPU takes one caption at a time, without padding. That is not slower than padding all, and the loss of a
    # caption is the same in every digit whichever captions share its batch: one process or several, any batch size
    number = 1 if input_ids.is_cpu else len(input_ids)
    logits = []
    for start in range(0, len(input_ids), number):
        few = slice(start, start + number)
        width = max(1, int(attention_mask[few].sum(dim=1).max())) if input_ids.is_cpu else input_ids.shape[1]
        images = [(keys[few], values[few]) for keys, values in cross_attention]
        found = caption_hidden_states(model.text_decoder, images, input_ids[few, :width])
        logits.append(model.text_decoder.cls(found[:, :-1][before[few, : width - 1]]))
    return torch.cat(logits)


def generate_captions(
    model: BlipForConditionalGeneration,
    image_embeds: torch.Tensor,
    start_ids: list[int],
    cross_attention: CrossAttention | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Generate captions as `BlipForConditionalGeneration.generate(pixel_values, prompt)` does, token for token.

    Args:
        model: the model.
        image_embeds: `[B, P + 1, D]`, from `encode_images`.
        start_ids: `[DEC]` and the tokens of the prompt, the same for every image; never a reference (T1).
        cross_attention: `cross_attention_of` the images, where it is there already. It is used up.
        settings: the decode settings, `num_beams` and so on.

    Returns:
        The new tokens `[B, T]`, without `start_ids`, padded behind `[SEP]`.
    """
    text = model.config.text_config
    # One tensor per call: `generate` may write into it (T10)
    input_ids = torch.tensor([start_ids], device=image_embeds.device).repeat(len(image_embeds), 1)
    if cross_attention is not None:
        settings["cross_attention"] = cross_attention
    generated = model.text_decoder.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        eos_token_id=text.sep_token_id,
        pad_token_id=text.pad_token_id,
        **settings,
    )
    return generated[:, len(start_ids) :]


def attention_maps(
    model: BlipForConditionalGeneration, image_embeds: torch.Tensor, start_ids: list[int], tokens: torch.Tensor
) -> torch.Tensor:
    """Return where the decoder looked as it wrote each token: its cross-attention over the patches of one image.

    Args:
        model: the model.
        image_embeds: `[1, P + 1, D]`, from `encode_images`.
        start_ids: `[DEC]` and the tokens of the prompt.
        tokens: `[T]`, what was generated after them.

    Returns:
        Float `[T, H, W]` on the grid of patches: attention weights, the mean over layers and heads, without that on
        the `[CLS]` embedding.
    """
    input_ids = torch.cat([torch.tensor(start_ids, device=tokens.device), tokens])[None, :-1]
    outputs = model.text_decoder(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        encoder_hidden_states=image_embeds,
        use_cache=False,
        output_attentions=True,
    )
    attention = torch.stack(outputs.cross_attentions).float().mean(dim=(0, 2))[0]
    side = math.isqrt(attention.shape[-1] - 1)
    # The position before a token is the one that wrote it
    return attention[len(start_ids) - 1 :, 1:].unflatten(-1, (side, side))
