#!/usr/bin/env python
"""Fine-tune a captioning model on radiology images, score it by beam search, and keep all that a rerun needs.

    python run_captioning.py --model_name_or_path Salesforce/blip-image-captioning-base
    python run_captioning.py recipes/rocov2_blip_base.json --num_train_epochs 3
    python run_captioning.py --model_name_or_path outputs/my-run --do_train false
    python run_captioning.py hf://user/model/recipe.json
    python run_captioning.py --push_only outputs/my-run --hub_model_id user/model

The first trains on ROCOv2 from the Hub, the second runs a recipe (flags win), the third scores a saved model, the
fourth repeats a published run, the fifth pushes a finished one.
"""

from functools import cache, partial
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import set_seed

from captioning.command_line import exit_on_user_error, set_up_logging
from captioning.data.checks import check_rows
from captioning.data.leaks import find_leaks
from captioning.data.neighbors import FOLDER
from captioning.data.retrieve import retrieve
from captioning.data.sources import dataset_commit, load_source
from captioning.data.splits import captions_to_learn, keep_usable, sample_training, select_splits
from captioning.data.tokenize_captions import tokenize
from captioning.data.zenodo import concept_names
from captioning.errors import as_user_error
from captioning.hub.client import limit_waiting
from captioning.hub.repository import PushCheckpoints, Repository, repository_of
from captioning.models.captioner import Captioner
from captioning.reporting.card_images import write_card_images
from captioning.reporting.curves import draw_training_curve
from captioning.reporting.model_card import write_model_card
from captioning.reporting.publish import push, push_finished_run
from captioning.reporting.results import keep_split, training_for_baselines, write_page
from captioning.reporting.run_record import SPLITS, RunRecord
from captioning.reporting.summary import summary
from captioning.scoring.training_split import Training
from captioning.stages import begin_stages, keep_stages, stage, time_in_words
from captioning.training.adapt import load_model, pin_retriever
from captioning.training.arguments import CaptioningArguments, DataArguments, ModelArguments
from captioning.training.concept_loss import CaptionAndConceptLoss, set_up_concept_head
from captioning.training.fingerprint import fingerprint, refuse_changes
from captioning.training.output_folder import hold_folder, own_output_dir, write_recipe
from captioning.training.recipe import parse_arguments, parse_push_arguments
from captioning.training.safeguards import UnreadableImages
from captioning.training.self_critical import Reward, SelfCritical, parse_reward
from captioning.training.trainer import CaptioningTrainer
from captioning.training.tune_decoding import tune_decoding
from collator import CaptioningCollator
from metrics import compute_metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the recipe given by `argv` (default: the command line) and return all its metrics.

    `--push_only <output folder>` pushes a finished run instead. A mistake, or a push that fails, is a UserError.
    """
    begin_stages(imported=__name__ == "__main__")
    set_up_logging()
    limit_waiting()
    if push_args := parse_push_arguments(argv):
        with hold_folder(push_args.push_only):
            push_finished_run(push_args.push_only, push_args.hub_model_id, push_args.hub_private_repo)
        return {}
    model_args, data_args, args = parse_arguments(argv)
    if args.push_to_hub:
        Repository(args.output_dir, args.hub_model_id)  # refuses an impossible name before anything is written
    with own_output_dir(args) as checkpoint, keep_stages(args.output_dir, bool(checkpoint), args.should_save):
        return run(model_args, data_args, args, checkpoint)


def run(
    model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments, checkpoint: str | None
) -> dict[str, float]:
    """Run the recipe in its output folder, from a checkpoint if there is one, and return all its metrics."""
    repository = repository_of(args)
    set_seed(args.seed)
    pin_retriever(model_args, args)

    with args.main_process_first(desc="loading the data"):
        dataset = load_data(model_args, data_args, args)
        # Once, and only when its rows are asked for: it takes minutes, and a mistake in the model comes first
        check = cache(partial(check_splits, dataset, data_args, args))
        captions = captions_to_learn(dataset, check, data_args.max_train_samples, args.do_train)
        captioner = load_model(model_args, data_args, captions, args, checkpoint)
        tokenized = tokenize(check(), captioner, data_args.max_caption_length)
        tokenized, pool = retrieve(tokenized, args, data_args.max_samples())
        splits = keep_usable(tokenized, data_args.max_samples(), data_args.neighbor_samples, args.do_train)
        set_up_concept_head(captioner, splits.get("train"), args, concept_names(data_args.dataset_name))
        leaks = find_leaks({**dataset, **splits})  # a run that only scores has the training split unchecked

    digests = fingerprint(dataset, captioner, model_args, pool and pool.retriever)
    if checkpoint and not args.resume_despite_changes:
        refuse_changes(checkpoint, digests)
    write_recipe(model_args, data_args, args, digests)
    if pool and args.do_train and args.should_save:
        pool.save(Path(args.output_dir) / FOLDER)
    with as_user_error("the Trainer cannot be set up with these arguments"):
        trainer = make_trainer(captioner, splits, data_args, args)
    if repository:
        repository.try_to_open()
        trainer.add_callback(PushCheckpoints(repository))
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= train(trainer, checkpoint, model_args.merge_lora)
    trainer.generation_config = args.decoding()
    if args.tune_decoding:
        tune_decoding(trainer, splits["validation"])
    record = RunRecord(args.output_dir, captioner.config.model_type, leaks)
    training = training_for_baselines(trainer, dataset, splits, data_args)
    if args.do_eval:
        metrics |= predict(trainer, record, splits["validation"], "validation", training, page=not args.do_predict)
    if args.do_predict:
        metrics |= predict(trainer, record, splits["test"], "test", training, page=True)

    if trainer.is_world_process_zero():
        draw_training_curve(record)
        write_card_images(trainer, record, splits.get(record.captioned))
        write_model_card(record, args.hub_model_id)
        print(summary(metrics, record))
        if repository:
            push(repository, record, trainer)
        print(f"\n{time_in_words()}")
    trainer.accelerator.wait_for_everyone()  # a process that ends earlier takes the launcher, and the others, with it
    trainer.accelerator.end_training()
    return metrics


@stage("load")
def load_data(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> DatasetDict:
    """Load the splits that the run needs; their commit on the Hub is written into `data_args.dataset_revision`."""
    trains_tokenizer = model_args.config_name is not None and model_args.tokenizer_name is None
    needed = {"train": args.do_train or trains_tokenizer, "validation": args.do_eval, "test": args.do_predict}
    data_args.dataset_revision = dataset_commit(data_args.dataset_name, data_args.dataset_revision)
    dataset = load_source(data_args.dataset_name, data_args.dataset_revision, data_args.streaming, data_args)
    limits = data_args.max_samples()
    uses_captions = args.predict_with_generate or args.retrieved_captions > 0
    return select_splits(dataset, data_args.dataset_name, needed, limits, with_captions=uses_captions)


def check_splits(dataset: DatasetDict, data_args: DataArguments, args: CaptioningArguments) -> DatasetDict:
    """Mark the rows that cannot be used, and list them in `rejected.jsonl`.

    Of the training split a run that neither trains nor retrieves captions checks a sample.
    """
    rejected_file = Path(args.output_dir) / "rejected.jsonl" if args.should_save else None
    if rejected_file and not args.resume_from_checkpoint:
        rejected_file.unlink(missing_ok=True)  # a resumed run keeps what it has found in streamed images
    if not args.do_train and not args.retrieved_captions:
        dataset = sample_training(dataset, data_args.max_train_samples, data_args.neighbor_samples)
    unopened = ["train"] if data_args.streaming and args.do_train else []  # `UnreadableImages` checks them
    num_workers = data_args.preprocessing_num_workers
    return check_rows(dataset, data_args.max_rejected_fraction, rejected_file, num_workers, unopened)


def make_trainer(
    captioner: Captioner, splits: DatasetDict, data_args: DataArguments, args: CaptioningArguments
) -> CaptioningTrainer:
    """Wire model, data, collator, objective and metrics together."""
    collator = CaptioningCollator(captioner, with_ids=True)
    objective = None
    if args.do_train and args.learns_concepts:
        objective = CaptionAndConceptLoss(captioner, args, splits["train"])
        collator.concepts = captioner.concept_head.concepts
        collator.unlabeled_are_negative = args.unlabeled_are_negative
    elif args.do_train and args.objective == "self_critical":
        objective = SelfCritical(captioner, args, Reward(parse_reward(args.reward), splits["train"]))
    trainer = CaptioningTrainer(
        captioner=captioner,
        args=args,
        data_collator=collator,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        compute_metrics=compute_metrics,
        generation_config=args.decoding(in_training=args.do_train),
        publish=partial(push_finished_run, args.output_dir, args.hub_model_id, args.hub_private_repo),
        objective=objective,
    )
    if data_args.streaming:
        unreadable = UnreadableImages(data_args.max_rejected_fraction, Path(args.output_dir) / "rejected.jsonl")
        collator.unreadable = unreadable.add
        trainer.add_callback(unreadable)
    return trainer


@stage("training")
def train(trainer: CaptioningTrainer, checkpoint: str | None, merge_lora: bool) -> dict[str, float]:
    """Train, save model or adapter, processor and trainer state, and return the training metrics."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.captioner.set_generation_config(trainer.args.decoding())
    trainer.save_model()
    if merge_lora:
        trainer.merge_adapter()
    trainer.save_state()
    trainer.stop_if_told()
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.save_metrics("train", metrics)
    return metrics


def predict(
    trainer: CaptioningTrainer, record: RunRecord, rows: Dataset, split: str, training: Training | None, page: bool
) -> dict[str, float]:
    """Caption and score a split; write its metrics, predictions and scores, and the page if asked for."""
    prefix = SPLITS[split]
    output = trainer.predict(rows, metric_key_prefix=prefix)
    found = output.predictions
    metrics = output.metrics | {f"{prefix}_samples": len(rows)}
    if found.captions is not None:
        scores = keep_split(trainer, record, rows, found, split, training)
        metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
    trainer.save_metrics(prefix, metrics)
    if found.captions is not None and page:
        write_page(trainer, record, rows, found, split)
    return metrics


if __name__ == "__main__":
    exit_on_user_error(main)
