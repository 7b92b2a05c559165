"""Tiny checkpoints of other families than BLIP, built here as stock transformers would save them.

`save_tiny(family, folder)` writes one. Weights are random and large, so that an untrained model has opinions, and
nothing drops out, so that results can be compared.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import make_captions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from captioning.models.processor import build_processor


Built = tuple[dict[str, Any], ProcessorMixin]

SIDE = {"height": 32, "width": 32}
CROP = {"size": {"shortest_edge": 32}, "crop_size": SIDE}
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
VISION = SHAPE | dict(image_size=32, patch_size=8, initializer_range=0.2)
CLIP = VISION | dict(model_type="clip_vision_model", projection_dim=32, initializer_factor=10.0)
SIGLIP = VISION | dict(model_type="siglip_vision_model", vision_use_head=False, projection_dim=32)
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
CHAT = (
    "{% for message in messages %}{{ message.role + ': ' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ 'IMAGE' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of captions; `special` are its tokens by attribute, such as `image_token`."""
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens, alphabet = [*named.values(), *special.values()], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(make_captions(20), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=special, **named)


def _language(tokenizer: PreTrainedTokenizerFast, model_type: str, **more) -> dict[str, Any]:
    more |= dict(model_type=model_type, vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2)
    return SHAPE | IDS | dict(num_key_value_heads=2, head_dim=8) | more


def _ids(tokenizer: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


# --- Families -------------------------------------------------------------------------------------------------


def _blip2(text: Callable[[PreTrainedTokenizerFast], dict[str, Any]], instructed: bool = False) -> Built:
    tokenizer, images = make_tokenizer(), transformers.BlipImageProcessorPil(size=SIDE)
    if instructed:
        processor = transformers.InstructBlipProcessor(images, tokenizer, make_tokenizer(), num_query_tokens=4)
    else:
        processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)
    qformer = dict(vocab_size=420, encoder_hidden_size=32, cross_attention_frequency=1, initializer_range=0.2)
    qformer |= SHAPE | NO_DROPOUT
    config = dict(vision_config=VISION, qformer_config=qformer, text_config=text(tokenizer))
    return config | dict(num_query_tokens=4) | _ids(tokenizer, image_token_index="<image>"), processor


def _opt(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    shape = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    more = dict(model_type="opt", vocab_size=len(tokenizer), max_position_embeddings=128, dropout=0.0, init_std=0.2)
    return shape | more | IDS


def _t5(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    shape = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return shape | dict(model_type="t5", vocab_size=len(tokenizer), decoder_start_token_id=0) | IDS


def _llava() -> Built:
    tokenizer = make_tokenizer(image_token="<image>")
    shared = dict(vision_feature_select_strategy="default")
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**CROP), tokenizer, patch_size=8, num_additional_image_tokens=1, **shared
    )
    config = dict(text_config=_language(tokenizer, "llama"), vision_config=CLIP, vision_feature_layer=-2, **shared)
    return config | _ids(tokenizer, image_token_index="<image>"), processor


def _llava_onevision() -> Built:
    tokenizer = make_tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32]]
    shared = dict(vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9")
    processor = build_processor(
        transformers.LlavaOnevisionProcessor,
        image_processor=transformers.LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=CHAT.replace("IMAGE", "<image>"),
        **shared,
    )
    config = dict(text_config=_language(tokenizer, "qwen2"), vision_config=SIGLIP, image_grid_pinpoints=pinpoints)
    return config | shared | _ids(tokenizer, image_token_index="<image>", video_token_index="<video>"), processor


def _qwen(kind: type[ProcessorMixin], model_type: str, patch_size: int, rope: dict, **vision) -> Built:
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    names |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokenizer = make_tokenizer(**{f"{name}_token": token for name, token in names.items()})
    area = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor = build_processor(
        kind,
        image_processor=transformers.Qwen2VLImageProcessorPil(patch_size=patch_size, size=area),
        tokenizer=tokenizer,
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    vision |= dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=64, out_hidden_size=32)
    vision |= dict(patch_size=patch_size, spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.2)
    rope |= dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    text = _language(tokenizer, f"{model_type}_text", rope_parameters=rope)
    ids = _ids(tokenizer, **{f"{name}_token_id": token for name, token in names.items()})
    return dict(text_config=text, vision_config=vision) | ids, processor


def _qwen2_5_vl() -> Built:
    return _qwen(transformers.Qwen2_5_VLProcessor, "qwen2_5_vl", 14, {}, window_size=56, fullatt_block_indexes=[1])


def _qwen3_vl() -> Built:
    vision = dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return _qwen(transformers.Qwen3VLProcessor, "qwen3_vl", 16, dict(mrope_interleaved=True), **vision)


def _gemma3() -> Built:
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer(**special)
    template = "{{ bos_token }}" + CHAT.replace("IMAGE", "<start_of_image>")
    images = transformers.Gemma3ImageProcessorPil(size=SIDE)
    processor = transformers.Gemma3Processor(images, tokenizer, template, image_seq_length=4)
    text = _language(tokenizer, "gemma3_text", sliding_window=64)
    ids = _ids(tokenizer, **{f"{name}_index": token for name, token in special.items()})
    return dict(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4) | ids, processor


def _paligemma() -> Built:
    tokenizer, images = make_tokenizer(image_token="<image>"), transformers.SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    text = _language(tokenizer, "gemma", num_image_tokens=16)
    config = dict(text_config=text, vision_config=SIGLIP, projection_dim=32, hidden_size=32)
    return config | _ids(tokenizer, image_token_index="<image>"), processor


def _idefics(name: str) -> Built:
    kind, images = (getattr(transformers, name + part) for part in ("Processor", "ImageProcessorPil"))
    special = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    special |= {"image_token": "<image>", "end_of_utterance_token": "<end_of_utterance>"}
    rows = {f"row_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}
    tokenizer = make_tokenizer(**special | rows)
    processor = build_processor(
        kind,
        image_processor=images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    vision = VISION | dict(model_type=f"{name.lower()}_vision")
    config = dict(text_config=_language(tokenizer, "llama"), vision_config=vision, scale_factor=2, pad_token_id=0)
    return config | _ids(tokenizer, image_token_id="<image>"), processor


def _git() -> Built:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    text = SHAPE | NO_DROPOUT | IDS | dict(vocab_size=len(tokenizer), max_position_embeddings=512)
    vision = VISION | dict(projection_dim=32, initializer_factor=10.0)
    config = dict(vision_config=vision, num_image_with_embedding=None, initializer_range=0.2)
    return config | text, transformers.GitProcessor(transformers.CLIPImageProcessorPil(**CROP), tokenizer)


def _vit_gpt2() -> Built:
    tokenizer = make_tokenizer()
    shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    decoder = shape | dict(model_type="gpt2", vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True)
    decoder |= dict(initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    config = dict(encoder=VISION | NO_DROPOUT | dict(model_type="vit"), decoder=decoder)
    config |= dict(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    return config, transformers.VisionTextDualEncoderProcessor(transformers.ViTImageProcessorPil(size=SIDE), tokenizer)


# By a name for messages: the `model_type`, and what makes config and processor
FAMILIES: dict[str, tuple[str, Callable[[], Built]]] = {
    "blip-2-opt": ("blip-2", lambda: _blip2(_opt)),
    "blip-2-t5": ("blip-2", lambda: _blip2(_t5)),
    "instructblip": ("instructblip", lambda: _blip2(_opt, instructed=True)),
    "llava": ("llava", _llava),
    "llava_onevision": ("llava_onevision", _llava_onevision),
    "qwen2_5_vl": ("qwen2_5_vl", _qwen2_5_vl),
    "qwen3_vl": ("qwen3_vl", _qwen3_vl),
    "gemma3": ("gemma3", _gemma3),
    "paligemma": ("paligemma", _paligemma),
    "idefics3": ("idefics3", lambda: _idefics("Idefics3")),
    "smolvlm": ("smolvlm", lambda: _idefics("SmolVLM")),
    "git": ("git", _git),
    "vit-gpt2": ("vision-encoder-decoder", _vit_gpt2),
}


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint of a family: weights, config, processor."""
    model_type, build = FAMILIES[family]
    values, processor = build()
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # what is 0 at first: query tokens, and projections
        for value in model.parameters():
            if not value.any() and value.dim() > 1:
                value.normal_(std=0.2)
    model.generation_config = transformers.GenerationConfig(**IDS)
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


# --- Stock ----------------------------------------------------------------------------------------------------


def stock_inputs(captioner, image, text: str, ids: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """One image in the prompt `text` and, behind it, the tokens of a caption, as a short script would make them."""
    processor, image, kind = captioner.processor, image.convert("RGB"), captioner.config.model_type
    if kind == "vision-encoder-decoder":
        inputs = {"pixel_values": processor.image_processor(image, return_tensors="pt")["pixel_values"]}
    else:
        begins = {"add_special_tokens": False} if text.startswith("<s>") else {}
        inputs = dict(processor(images=[[image]], text=[text], **begins, return_tensors="pt"))
        for name in ("labels", *(["token_type_ids"] if kind not in ("gemma3", "paligemma") else [])):
            inputs.pop(name, None)
    new = torch.tensor([ids], dtype=torch.long)
    if captioner.config.is_encoder_decoder or not ids:
        return inputs | ({"labels": new} if ids else {})
    kinds = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": int(kind == "paligemma")}
    ends = {"input_ids": new} | {name: torch.full_like(new, value) for name, value in kinds.items() if name in inputs}
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), new], dim=1)
    return inputs | {name: torch.cat([inputs[name], end], dim=1) for name, end in ends.items()} | {"labels": labels}


def stock_tokens(captioner, model, image, text: str, **settings) -> torch.Tensor:
    """The new tokens of stock `generate`, int64 `[T]`."""
    inputs, pad = stock_inputs(captioner, image, text), captioner.tokenizer.pad_token_id
    tokens = model.generate(**inputs, eos_token_id=captioner.end_token_ids, pad_token_id=pad, **settings)
    return tokens[0, 1 if captioner.config.is_encoder_decoder else inputs["input_ids"].shape[1] :]


# --- Retrievers -----------------------------------------------------------------------------------------------

PIXELS = dict(image_size=32, patch_size=8)
RETRIEVERS = {
    "vit": transformers.ViTConfig(**SHAPE, **PIXELS),
    "clip": transformers.CLIPConfig(vision_config=SHAPE | PIXELS, text_config=SHAPE, projection_dim=16),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1]),
}


def save_vision_model(folder: Path, kind: str = "vit", seed: int = 0) -> str:
    """Write a tiny vision model with its image processor."""
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(RETRIEVERS[kind]).save_pretrained(folder)
    images = {"clip": transformers.CLIPImageProcessorPil(**CROP)}
    images.get(kind, transformers.ViTImageProcessorPil(size=SIDE)).save_pretrained(folder)
    return str(folder)
