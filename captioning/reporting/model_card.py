"""The model card, `README.md` of the output folder.

It is made from the files of the run alone, so that a push can write it again under the name of the repository.
"""

import json
import math
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from captioning.files import PROJECT, write_whole
from captioning.models.lora import WEIGHT_FILES
from captioning.reporting.card_images import chosen_examples
from captioning.reporting.page_scores import score_label
from captioning.reporting.run_record import SPLITS, RunRecord
from captioning.reporting.score_table import detection_rows, in_digits, markdown, number_text, score_cells
from captioning.scoring.baselines import BASELINES
from captioning.stages import stage
from captioning.training.decoding import decode_settings, generation_config


TEMPLATE = Path(__file__).parent / "model_card_template.md"
TAGS = ("image-captioning", "radiology", "medical", "generated_from_trainer")
COMMIT_DIGITS = 40
STAGES = {"train": "training", "eval": "validation", "predict": "test"}  # by the prefix of their results
# The scores of the `model-index`, with the types of their metrics
INDEXED_SCORES = {"rougeL": "rouge", "rouge1": "rouge", "rouge2": "rouge", "imageclef_rouge1": "rouge"}
INDEXED_SCORES |= {"coco_cider": "cider", "coco_bleu4": "bleu", "coco_meteor": "meteor", "loss": "loss"}
INDEXED_SCORES |= {"concept_f1": "f1", "concept_detection_f1": "f1"}
MAIN_SCORES = ("rougeL", "imageclef_rouge1", "coco_cider", "concept_f1")
SCORE_COLUMNS = {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "loss": "loss"}
SCORE_COLUMNS |= {"perplexity": "perplexity", "gen_len": "length", "unique_captions": "distinct"}
DECIMALS = {"perplexity": 1, "gen_len": 1, "unique_captions": 2}  # of columns without an interval; else 3
# By the kind of the data; the template has the reasons
LICENSES = {"rocov2": "cc-by-nc-sa-4.0", "phantoms": "apache-2.0", "other": "other"}


@stage("card")
def write_model_card(record: RunRecord, name: str | None = None) -> None:
    """Write `README.md` into the output folder of a run; `name` is as in `render_card`, by default the folder's."""
    write_whole(record.folder / "README.md", render_card(record, name or record.folder.resolve().name))


def render_card(record: RunRecord, name: str) -> str:
    """Return the card of a run as Markdown with YAML metadata; `name`: of the model, or `<user>/<name>` on the Hub."""
    recipe, family, start = record.recipe, record.card_facts, record.start
    base, base_on_hub = start and start.id, bool(start and start.revision)
    if not base and not recipe["do_train"]:
        base = Path(recipe["config_name"]).stem  # random weights were scored as they are
    license = "other" if record.data_kind == "phantoms" and base else LICENSES[record.data_kind]
    stages = [(split, prefix) for split, prefix in SPLITS.items() if f"{prefix}_loss" in record.results]
    scored = next((split for split in SPLITS if split in record.scores), None)
    sizes = {f"{prefix}_samples": stage for prefix, stage in STAGES.items()}
    metadata = ModelCardData(
        language=recipe["language"],
        license=recipe["license"] or license,
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="image-to-text",
        base_model=base if base_on_hub else None,
        base_model_relation="adapter" if base_on_hub and record.is_adapter else None,
        datasets=[record.data.id] if record.data.revision else None,
        metrics=["rouge"],
        tags=[*family.tags, *(["lora"] if record.is_adapter else []), *TAGS],
        model_name=name.split("/")[-1],
        eval_results=[result for stage in stages[:1] for result in _eval_results(record, *stage)] or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        record=record,
        name=name,
        base=base,
        base_on_hub=base_on_hub,
        stages=stages,
        columns=SCORE_COLUMNS,
        scored=scored,
        main_scores=MAIN_SCORES,
        detection=detection_rows(record.scores.get(scored, {}).get("concept_detection", {"systems": {}})),
        baselines=BASELINES,
        examples=record.captioned and _examples(record),
        usage=_usage(record, name),
        plain_generate=_plain_generate(record),
        autocast=_autocast(recipe),
        recipe_address=f"hf://{name}/recipe.json" if "/" in name else f"{name}/recipe.json",
        missing_flags=_missing_flags(record),
        facts=_run_facts(record),
        sizes=[f"{stage} {record.results[key]:,}" for key, stage in sizes.items() if key in record.results],
        has_curve=(record.folder / "training_curve.png").is_file(),
        show_result=partial(_show_result, record),
        **{tool.__name__: tool for tool in (in_digits, markdown, number_text, score_cells, score_label)},
    )
    return str(card)


# --- Scores ---------------------------------------------------------------------------------------------------


def _eval_results(record: RunRecord, split: str, prefix: str) -> list[EvalResult]:
    """Return the scores of a split for the `model-index`."""
    values = {key: record.results.get(f"{prefix}_{key}") for key in INDEXED_SCORES}
    return [
        EvalResult(
            task_type="image-to-text",
            task_name="Image captioning",
            dataset_type=record.data.id,
            dataset_name=record.data.id.split("/")[-1],
            dataset_split=split,
            dataset_revision=record.data.revision,
            metric_type=INDEXED_SCORES[key],
            metric_name=score_label(key, full=True),
            metric_config=None if key == "loss" else key,
            metric_value=round(float(value), 4),
        )
        for key, value in values.items()
        if value is not None
    ]


def _show_result(record: RunRecord, split: str, key: str, value: float | None) -> str:
    """Return a metric of a split with the decimals that its interval deserves, a dash for None, NaN and infinity."""
    entry = record.scores.get(split, {"scores": {}})["scores"].get(key, {"value": None})
    return number_text(value, DECIMALS.get(key, 3)) if entry["value"] is None else in_digits(entry)(value)


def _examples(record: RunRecord) -> dict[str, dict[str, Any]]:
    rows, found = record.predictions(record.captioned), {}
    for which, index in chosen_examples(rows).items():
        picture = f"examples/{which}.jpg"
        found[which] = rows[index] | {"picture": picture if (record.folder / picture).is_file() else None}
    return found


# --- Use and repeat -------------------------------------------------------------------------------------------


def _usage(record: RunRecord, name: str) -> str:
    recipe, start = record.recipe, record.start
    model = name if recipe["do_train"] or not start else start.id
    revision = f', revision="{start.revision}"' if start and start.revision else ""
    # The start's own `generation_config.json` may sample or penalize; that of a whole model is the run's
    tokens = (record.is_adapter or not recipe["do_train"]) and record.sample.get("tokens")
    return jinja2.Template(record.card_facts.usage).render(
        name=_python_string(model),
        adapter_of=record.is_adapter and _python_string(start.id) + revision,
        arguments=_python_arguments(record.sample.get("prompt") or {}),
        tokens=tokens and _python_arguments(tokens),
        dtype=None if recipe["torch_dtype"] == "float32" else f'"{recipe["torch_dtype"]}"',
        settings=_python_arguments(decode_settings(recipe)),
        holder="name" if model == name else _python_string(name),
        prompt=recipe["prompt"] and repr(recipe["prompt"]),
        autocast=_autocast(recipe),
    )


def _python_arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _python_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain_generate(record: RunRecord) -> str:
    can = record.recipe["do_train"] and not record.is_adapter
    suffices = can and record.captioner_class.plain_generate_suffices(generation_config(record.recipe))
    return jinja2.Template(record.card_facts.plain_generate).render(prompt=record.recipe["prompt"], suffices=suffices)


def _autocast(recipe: Mapping[str, Any]) -> str | None:
    return "bfloat16" if recipe["bf16"] else "float16" if recipe["fp16"] else None


def _missing_flags(record: RunRecord) -> list[str]:
    """Return the flags that a rerun elsewhere needs: what was read from the folders of this machine."""
    recipe, start = record.recipe, record.start
    local = {
        "`--dataset_name`": record.data_kind != "phantoms" and not record.data.revision,
        "`--model_name_or_path` (to train again)": start and recipe["do_train"] and not start.revision,
        "`--config_name`": not recipe.get("model_config")
        and not (PROJECT / (recipe["config_name"] or "")).is_relative_to(PROJECT),
        "`--retriever`": recipe.get("retriever") and not recipe.get("retriever_revision"),
        "`--tokenizer_name`": Path(recipe["tokenizer_name"] or "").is_absolute(),
    }
    return [flag for flag, is_local in local.items() if is_local]


def _run_facts(record: RunRecord) -> dict[str, Any]:
    recipe, results, hardware = record.recipe, record.results, record.recipe["hardware"]
    facts: dict[str, Any] = {key: markdown(value) for key, value in record.facts(COMMIT_DIGITS).items()}
    facts["parameters"] = _num_parameters(record)
    facts["image size"] = record.config.get("vision_config", {}).get("image_size")
    if recipe["do_train"]:
        batch_size, steps = recipe["per_device_train_batch_size"], recipe.get("max_steps", -1)
        schedule = f"learning rate {recipe['learning_rate']:g}, {recipe['lr_scheduler_type']}"
        epochs = f"{recipe['num_train_epochs']:g}"
        if steps > 0:  # it wins over the epochs
            epochs = f"{results['epoch']:.2g} ({steps:,} steps)" if "epoch" in results else f"{steps:,} steps"
        smoothing, changed = recipe["label_smoothing"], recipe.get("changed_on_resume") or {}
        changes = [f"{key} {', then '.join(map(str, values))}" for key, values in changed.items()]
        facts |= {
            "epochs": epochs,
            "captions per step": batch_size * recipe["gradient_accumulation_steps"] * hardware["processes"],
            "optimizer": f"{recipe['optim']}, {schedule}",
            "label smoothing": "as in the config of the start" if smoothing is None else smoothing,
            "precision": _autocast(recipe) or "float32",
            "seed": recipe["seed"],
            "changed on resume": markdown("; ".join(changes)),
        }
    devices = "" if hardware["device"] == "cpu" else f"{hardware['processes']} x {hardware['device']}, "
    times = {stage: results.get(f"{prefix}_runtime") for prefix, stage in STAGES.items()}
    facts |= {
        "hardware": f"{devices}{hardware['processor']}, {hardware['threads']} threads",
        "time": ", ".join(f"{stage} {timedelta(seconds=round(time))}" for stage, time in times.items() if time),
        "packages": ", ".join(f"{name} {version}" for name, version in recipe["package_versions"].items()),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _num_parameters(record: RunRecord) -> str | None:
    path = next((path for name in WEIGHT_FILES if (path := record.folder / name).is_file()), None)
    if path is None:
        return None
    with safe_open(path, framework="pt") as weights:
        number = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"{number / 1e6:.{2 if number < 1e8 else 0}f} million{' in the adapter' if record.is_adapter else ''}"
