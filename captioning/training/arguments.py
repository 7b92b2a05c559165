"""The arguments of a run: three dataclasses, the third of which has all fields of `Seq2SeqTrainingArguments`.

`recipe.py` fills them from a recipe and flags.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Seq2SeqTrainingArguments

from captioning.errors import UserError, did_you_mean
from captioning.training.decoding import generation_config
from metrics import METRIC_NAMES


MAX_RECIPE = 2**20  # bytes
MAX_BEAMS = 256  # far beyond what helps; a memory that they fill is noticed at the first evaluation only
MAX_LENGTH_PENALTY = 100  # exponent of a length of some hundreds: beyond that a double overflows
MAX_EPOCHS = 10**6
MAX_IMAGE_SIZE = 8192  # pixels a side
MAX_VOCABULARY = 2**20  # entries
MAX_WORKERS = 512  # processes; a slip of the finger, or a stranger's recipe, could stop the machine


@dataclass
class ModelArguments:
    """Which BLIP, and how it is adapted to the run."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a BlipForConditionalGeneration checkpoint."}
    )
    model_revision: str = field(default="main", metadata={"help": "Commit, branch or tag of a Hub id."})
    config_name: str | None = field(
        default=None, metadata={"help": "BlipConfig JSON of a model to build with random weights instead."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "With config_name: Hub id, folder of a tokenizer, or folder with a WordPiece vocab.txt. "
            "Default: one is trained on the training captions."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Most entries of a tokenizer that is trained."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels; position embeddings are interpolated. Default: the checkpoint's."},
    )
    freeze_vision_model: bool = field(default=False, metadata={"help": "Train the text decoder only."})
    label_smoothing: float | None = field(
        default=None,
        metadata={"help": "Weight of the uniform distribution in the training loss. Default: the checkpoint's."},
    )
    fast_blip: bool = field(
        default=True,
        metadata={"help": "The same numbers, several times as fast. false: attention and beam search as shipped."},
    )

    def __post_init__(self):
        """Check the values that need nothing but themselves."""
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise UserError(
                "give either --model_name_or_path (a checkpoint, e.g. Salesforce/blip-image-captioning-base) "
                "or --config_name (a config to build from, e.g. recipes/configs/blip_small.json)"
            )
        if self.tokenizer_name and self.model_name_or_path:
            raise UserError("tokenizer_name goes with config_name only: a checkpoint brings its own tokenizer")
        _at_least(self, "vocab_size", 100)
        _at_most(self, "vocab_size", MAX_VOCABULARY)
        _at_least(self, "image_size", 1)
        _at_most(self, "image_size", MAX_IMAGE_SIZE)
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; set it from 0 to below 1")


@dataclass
class DataArguments:
    """Which images and captions."""

    dataset_name: str = field(
        default="eltorio/ROCOv2-radiology",
        metadata={"help": "Hub id, folder (save_to_disk, parquet or Zenodo layout), or 'phantoms'."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of a Hub id."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read images when they are needed, from the Hub or parquet shards; nothing is downloaded."},
    )
    max_caption_length: int = field(
        default=64, metadata={"help": "WordPieces of a training caption, [DEC], prompt and [SEP] included."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "Text that every caption continues; given, not learnt, and not scored."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for the validation split."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same for the test split."})
    max_rejected_fraction: float = field(
        default=0.01, metadata={"help": "Share of a split's rows that may be unusable before the run stops."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that check the rows."})
    neighbor_samples: int = field(
        default=10_000,
        metadata={"help": "Training images among which the nearest is sought, for a baseline; 0 leaves it out."},
    )
    language: str = field(default="en", metadata={"help": "Language of the captions (ISO 639), for the model card."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "License of the trained model (a Hub license id), for the model card. Default: that of ROCOv2 or "
            "the phantoms where the data is one of them, else 'other'."
        },
    )

    def __post_init__(self):
        """Check the values that need nothing but themselves."""
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
            _at_least(self, name, 1)
        _at_least(self, "neighbor_samples", 0)
        _at_most(self, "preprocessing_num_workers", MAX_WORKERS)
        if not 0 <= self.max_rejected_fraction <= 1:
            raise UserError(f"max_rejected_fraction is {self.max_rejected_fraction}; set it from 0 to 1")

    def max_samples(self) -> dict[str, int | None]:
        """Return by split how many rows the run uses at most, None for all."""
        return {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }


@dataclass
class CaptioningArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the defaults of this recipe, and the decode settings."""

    # Stages
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to score the validation split."})
    do_predict: bool = field(default=True, metadata={"help": "Whether to score the test split."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "'true': the last complete checkpoint in output_dir; or a checkpoint's folder."},
    )

    # Optimization: the anchors of published BLIP fine-tunes on ROCOv2
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warm-up; below 1, a share of all."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast. Default: where the GPU has it.", "nargs": "?", "const": True},
    )

    # Evaluation, checkpoints, logs
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="rougeL", metadata={"help": "The metric it is best by."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between logs; below 1, a share of all."})
    # The order of the union is the Trainer's: its argument parser reads the second member
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "Where logs go."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Must stay false: a loss that is no number ends the run, it is not averaged away."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator reads them."})

    # Decoding
    predict_with_generate: bool = field(default=True, metadata={"help": "Generate captions; false: loss only."})
    num_beams: int = field(default=3, metadata={"help": "Beams."})
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens generated, [SEP] included."})
    min_new_tokens: int = field(default=0, metadata={"help": "Fewest tokens generated."})
    no_repeat_ngram_size: int = field(default=0, metadata={"help": "No n-gram of this size twice; 0: no rule."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Exponent of the length that a beam's score is divided by."}
    )

    # Scores
    coco_metrics: bool = field(
        default=True, metadata={"help": "BLEU, CIDEr, METEOR of the final captions; they need a Java runtime."}
    )
    bertscore_model: str | None = field(
        default=None,
        metadata={"help": "Weights of BERTScore, e.g. microsoft/deberta-xlarge-mnli (ImageCLEF's), at hand already."},
    )
    write_submission: bool = field(
        default=False, metadata={"help": "Write submission.csv and .zip for ImageCLEF, of the test split."}
    )

    push_to_hub: bool = field(
        default=False, metadata={"help": "Push checkpoints during training, and the whole run at its end."}
    )
    package_versions: dict | None = field(
        default=None, metadata={"help": "Written into recipe.json: the packages of the run."}
    )
    hardware: dict | None = field(
        default=None, metadata={"help": "Written into recipe.json: the device of the run, and its threads."}
    )

    def __post_init__(self):
        """Check our values, resolve precision and stages, then let the Trainer's arguments check themselves."""
        self._check_values()
        if (self.resume_from_checkpoint or "").lower() in ("", "false"):
            self.resume_from_checkpoint = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # or accelerate would start no process group, and each process train by itself
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # BLIP uses all of its parameters in each step
        self.dataloader_pin_memory &= torch.cuda.is_available()  # else torch warns at each loader
        if not (self.do_train and self.do_eval):
            self.eval_strategy, self.load_best_model_at_end = "no", False
        if not self.predict_with_generate and self.metric_for_best_model not in ("loss", "eval_loss"):
            self.metric_for_best_model = "loss"
        self._check_best_model()
        super().__post_init__()
        self._check_checkpointing()
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise UserError("accelerator_config: split_batches and dispatch_batches must stay off, see sharding.py")
        if self.n_gpu > 1:
            raise UserError(
                f"one process would use {self.n_gpu} GPUs by DataParallel, whose loss is another; start with torchrun "
                "--nproc_per_node, see DISTRIBUTED.md, or set CUDA_VISIBLE_DEVICES to one of them"
            )

    def _check_values(self) -> None:
        for name, lowest in (
            ("num_beams", 1),
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("no_repeat_ngram_size", 0),
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("eval_accumulation_steps", 1),
            ("dataloader_num_workers", 0),
            ("seed", 0),
            ("data_seed", 0),
            ("dataloader_prefetch_factor", 1),
            ("num_train_epochs", 0),
        ):
            _at_least(self, name, lowest)
        _at_most(self, "num_beams", MAX_BEAMS)
        _at_most(self, "num_train_epochs", MAX_EPOCHS)
        _at_most(self, "dataloader_num_workers", MAX_WORKERS)
        if not self.eval_do_concat_batches:
            raise UserError("eval_do_concat_batches must stay true: scores are computed over the whole split")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}; lower the former"
            )
        for name in FILE_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value and not value.lstrip().startswith("{"):
                path = Path(value)  # the Trainer reads it whole, also where it has no end
                if not os.path.isfile(value) or path.stat().st_size > MAX_RECIPE:
                    raise UserError(f"{name} '{value}' is no JSON file of at most {MAX_RECIPE:,} bytes; give one")
        for name, instead in REPLACED_FIELDS.items():
            if getattr(self, name):
                raise UserError(f"{name} is not used here; {instead}")
        if self.push_to_hub and not self.do_train:
            raise UserError("push_to_hub goes with do_train; a finished run is pushed by --push_only <output folder>")
        if self.write_submission and not (self.do_predict and self.predict_with_generate):
            raise UserError("write_submission needs captions of the test split: do_predict and predict_with_generate")
        if self.logging_nan_inf_filter:
            raise UserError("logging_nan_inf_filter must stay false: a loss that is no number ends the run")
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns must stay false: the collator reads the images from the rows")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise UserError(f"learning_rate is {self.learning_rate}; set --learning_rate to a number from 0 up")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:  # not NaN either
            raise UserError(
                f"length_penalty is {self.length_penalty}; set --length_penalty from -{MAX_LENGTH_PENALTY} to "
                f"{MAX_LENGTH_PENALTY}"
            )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise UserError("dataloader_persistent_workers needs workers; set --dataloader_num_workers to 1 or more")
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; set --seed below 2**32")
        if self.train_sampling_strategy not in ("random", "sequential"):
            # The Trainer would sort the evaluation too, and predictions would meet the references of other images
            raise UserError(f"train_sampling_strategy is '{self.train_sampling_strategy}'; set random or sequential")

    def _check_checkpointing(self) -> None:
        """Check here what torch would find out in the first step."""
        settings = self.activation_checkpointing_kwargs or {}  # the new name, which is given the value of the old
        known = f"; there are {', '.join(CHECKPOINTING_SETTINGS)}"
        if not isinstance(settings, dict):
            raise UserError(
                f"gradient_checkpointing_kwargs is '{str(settings)[:200]}', which is no JSON object{known}"
            )
        for name, value in settings.items():
            if name not in CHECKPOINTING_SETTINGS:
                hint = did_you_mean(name, CHECKPOINTING_SETTINGS) or known
                raise UserError(f"gradient_checkpointing_kwargs: unknown key '{name[:200]}'{hint}")
            values = CHECKPOINTING_SETTINGS[name]
            if not any(value is each or (isinstance(value, str) and value == each) for each in values):
                raise UserError(
                    f"gradient_checkpointing_kwargs: '{name}' is {str(value)[:200]!r}; set one of "
                    f"{', '.join(map(str, values))}"
                )
        if settings.get("use_reentrant") and settings.get("debug"):
            raise UserError("gradient_checkpointing_kwargs: debug goes with use_reentrant false")

    def _check_best_model(self) -> None:
        """Check here what the Trainer would find out at the end of the first epoch."""
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in METRIC_NAMES:
            hint = did_you_mean(metric, METRIC_NAMES) or f"; there are {', '.join(METRIC_NAMES)}"
            raise UserError(f"metric_for_best_model '{self.metric_for_best_model}' is not measured{hint}")
        if self.greater_is_better is None:
            self.greater_is_better = metric not in ("loss", "perplexity")
        if self.save_strategy == "no":
            self.load_best_model_at_end = False
        if self.load_best_model_at_end and self.save_strategy not in ("best", self.eval_strategy):
            raise UserError(
                f"eval_strategy is {self.eval_strategy} and save_strategy {self.save_strategy}: set both alike, or "
                "--load_best_model_at_end false"
            )

    def decoding(self) -> GenerationConfig:
        """Return the decode settings."""
        return generation_config(vars(self))


# Fields of `Seq2SeqTrainingArguments` that would be ignored, or wrong for BLIP
REPLACED_FIELDS = {
    "hub_token": "it would be stored in clear in training_args.bin: run `hf auth login` or set HF_TOKEN",
    "label_smoothing_factor": "the Trainer's smoother does not shift BLIP's labels: set --label_smoothing",
    "generation_num_beams": "set --num_beams",
    "generation_max_length": "set --max_new_tokens",
    "generation_config": "set --num_beams, --max_new_tokens and the other decode settings",
    "hub_revision": "a run is pushed to the main branch",
    "batch_eval_metrics": "scores are computed over the whole split",
    "dataloader_drop_last": "it would drop rows of the evaluation too",
    "use_liger_kernel": "there is no Liger kernel for BLIP",
    "deepspeed": "evaluation calls parts of the model by themselves; BLIP fits a GPU, see DISTRIBUTED.md",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed, which a run that was stopped promises",
    "fsdp": "evaluation calls parts of the model by themselves; BLIP fits a GPU, see DISTRIBUTED.md",
}
# Of `torch.utils.checkpoint.checkpoint`, what a recipe can say
CHECKPOINTING_SETTINGS = {
    name: (True, False) for name in ("use_reentrant", "preserve_rng_state", "debug", "early_stop")
}
CHECKPOINTING_SETTINGS["determinism_check"] = ("default", "none")
FILE_FIELDS = ("accelerator_config", "fsdp_config")  # an object, or the name of a JSON file that has it


@dataclass
class PushArguments:
    """A finished run, pushed alone."""

    push_only: str = field(metadata={"help": "Output folder of a finished run; nothing is run, it is only pushed."})
    hub_model_id: str | None = field(default=None, metadata={"help": "<user>/<name>; default: the folder's name."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private.", "nargs": "?", "const": True}
    )


def _at_most(arguments: Any, name: str, highest: int) -> None:
    value = getattr(arguments, name)
    if value is not None and value > highest:
        raise UserError(f"{name} is {value}; set --{name} to {highest} or less")


def _at_least(arguments: Any, name: str, lowest: int) -> None:
    value = getattr(arguments, name)
    if value is not None and value < lowest:
        raise UserError(f"{name} is {value}; set --{name} to {lowest} or more")
