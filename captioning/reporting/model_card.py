"""The model card, `README.md` of the output folder, and the push of a finished run.

The card is made from the files of the folder alone (`recipe.json`, `all_results.json`, `trainer_state.json`,
`predictions/`), so that a push can write it anew under the name of the repository.
"""

import json
import logging
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from captioning.files import PROJECT, write_whole
from captioning.hub.revisions import COMMIT_HASH
from captioning.models.captioner import Captioner, CardFacts
from captioning.models.load import class_in_folder
from captioning.scoring.baselines import BASELINES
from captioning.scoring.captions import read_predictions
from captioning.training.decoding import decode_settings, generation_config, in_words


logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "model_card_template.md"
ROCOV2 = "eltorio/ROCOv2-radiology"
CAPTION_WIDTH = 300  # characters of a caption in the table of examples
# What a recipe leaves out where it is the default, or was written before there was the key
RECIPE_DEFAULTS = {
    "do_train": True,
    "language": "en",
    "license": None,
    "hardware": {"device": "unknown", "processor": "unknown", "threads": "unknown", "processes": 1},
}
SPLITS = {"test": "predict", "validation": "eval"}  # split to the prefix of its metrics
SCORE_COLUMNS = {
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "loss": "loss",
    "perplexity": "perplexity",
    "gen_len": "length",
    "unique_captions": "distinct",
}
LICENSES = {
    "rocov2": (
        "cc-by-nc-sa-4.0",
        "The images and captions of ROCOv2 come from PubMed Central. Their license labels disagree between mirrors "
        "(CC BY, CC BY-NC and CC BY-NC-SA 4.0); this card states the strictest, CC BY-NC-SA 4.0. The license of each "
        "image is in `license_information.csv` of the data's Zenodo record, 10821435.",
    ),
    "phantoms": (
        "apache-2.0",
        "The phantoms are drawn by the recipe itself, Apache-2.0 like its code; no patient's image is among them.",
    ),
    "other": (
        "other",
        "The license of the training data is not known to the recipe: whoever publishes this model states it here and "
        "in the metadata (`--license`).",
    ),
}


# --- Write ----------------------------------------------------------------------------------------------------


def write_model_card(
    output_dir: Path, name: str | None = None, captioner_class: type[Captioner] | None = None
) -> None:
    """Write `README.md` into an output folder.

    Args:
        output_dir: the folder, with `recipe.json` at least.
        name: `<user>/<name>` of the repository it is pushed to; default: the folder's name.
        captioner_class: of the model; default: of that which is saved in the folder.
    """
    write_whole(output_dir / "README.md", render(output_dir, name or output_dir.resolve().name, captioner_class))


# --- Render ---------------------------------------------------------------------------------------------------


def render(output_dir: Path, name: str, captioner_class: type[Captioner] | None = None) -> str:
    """Return the card of the run in `output_dir` as Markdown with its YAML metadata.

    Args:
        output_dir: the output folder.
        name: of the model or its repository.
        captioner_class: of the model; default: of that which is saved in the folder.
    """
    facts = (captioner_class or class_in_folder(output_dir)).card
    recipe = RECIPE_DEFAULTS | _read_json(output_dir / "recipe.json")
    config = generation_config(recipe)
    results = _read_json(output_dir / "all_results.json")
    data = _data_of(recipe, output_dir)
    start = recipe["model_name_or_path"]
    base = start and (_hub_id(start, recipe["model_revision"]) or _folder_name(start))
    if not base and not recipe["do_train"]:
        base = Path(recipe["config_name"]).stem  # of random weights that were scored as they are
    license, license_text = LICENSES[data["kind"]]
    if data["kind"] != "phantoms":
        license_text = f"{license_text} {facts.license_note}"
    if data["kind"] == "phantoms" and base:
        license, license_text = "other", f"{license_text} The license of {base} applies to what was made from it."
    metadata = ModelCardData(
        language=recipe["language"],
        license=recipe["license"] or license,
        library_name="transformers",
        pipeline_tag="image-to-text",
        base_model=base,
        datasets=[data["id"]],
        metrics=["rouge"],
        tags=[*facts.tags, "image-captioning", "radiology", "medical", "generated_from_trainer"],
        model_name=name.split("/")[-1],
        eval_results=_eval_results(results, data) or None,
    )
    examples_split, examples = _examples(output_dir)
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        kind=facts.kind,
        usage=_usage(facts, recipe, name if recipe["do_train"] else base),
        trained=recipe["do_train"],
        base=f"[{base}](https://huggingface.co/{base})" if base and "/" in base else base and f"`{base}`",
        config_name=recipe["config_name"] and Path(recipe["config_name"]).name,
        parameters=_number_of_parameters(output_dir),
        image_size=_read_json(output_dir / "config.json").get("vision_config", {}).get("image_size"),
        data=data,
        scores=_scores(results),
        columns=SCORE_COLUMNS,
        worth=_worth(_read_json(output_dir / "scores.json")),
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        decoding=in_words(config),
        examples=examples,
        examples_split=examples_split,
        autocast=_autocast(recipe),
        plain_generate=_plain_generate(captioner_class or class_in_folder(output_dir), recipe),
        package_versions=recipe["package_versions"],
        recipe_address=f"hf://{name}/recipe.json" if "/" in name else f"{name}/recipe.json",
        missing_paths=_missing_paths(recipe),
        run_facts=_facts(recipe, results, base or "random weights", data),
        has_curve=(output_dir / "training_curve.png").is_file(),
        history=_history(_read_json(output_dir / "trainer_state.json")),
        license_text=license_text,
        citation=facts.citation,
    )
    return str(card)


def markdown(text: str) -> str:
    """Return text from the data so that it shows as it is in a Markdown table: on one line, no markup, no HTML."""
    spaced = "".join(
        " " if character.isspace() or unicodedata.category(character) in ("Cc", "Cf") else character
        for character in text
    )
    short = " ".join(spaced.split())
    if len(short) > CAPTION_WIDTH:
        short = short[: CAPTION_WIDTH - 1].rstrip() + "…"
    escaped = short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_{}\[\]|~$#!@])", r"\\\1", escaped)
    return escaped.replace("://", r"\://").replace("www.", r"www\.")  # GitHub's Markdown makes links of bare addresses


def _data_of(recipe: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Return the data's `kind` (a key of `LICENSES`), `id` for the metadata, `name` for the reader, `revision`."""
    given, revision = recipe["dataset_name"], recipe["dataset_revision"]
    if given == "phantoms":
        return {"kind": "phantoms", "id": "phantoms", "name": "phantoms, synthetic images", "revision": None}
    hub_id = _hub_id(given, revision)
    is_rocov2 = hub_id == ROCOV2 or any(
        row["image_id"].startswith("ROCOv2_") for row in _first_predictions(output_dir)
    )
    if hub_id:
        kind, name = "rocov2" if is_rocov2 else "other", f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"
        return {"kind": kind, "id": hub_id, "name": name, "revision": revision}
    if is_rocov2:
        return {"kind": "rocov2", "id": ROCOV2, "name": "a local copy of ROCOv2", "revision": None}
    name = _folder_name(given)
    return {"kind": "other", "id": name, "name": f"the data in a folder `{name}`", "revision": None}


def _first_predictions(output_dir: Path) -> list[dict[str, Any]]:
    files = [output_dir / "predictions" / f"{split}.jsonl" for split in SPLITS]
    return [row for path in files if path.is_file() for row in read_predictions(path)[:1]]


def _hub_id(given: str, revision: str | None) -> str | None:
    """Return the Hub id that a run was given, None for a path: what came from the Hub has its commit in the recipe."""
    return given if revision and COMMIT_HASH.fullmatch(revision) else None


def _folder_name(path: str) -> str:
    """Return the last folder of a path in the characters that an id on the Hub may have."""
    return re.sub(r"[^\w.-]+", "-", Path(path).name) or "local"


def _eval_results(results: Mapping[str, float], data: Mapping[str, Any]) -> list[EvalResult]:
    """Return the scores of the test split (validation where that was not scored) for the `model-index`."""
    for split, prefix in SPLITS.items():
        if f"{prefix}_loss" in results:
            return [
                EvalResult(
                    task_type="image-to-text",
                    task_name="Image captioning",
                    dataset_type=data["id"],
                    dataset_name=data["id"].split("/")[-1],
                    dataset_split=split,
                    dataset_revision=data["revision"],
                    metric_type="loss" if key == "loss" else "rouge",
                    metric_name="Loss" if key == "loss" else SCORE_COLUMNS[key],
                    metric_config=None if key == "loss" else key,
                    metric_value=float(results[f"{prefix}_{key}"]),
                )
                for key in ("rougeL", "rouge1", "rouge2", "loss")
                if math.isfinite(results.get(f"{prefix}_{key}", math.nan))  # the Hub refuses a card with another
            ]
    return []


def _scores(results: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "captions": results.get(f"{prefix}_samples", "-"),
            "cells": {
                key: f"{results[f'{prefix}_{key}']:.4f}" if f"{prefix}_{key}" in results else "-"
                for key in SCORE_COLUMNS
            },
        }
        for split, prefix in SPLITS.items()
        if f"{prefix}_loss" in results
    ]


def _worth(all_scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scores of the test split (validation where that was not captioned) beside what they are worth."""
    split = next((split for split in SPLITS if split in all_scores), None)
    if split is None:
        return None
    scores = all_scores[split]
    baselines = [baseline for baseline in BASELINES if baseline in scores["baselines"]]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [
        [
            f"`{name}`",
            number(entry["value"]),
            f"{number(entry['low'])} to {number(entry['high'])}",
            *(number(entry["baselines"].get(baseline)) for baseline in baselines),
            number(entry.get("upper_bound")),
        ]
        for name, entry in scores["scores"].items()
        if entry["value"] is not None
    ]
    constant = scores["baselines"]["constant"]
    return {
        "split": split,
        "verdict": scores["verdict"],
        "headings": [BASELINES[baseline].heading for baseline in baselines],
        "baselines": {BASELINES[baseline].heading: BASELINES[baseline].description for baseline in baselines},
        "rows": rows,
        "coco": any(name.startswith("coco_") for name in scores["scores"]),
        "constant": markdown(constant["caption"]),
        "found_among": constant["found_among"],
        "missing": {name: markdown(reason) for name, reason in scores["missing"].items()},
    }


def _examples(output_dir: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the best, the median and the worst caption by ROUGE-L, and a split's first: a sample nobody chose."""
    for split in SPLITS:
        path = output_dir / "predictions" / f"{split}.jsonl"
        if path.is_file() and (rows := read_predictions(path)):
            ranked = sorted(rows, key=lambda row: -row["rougeL"])
            chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "first": rows[0], "worst": ranked[-1]}
            return split, [
                {
                    "which": which,
                    "image_id": markdown(row["image_id"]),
                    "reference": markdown(row["reference"]),
                    "prediction": markdown(row["prediction"]) or "(empty)",
                    "rougeL": f"{row['rougeL']:.2f}",
                }
                for which, row in chosen.items()
            ]
    return None, []


def _missing_paths(recipe: Mapping[str, Any]) -> list[str]:
    """Return what a stranger must add to rerun the recipe: what was read from the folders of a machine."""
    folders = []
    if recipe["dataset_name"] != "phantoms" and not _hub_id(recipe["dataset_name"], recipe["dataset_revision"]):
        folders.append("`--dataset_name`")
    start, config = recipe["model_name_or_path"], recipe["config_name"]
    if start and recipe["do_train"] and not _hub_id(start, recipe["model_revision"]):
        folders.append("`--model_name_or_path` (to train again)")
    if config and not (PROJECT / config).is_relative_to(PROJECT):
        folders.append("`--config_name`")
    if recipe["tokenizer_name"] and Path(recipe["tokenizer_name"]).is_absolute():
        folders.append("`--tokenizer_name`")
    return folders


def _usage(facts: CardFacts, recipe: Mapping[str, Any], name: str) -> str:
    """Return the code that repeats the predictions; a scored model's own settings may be others."""
    settings = ", ".join(f"{name}={value!r}" for name, value in decode_settings(recipe).items())
    return jinja2.Template(facts.usage).render(
        name=json.dumps(name, ensure_ascii=False),
        settings="GenerationConfig.from_pretrained(name)" if recipe["do_train"] else f"GenerationConfig({settings})",
        prompt=recipe["prompt"] and repr(recipe["prompt"]),
        autocast=_autocast(recipe),
    )


def _plain_generate(captioner_class: type[Captioner], recipe: Mapping[str, Any]) -> str:
    suffices = recipe["do_train"] and captioner_class.plain_generate_suffices(generation_config(recipe))
    return jinja2.Template(captioner_class.card.plain_generate).render(prompt=recipe["prompt"], suffices=suffices)


def _autocast(recipe: Mapping[str, Any]) -> str | None:
    return "bfloat16" if recipe["bf16"] else "float16" if recipe["fp16"] else None


def _facts(
    recipe: Mapping[str, Any], results: Mapping[str, float], start: str, data: Mapping[str, Any]
) -> list[tuple]:
    """Return what the run was, as rows of a name and a value."""
    hardware = recipe["hardware"]
    device = f"{hardware['processor']}, {hardware['threads']} threads"
    device = device if hardware["device"] == "cpu" else f"{hardware['processes']} x {hardware['device']}, {device}"
    stages = {"train": "training", "eval": "validation", "predict": "test"}
    took = [f"{stages[key]} {_duration(results[f'{key}_runtime'])}" for key in stages if f"{key}_runtime" in results]
    rows = [
        ("start", _with_commit(start, recipe["model_revision"])),
        ("data", _with_commit(data["id"], data["revision"])),
    ]
    if recipe["do_train"]:
        batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * hardware["processes"]
        schedule = f"{recipe['optim']}, learning rate {recipe['learning_rate']:g}, {recipe['lr_scheduler_type']}"
        smoothing = recipe["label_smoothing"]
        rows += [
            ("training captions", results.get("train_samples", "-")),
            ("epochs", f"{recipe['num_train_epochs']:g}"),
            ("captions a step", batch),
            ("optimizer", schedule),
            ("label smoothing", "as in the start's config" if smoothing is None else smoothing),
            ("precision", _autocast(recipe) or "float32"),
            ("seed", recipe["seed"]),
        ]
    packages = ", ".join(f"{name} {number}" for name, number in recipe["package_versions"].items())
    return [*rows, ("hardware", device), ("time", ", ".join(took) or "-"), ("packages", packages)]


def _with_commit(name: str, revision: str | None) -> str:
    return f"{name}, revision `{revision}`" if revision and COMMIT_HASH.fullmatch(revision) else f"{name}"


def _history(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "step": entry["step"],
            "epoch": f"{entry['epoch']:.2f}",
            "loss": f"{entry['eval_loss']:.4f}",
            "rougeL": f"{entry['eval_rougeL']:.4f}" if "eval_rougeL" in entry else "-",
        }
        for entry in state.get("log_history", [])
        if "eval_loss" in entry
    ]


def _number_of_parameters(output_dir: Path) -> str | None:
    path = output_dir / "model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as weights:
        number = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"{number / 1e6:.2f} million" if number < 1e8 else f"{number / 1e6:.0f} million"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
