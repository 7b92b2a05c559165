"""The images that are published with a model: a sample to try the code of the card on, and those of its examples.

Images of a dataset are published only where that is allowed, see `RunRecord.may_publish_images`. Else the sample is a
phantom, which may be redistributed, and the examples are text.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from captioning.data.images import open_image
from captioning.data.phantoms import combinations, draw
from captioning.files import write_whole
from captioning.reporting.page_images import encode_image
from captioning.reporting.run_record import RunRecord
from captioning.stages import stage
from captioning.training.trainer import CaptioningTrainer


EXAMPLE_BYTES = 20_000  # of an image beside a caption: about 384 pixels a side


@stage("card")
def write_card_images(trainer: CaptioningTrainer, record: RunRecord, rows: Dataset | None) -> None:
    """Write `sample.png`, `sample.json`, and `examples/*.jpg` of the tokenized `rows` of the captioned split, if any.

    `sample.json` has the `image`, its `caption`, `decoded`: what stock decodes, where it is another text, `prompt`:
    the processor's arguments that make the prompt, and the special `tokens` of generation.
    """
    folder = record.folder
    shutil.rmtree(folder / "examples", ignore_errors=True)
    with_images = rows is not None and record.may_publish_images
    sample = open_image(rows[0]["image"]) if with_images else _drawing()
    sample = sample if sample.mode in ("L", "RGB") else sample.convert("RGB")
    sample.info.clear()  # a comment in the file may name a patient
    sample.save(folder / "sample.png")
    stock = copy(trainer.captioner)  # the code of the card knows nothing of ours
    stock.surface_form = None
    decoded, form = trainer.caption(sample, stock), trainer.captioner.surface_form
    settings = stock.plain_model.generation_config.to_diff_dict()
    caption = {
        "image": "sample.png",
        "caption": form.restore(decoded) if form else decoded,
        "decoded": decoded if form else None,
        "prompt": stock.prompt_arguments,
        "tokens": {name: value for name, value in settings.items() if name.endswith("_token_id")},
    }
    write_whole(folder / "sample.json", json.dumps(caption, indent=2, ensure_ascii=False) + "\n")
    if not with_images:
        return
    (folder / "examples").mkdir()
    for which, index in chosen_examples(record.predictions(record.captioned)).items():
        if jpeg := encode_image(open_image(rows[index]["image"]), EXAMPLE_BYTES):
            (folder / "examples" / f"{which}.jpg").write_bytes(jpeg)


def chosen_examples(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the rows of the best, the median and the worst caption by ROUGE-L, and the first, which nobody chose."""
    ranked = sorted(range(len(rows)), key=lambda row: -rows[row]["rougeL"])
    return {"best": ranked[0], "median": ranked[len(ranked) // 2], "first": 0, "worst": ranked[-1]}


def _drawing() -> Image.Image:
    shows = {"modality": "radiograph", "region": "chest", "finding": "nodule"}
    attributes = next(each for each in combinations("test") if shows.items() <= each.items())
    return Image.fromarray(draw(attributes, np.random.default_rng(0)))
