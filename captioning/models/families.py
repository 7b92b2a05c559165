"""The families of `image_text_to_text.py`, by the `model_type` of their checkpoints: all in which they differ.

To add a family, add it to `FAMILIES`, a tiny model of it to `tests/families.py`, and its license to `docs/models.md`.
"""

from dataclasses import dataclass
from functools import partial

from captioning.models.card_facts import BY_DECODER, BY_MODEL, CardFacts


ASK = "Write a caption for this radiology image."


@dataclass(frozen=True)
class Family:
    """What stock transformers does not tell of a family."""

    citation: tuple[str, str, int, str]  # authors, title, year and arXiv id of its paper
    prompt: str = ASK  # what is asked where the user gives no `--prompt`
    # Of the whole prompt where the processor has no chat template: `image` is the token that stands for it, `start`
    # the tokenizer's `cls_token`
    template: str = "{image}{prompt}"
    end: str | None = None  # ends a caption if the tokenizer knows it; else the first at which the model stops
    caption_type: int = 0  # `token_type_ids` of a caption: 1 in PaliGemma, whose prompt is read in both directions
    has_token_types: bool = False  # whether the model takes `token_type_ids`, which some tokenizers return unasked
    image_size: str | None = None  # what `--image_size` sets: the "area" or "longest_edge" of an image; None: fixed
    vision: str | None = None  # path of the module that encodes images, if `get_encoder("image")` does not find it
    text: str | None = None  # path of the module that writes, if `get_decoder()` does not find it
    takes_prompt: bool = True
    image_start: str | None = None  # in the prompt, before it retrieved captions are written; None: it takes none
    generates_by_decoder: bool = False  # `generate` is that of an inner model, which ignores the outer settings (T7)

    def card_facts(self, model_type: str) -> CardFacts:
        """Return what the model card says of the family."""
        authors, title, year, arxiv = self.citation
        key = model_type.replace("-", "").replace("_", "") + str(year)
        return CardFacts(
            kind=f"{model_type} model",
            tags=(model_type,),
            transformers="5.23",
            license_note="The license of the weights that it started from applies to these, too: see docs/models.md.",
            citation=CITATION.format(key=key, title=title, authors=authors, year=year, arxiv=arxiv),
            plain_generate=BY_DECODER if self.generates_by_decoder else BY_MODEL,
        )


QWEN = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
QwenVL = partial(Family, template=QWEN, image_size="area", image_start="<|vision_start|>")
Idefics = partial(
    Family,
    template="User:{image}{prompt}<end_of_utterance>\nAssistant:",
    end="<end_of_utterance>",
    image_size="longest_edge",
    image_start="<image>",
)
FAMILIES = {
    "blip-2": Family(
        ("Li and others", "BLIP-2: Bootstrapping Language-Image Pre-training", 2023, "2301.12597"),
        prompt="",
        template="{prompt}",  # the processor puts the image before it
        generates_by_decoder=True,
    ),
    "instructblip": Family(
        ("Dai and others", "InstructBLIP: Towards General-purpose Vision-Language Models", 2023, "2305.06500"),
        template="{prompt}",
        generates_by_decoder=True,
    ),
    "llava": Family(
        ("Liu and others", "Visual Instruction Tuning", 2023, "2304.08485"),
        template="USER: {image}\n{prompt} ASSISTANT:",
        image_start="<image>",
    ),
    "llava_onevision": Family(
        ("Li and others", "LLaVA-OneVision: Easy Visual Task Transfer", 2024, "2408.03326"),
        template=QWEN,
        image_start="<image>",
    ),
    "qwen2_5_vl": QwenVL(("Bai and others", "Qwen2.5-VL Technical Report", 2025, "2502.13923")),
    "qwen3_vl": QwenVL(("Bai and others", "Qwen3-VL Technical Report", 2025, "2511.21631")),
    "gemma3": Family(
        ("Gemma Team", "Gemma 3 Technical Report", 2025, "2503.19786"),
        template="<start_of_turn>user\n{image}{prompt}<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        has_token_types=True,
        image_start="<start_of_image>",
    ),
    "paligemma": Family(
        ("Beyer and others", "PaliGemma: A versatile 3B VLM for transfer", 2024, "2407.07726"),
        prompt="caption en",  # what it was pretrained with
        has_token_types=True,
        caption_type=1,
    ),
    "idefics3": Idefics(
        ("Laurençon and others", "Building and better understanding vision-language models", 2024, "2408.12637")
    ),
    "smolvlm": Idefics(
        ("Marafioti and others", "SmolVLM: Redefining small and efficient multimodal models", 2025, "2504.05299")
    ),
    "git": Family(
        ("Wang and others", "GIT: A Generative Image-to-text Transformer", 2022, "2205.14100"),
        prompt="",
        template="{start}{prompt}",
        vision="git.image_encoder",
        text="git.encoder",
    ),
    "vision-encoder-decoder": Family(
        ("Rothe and others", "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks", 2019, "1907.12461"),
        prompt="",
        vision="encoder",
        takes_prompt=False,
    ),
}


CITATION = """@misc{{{key},
  title         = {{{{{title}}}}},
  author        = {{{authors}}},
  year          = {{{year}}},
  eprint        = {{{arxiv}}},
  archivePrefix = {{arXiv}}
}}"""
