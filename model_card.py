"""The model card: `README.md` of the output folder, from a Jinja template."""

from collections.abc import Mapping
from pathlib import Path

import jinja2

from metrics import METRIC_NAMES
from report import write_whole


TEMPLATE = jinja2.Template(
    """---
library_name: transformers
pipeline_tag: image-to-text
tags: [blip, radiology, image-captioning]
---

# {{ name }}

A BLIP captioning model for radiology images, trained and scored by `run_captioning.py`. It is a research artefact and
**not for clinical use**: it states findings that are not there and misses some that are.

## Scores
{% for split, scores in splits.items() %}
{{ split }}: {% for metric, value in scores.items() -%}
{{ metric }} {{ "%.4f"|format(value) }}{{ ", " if not loop.last else "." }}
{%- endfor %}
{% endfor %}
ROUGE is `rouge_score` F1 without stemmer, mean over captions, from 0 to 1, against the full caption; `loss` is the
token-level negative log-likelihood in nats.

## Use

The decode settings are passed explicitly: stock BLIP does not read `generation_config.json` into its text decoder.

```python
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor, GenerationConfig

folder = "{{ folder }}"
model, processor = BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
settings = GenerationConfig.from_pretrained(folder)
inputs = processor(images=Image.open("image.png"){{ prompt }}, return_tensors="pt")
tokens = model.generate(**inputs, generation_config=settings)
print(processor.decode(tokens[0], skip_special_tokens=True))
```

`recipe.json` repeats the run: `python run_captioning.py recipe.json`.
""",
    keep_trailing_newline=True,
)


def write_model_card(
    output_dir: str, metrics: Mapping[str, float], prompt: str | None = None, model_name: str | None = None
) -> None:
    """Write `README.md` into `output_dir`.

    Args:
        output_dir: the folder of the run.
        metrics: those that `run_captioning.main` returns.
        prompt: the text that every caption continues.
        model_name: folder or Hub id of the model, where it is not in `output_dir`.
    """
    folder = Path(output_dir)
    splits = {
        name: {row: metrics[prefix + row] for row in METRIC_NAMES if prefix + row in metrics}
        for name, prefix in (("Validation", "eval_"), ("Test", "predict_"))
        if f"{prefix}loss" in metrics
    }
    card = TEMPLATE.render(
        name=folder.resolve().name,
        folder=model_name or folder.name,
        splits=splits,
        prompt=f", text={prompt!r}" if prompt else "",
    )
    write_whole(folder / "README.md", card)
