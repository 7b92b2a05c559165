"""The model card, `README.md` of the output folder.

It is made from the files of the run alone, so that a push can write it again under the name of the repository.
"""

import json
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
from captioning.reporting.run_record import SPLITS, RunRecord
from captioning.scoring.baselines import BASELINES
from captioning.training.decoding import decode_settings


TEMPLATE = Path(__file__).parent / "model_card_template.md"
CAPTION_WIDTH = 300  # characters of a caption in the table of examples
COMMIT_DIGITS = 40
SCORE_COLUMNS = {
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "loss": "loss",
    "perplexity": "perplexity",
    "gen_len": "length",
    "unique_captions": "distinct",
}
# By the kind of the data
LICENSES = {
    "rocov2": (
        "cc-by-nc-sa-4.0",
        "The images and captions of ROCOv2 come from PubMed Central. Their license labels disagree between mirrors "
        "(CC BY, CC BY-NC and CC BY-NC-SA 4.0); this card states the strictest, CC BY-NC-SA 4.0. The license of each "
        "image is in `license_information.csv` of the data's Zenodo record, 10821435.",
    ),
    "phantoms": (
        "apache-2.0",
        "The phantoms are drawn by the recipe itself and are licensed as its code is, Apache-2.0. They show no "
        "patients.",
    ),
    "other": (
        "other",
        "The recipe does not know the license of the training data. Whoever publishes this model must state it here "
        "and in the metadata (`--license`).",
    ),
}


def write_model_card(record: RunRecord, name: str | None = None) -> None:
    """Write `README.md` into the output folder of a run.

    Args:
        record: of the run.
        name: `<user>/<name>` of the repository that it is pushed to; default: the folder's name.
    """
    write_whole(record.folder / "README.md", render_card(record, name or record.folder.resolve().name))


def render_card(record: RunRecord, name: str) -> str:
    """Return the card of a run as Markdown with YAML metadata; `name` is that of the model or its repository."""
    recipe, family = record.recipe, record.captioner_class.card
    base = record.start and record.start.id
    if not base and not recipe["do_train"]:
        base = Path(recipe["config_name"]).stem  # random weights were scored as they are
    license, license_text = LICENSES[record.data_kind]
    if record.data_kind != "phantoms":
        license_text = f"{license_text} {family.license_note}"
    elif base:
        license, license_text = (
            "other",
            f"{license_text} What was made from {base} is also under the license of {base}.",
        )
    metadata = ModelCardData(
        language=recipe["language"],
        license=recipe["license"] or license,
        library_name="transformers",
        pipeline_tag="image-to-text",
        base_model=base,
        datasets=[record.data.id],
        metrics=["rouge"],
        tags=[*family.tags, "image-captioning", "radiology", "medical", "generated_from_trainer"],
        model_name=name.split("/")[-1],
        eval_results=_eval_results(record) or None,
    )
    examples_split, examples = _examples(record)
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        kind=family.kind,
        usage=_usage(record, name if recipe["do_train"] else base),
        plain_generate=_plain_generate(record),
        autocast=_autocast(recipe),
        package_versions=recipe["package_versions"],
        trained=recipe["do_train"],
        base=f"[{base}](https://huggingface.co/{base})" if base and "/" in base else base and f"`{base}`",
        config_name=recipe["config_name"] and Path(recipe["config_name"]).name,
        data=f"[{record.data.id}](https://huggingface.co/datasets/{record.data.id})"
        if record.data.revision
        else markdown(record.data_in_words),
        data_kind=record.data_kind,
        parameters=_num_parameters(record),
        image_size=record.image_size,
        scores=_score_rows(record),
        columns=SCORE_COLUMNS,
        decoding=record.facts(COMMIT_DIGITS)["decoding"],
        baselines=_baseline_table(record),
        examples=examples,
        examples_split=examples_split,
        recipe_address=f"hf://{name}/recipe.json" if "/" in name else f"{name}/recipe.json",
        missing_flags=_missing_flags(record),
        run_facts=_run_facts(record),
        has_curve=(record.folder / "training_curve.png").is_file(),
        history=_history(record),
        license_text=license_text,
        citation=family.citation,
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


# --- Scores ---------------------------------------------------------------------------------------------------


def _eval_results(record: RunRecord) -> list[EvalResult]:
    """Return the scores of one split for the `model-index`, finite ones: the Hub rejects a card with NaN."""
    results = record.results
    scored = [(split, prefix) for split, prefix in SPLITS.items() if f"{prefix}_loss" in results]
    return [
        EvalResult(
            task_type="image-to-text",
            task_name="Image captioning",
            dataset_type=record.data.id,
            dataset_name=record.data.id.split("/")[-1],
            dataset_split=split,
            dataset_revision=record.data.revision,
            metric_type="loss" if key == "loss" else "rouge",
            metric_name="Loss" if key == "loss" else SCORE_COLUMNS[key],
            metric_config=None if key == "loss" else key,
            metric_value=float(results[f"{prefix}_{key}"]),
        )
        for split, prefix in scored[:1]
        for key in ("rougeL", "rouge1", "rouge2", "loss")
        if math.isfinite(results.get(f"{prefix}_{key}", math.nan))
    ]


def _score_rows(record: RunRecord) -> list[list[str]]:
    results, config = record.results, record.decoding
    return [
        [split, str(results.get(f"{prefix}_samples", "-")), str(config.num_beams), str(config.max_new_tokens)]
        + [_four_digits(results.get(f"{prefix}_{key}")) for key in SCORE_COLUMNS]
        for split, prefix in SPLITS.items()
        if f"{prefix}_loss" in results
    ]


def _baseline_table(record: RunRecord) -> dict[str, Any] | None:
    """Return the scores of one split beside their intervals, baselines and upper bounds, None without any."""
    split = next((split for split in SPLITS if split in record.scores), None)
    if split is None:
        return None
    scores = record.scores[split]
    baselines = {key: baseline for key, baseline in BASELINES.items() if key in scores["baselines"]}
    constant = scores["baselines"]["constant"]
    return {
        "split": split,
        "verdict": scores["verdict"],
        "headings": [baseline.heading for baseline in baselines.values()],
        "descriptions": [f"*{baseline.heading}*: {baseline.description}" for baseline in baselines.values()],
        "rows": [
            [
                f"`{name}`",
                _four_digits(entry["value"]),
                f"{_four_digits(entry['low'])} to {_four_digits(entry['high'])}",
                *(_four_digits(entry["baselines"].get(key)) for key in baselines),
                _four_digits(entry.get("upper_bound")),
            ]
            for name, entry in scores["scores"].items()
            if entry["value"] is not None
        ],
        "coco": any(name.startswith("coco_") for name in scores["scores"]),
        "constant": markdown(constant["caption"]),
        "found_among": constant["found_among"],
        "missing": {name: markdown(reason) for name, reason in scores["missing"].items()},
    }


def _examples(record: RunRecord) -> tuple[str | None, list[list[str]]]:
    """Return the best, the median and the worst caption of a split by ROUGE-L, and the first, which nobody chose."""
    for split in SPLITS:
        if rows := record.predictions(split):
            ranked = sorted(rows, key=lambda row: -row["rougeL"])
            chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "first": rows[0], "worst": ranked[-1]}
            return split, [
                [
                    which,
                    *(markdown(row[key]) or "(empty)" for key in ("image_id", "reference", "prediction")),
                    f"{row['rougeL']:.2f}",
                ]
                for which, row in chosen.items()
            ]
    return None, []


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


# --- Use and repeat -------------------------------------------------------------------------------------------


def _usage(record: RunRecord, name: str) -> str:
    """Return code that repeats the predictions. A model that was only scored may have other settings of its own."""
    recipe = record.recipe
    settings = ", ".join(f"{key}={value!r}" for key, value in decode_settings(recipe).items())
    return jinja2.Template(record.captioner_class.card.usage).render(
        name=json.dumps(name, ensure_ascii=False),
        settings="GenerationConfig.from_pretrained(name)" if recipe["do_train"] else f"GenerationConfig({settings})",
        prompt=recipe["prompt"] and repr(recipe["prompt"]),
        autocast=_autocast(recipe),
    )


def _plain_generate(record: RunRecord) -> str:
    family = record.captioner_class
    suffices = record.recipe["do_train"] and family.plain_generate_suffices(record.decoding)
    return jinja2.Template(family.card.plain_generate).render(prompt=record.recipe["prompt"], suffices=suffices)


def _autocast(recipe: Mapping[str, Any]) -> str | None:
    return "bfloat16" if recipe["bf16"] else "float16" if recipe["fp16"] else None


def _missing_flags(record: RunRecord) -> list[str]:
    """Return the flags that a rerun elsewhere needs: what was read from the folders of this machine."""
    recipe, flags = record.recipe, []
    if record.data_kind != "phantoms" and not record.data.revision:
        flags.append("`--dataset_name`")
    if record.start and recipe["do_train"] and not record.start.revision:
        flags.append("`--model_name_or_path` (to train again)")
    if recipe["config_name"] and not (PROJECT / recipe["config_name"]).is_relative_to(PROJECT):
        flags.append("`--config_name`")
    if recipe["tokenizer_name"] and Path(recipe["tokenizer_name"]).is_absolute():
        flags.append("`--tokenizer_name`")
    return flags


def _run_facts(record: RunRecord) -> dict[str, Any]:
    """Return what was run on what, how, on which machine, with which packages."""
    recipe, results, hardware = record.recipe, record.results, record.recipe["hardware"]
    batch_size = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * hardware["processes"]
    schedule = f"learning rate {recipe['learning_rate']:g}, {recipe['lr_scheduler_type']}"
    facts: dict[str, Any] = {key: markdown(value) for key, value in record.facts(COMMIT_DIGITS).items()}
    if recipe["do_train"]:
        smoothing = recipe["label_smoothing"]
        facts |= {
            "training captions": results.get("train_samples", "-"),
            "epochs": f"{recipe['num_train_epochs']:g}",
            "captions per step": batch_size,
            "optimizer": f"{recipe['optim']}, {schedule}",
            "label smoothing": "as in the config of the start" if smoothing is None else smoothing,
            "precision": _autocast(recipe) or "float32",
            "seed": recipe["seed"],
        }
    processor = f"{hardware['processor']}, {hardware['threads']} threads"
    on_cpu = hardware["device"] == "cpu"
    stages = {"train": "training", "eval": "validation", "predict": "test"}
    took = [f"{stages[key]} {_duration(results[f'{key}_runtime'])}" for key in stages if f"{key}_runtime" in results]
    return facts | {
        "hardware": processor if on_cpu else f"{hardware['processes']} x {hardware['device']}, {processor}",
        "time": ", ".join(took) or "-",
        "packages": ", ".join(f"{name} {version}" for name, version in recipe["package_versions"].items()),
    }


def _history(record: RunRecord) -> list[list[str]]:
    return [
        [
            str(entry["step"]),
            f"{entry['epoch']:.2f}",
            _four_digits(entry["eval_loss"]),
            _four_digits(entry.get("eval_rougeL")),
        ]
        for entry in record.log_history
        if "eval_loss" in entry
    ]


def _num_parameters(record: RunRecord) -> str | None:
    path = record.folder / "model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as weights:
        number = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"{number / 1e6:.2f} million" if number < 1e8 else f"{number / 1e6:.0f} million"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
