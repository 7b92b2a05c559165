"""`CaptioningTrainer`: the token-normalized loss, evaluation that encodes each image once, and sound checkpoints."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from captioning.data.streaming import is_streamed
from captioning.errors import Stopped, UserError, as_user_error
from captioning.files import write_whole
from captioning.hub.repository import Repository
from captioning.models.blip import (
    attention_maps,
    caption_logits,
    cross_attention_of,
    encode_images,
    generate_captions,
    packed_for_evaluation,
)
from captioning.reporting.model_card import write_model_card
from captioning.reporting.publish import push
from captioning.training.checkpoints import last_complete_checkpoint
from captioning.training.safeguards import StopOnSigterm, full_is_user_error, loss_is_no_number, weight_is_no_number
from captioning.training.samplers import PaddedRows, PaddedSampler, SetEpoch, StreamingSampler
from collator import IGNORE_INDEX
from metrics import compute_metrics


class CaptioningTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` whose losses, generation and metrics are right for BLIP.

    `processing_class` is the whole `BlipProcessor`, so that checkpoints hold all of it (T8).

    Args:
        start_ids: `[DEC]` and the tokens of the prompt, from which generation starts.
        decoding: the keyword arguments of `generate`.
        kwargs: those of `Seq2SeqTrainer`; datasets must have the columns of a tokenized split.
    """

    def __init__(self, *, start_ids: list[int], decoding: dict[str, Any], **kwargs):
        super().__init__(compute_metrics=self._compute_metrics, **kwargs)
        self.start_ids = start_ids
        self.decoding = decoding
        # `compute_loss` below normalizes over the accumulated batch; with this set the Trainer counts its labels
        # and does not divide by the accumulation steps again
        self.model_accepts_loss_kwargs = True
        # Tied weights are stored once. Without this, each checkpoint that is loaded back is said to lack them
        self.model._keys_to_ignore_on_save = list(self.model._tied_weights_keys)
        self.stop_on_sigterm = StopOnSigterm()
        self.add_callback(self.stop_on_sigterm)
        self.add_callback(LogBeforeCheckpoint())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the processor."""
        return self.processing_class.tokenizer

    # --- Training ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the stock loader; several processes get the global batches that one process would have."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        return self._get_dataloader(
            dataset=PaddedRows(self.train_dataset, prompt_length=len(self.start_ids) - 1),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._padded_sampler,
            is_training=True,
        )

    def _padded_sampler(self, rows: PaddedRows) -> PaddedSampler:
        global_batch = self._train_batch_size * self.args.world_size
        return PaddedSampler(self._get_train_sampler(rows.rows), len(rows), global_batch, self.args.data_seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the sum of token NLLs over the number of caption tokens in the whole accumulated batch (T2).

        BLIP's own loss is the mean over the tokens of one micro-batch, whatever `num_items_in_batch` says, smoothed by
        `config.text_config.label_smoothing` (T5). Evaluation has a loss of its own, which is not.
        """
        outputs = model(**inputs, use_cache=False)
        num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        if num_items_in_batch is None:
            num_items_in_batch = num_tokens
        if not num_tokens:
            # Blank rows or unreadable images alone, whose mean loss is no number: this one takes part in the exchange
            # of gradients, and has none
            loss = outputs.logits.sum() * 0
            return (loss, outputs) if return_outputs else loss
        loss = outputs.loss * num_tokens / torch.as_tensor(num_items_in_batch, device=num_tokens.device).flatten()[0]
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is over all processes, which average gradients
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not is_streamed(rows) or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        slots = args.world_size * max(1, args.dataloader_num_workers)
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = StreamingSampler(rows, self._train_batch_size, slots, seed)
        self.remove_callback(SetEpoch)  # of a training before
        self.add_callback(SetEpoch(sampler))
        return sampler

    def create_optimizer(self, *args, **kwargs):
        """Build the stock optimizer; arguments that it refuses are the user's."""
        with as_user_error("the optimizer cannot be built", "check --optim and --optim_args"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Build the stock schedule; arguments that it refuses, or cannot compute a step with, are the user's."""
        with as_user_error("the schedule cannot be built", "check --lr_scheduler_type and --lr_scheduler_kwargs"):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            for rate in getattr(scheduler, "lr_lambdas", ()):
                for step in (0, num_training_steps // 2, num_training_steps):
                    rate(step)
            return scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Run the stock step; a loss that is no number ends the run before it reaches the weights."""
        image_ids = inputs.pop("image_id", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            last = last_complete_checkpoint(self.args.output_dir)
            raise loss_is_no_number(loss.item(), self.state.global_step + 1, image_ids, last)
        return loss

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train; the `train_loss` returned is the mean over all steps of the run, also of those before a resume.

        Raises:
            UserError: the loss is no number, or memory or disk are full.
            Stopped: SIGTERM came; a checkpoint is saved.
        """
        folder = self.args.output_dir
        with self.stop_on_sigterm as stop, full_is_user_error(folder, self._train_batch_size, "train"):
            output = super().train(*args, **kwargs)
            if stop.stopping:
                raise self._stopped()
        output.metrics["train_loss"] = mean_training_loss(self.state.log_history)
        return output._replace(training_loss=output.metrics["train_loss"])

    # --- Files ------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the stock Trainer does; in the output folder each file appears whole, the weights last."""
        if output_dir is not None:  # a checkpoint, which is complete when its `trainer_state.json` is there
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(self.args.output_dir)
        staged = folder / "model.tmp"
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        try:
            with full_is_user_error(str(folder), self._train_batch_size, "train"):
                super().save_model(str(staged), _internal_call=True)
        except UserError:
            shutil.rmtree(staged, ignore_errors=True)  # half a model only keeps the space that is missing
            raise
        if self.args.should_save:
            for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, folder / path.name)
            staged.rmdir()

    def _save_checkpoint(self, model, trial) -> None:
        """Save as the stock Trainer does; a run that is to stop ends here, before its clean-up of checkpoints.

        Raises:
            UserError: the last update left a weight that is no number, before any loss has shown it.
        """
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise weight_is_no_number(self.state.global_step, last_complete_checkpoint(self.args.output_dir))
        super()._save_checkpoint(model, trial)
        if self.stop_on_sigterm.stopping:
            raise self._stopped()

    def stop_if_told(self) -> None:
        """Raise `Stopped` if SIGTERM came after the last step of the training, whose model is saved by now."""
        if self.stop_on_sigterm.agree(self.args):
            raise self._stopped()

    def _stopped(self) -> Stopped:
        self.accelerator.wait_for_everyone()
        last = last_complete_checkpoint(self.args.output_dir)
        return self.stop_on_sigterm.stopped(last, self.state.global_step, self.state.max_steps)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `<split>_results.json`, and into `all_results.json`, each whole or not at all."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_whole(folder / f"{split}_results.json", json.dumps(metrics, indent=4, sort_keys=True))
        if combined:
            path = folder / "all_results.json"
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # there is none, or a damaged one, which is no reason to lose these
                known = {}
            write_whole(path, json.dumps(known | metrics, indent=4, sort_keys=True))

    def save_state(self) -> None:
        """Write `trainer_state.json` whole or not at all."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "trainer_state.json"
            self.state.save_to_json(f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them as the stock Trainer does, by torch's `weights_only`; what cannot be loaded is one line."""
        with as_user_error(f"'{checkpoint}' cannot be resumed", "resume from another checkpoint"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load it likewise."""
        with as_user_error(f"'{checkpoint}' cannot be resumed", "resume from another checkpoint"):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the state of each process; the first goes on to write `trainer_state.json` when all are there."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    # --- Hub --------------------------------------------------------------------------------------------------

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the recipe's card; the Trainer's own has an empty `model-index` for BLIP (T16)."""
        if self.is_world_process_zero():
            write_model_card(Path(self.args.output_dir), self.args.hub_model_id)

    def push_to_hub(self, *args, **kwargs) -> None:
        """Push the output folder as `run_captioning.py` does; the stock push uploads `training_args.bin` (T15)."""
        if self.is_world_process_zero():
            push(Repository(self.args.output_dir, self.args.hub_model_id, self.args.hub_private_repo))

    # --- Evaluation -------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Score and caption one batch, encoding its images once.

        The decoder generates from the image and the fixed prompt: stock `prediction_step` hands it the reference
        as a prompt (T1).

        Returns:
            `(None, (nll, num_tokens[, new_tokens]), labels)`, see `metrics.compute_metrics`. There is no loss per
            batch: the Trainer would average it over batches of different token counts (T6).
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        # The mixed precision of training: accelerate puts it on `model.forward`, which is not called here
        with torch.no_grad(), self.accelerator.autocast(), packed_for_evaluation(self.model):
            image_embeds = encode_images(self.model, inputs["pixel_values"])
            cross_attention = cross_attention_of(self.model, image_embeds)
            is_label = F.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0))
            logits = caption_logits(
                self.model, image_embeds, inputs["input_ids"], inputs["attention_mask"], is_label, cross_attention
            )
            outputs = (caption_nll(logits, labels, is_label), is_label.sum(dim=1))
            del logits
            if self.args.predict_with_generate:
                tokens = generate_captions(self.model, image_embeds, self.start_ids, cross_attention, **self.decoding)
                outputs += (tokens,)
        return None, outputs, labels

    def image_features(self, rows: Dataset) -> np.ndarray:
        """Return what the vision model makes of each image of a tokenized split, float32 `[N, D]`.

        The mean over the patches: trained on captions alone, the embedding of `[CLS]` need not sum the image up.
        """
        self.model.eval()
        features = []
        for inputs in self.get_test_dataloader(rows):
            pixel_values = self._prepare_inputs(inputs)["pixel_values"]
            with torch.no_grad(), self.accelerator.autocast():
                found = encode_images(self.model, pixel_values)[:, 1:].mean(dim=1)
            features.append(self.accelerator.gather_for_metrics(found).float().cpu().numpy())
        return np.concatenate(features)

    def word_attention(self, rows: Dataset, tokens: np.ndarray) -> list[list[tuple[str, np.ndarray]]]:
        """Return for each image the words of its caption, and where the decoder looked as it wrote them.

        Args:
            rows: N rows of a tokenized split.
            tokens: int `[N, T]`, what was generated for them, padded with the padding token or -100.

        Returns:
            N lists of words, each with the mean over its tokens of the maps `[H, W]` of `blip.attention_maps`.
        """
        self.model.eval()
        found = []
        for row, generated in zip(rows, tokens, strict=True):
            kept = torch.from_numpy(self._without_padding(generated))
            if not len(kept):
                found.append([])
                continue
            inputs = self._prepare_inputs(self.data_collator([row]))
            with torch.no_grad(), self.accelerator.autocast():
                image_embeds = encode_images(self.model, inputs["pixel_values"])
                maps = attention_maps(self.model, image_embeds, self.start_ids, kept.to(image_embeds.device))
            words: list[tuple[str, list[np.ndarray]]] = []
            names = self.tokenizer.convert_ids_to_tokens(kept.tolist())
            for name, attention in zip(names, maps.cpu().numpy(), strict=True):
                if name.startswith("##") and words:
                    word, pieces = words.pop()
                    words.append((word + name.removeprefix("##"), [*pieces, attention]))
                elif name not in self.tokenizer.all_special_tokens:
                    words.append((name, [attention]))
            found.append([(word, np.mean(pieces, axis=0)) for word, pieces in words])
        return found

    def _without_padding(self, generated: np.ndarray) -> np.ndarray:
        """Return the tokens `[T]` up to `[SEP]`, or without padding at their end; a model may write padding too."""
        tokens = generated[generated >= 0]
        ends = np.flatnonzero(tokens == self.tokenizer.sep_token_id)
        if len(ends):
            return tokens[: ends[0] + 1]
        written = np.flatnonzero(tokens != self.tokenizer.pad_token_id)
        return tokens[: written[-1] + 1] if len(written) else tokens[:0]

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """Run the stock loop; `_compute_metrics` scores against the full captions of `dataloader`'s split."""
        self._references = list(dataloader.dataset["caption"])
        # `evaluate` asks for `gather`, which would count the rows that pad the last batch of several processes
        self.gather_function = self.accelerator.gather_for_metrics
        with full_is_user_error(self.args.output_dir, self.args.eval_batch_size, "eval"):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _compute_metrics(self, prediction) -> dict[str, float]:
        return compute_metrics(prediction, self._references, self.tokenizer)


class LogBeforeCheckpoint(TrainerCallback):
    """Close the running mean of the logged loss before each checkpoint, which does not hold it.

    A resumed run would otherwise log another loss than one that was never interrupted.
    """

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a log when the step ends in a checkpoint."""
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


def caption_nll(logits: torch.Tensor, labels: torch.Tensor, is_label: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood float64 `[B]` in nats of each caption, without smoothing.

    Args:
        logits: `[N, V]`, from `blip.caption_logits`.
        labels: `[B, L]`.
        is_label: bool `[B, L]`, true at the N labels.
    """
    nll = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    nll[is_label] = F.cross_entropy(logits.float(), labels[is_label], reduction="none").double()
    return nll.sum(dim=1)


def mean_training_loss(log_history: list[dict[str, float]]) -> float:
    """Return the mean over steps of the losses in a `trainer_state.json` log, each the mean since the one before."""
    total, last_step = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last_step)
            last_step = entry["step"]
    return total / max(last_step, 1)
