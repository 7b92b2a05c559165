"""Tiny checkpoints of other families, built here as stock transformers would save them.

`save_tiny(family, folder)` writes one. Weights are random and large, so that an untrained model has opinions.
"""

from pathlib import Path

import torch
from helpers import make_captions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip_2.processing_blip_2 import Blip2Processor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.git.processing_git import GitProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.instructblip.processing_instructblip import InstructBlipProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning.models.processor import build_processor


SIDE = {"height": 32, "width": 32}
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)
CHAT = "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{% if part.type == 'image' %}{{ '%s' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of captions; `special` are its tokens by attribute, such as `image_token`."""
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = [*named.values(), *special.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(make_captions(20), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=special, **named)


def _language(tokenizer: PreTrainedTokenizerFast, model_type: str, **more) -> dict:
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, vocab_size=len(tokenizer))
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return (
        dict(model_type=model_type, max_position_embeddings=512, head_dim=8, initializer_range=0.2)
        | shape
        | ids
        | more
    )


def _opt(tokenizer, dropout=0.0) -> dict:
    return dict(
        model_type="opt", vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, dropout=dropout,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def _t5(tokenizer) -> dict:
    return dict(
        model_type="t5", vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


def _blip2(text, kind="blip-2"):
    qformer = dict(
        vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        encoder_hidden_size=32, cross_attention_frequency=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    tokenizer, images = make_tokenizer(), BlipImageProcessorPil(size=SIDE)
    processor = Blip2Processor(images, tokenizer, num_query_tokens=4)
    if kind == "instructblip":
        processor = InstructBlipProcessor(images, tokenizer, make_tokenizer(), num_query_tokens=4)
        qformer["vocab_size"] = len(processor.qformer_tokenizer)
    vision = VISION | {"initializer_range": 0.2, "qkv_bias": True}
    config = dict(num_query_tokens=4, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    config |= dict(vision_config=vision, qformer_config=qformer, text_config=text(tokenizer), initializer_range=0.2)
    return config, processor


def _llava():
    tokenizer = make_tokenizer(image_token="<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 32, "initializer_factor": 10.0}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = dict(text_config=_language(tokenizer, "llama"), vision_config=vision, image_token_index=image)
    return config | dict(vision_feature_layer=-2, vision_feature_select_strategy="default"), processor


def _llava_onevision():
    tokenizer = make_tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32]]
    images = LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=pinpoints)
    processor = build_processor(
        LlavaOnevisionProcessor, image_processor=images, tokenizer=tokenizer, num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9", chat_template=CHAT.replace("%s", "<image>"),
    )  # fmt: skip
    vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    ids = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video")}
    config = dict(text_config=_language(tokenizer, "qwen2"), vision_config=vision, image_grid_pinpoints=pinpoints)
    return config | ids | dict(vision_aspect_ratio="anyres_max_9", vision_feature_select_strategy="full"), processor


def _qwen(number):
    special = {f"{name}_token": f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    special = {
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    tokenizer = make_tokenizer(**special)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    patch = 14 if number == 2 else 16
    images = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
    template = CHAT.replace("%s", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = build_processor(
        Qwen2_5_VLProcessor if number == 2 else Qwen3VLProcessor,
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=template,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        patch_size=patch,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=32,
        initializer_range=0.2,
    )
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    if number == 3:
        rope["mrope_interleaved"] = True
        vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        text = _language(tokenizer, "qwen3_vl_text", rope_parameters=rope)
    else:
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
        text = _language(tokenizer, "qwen2_5_vl_text", rope_parameters=rope)
    return dict(text_config=text, vision_config=vision, **ids), processor


def _gemma3():
    tokenizer = make_tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    images = Gemma3ImageProcessorPil(size=SIDE)
    processor = Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template="{{ bos_token }}" + CHAT.replace("%s", "<start_of_image>")
    )
    vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    text = _language(tokenizer, "gemma3_text", sliding_window=64)
    names = {
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return dict(text_config=text, vision_config=vision, mm_tokens_per_image=4, initializer_range=0.2, **ids), processor


def _paligemma():
    tokenizer = make_tokenizer(image_token="<image>")
    images = SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32}
    text = _language(tokenizer, "gemma", num_image_tokens=16)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return dict(
        text_config=text, vision_config=vision, image_token_index=image, projection_dim=32, hidden_size=32
    ), processor


def _idefics(kind):
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    rows = {f"row_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}
    tokenizer = make_tokenizer(**special | rows)
    images_of, processor_of = (
        (Idefics3ImageProcessorPil, Idefics3Processor)
        if kind == "idefics3"
        else (SmolVLMImageProcessorPil, SmolVLMProcessor)
    )
    images = images_of(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = build_processor(
        processor_of,
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHAT.replace("%s", "<image>"),
    )
    vision = VISION | {"model_type": "idefics3_vision" if kind == "idefics3" else "smolvlm_vision"}
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = _language(tokenizer, "llama")
    return dict(
        text_config=text, vision_config=vision, image_token_id=image, scale_factor=2, pad_token_id=0
    ), processor


def _git():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    processor = GitProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE), tokenizer)
    text = _language(tokenizer, "git", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    del text["model_type"], text["head_dim"], text["num_key_value_heads"]
    return dict(
        vision_config=VISION | {"projection_dim": 32, "initializer_factor": 10.0},
        num_image_with_embedding=None,
        **text,
    ), processor


def _vit_gpt2():
    tokenizer = make_tokenizer()
    processor = VisionTextDualEncoderProcessor(ViTImageProcessorPil(size=SIDE), tokenizer)
    encoder = VISION | dict(
        model_type="vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2
    )
    decoder = dict(
        model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=len(tokenizer), is_decoder=True,
        add_cross_attention=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return dict(encoder=encoder, decoder=decoder, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2), processor


# By a name for messages: the `model_type`, and what makes config and processor
FAMILIES = {
    "blip-2-opt": ("blip-2", lambda: _blip2(_opt)),
    "blip-2-t5": ("blip-2", lambda: _blip2(_t5)),
    "instructblip": ("instructblip", lambda: _blip2(_opt, "instructblip")),
    "llava": ("llava", _llava),
    "llava_onevision": ("llava_onevision", _llava_onevision),
    "qwen2_5_vl": ("qwen2_5_vl", lambda: _qwen(2)),
    "qwen3_vl": ("qwen3_vl", lambda: _qwen(3)),
    "gemma3": ("gemma3", _gemma3),
    "paligemma": ("paligemma", _paligemma),
    "idefics3": ("idefics3", lambda: _idefics("idefics3")),
    "smolvlm": ("smolvlm", lambda: _idefics("smolvlm")),
    "git": ("git", _git),
    "vit-gpt2": ("vision-encoder-decoder", _vit_gpt2),
}


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint of a family: weights, config, processor, as a stock script would save them."""
    model_type, build = FAMILIES[family]
    values, processor = build()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **values)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # what is 0 at first, such as query tokens, a projection, and gates
        for value in model.parameters():
            if not value.any() and value.dim() > 1:
                value.normal_(std=0.2)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
