"""What a competent user writes from the documentation of transformers: BLIP, fine-tuned and scored.

    python benchmarks/stock_script.py MODEL DATA OUTPUT [--num_train_epochs 2 --batch_size 16 ...]

MODEL is a saved BLIP, DATA a folder of parquet files. The other side of `end_to_end.py`: the same data, model, losses
and decode settings as `run_captioning.py`, by transformers, datasets and rouge_score alone. Of the traps in
docs/traps.md it avoids those that would make it compute something else: padding is masked, captions begin with the
token that generation begins with, and generation does not see the reference. It checks no rows and has no baselines.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


sys.path.insert(0, str(Path(__file__).parent.parent))
from captioning.stages import begin_stages, keep_stages, stage


class StockScriptTrainer(Seq2SeqTrainer):
    """The stock trainer, but that `generate` gets the images alone, and with the stages that `end_to_end.py` reads."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Return loss, generated tokens and labels of a batch."""
        inputs = self._prepare_inputs(inputs)
        config = self.args
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss
            tokens = model.generate(
                pixel_values=inputs["pixel_values"],
                num_beams=config.generation_num_beams,
                max_new_tokens=config.generation_max_length,
            )
        return loss, tokens, inputs["labels"]

    def evaluation_loop(self, *args, **kwargs):
        """Run the stock loop."""
        with stage("evaluation in training" if self.is_in_train else "prediction"):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args, **kwargs):
        """Save as stock does."""
        with stage("saving"):
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with stage("saving"):
            super()._save_checkpoint(*args, **kwargs)


def main(given: argparse.Namespace) -> None:
    set_seed(42)
    with stage("load"):
        names = {split: f"{given.data}/{split}-*.parquet" for split in ("train", "validation", "test")}
        dataset = load_dataset("parquet", data_files=names)
    with stage("model"):
        processor = BlipProcessor.from_pretrained(given.model)
        model = BlipForConditionalGeneration.from_pretrained(given.model)
    tokenizer, start = processor.tokenizer, model.config.text_config.bos_token_id

    def collate(rows):
        images, captions = [row["image"].convert("RGB") for row in rows], [row["caption"] for row in rows]
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        batch = processor(images=images, text=captions, **options)
        batch["input_ids"][:, 0] = start
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, 0] = -100
        return batch

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])

    @stage("scores")
    def compute_metrics(prediction):
        tokens, labels = (np.where(found == -100, tokenizer.pad_token_id, found) for found in tuple(prediction)[:2])
        captions, references = (tokenizer.batch_decode(found, skip_special_tokens=True) for found in (tokens, labels))
        found = [scorer.score(*pair) for pair in zip(references, captions, strict=True)]
        return {name: np.mean([each[name].fmeasure for each in found]) for name in scorer.rouge_types}

    trainer = StockScriptTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=given.output,
            num_train_epochs=given.num_train_epochs,
            per_device_train_batch_size=given.batch_size,
            per_device_eval_batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            dataloader_num_workers=1,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="rougeL",
            predict_with_generate=True,
            generation_num_beams=3,
            generation_max_length=given.max_new_tokens,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
        ),
        data_collator=collate,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    with stage("training"):
        trainer.train()
        trainer.save_model()
    metrics = trainer.evaluate()
    metrics |= trainer.predict(dataset["test"], metric_key_prefix="predict").metrics
    Path(given.output, "all_results.json").write_text(json.dumps(metrics, default=float))


if __name__ == "__main__":
    begin_stages(imported=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "output"):
        parser.add_argument(name)
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    flags = parser.parse_args()
    with keep_stages(flags.output, resumed=False, should_save=True):
        main(flags)
