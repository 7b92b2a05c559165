"""`--tune_decoding`: decode settings chosen on validation images; BLIP encodes each image once for all of them."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig

from captioning.files import to_json, write_whole
from captioning.stages import stage
from captioning.training.decoding import generation_config, in_words, settings_of_grid
from captioning.training.safeguards import full_is_user_error
from captioning.training.trainer import CaptioningTrainer
from metrics import CaptionMetric


logger = logging.getLogger(__name__)


@stage("choice of decoding")
def tune_decoding(trainer: CaptioningTrainer, rows: Dataset) -> None:
    """Caption validation images by each of the settings to try, and go on with the best by `metric_for_best_model`.

    Of scores equal to four digits, that with the fewest beams wins, then that with the shortest captions. The winner
    goes into trainer, arguments, `recipe.json`, and the saved model of a run that trains.
    """
    args, path = trainer.args, Path(trainer.args.output_dir) / "recipe.json"
    metric = args.metric_for_best_model.removeprefix("eval_")
    settings = settings_of_grid(vars(args), args.tune_decoding_grid)
    configs = [generation_config(vars(args) | fields) for fields in settings]
    rows = rows.select(range(0, len(rows), -(-len(rows) // args.tune_samples)))  # from all parts of the split
    logger.info("Trying %d decode settings on %d validation images, by %s", len(configs), len(rows), metric)
    with full_is_user_error(args.output_dir, args.eval_batch_size, "eval"):
        table = score_settings(trainer, rows, configs)
    sign = 1 if args.greater_is_better else -1
    ranks = [(sign * round(r[metric], 4), -c.num_beams, -r["gen_len"]) for r, c in zip(table, configs, strict=True)]
    chosen = ranks.index(max(ranks))
    for row in table:
        logger.info("%.4f, %.1f tokens: %s", row[metric], row["gen_len"], row["decoding"])
    note = f"the decode settings were chosen by {metric} on {len(rows):,} of its images, which flatters its scores"
    logger.info("Chosen: %s. Validation: %s", table[chosen]["decoding"], note)
    vars(args).update(settings[chosen])
    trainer.generation_config = args.decoding()
    trainer.captioner.set_generation_config(trainer.generation_config)
    if args.do_train and chosen:
        trainer.save_model()
    if trainer.is_world_process_zero():  # a rerun decodes by the winner and does not try again
        recipe = json.loads(path.read_text(encoding="utf-8"))
        recipe = {name: value for name, value in recipe.items() if not name.startswith("tune_")} | settings[chosen]
        recipe["tuned_decoding"] = {"before": settings[0], "metric": metric, "note": note, "table": table}
        write_whole(path, to_json(recipe, indent=2) + "\n")


def score_settings(trainer: CaptioningTrainer, rows: Dataset, configs: list[GenerationConfig]) -> list[dict[str, Any]]:
    """Return decode settings in words with their `CaptionMetric` and `gen_len`, the same in each process."""
    captioner, accelerator = trainer.captioner, trainer.accelerator
    table = [{"decoding": in_words(config), "captions": [], "lengths": []} for config in configs]
    trainer.model.eval()
    for inputs in trainer.get_test_dataloader(rows):
        with torch.no_grad(), accelerator.autocast(), captioner.evaluation():
            encoded = captioner.encode_images(trainer._prepare_inputs(inputs))
            generated = captioner.generate_each(encoded, configs)
        for row, tokens in zip(table, generated, strict=True):
            tokens = accelerator.pad_across_processes(tokens, dim=1, pad_index=-100)
            tokens = accelerator.gather_for_metrics(tokens).cpu().numpy()
            row["captions"] += captioner.decode(tokens)
            row["lengths"] += captioner.num_new_tokens(tokens).tolist()
    for row in table:
        row["gen_len"] = float(np.mean(row.pop("lengths")))
        row.update(CaptionMetric().compute(predictions=row.pop("captions"), references=list(rows["caption"])))
    return table
