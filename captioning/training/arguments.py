"""The arguments of a run: three dataclasses, of which the third has all fields of `Seq2SeqTrainingArguments`.

`recipe.py` fills them from a recipe and flags.
"""

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, Seq2SeqTrainingArguments
from transformers.hf_argparser import HfArg

from captioning.data.layout import Layout
from captioning.errors import UserError, as_user_error, did_you_mean
from captioning.hub.licenses import check_license
from captioning.training import decoding
from captioning.training.self_critical import parse_reward
from metrics import METRIC_NAMES


# The lowest and the highest value of a field, both included. Upper limits are far beyond any use: a typing error, or a
# recipe from a stranger, must not stop the machine, or fail only hours later at the first evaluation
RANGES = decoding.LIMITS | {
    "learning_rate": (0, 1e308),  # any float but infinity; a training that explodes is reported when it does
    "num_train_epochs": (0, 10**6),
    "max_rejected_fraction": (0, 1),
    "seed": (0, 2**32 - 1),  # of numpy
    "image_size": (1, 8192),
    "vocab_size": (100, 2**20),
    "lora_r": (1, 4096),
    "lora_alpha": (1, 2**20),
    "preprocessing_num_workers": (1, 512),
    "dataloader_num_workers": (0, 512),
    "num_samples": (2, 256),
    "sampling_temperature": (0.01, 100),
    "sampling_top_p": (0.001, 1),
    "retrieved_captions": (0, 64),
}
RANGES |= dict.fromkeys(("label_smoothing", "lora_dropout"), (0, 0.999))
RANGES |= dict.fromkeys(("data_seed", "neighbor_samples", "sampling_top_k", "caption_loss_weight"), (0, math.inf))
RANGES |= dict.fromkeys((
    "max_train_samples", "max_eval_samples", "max_predict_samples", "dataloader_prefetch_factor",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "eval_accumulation_steps", "tune_samples", "min_concept_count", "concept_neighbors",
), (1, math.inf))  # fmt: skip

# Fields of the Trainer that the rest relies on
FIXED_FIELDS = {
    "eval_do_concat_batches": (True, "scores are computed over the whole split"),
    "logging_nan_inf_filter": (False, "a loss that is NaN or infinite ends the run"),
    "remove_unused_columns": (False, "the collator reads the images from the rows"),
}


@dataclass
class ModelArguments:
    """Which model, and how it is adapted to the run."""

    model_name_or_path: str | None = HfArg(default=None, help="Hub id or folder of a pretrained captioning model.")
    model_revision: str = HfArg(default="main", help="Commit, branch or tag of a Hub id.")
    config_name: str | None = HfArg(default=None, help="Or config of a model to build: JSON file, folder or Hub id.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer or vocab.txt; else one is trained on captions.")
    vocab_size: int = HfArg(default=4096, help="Maximum number of entries of a tokenizer that is trained.")
    image_size: int | None = HfArg(default=None, help="Side in pixels, positions interpolated. Default: the model's.")
    freeze_vision_model: bool = HfArg(default=False, help="Train only what follows the vision model.")
    label_smoothing: float | None = HfArg(default=None, help="Smoothing of the training loss. Default: the model's.")
    fast_blip: bool = HfArg(default=True, help="The same numbers by faster code, for BLIP; false: stock transformers.")
    torch_dtype: Literal["float32", "bfloat16"] = HfArg(default="float32", help="Of weights that do not learn.")
    use_peft: bool = HfArg(default=False, help="Learn low-rank adapters (LoRA) in place of the weights.")
    lora_r: int = HfArg(default=16, help="Their rank.")
    lora_alpha: int = HfArg(default=32, help="Their output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout of their inputs.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Their layers. Default: linear ones of the text.")
    merge_lora: bool = HfArg(default=False, help="End with a plain model; the adapter is kept in adapter/.")
    model_config: dict | None = HfArg(default=None, help="Written into recipe.json: the config that config_name held.")

    def __post_init__(self):
        """Check the values that can be checked alone."""
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise UserError(
                "give either --model_name_or_path (a checkpoint, e.g. Salesforce/blip-image-captioning-base) "
                "or --config_name (a config to build from, e.g. recipes/configs/blip_small.json)"
            )
        if self.model_config and not self.config_name:
            raise UserError("model_config is the content of config_name, which is missing; set --config_name")
        if self.tokenizer_name and self.model_name_or_path:
            raise UserError("tokenizer_name goes with config_name only: a checkpoint has its own tokenizer")
        if self.use_peft and self.config_name:
            raise UserError("use_peft adapts a trained model, not random weights; give it by --model_name_or_path")
        of_lora = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora")
        given = [name for name in of_lora if getattr(self, name) != self.__dataclass_fields__[name].default]
        if given and not self.use_peft:
            raise UserError(f"{given[0]} goes with use_peft, without which all weights learn; set --use_peft true")
        _check_ranges(self)


@dataclass
class DataArguments(Layout):
    """Which images and captions; the fields of `Layout` say which columns and splits."""

    dataset_name: str = HfArg(default="eltorio/ROCOv2-radiology", help="Hub id, folder, table or 'phantoms'.")
    dataset_revision: str | None = HfArg(default=None, help="Commit, branch or tag of a Hub id.")
    streaming: bool = HfArg(default=False, help="Read images when needed, from parquet on the Hub or in a folder.")
    max_caption_length: int = HfArg(default=64, help="Tokens that a caption is cut to; start, prompt and end count.")
    prompt: str | None = HfArg(default=None, help="Text that every caption continues: not learned, and not scored.")
    restore_surface_form: bool = HfArg(default=True, help="Restore the case and spacing that BLIP's tokenizer loses.")
    max_train_samples: int | None = HfArg(default=None, help="Use only so many rows, the first ones.")
    max_eval_samples: int | None = HfArg(default=None, help="The same for the validation split.")
    max_predict_samples: int | None = HfArg(default=None, help="The same for the test split.")
    max_rejected_fraction: float = HfArg(default=0.01, help="Share of a split's rows that may be unusable.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes that check the rows.")
    neighbor_samples: int = HfArg(default=10_000, help="Training images of the nearest-image baseline; 0: no such.")
    language: str = HfArg(default="en", help="Language of the captions (ISO 639), for the model card.")
    license: str | None = HfArg(default=None, help="License of the model, a Hub id. Default: that of known data.")
    publish_images: bool = HfArg(default=False, help="Show test images in the card, where their license allows it.")

    def __post_init__(self):
        """Check the values that can be checked alone."""
        super().__post_init__()
        _check_ranges(self)
        check_license(self.license)

    def max_samples(self) -> dict[str, int | None]:
        """Return by split how many rows the run uses at most, None for all."""
        return dict(train=self.max_train_samples, validation=self.max_eval_samples, test=self.max_predict_samples)


@dataclass
class CaptioningArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the defaults of this recipe, and the decode settings."""

    # Stages
    do_train: bool = HfArg(default=True, help="Whether to train.")
    do_eval: bool = HfArg(default=True, help="Whether to score the validation split.")
    do_predict: bool = HfArg(default=True, help="Whether to score the test split.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="'true', for the last one, or a checkpoint.")
    resume_despite_changes: bool = HfArg(default=False, help="Resume though data, tokenizer or model have changed.")

    # Optimization: as in published fine-tunes of BLIP on ROCOv2
    learning_rate: float = HfArg(default=1e-5, help="Peak learning rate of AdamW.")
    weight_decay: float = HfArg(default=0.05, help="Weight decay of AdamW.")
    num_train_epochs: float = HfArg(default=5.0, help="Epochs.")
    warmup_steps: float = HfArg(default=0.05, help="Steps of linear warm-up; below 1, a share of all.")
    bf16: bool | None = HfArg(default=None, help="Default: if the GPU has it.")

    # Self-critical training; sampled as in a published run on ROCOv2
    objective: Literal["likelihood", "self_critical"] = HfArg(default="likelihood", help="Or from scored samples.")
    reward: str = HfArg(default="rougeL", help="Scores with weights, e.g. imageclef_rouge1=0.5,concept_f1=0.5.")
    num_samples: int = HfArg(default=4, help="Samples of each image; each is judged by the others.")
    sampling_temperature: float = HfArg(default=0.9, help="Their logits are divided by it.")
    sampling_top_k: int = HfArg(default=40, help="They take one of so many most probable tokens; 0: of all.")
    sampling_top_p: float = HfArg(default=0.85, help="Of these, one of the fewest that have this probability.")
    caption_loss_weight: float = HfArg(default=0.0, help="Weight of the usual loss of the captions beside it.")

    # Concepts
    concept_loss_weight: str = HfArg(default="0", help="Learn concepts too, so weighted; auto: .1 of the captions.")
    concept_loss: Literal["asymmetric", "bce"] = HfArg(default="asymmetric", help="bce weighs positives by rarity.")
    min_concept_count: int = HfArg(default=10, help="Training images that a concept needs to be learned.")
    unlabeled_are_negative: bool = HfArg(default=False, help="Images without concepts count as having none of them.")
    concept_thresholds: Literal["one", "each"] = HfArg(default="one", help="One for all, or each concept its own.")
    concept_neighbors: int = HfArg(default=20, help="Nearest training images whose concepts are the baseline.")
    retriever: str | None = HfArg(default=None, help="Vision model that finds these images. Default: the model.")
    retriever_revision: str | None = HfArg(default=None, help="Its commit, branch or tag.")

    # Captions in the prompt
    retrieved_captions: int = HfArg(default=0, help="So many captions of near images, by --retriever, in each prompt.")
    retrieve_across_groups: bool = HfArg(default=False, help="Also those of images of the same --group_column.")

    # Evaluation, checkpoints, logs
    eval_strategy: str = HfArg(default="epoch", help="no, steps or epoch.")
    save_strategy: str = HfArg(default="epoch", help="no, steps, epoch or best.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints to keep, the best one included.")
    load_best_model_at_end: bool = HfArg(default=True, help="End with the best checkpoint.")
    metric_for_best_model: str | None = HfArg(default="rougeL", help="What decides which checkpoint is the best.")
    logging_steps: float = HfArg(default=50, help="Steps between logs; below 1, a share of all.")
    # The order of the union is the Trainer's: its argument parser reads the second member
    report_to: None | str | list[str] = HfArg(default="tensorboard", help="Where logs go.")  # noqa: RUF036
    train_sampling_strategy: Literal["random", "sequential"] = HfArg(default="random", help="Order of the rows.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Must stay false: NaN or infinity ends the run.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator reads the images.")

    # Decoding
    predict_with_generate: bool = HfArg(default=True, help="Generate captions; false: evaluate the loss only.")
    num_beams: int = HfArg(default=3, help="Beams of beam search; 1: greedy search.")
    max_new_tokens: int = HfArg(default=64, help="Maximum generated tokens, the end token included.")
    min_new_tokens: int = HfArg(default=0, help="Minimum generated tokens.")
    no_repeat_ngram_size: int = HfArg(default=0, help="Size of n-grams that occur once in a caption at most; 0: none.")
    length_penalty: float = HfArg(default=1.0, help="A beam's score is divided by its length to this power.")
    tune_decoding: bool = HfArg(default=False, help="At the end, choose among decode settings on validation images.")
    tune_decoding_grid: list[str] = HfArg(default_factory=lambda: [*decoding.DEFAULT_GRID], help="Those to try.")
    tune_samples: int = HfArg(default=500, help="The most validation images that they are tried on.")

    # Scores
    coco_metrics: bool = HfArg(default=True, help="BLEU, CIDEr and METEOR of the final captions; they need Java.")
    bertscore_model: str | None = HfArg(default=None, help="For BERTScore, e.g. microsoft/deberta-xlarge-mnli.")
    write_submission: bool = HfArg(default=False, help="Write submission.csv and .zip for ImageCLEF (test split).")

    accelerator_config: dict | str | None = HfArg(default=None, help="A JSON object of accelerate's settings.")
    push_to_hub: bool = HfArg(default=False, help="Push checkpoints during training, and the whole run at its end.")
    tuned_decoding: dict | None = HfArg(default=None, help="Written into recipe.json: settings tried, with scores.")
    package_versions: dict | None = HfArg(default=None, help="Written into recipe.json: the packages of the run.")
    hardware: dict | None = HfArg(default=None, help="Written into recipe.json: device, processor and threads.")
    code: dict | None = HfArg(default=None, help="Written into recipe.json: address and commit of this project.")
    fingerprint: dict | None = HfArg(default=None, help="Written into recipe.json: digests of data, tokenizer, model.")
    changed_on_resume: dict | None = HfArg(default=None, help="Written into recipe.json: values before and after.")
    has_default_output_dir: bool = field(default=False, init=False)  # no folder was named

    def __post_init__(self):
        """Check our values, resolve precision and stages, then let the Trainer's arguments check themselves."""
        _check_ranges(self)
        self._check_fields_of_the_trainer()
        self._check_combinations()
        if (self.resume_from_checkpoint or "").lower() in ("", "false"):
            self.resume_from_checkpoint = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate starts no process group, and each process trains on its own
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dataloader_pin_memory &= torch.cuda.is_available()  # else torch warns at each loader
        if not (self.do_train and self.do_eval):
            self.eval_strategy, self.load_best_model_at_end = "no", False
        if not self.predict_with_generate and self.metric_for_best_model not in ("loss", "eval_loss"):
            self.metric_for_best_model = "loss"
        self._check_best_model()
        self._check_tuning()
        super().__post_init__()
        self._check_checkpointing()
        self._check_accelerator()

    def _check_fields_of_the_trainer(self) -> None:
        for name, (needed, reason) in FIXED_FIELDS.items():
            if getattr(self, name) != needed:
                raise UserError(f"{name} must stay {str(needed).lower()}: {reason}")
        settings = self.accelerator_config
        if isinstance(settings, str) and not settings.lstrip().startswith("{"):
            raise UserError(f"accelerator_config is '{settings}'; set a JSON object")  # not a file, which has no end
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise UserError("dataloader_persistent_workers needs workers; set --dataloader_num_workers to 1 or more")

    def _check_combinations(self) -> None:
        decoding.check_decoding(vars(self))
        if self.push_to_hub and not self.do_train:
            raise UserError("push_to_hub goes with do_train; a finished run is pushed by --push_only <output folder>")
        if self.write_submission and not (self.do_predict and self.predict_with_generate):
            raise UserError("write_submission needs captions of the test split: do_predict and predict_with_generate")
        parse_reward(self.reward)
        weight = self.concept_weight()
        if weight is not None and not 0 <= weight < math.inf:
            raise UserError(f"concept_loss_weight is {weight}; set auto, or a number from 0")
        if self.learns_concepts and self.objective == "self_critical":
            raise UserError("concept_loss_weight goes with --objective likelihood: samples teach captions alone")
        if self.retrieved_captions and not self.retriever:
            raise UserError(
                "retrieved_captions needs a model that does not change while this one learns; set --retriever to a "
                "vision model such as facebook/dinov2-base"
            )

    def _check_accelerator(self) -> None:
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise UserError("accelerator_config: split_batches and dispatch_batches must be off: rows are dealt here")
        if self.n_gpu > 1:
            raise UserError(
                f"one process would use {self.n_gpu} GPUs by DataParallel, whose loss differs; start with torchrun "
                "--nproc_per_node, see docs/distributed.md, or set CUDA_VISIBLE_DEVICES to one of them"
            )

    def _check_checkpointing(self) -> None:
        """Let torch report now what it would report in the first step."""
        settings = self.activation_checkpointing_kwargs or {}  # where transformers keeps gradient_checkpointing_kwargs
        with as_user_error("gradient_checkpointing_kwargs"), warnings.catch_warnings(action="ignore"):
            checkpoint(torch.neg, torch.ones(1, requires_grad=True), **settings)

    def _check_best_model(self) -> None:
        """Report here what the Trainer would report at the end of the first epoch."""
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in METRIC_NAMES:
            hint = did_you_mean(metric, METRIC_NAMES) or f"; there are {', '.join(METRIC_NAMES)}"
            raise UserError(f"metric_for_best_model '{self.metric_for_best_model}' is not measured{hint}")
        if self.greater_is_better is None:
            self.greater_is_better = metric not in ("loss", "perplexity")
        if self.save_strategy == "no":
            self.load_best_model_at_end = False

    def _check_tuning(self) -> None:
        if self.tune_decoding:
            if not (self.do_eval and self.predict_with_generate):
                needed = "do_eval and predict_with_generate"
                raise UserError(f"tune_decoding needs captions of the validation split: {needed}")
            if self.metric_for_best_model.removeprefix("eval_") in ("loss", "perplexity"):
                raise UserError("tune_decoding: decoding does not change the loss; set --metric_for_best_model rougeL")
            for settings in decoding.settings_of_grid(vars(self), self.tune_decoding_grid):
                decoding.check_decoding(vars(self) | settings)
        if self.tuned_decoding is not None:  # of a recipe, and shown in card and page
            with as_user_error("tuned_decoding is not what a run writes", "leave it out"):
                decoding.check_decoding(vars(self) | self.tuned_decoding["before"])
                metric, table = self.tuned_decoding["metric"], self.tuned_decoding["table"]
                scores = [row[metric] + row["gen_len"] for row in table]
                words = "".join([self.tuned_decoding["note"], *(row["decoding"] for row in table)])
                if not (metric in METRIC_NAMES and all(map(math.isfinite, scores)) and words.isprintable()):
                    raise ValueError("it has another metric, scores or words")

    @property
    def learns_concepts(self) -> bool:
        """Whether a training learns concepts."""
        return self.concept_weight() != 0

    def concept_weight(self) -> float | None:
        """Return the weight of the loss of the concepts, None for `auto`."""
        with as_user_error(f"concept_loss_weight is '{self.concept_loss_weight}'", "set auto, or a number from 0"):
            return None if self.concept_loss_weight == "auto" else float(self.concept_loss_weight)

    def decoding(self, in_training: bool = False) -> GenerationConfig:
        """Return the decode settings, or those of the training, where it chose others at its end."""
        before = (self.tuned_decoding or {}).get("before", {}) if in_training else {}
        return decoding.generation_config(vars(self) | before)


@dataclass
class PushArguments:
    """A finished run that is pushed without running anything."""

    push_only: str = HfArg(help="Output folder of a finished run; nothing is run, it is only pushed.")
    hub_model_id: str | None = HfArg(default=None, help="<user>/<name>; default: the folder's name.")
    hub_private_repo: bool | None = HfArg(default=None, help="Whether a new repository is private.")


def _check_ranges(arguments: Any) -> None:
    """Raise a UserError for a field that is NaN, infinite or outside of its range; None is not checked."""
    for name, (lowest, highest) in RANGES.items():
        value = getattr(arguments, name, None)
        if value is not None:
            decoding.check_range(name, value, lowest, highest)
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):  # a recipe, which is JSON, could not hold it
            hint = "0 to clip nothing" if name == "max_grad_norm" else "a finite number"
            raise UserError(f"{name} is {value}; set --{name} to {hint}")
