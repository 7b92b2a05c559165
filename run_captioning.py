#!/usr/bin/env python
"""Fine-tune BLIP on radiology images and captions, score it by beam search, and keep all that a rerun needs.

    python run_captioning.py --model_name_or_path Salesforce/blip-image-captioning-base
    python run_captioning.py recipes/rocov2_blip_base.json --num_train_epochs 3
    python run_captioning.py --model_name_or_path outputs/my-run --do_train false
    python run_captioning.py hf://user/model/recipe.json
    python run_captioning.py --push_only outputs/my-run --hub_model_id user/model

The first trains on ROCOv2 from the Hub, the second runs a recipe (flags win), the third scores a saved model, the
fourth repeats a published run, the fifth pushes a finished one.
"""

import json
import logging
import os
import tempfile
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import BlipForConditionalGeneration, BlipProcessor, set_seed

import blip
import rocov2
from arguments import (
    CaptioningArguments,
    DataArguments,
    ModelArguments,
    parse_arguments,
    parse_push_arguments,
    resolved_recipe,
)
from collator import CaptioningCollator
from errors import UserError, as_user_error, exit_on_user_error
from hub import PushCheckpoints, Repository, open_repository, pin_revision
from metrics import decode_captions
from model_card import push, push_finished_run, write_model_card
from predictions import write_predictions, write_whole
from report import draw_training_curve, summary
from trainer import CaptioningTrainer, last_complete_checkpoint


logger = logging.getLogger("captioning.run_captioning")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the recipe given by `argv` (default: the command line) and return all its metrics.

    With `--push_only <output folder>` a finished run is pushed instead, and there are no metrics.

    Raises:
        UserError: a mistake in the recipe, the data or the folders, or a push that failed; its message is one line.
    """
    set_up_logging()
    if push_args := parse_push_arguments(argv):
        push_finished_run(push_args.push_only, push_args.hub_model_id, push_args.hub_private_repo)
        return {}
    model_args, data_args, args = parse_arguments(argv)
    checkpoint = prepare_output_dir(args)
    set_seed(args.seed)

    with args.main_process_first(desc="loading the data"):
        dataset = load_data(model_args, data_args, args)
        model, processor = load_model(model_args, dataset, args)
        prompt_ids = processor.tokenizer(data_args.prompt or "", add_special_tokens=False)["input_ids"]
        blip.check_lengths(model, data_args.max_caption_length, 1 + len(prompt_ids), args.max_new_tokens)
        splits = prepare_data(dataset, processor, prompt_ids, data_args, args)

    write_recipe(model_args, data_args, args)
    repository = open_repository(args)
    with as_user_error("the Trainer cannot be set up with these arguments"):
        trainer = make_trainer(model, processor, splits, prompt_ids, args, repository)
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= train(trainer, checkpoint)
    if args.do_eval:
        metrics |= predict(trainer, splits["validation"], "validation", "eval")
    if args.do_predict:
        metrics |= predict(trainer, splits["test"], "test", "predict")

    if trainer.is_world_process_zero():
        draw_training_curve(Path(args.output_dir))
        write_model_card(Path(args.output_dir), args.hub_model_id)
        print(summary(metrics, Path(args.output_dir) / "predictions"))
        if repository:
            push(repository)
    return metrics


def set_up_logging() -> None:
    """Show our own messages on standard error, and of the Hub client only errors: it reports each retry twice."""
    ours = logging.getLogger("captioning")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


# --- Output folder --------------------------------------------------------------------------------------------


def prepare_output_dir(args: CaptioningArguments) -> str | None:
    """Make the output folder, check that it can be written, and return the checkpoint to resume from, if any."""
    output_dir = args.output_dir
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output folder '{output_dir}' cannot be written: {reason}; set --output_dir") from error
    if not args.do_train and (Path(output_dir) / "model.safetensors").is_file():
        raise UserError(
            f"output folder '{output_dir}' holds a trained model, whose recipe and scores must stay together; set "
            "another --output_dir for these scores"
        )
    wish = args.resume_from_checkpoint
    if not args.do_train or wish is None or wish.lower() == "false":
        if args.do_train and any(Path(output_dir).glob("checkpoint-*")):
            raise UserError(
                f"output folder '{output_dir}' holds checkpoints of an earlier run; continue it with "
                "--resume_from_checkpoint true, or set another --output_dir"
            )
        return None
    if wish.lower() == "true":
        checkpoint = last_complete_checkpoint(output_dir)
        logger.info("Resuming from %s", checkpoint or f"the start: '{output_dir}' holds no complete checkpoint")
        return checkpoint
    if not (Path(wish) / "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint '{wish}' is no complete checkpoint; give 'true' for the last one")
    return wish


def write_recipe(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> None:
    """Write `recipe.json`: what was run, at which commits, with which packages, on which hardware.

    What differs from the recipe that was given, or from the run that is resumed, is told before any work is done.

    Raises:
        UserError: the run that is to be resumed has another model.
    """
    recipe = resolved_recipe(model_args, data_args, args)
    tell_differences("package", args.package_versions, recipe["package_versions"])
    tell_differences("hardware", args.hardware, recipe["hardware"])
    path = Path(args.output_dir) / "recipe.json"
    if args.do_train and args.resume_from_checkpoint and path.is_file():
        with as_user_error(f"'{path}' of the run to resume cannot be read", "delete it"):
            before = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(key for key in recipe.keys() | before.keys() if recipe.get(key) != before.get(key)):
            if hasattr(model_args, key) and key != "label_smoothing":
                raise UserError(
                    f"cannot resume in '{args.output_dir}': {key} was {before.get(key)}, is {recipe.get(key)}; "
                    "set it back, or another --output_dir"
                )
            logger.warning("Resuming with another recipe: %s was %s, is %s", key, before.get(key), recipe.get(key))
    if args.should_save:
        write_whole(path, json.dumps(recipe, indent=2) + "\n")


def tell_differences(kind: str, given: dict[str, object] | None, here: dict[str, object]) -> None:
    """Log what the recipe was run with and this run is not: bit for bit the same holds on one machine only."""
    for name, wanted in (given or {}).items():
        found = here.get(name, "none")
        if found != wanted:
            logger.warning(
                "The recipe ran with %s %s '%s', here is '%s': the numbers may differ", kind, name, wanted, found
            )


# --- Data and model -------------------------------------------------------------------------------------------


def load_data(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> DatasetDict:
    """Load the splits that the run's stages need, rows unchecked: that takes minutes, and mistakes come first.

    The commit on the Hub that the data came from is written into `data_args.dataset_revision`.
    """
    stages = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    learns_tokenizer = model_args.config_name is not None and model_args.tokenizer_name is None
    needed = [split for split, wanted in stages.items() if wanted or (split == "train" and learns_tokenizer)]
    data_args.dataset_revision = rocov2.dataset_commit(data_args.dataset_name, data_args.dataset_revision)
    dataset = rocov2.load_rocov2(data_args.dataset_name, data_args.dataset_revision)
    for split in needed:
        if split not in dataset:
            stage = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}[split]
            raise UserError(
                f"dataset '{data_args.dataset_name}' has no split '{split}', only {', '.join(dataset)}; "
                f"add it or set --{stage} false"
            )
    limits = data_args.max_samples()
    # A trial run on few samples must not wait for the check of all rows; a few more make up for those set aside
    enough = {
        split: len(dataset[split]) if limits[split] is None else limits[split] * 51 // 50 + 10 for split in needed
    }
    return DatasetDict(
        {split: dataset[split].select(range(min(enough[split], len(dataset[split])))) for split in needed}
    )


def load_model(
    model_args: ModelArguments, dataset: DatasetDict, args: CaptioningArguments
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """Load the checkpoint, or build the model of `config_name`, and adapt it to the run.

    The commit on the Hub that the checkpoint came from is written into `model_args.model_revision`.
    """
    if model_args.model_name_or_path:
        name = model_args.model_name_or_path
        model_args.model_revision = pin_revision(name, model_args.model_revision)
        model, processor = blip.load_blip(name, model_args.model_revision)
        if not args.do_train:
            blip.tell_other_decoding(model, args.decoding())
    else:
        if model_args.tokenizer_name:
            tokenizer = blip.load_tokenizer(model_args.tokenizer_name)
        else:
            captions = [str(caption) for caption in dataset["train"]["caption"] if caption is not None]
            tokenizer = blip.train_tokenizer(captions, model_args.vocab_size)
        model, processor = blip.build_blip(model_args.config_name, blip.add_blip_tokens(tokenizer), args.seed)
    if model_args.image_size:
        blip.resize_images(model, processor, model_args.image_size)
    if model_args.label_smoothing is not None:
        blip.set_label_smoothing(model, model_args.label_smoothing)
    if model_args.freeze_vision_model:
        model.vision_model.requires_grad_(False)
    blip.set_decoding(model, args.decoding())
    return model, processor


def prepare_data(
    dataset: DatasetDict,
    processor: BlipProcessor,
    prompt_ids: list[int],
    data_args: DataArguments,
    args: CaptioningArguments,
) -> DatasetDict:
    """Check the rows, add `input_ids`, and keep the usable rows, as many as the run asks for.

    The rows set aside are listed in `rejected.jsonl`.
    """
    num_proc = data_args.preprocessing_num_workers
    rejected_file = Path(args.output_dir) / "rejected.jsonl"
    checked = rocov2.check_rows(dataset, data_args.max_rejected_fraction, rejected_file, num_proc)
    tokenised = rocov2.tokenise(checked, processor.tokenizer, data_args.max_caption_length, prompt_ids, num_proc)
    limits = data_args.max_samples()
    return DatasetDict({split: rocov2.usable(rows, limits[split]) for split, rows in tokenised.items()})


# --- Train, evaluate, predict ---------------------------------------------------------------------------------


def make_trainer(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    splits: DatasetDict,
    prompt_ids: list[int],
    args: CaptioningArguments,
    repository: Repository | None = None,
) -> CaptioningTrainer:
    """Wire model, data and collator together; training and generation start from the same `[DEC]` and prompt."""
    bos_token_id = model.config.text_config.bos_token_id
    return CaptioningTrainer(
        model=model,
        args=args,
        processing_class=processor,
        data_collator=CaptioningCollator(processor, bos_token_id, prompt_length=len(prompt_ids)),
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        start_ids=[bos_token_id, *prompt_ids],
        decoding=args.decoding(),
        callbacks=[PushCheckpoints(repository)] if repository else [],
    )


def train(trainer: CaptioningTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, save model, processor and trainer state, and return the training metrics."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.save_metrics("train", metrics)
    return metrics


def predict(trainer: CaptioningTrainer, rows: Dataset, split: str, prefix: str) -> dict[str, float]:
    """Score and caption a split; write `<prefix>_results.json` and `predictions/<split>.jsonl`."""
    output = trainer.predict(rows, metric_key_prefix=prefix)
    metrics = output.metrics | {f"{prefix}_samples": len(rows)}
    trainer.save_metrics(prefix, metrics)
    nll, _, *tokens = output.predictions
    if tokens and trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions" / f"{split}.jsonl"
        predictions = decode_captions(tokens[0], trainer.tokenizer)
        write_predictions(path, rows["image_id"], rows["caption"], predictions, nll)
    return metrics


if __name__ == "__main__":
    exit_on_user_error(main)
