"""Tiny checkpoints of other families than BLIP, built here as stock transformers would save them.

`save_tiny(family, folder)` writes one. Weights are random and large, so that an untrained model has opinions, and
nothing drops out, so that results can be compared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import make_captions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Blip2Processor,
    CLIPConfig,
    Gemma3Processor,
    GenerationConfig,
    GitProcessor,
    Idefics3Processor,
    InstructBlipProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    ResNetConfig,
    SmolVLMProcessor,
    VisionTextDualEncoderProcessor,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

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
    tokenizer, images = make_tokenizer(), BlipImageProcessorPil(size=SIDE)
    if instructed:
        processor = InstructBlipProcessor(images, tokenizer, make_tokenizer(), num_query_tokens=4)
    else:
        processor = Blip2Processor(images, tokenizer, num_query_tokens=4)
    qformer = (
        SHAPE
        | NO_DROPOUT
        | dict(vocab_size=420, encoder_hidden_size=32, cross_attention_frequency=1, initializer_range=0.2)
    )
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
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**CROP), tokenizer, patch_size=8, num_additional_image_tokens=1, **shared
    )
    config = dict(text_config=_language(tokenizer, "llama"), vision_config=CLIP, vision_feature_layer=-2, **shared)
    return config | _ids(tokenizer, image_token_index="<image>"), processor


def _llava_onevision() -> Built:
    tokenizer = make_tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32]]
    shared = dict(vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9")
    processor = build_processor(
        LlavaOnevisionProcessor,
        image_processor=LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=CHAT.replace("IMAGE", "<image>"),
        **shared,
    )
    config = dict(text_config=_language(tokenizer, "qwen2"), vision_config=SIGLIP, image_grid_pinpoints=pinpoints)
    return config | shared | _ids(tokenizer, image_token_index="<image>", video_token_index="<video>"), processor


def _qwen(kind: type[ProcessorMixin], model_type: str, patch_size: int, vision: dict, rope: dict) -> Built:
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    names |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokenizer = make_tokenizer(**{f"{name}_token": token for name, token in names.items()})
    area = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor = build_processor(
        kind,
        image_processor=Qwen2VLImageProcessorPil(patch_size=patch_size, size=area),
        tokenizer=tokenizer,
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    vision |= dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=64, out_hidden_size=32)
    vision |= dict(patch_size=patch_size, spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.2)
    rope |= dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    text = _language(tokenizer, f"{model_type}_text", rope_parameters=rope)
    ids = _ids(tokenizer, **{f"{name}_token_id": token for name, token in names.items()})
    return dict(text_config=text, vision_config=vision) | ids, processor


def _gemma3() -> Built:
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer(**special)
    template = "{{ bos_token }}" + CHAT.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=SIDE), tokenizer, template, image_seq_length=4)
    text = _language(tokenizer, "gemma3_text", sliding_window=64)
    ids = _ids(tokenizer, **{f"{name}_index": token for name, token in special.items()})
    return dict(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4) | ids, processor


def _paligemma() -> Built:
    tokenizer, images = make_tokenizer(image_token="<image>"), SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    text = _language(tokenizer, "gemma", num_image_tokens=16)
    config = dict(text_config=text, vision_config=SIGLIP, projection_dim=32, hidden_size=32)
    return config | _ids(tokenizer, image_token_index="<image>"), processor


def _idefics(kind: type[ProcessorMixin], images: Callable, vision_type: str) -> Built:
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
    config = dict(text_config=_language(tokenizer, "llama"), vision_config=VISION | {"model_type": vision_type})
    return config | dict(scale_factor=2, pad_token_id=0) | _ids(tokenizer, image_token_id="<image>"), processor


def _git() -> Built:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    text = SHAPE | NO_DROPOUT | IDS | dict(vocab_size=len(tokenizer), max_position_embeddings=512)
    vision = VISION | dict(projection_dim=32, initializer_factor=10.0)
    config = dict(vision_config=vision, num_image_with_embedding=None, initializer_range=0.2)
    return config | text, GitProcessor(CLIPImageProcessorPil(**CROP), tokenizer)


def _vit_gpt2() -> Built:
    tokenizer = make_tokenizer()
    shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    decoder = shape | dict(model_type="gpt2", vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True)
    decoder |= dict(initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    config = dict(encoder=VISION | NO_DROPOUT | dict(model_type="vit"), decoder=decoder)
    config |= dict(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    return config, VisionTextDualEncoderProcessor(ViTImageProcessorPil(size=SIDE), tokenizer)


# By a name for messages: the `model_type`, and what makes config and processor
FAMILIES: dict[str, tuple[str, Callable[[], Built]]] = {
    "blip-2-opt": ("blip-2", lambda: _blip2(_opt)),
    "blip-2-t5": ("blip-2", lambda: _blip2(_t5)),
    "instructblip": ("instructblip", lambda: _blip2(_opt, instructed=True)),
    "llava": ("llava", _llava),
    "llava_onevision": ("llava_onevision", _llava_onevision),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        lambda: _qwen(Qwen2_5_VLProcessor, "qwen2_5_vl", 14, dict(window_size=56, fullatt_block_indexes=[1]), {}),
    ),
    "qwen3_vl": (
        "qwen3_vl",
        lambda: _qwen(
            Qwen3VLProcessor,
            "qwen3_vl",
            16,
            dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            dict(mrope_interleaved=True),
        ),
    ),
    "gemma3": ("gemma3", _gemma3),
    "paligemma": ("paligemma", _paligemma),
    "idefics3": ("idefics3", lambda: _idefics(Idefics3Processor, Idefics3ImageProcessorPil, "idefics3_vision")),
    "smolvlm": ("smolvlm", lambda: _idefics(SmolVLMProcessor, SmolVLMImageProcessorPil, "smolvlm_vision")),
    "git": ("git", _git),
    "vit-gpt2": ("vision-encoder-decoder", _vit_gpt2),
}


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint of a family: weights, config, processor."""
    model_type, build = FAMILIES[family]
    values, processor = build()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():  # what is 0 at first: query tokens, and projections
        for value in model.parameters():
            if not value.any() and value.dim() > 1:
                value.normal_(std=0.2)
    model.generation_config = GenerationConfig(**IDS)
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


# --- Retrievers -----------------------------------------------------------------------------------------------

PIXELS = dict(image_size=32, patch_size=8)
RETRIEVERS = {
    "vit": ViTConfig(**SHAPE, **PIXELS),
    "clip": CLIPConfig(vision_config=SHAPE | PIXELS, text_config=SHAPE, projection_dim=16),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1]),
}


def save_vision_model(folder: Path, kind: str = "vit", seed: int = 0) -> str:
    """Write a tiny vision model with its image processor."""
    torch.manual_seed(seed)
    AutoModel.from_config(RETRIEVERS[kind]).save_pretrained(folder)
    images = CLIPImageProcessorPil(**CROP) if kind == "clip" else ViTImageProcessorPil(size=SIDE)
    images.save_pretrained(folder)
    return str(folder)
