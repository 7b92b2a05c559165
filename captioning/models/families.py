"""The families of `image_text_to_text.py`, by the `model_type` of their checkpoints: all in which they differ.

To add a family, add it to `FAMILIES`, and a tiny model of it to `tests/families.py`. docs/models.md has the licenses
of their weights and what memory they need.
"""

from dataclasses import dataclass

from captioning.models.card_facts import CardFacts


ASK = "Write a caption for this radiology image."


@dataclass(frozen=True)
class Family:
    """What stock transformers does not tell of a family.

    Attributes:
        citation: authors, title, year and arXiv id of its paper.
        prompt: what is asked where the user gives no `--prompt`.
        template: of the whole prompt where the processor has no chat template, with the fields `image` (the token
            that stands for it), `prompt` and `start` (the tokenizer's `cls_token`).
        end: token that ends a caption if the tokenizer knows it; by default the first at which the model stops.
        caption_type: `token_type_ids` of a caption: 1 in PaliGemma, whose prompt is read in both directions.
        has_token_types: whether the model takes `token_type_ids`; some tokenizers return them unasked.
        image_size: what `--image_size` sets: the "area" of an image, its "longest_edge", or None where the size of
            images is fixed.
        vision: path of the module that encodes images where stock's `get_encoder("image")` does not find it.
        text: path of the module that writes where stock's `get_decoder()` does not find it.
        takes_prompt: whether there is one.
        image_start: with what the place of the image in a prompt begins, before which retrieved captions are written;
            None: the family takes none.
        generates_by_decoder: whether `generate` is that of an inner model, which ignores the outer settings (T7).
    """

    citation: tuple[str, str, int, str]
    prompt: str = ASK
    template: str = "{image}{prompt}"
    end: str | None = None
    caption_type: int = 0
    has_token_types: bool = False
    image_size: str | None = None
    vision: str | None = None
    text: str | None = None
    takes_prompt: bool = True
    image_start: str | None = None
    generates_by_decoder: bool = False

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


IDEFICS = "User:{image}{prompt}<end_of_utterance>\nAssistant:"
QWEN = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
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
    "qwen2_5_vl": Family(
        ("Bai and others", "Qwen2.5-VL Technical Report", 2025, "2502.13923"),
        template=QWEN,
        image_size="area",
        image_start="<|vision_start|>",
    ),
    "qwen3_vl": Family(
        ("Bai and others", "Qwen3-VL Technical Report", 2025, "2511.21631"),
        template=QWEN,
        image_size="area",
        image_start="<|vision_start|>",
    ),
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
    "idefics3": Family(
        ("Laurençon and others", "Building and better understanding vision-language models", 2024, "2408.12637"),
        template=IDEFICS,
        end="<end_of_utterance>",
        image_size="longest_edge",
        image_start="<image>",
    ),
    "smolvlm": Family(
        ("Marafioti and others", "SmolVLM: Redefining small and efficient multimodal models", 2025, "2504.05299"),
        template=IDEFICS,
        end="<end_of_utterance>",
        image_size="longest_edge",
        image_start="<image>",
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
BY_MODEL = """{% if suffices %}So does `model.generate(**inputs)` without the settings.
{%- else %}Without the settings, `model.generate(**inputs)` searches as its model was published to.{% endif %}"""
BY_DECODER = """`model.generate(**inputs)` alone does not: its language model generates, into which stock
`from_pretrained` does not read `generation_config.json`. It would search greedily, for 20 tokens."""
