"""What the model card says of a family of models."""

from dataclasses import dataclass


# Jinja template of code that captions the sample, with the variables of `reporting/model_card.py`
USAGE = """{% if autocast %}import torch
{% endif %}{% if adapter_of %}from peft import PeftModel
{% endif %}from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
{%- if tokens %}, GenerationConfig{% endif %}
from transformers.utils import cached_file

name = {{ name }}
{% if adapter_of -%}
model = AutoModelForImageTextToText.from_pretrained({{ adapter_of }}, dtype={{ dtype or '"float32"' }})
model = PeftModel.from_pretrained(model, name)
{% else -%}
model = AutoModelForImageTextToText.from_pretrained(name, dtype={{ dtype or '"float32"' }})
{% endif -%}
{% if tokens -%}
model{% if adapter_of %}.base_model.model{% endif %}.generation_config = GenerationConfig({{ tokens }})
{% endif -%}
processor = AutoProcessor.from_pretrained(name)
processor.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil")  # torchvision: other pixels
settings = dict({{ settings }})

image = Image.open(cached_file({{ holder }}, "sample.png")).convert("RGB")
{% if arguments -%}
inputs = processor(images=[[image]], {{ arguments }}, return_tensors="pt")
{% else -%}
inputs = processor.image_processor(image, return_tensors="pt")
{% endif -%}
{% if autocast -%}
device = "cuda" if torch.cuda.is_available() else "cpu"
with torch.autocast(device, torch.{{ autocast }}, enabled=device == "cuda"):  # as in the evaluation
    tokens = model.to(device).generate(**inputs.to(device), **settings)
{% else -%}
tokens = model.generate(**inputs, **settings)
{% endif -%}
{% if arguments -%}
if not model.config.is_encoder_decoder:
    tokens = tokens[:, inputs["input_ids"].shape[1]{% if num_unread %} - {{ num_unread }}{% endif %} :]  # no prompt
{% endif -%}
print(processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())"""


@dataclass(frozen=True)
class CardFacts:
    """What the model card says of a family.

    Attributes:
        kind: fills "A ... that writes a caption for a radiology image".
        tags: of the card's metadata.
        transformers: the first version in which the code of `usage` runs.
        license_note: a sentence on the license of the pretrained weights.
        citation: BibTeX of the family's paper.
        plain_generate: Jinja template of what to say of a call of `generate` without settings, given `prompt` and
            `suffices`: whether that call repeats the predictions too.
        usage: Jinja template of code that repeats the predictions, as `USAGE`.
    """

    kind: str
    tags: tuple[str, ...]
    transformers: str
    license_note: str
    citation: str
    plain_generate: str
    usage: str = USAGE
