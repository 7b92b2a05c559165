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

# What to say of a call without settings, which `suffices` or not
SUFFICES = "So does `model.generate(**inputs)` without the settings."
BY_DECODER = """`model.generate(**inputs)` alone does not: its language model generates, into which stock
`from_pretrained` reads neither `generation_config.json` nor beams. It would search greedily, for 20 tokens."""
BY_MODEL = f"""{{% if suffices %}}{SUFFICES}{{% else %}}Without the settings, `model.generate(**inputs)` searches as
its model was published to.{{% endif %}}"""


@dataclass(frozen=True)
class CardFacts:
    """What the model card says of a family."""

    kind: str  # fills "A ... that writes a caption for a radiology image"
    tags: tuple[str, ...]
    transformers: str  # the first version in which the code of `usage` runs
    license_note: str  # a sentence on the license of the pretrained weights
    citation: str  # BibTeX of the family's paper
    plain_generate: str  # template as `BY_MODEL`
    usage: str = USAGE
