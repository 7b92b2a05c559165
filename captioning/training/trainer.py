"""`CaptioningTrainer`: a loss normalized by tokens, evaluation that encodes each image once, whole checkpoints."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.data import DataLoader
from transformers import EvalPrediction, GenerationConfig, Seq2SeqTrainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import ModelOutput

from captioning.command_line import on_stop_signals
from captioning.data.streaming import is_streamed
from captioning.errors import Stopped, UserError, as_user_error, printable
from captioning.files import to_json, without_nan, write_whole
from captioning.models import lora
from captioning.models.captioner import Captioner
from captioning.models.concept_head import WEIGHTS_FILE
from captioning.models.weights import nan_weights, refuse_nan_weights
from captioning.stages import stage
from captioning.training.checkpoints import last_complete_checkpoint
from captioning.training.concept_loss import CaptionAndConceptLoss
from captioning.training.fingerprint import FINGERPRINT_FILE
from captioning.training.safeguards import StopOnSignal, full_is_user_error, not_finite
from captioning.training.samplers import PaddedRows, PaddedSampler, StreamingSampler
from captioning.training.self_critical import SelfCritical


BESIDE = ("image_id", "concept_labels")  # in a batch of `CaptioningCollator`, and no input of the model
MAX_IDS_WIDTH = 200  # characters, of the image ids of a batch whose loss is NaN or infinite


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation returns for the N images of a split; without generation only the first two."""

    nll: np.ndarray  # float64 `[N]`, negative log-likelihood of each reference in nats, summed over its tokens
    num_tokens: np.ndarray  # int `[N]`, of the references
    tokens: np.ndarray | None = None  # int `[N, T]`, the new ones, padded
    num_new_tokens: np.ndarray | None = None  # int `[N]`, without padding
    captions: list[str] | None = None
    features: np.ndarray | None = None  # float32 `[N, D]`, of the images


class CaptioningTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` whose losses, generation and metrics are right for captioning models.

    Its `processing_class` is the whole processor, so that checkpoints hold all of it (T8).

    Args:
        captioner: the model and its processor.
        generation_config: the decode settings of evaluation.
        compute_metrics: called with an `EvalPrediction` whose `predictions` are an `Evaluated`, and whose `label_ids`
            are the N full reference captions: the labels are truncated, which would flatter the scores (T9).
        publish: called by `push_to_hub`.
        objective: what is learned in place of the reference captions, or beside them.
        kwargs: those of `Seq2SeqTrainer`; datasets have the columns of a tokenized split.
    """

    def __init__(
        self,
        *,
        captioner: Captioner,
        generation_config: GenerationConfig,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        publish: Callable[[], None] | None = None,
        objective: SelfCritical | CaptionAndConceptLoss | None = None,
        **kwargs,
    ):
        if kwargs["args"].ddp_find_unused_parameters is None and captioner.uses_all_parameters:
            kwargs["args"].ddp_find_unused_parameters = False
        stock = {"model": captioner.model, "processing_class": captioner.processor}
        super().__init__(compute_metrics=self._compute_metrics, **stock, **kwargs)
        self.captioner, self.generation_config = captioner, generation_config
        self._metrics_of_texts, self._publish = compute_metrics, publish
        self.objective, self._beside = objective, {}
        # The Trainer shall count the labels of the accumulated batch and not divide by its steps: `compute_loss` does
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False
        # Tied weights are stored once; without this, loading a checkpoint warns that they are missing
        self.model._keys_to_ignore_on_save = list(self.model.all_tied_weights_keys)
        self.stop_on_signal = StopOnSignal()
        for callback in (self.stop_on_signal, LogBeforeCheckpoint()):
            self.add_callback(callback)

    # --- Training ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the stock loader; several processes share the global batches that one process would have."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        rows, size = PaddedRows(self.train_dataset, self.captioner.prompt_row), self._train_batch_size
        return self._get_dataloader(rows, "Training", size, sampler_fn=self._padded_sampler, is_training=True)

    def _padded_sampler(self, rows: PaddedRows) -> PaddedSampler:
        global_batch = self._train_batch_size * self.args.world_size
        return PaddedSampler(self._get_train_sampler(rows.rows), len(rows), global_batch, self.args.data_seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the sum of token NLLs over the number of caption tokens in the whole accumulated batch (T2).

        A model's own loss is the mean over the tokens of one micro-batch, smoothed where its config says so (T5).
        """
        if self.objective:
            outputs, loss = None, self.objective.loss(self, model, inputs, self._beside, num_items_in_batch)
        else:
            outputs = self.captioner.forward(model, inputs)
            loss = self.caption_loss(outputs, inputs["labels"], num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # items are those of all processes, which average gradients
        return (loss, outputs) if return_outputs else loss

    def caption_loss(self, outputs: ModelOutput, labels: torch.Tensor, num_items: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the token NLLs over `num_items`, by default the number of targets of `labels`."""
        num_tokens = self.captioner.num_targets(labels).sum()
        if not num_tokens:
            return outputs.logits.sum() * 0  # keeps the graph, so that DDP's all-reduce still runs
        total = torch.as_tensor(num_tokens if num_items is None else num_items, device=num_tokens.device)
        return outputs.loss * num_tokens / total.flatten()[0]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Count the caption tokens of an accumulated batch and, for another objective, the images that it counts."""
        num_tokens = super()._get_num_items_in_batch(batch_samples, device)
        if not self.objective or num_tokens is None:
            return num_tokens
        images = sum(self.objective.num_images(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices:
            images = self.accelerator.gather(images).sum()
        return torch.stack([num_tokens, images])

    def _get_train_sampler(self, train_dataset=None):
        args, rows = self.args, self.train_dataset if train_dataset is None else train_dataset
        if not is_streamed(rows) or args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        sampler = StreamingSampler(rows, args.seed if args.data_seed is None else args.data_seed)
        self.remove_callback(StreamingSampler)  # that of an earlier training
        self.add_callback(sampler)
        return sampler

    def create_optimizer(self, *args, **kwargs):
        """Build the stock optimizer; arguments that it refuses are a user's mistake."""
        with as_user_error("the optimizer cannot be built", "check --optim and --optim_args"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Build the stock schedule; arguments that it refuses, or fails with at a step, are a user's mistake."""
        with as_user_error("the schedule cannot be built", "check --lr_scheduler_type and --lr_scheduler_kwargs"):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            for rate in getattr(scheduler, "lr_lambdas", ()):
                for step in (0, num_training_steps // 2, num_training_steps):
                    rate(step)
            return scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Run the stock step; a loss of NaN or infinity ends the run before it reaches the weights."""
        self._beside = {name: inputs.pop(name) for name in BESIDE if name in inputs}
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            ids = printable(", ".join(self._beside.get("image_id", ["unknown"])), MAX_IDS_WIDTH)
            what = f"the loss of step {self.state.global_step + 1} is {loss.item()}, at the images {ids}"
            raise not_finite(what, self.args.output_dir)
        return loss

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train; the `train_loss` returned is the mean over all steps of the run, also of those before a resume.

        NaN, infinity, full memory or disk raise a UserError, a signal `Stopped` when a checkpoint is saved.
        """
        full = full_is_user_error(self.args.output_dir, self._train_batch_size, "train")
        with on_stop_signals(self.stop_on_signal.receive), full:
            output = super().train(*args, **kwargs)
            if self.stop_on_signal.stopping:
                raise self._stopped()
        loss = mean_training_loss(self.state.log_history)
        return output._replace(training_loss=loss, metrics=output.metrics | {"train_loss": loss})

    # --- Files ------------------------------------------------------------------------------------------------

    @stage("saving")
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the stock Trainer does; in the output folder each file appears whole, the weights last."""
        if output_dir is not None:  # a checkpoint, which is complete when its `trainer_state.json` is there
            super().save_model(output_dir, _internal_call)
            self._save_parts(output_dir)
            if self.args.should_save and self.args.fingerprint:
                write_whole(Path(output_dir) / FINGERPRINT_FILE, json.dumps(self.args.fingerprint, indent=2) + "\n")
            return
        folder = Path(self.args.output_dir)
        staged = folder / "model.tmp"
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        try:
            with full_is_user_error(str(folder), self._train_batch_size, "train"):
                super().save_model(str(staged), _internal_call=True)
                self._save_parts(staged)
        except UserError:
            shutil.rmtree(staged, ignore_errors=True)  # half a model is of no use and takes space
            raise
        if self.args.should_save:
            for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                if (folder / path.name).is_dir():
                    shutil.rmtree(folder / path.name)
                os.replace(path, folder / path.name)
            staged.rmdir()

    def _save_parts(self, folder: str | Path) -> None:
        if not self.args.should_save:
            return
        if lora.is_adapted(self.model):
            lora.save_config(self.captioner, folder)
        for part in (self.captioner.surface_form, self.captioner.concept_head):
            if part:
                part.save(folder)

    def merge_adapter(self) -> None:
        """Make the saved adapter a part of the weights, and save the whole model; the adapter goes into `adapter/`."""
        lora.merge_adapter(self.captioner)
        self.model = self.model_wrapped = self.captioner.model
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            (folder / "adapter").mkdir(exist_ok=True)
            for name in (lora.ADAPTER_CONFIG, lora.ADAPTER_WEIGHTS, lora.BASE_CONFIG):
                os.replace(folder / name, folder / "adapter" / name)
        self._save_parts(folder / "adapter")
        self.save_model()

    @stage("saving")
    def _save_checkpoint(self, model, trial) -> None:
        """Save as the stock Trainer does; a run that is to stop ends here, before old checkpoints are deleted.

        A weight may be NaN or infinity after the last update, which no loss has shown yet: that is a UserError.
        """
        if nan_weights(self.model):
            what = f"step {self.state.global_step} made weights NaN or infinite, and no checkpoint is saved"
            raise not_finite(what, self.args.output_dir)
        was_there = os.path.isdir(self.args.output_dir)
        super()._save_checkpoint(model, trial)
        if not was_there:
            go_on = "a checkpoint is saved there: go on from it with --resume_from_checkpoint true"
            raise UserError(f"output folder '{self.args.output_dir}' was removed during the training; {go_on}")
        if self.stop_on_signal.stopping:
            raise self._stopped()

    def stop_if_told(self) -> None:
        """Raise `Stopped` if a signal came after the last step of the training, whose model is saved by now."""
        if self.stop_on_signal.agree(self.args):
            raise self._stopped()

    def _stopped(self) -> Stopped:
        self.accelerator.wait_for_everyone()
        last, number = last_complete_checkpoint(self.args.output_dir), self.stop_on_signal.received
        step = f"step {self.state.global_step} of {self.state.max_steps}"
        go_on = f"go on with the same command and --resume_from_checkpoint true{f', from {last}' if last else ''}"
        return Stopped(f"stopped by {signal.Signals(number).name} after {step}; {go_on}", number)

    def save_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Write `<split>_results.json`, and into `all_results.json`, each whole or not at all."""
        if self.is_world_process_zero():
            own, path = (Path(self.args.output_dir) / f"{name}_results.json" for name in (split, "all"))
            write_whole(own, to_json(metrics, indent=4, sort_keys=True))
            known = {}
            with suppress(OSError, ValueError, TypeError):  # missing or damaged
                known = dict(json.loads(path.read_text(encoding="utf-8")))
            write_whole(path, to_json(known | metrics, indent=4, sort_keys=True))

    def save_state(self) -> None:
        """Write `trainer_state.json` whole or not at all."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "trainer_state.json"
            self.state.save_to_json(f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the stock Trainer does; the log that is saved has None in place of NaN and infinity."""
        if self.objective and "loss" in logs:
            logs |= self.objective.measured(self)
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = without_nan(self.state.log_history[-1])

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        is_new = super()._determine_best_metric(*args, **kwargs)
        self.state.best_metric = without_nan(self.state.best_metric)  # infinite as long as each metric was NaN
        return is_new

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        mend = "resume from another checkpoint, or set another --output_dir"
        with as_user_error(f"the weights in '{resume_from_checkpoint}' are not those of this model", mend):
            if not self._loads_by_old_names(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_concept_head(resume_from_checkpoint)
        refuse_nan_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._loads_by_old_names(self.state.best_model_checkpoint):
            super()._load_best_model()
        self._load_concept_head(self.state.best_model_checkpoint)

    def _load_concept_head(self, folder: str) -> None:
        if self.captioner.concept_head:
            self.captioner.concept_head.load_weights(Path(folder) / WEIGHTS_FILE)

    def _loads_by_old_names(self, folder: str) -> bool:
        """Load the weights of a checkpoint if they are saved under other names than those in the model (T18).

        `save_pretrained` writes many families under the names that transformers 4 gave them, which `from_pretrained`
        knows. The Trainer does not: it would load none of them, warn, and go on from the weights that are there.
        """
        file = Path(folder) / lora.WEIGHT_FILES[0]
        if lora.is_adapted(self.model) or not file.is_file():
            return False
        with safe_open(file, "pt") as weights:
            if set(weights.keys()) <= self.model.state_dict().keys():
                return False
        saved, loading = type(self.model).from_pretrained(folder, dtype=self.model.dtype, output_loading_info=True)
        self._issue_warnings_after_load(_IncompatibleKeys(loading["missing_keys"], loading["unexpected_keys"]))
        self.model.load_state_dict(saved.state_dict())
        return True

    def _issue_warnings_after_load(self, load_result) -> None:
        super()._issue_warnings_after_load(load_result)  # ties the weights that are stored once
        missing = set(load_result.missing_keys) - set(self.model._keys_to_ignore_on_save)
        if unlike := sorted({*missing, *load_result.unexpected_keys}):
            raise KeyError(f"{len(unlike)} are missing or unknown, such as {unlike[0]}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with as_user_error(f"'{checkpoint}' cannot be resumed", "resume from another checkpoint"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with as_user_error(f"'{checkpoint}' cannot be resumed", "resume from another checkpoint"):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait until each process has saved its state: then the first writes `trainer_state.json`."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, **kwargs) -> None:
        """Do nothing: the card is written after the run; the Trainer's own has no scores (T16)."""

    def push_to_hub(self, *args, **kwargs) -> None:
        """Publish the output folder by `publish`; the stock push uploads `training_args.bin` (T15)."""
        if self._publish and self.is_world_process_zero():
            self._publish()

    # --- Evaluation -------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs):
        """Move a batch to the device, without what is no input of the model."""
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name not in BESIDE})

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Score and caption one batch, encoding its images once; the reference is no prompt, as it is in stock (T1).

        Returns:
            `(None, (nll, num_tokens[, tokens, features]), labels)`, see `Evaluated`. None instead of the batch's loss,
            which the Trainer would average over batches of different token counts (T6).
        """
        inputs = self._prepare_inputs(inputs)
        captioner = self.captioner
        # Mixed precision as in training: accelerate applies it to `model.forward`, which is not called here
        with torch.no_grad(), self.accelerator.autocast(), captioner.evaluation():
            encoded = captioner.encode_images(inputs)
            outputs = (captioner.caption_nll(encoded, inputs), captioner.num_targets(inputs["labels"]))
            if self.args.predict_with_generate:
                features = captioner.image_features(encoded)
                outputs += (captioner.generate(encoded, self.generation_config), features)
        return None, outputs, inputs["labels"]

    def evaluation_loop(self, dataloader, *args, **kwargs) -> EvalLoopOutput:
        """Run the stock loop; its `predictions` are an `Evaluated`."""
        self._references = list(dataloader.dataset["caption"])
        # `evaluate` would set `gather`, which keeps the rows that pad the last batch of several processes
        self.gather_function = self.accelerator.gather_for_metrics
        full = full_is_user_error(self.args.output_dir, self.args.eval_batch_size, "eval")
        with full, stage("evaluation in training" if self.is_in_train else "prediction"):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        return output._replace(predictions=self._evaluated)

    @stage("scores")
    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Turn the tokens of a split into text, once, and call `compute_metrics` with an `Evaluated`."""
        nll, num_tokens, *generated = prediction.predictions
        self._evaluated = Evaluated(nll, num_tokens)
        if generated:
            tokens, features = generated
            num_new_tokens, captions = self.captioner.num_new_tokens(tokens), self.captioner.decode(tokens)
            self._evaluated = Evaluated(nll, num_tokens, tokens, num_new_tokens, captions, features)
        if self._metrics_of_texts is None:
            return {}
        return self._metrics_of_texts(EvalPrediction(predictions=self._evaluated, label_ids=self._references))

    def image_features(self, rows: Dataset) -> np.ndarray:
        """Return the features of the images of a tokenized split, float32 `[N, D]`."""
        self.model.eval()
        features = []
        for inputs in self.get_test_dataloader(rows):
            with torch.no_grad(), self.accelerator.autocast():
                found = self.captioner.image_features(self.captioner.encode_images(self._prepare_inputs(inputs)))
            features.append(self.accelerator.gather_for_metrics(found).cpu().numpy())
        return np.concatenate(features)

    def caption(self, image: Image.Image, captioner: Captioner | None = None) -> str:
        """Return the caption of one image, decoded as in evaluation, by the model or by another `captioner`."""
        captioner = captioner or self.captioner
        captioner.model.eval()
        inputs = self._prepare_inputs(captioner.collate([image], [captioner.prompt_row]))
        with torch.no_grad(), self.accelerator.autocast(), captioner.evaluation():
            tokens = captioner.generate(captioner.encode_images(inputs), self.generation_config)
        return captioner.decode(tokens.cpu().numpy())[0]

    def word_attention(self, rows: Dataset, tokens: np.ndarray) -> list[list[tuple[str, np.ndarray]]]:
        """Return the words of the captions `tokens` of N rows, int `[N, T]` and padded, with their attention maps.

        These are N lists of words, each with its map `[H, W]`, see `Captioner.word_attention`; they are empty if the
        model has no such maps.
        """
        self.model.eval()
        found = []
        for row, generated in zip(rows, tokens, strict=True):
            kept = torch.from_numpy(self.captioner.without_padding(generated)).to(self.args.device)
            with torch.no_grad(), self.accelerator.autocast():
                encoded = self.captioner.encode_images(self._prepare_inputs(self.data_collator([row])))
                found.append((self.captioner.word_attention(encoded, kept) if len(kept) else None) or [])
        return found


class LogBeforeCheckpoint(TrainerCallback):
    """Log the running mean of the loss before each checkpoint, which does not hold it: a resumed run logs the same."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a log when the step ends in a checkpoint."""
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


def mean_training_loss(log_history: list[dict[str, float]]) -> float:
    """Return the mean over all steps of the losses in a log, each of which is the mean since the previous one."""
    total, last_step = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last_step)
            last_step = entry["step"]
    return total / max(last_step, 1)
