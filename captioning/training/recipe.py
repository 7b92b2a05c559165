"""From a recipe (JSON) and flags, which win, to the three dataclasses of `arguments.py`, and back to a recipe."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import Field, asdict, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from captioning.command_line import OneLineParser
from captioning.data.tables import TABLE_ENDINGS
from captioning.errors import UserError, as_user_error, did_you_mean
from captioning.files import PROJECT
from captioning.hub.foreign_recipe import refuse_local_names
from captioning.hub.revisions import download_recipe
from captioning.training.arguments import CaptioningArguments, DataArguments, ModelArguments, PushArguments
from captioning.training.decoding import DEFAULTS


MAX_RECIPE = 2**20  # bytes
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "evaluate", "rouge_score", "pillow")
DATACLASSES = (ModelArguments, DataArguments, CaptioningArguments)
# Fields of `Seq2SeqTrainingArguments` that would have no effect or do harm here, and what to do instead
REPLACED_FIELDS = {
    "hub_token": "it would be stored in clear text in training_args.bin: run `hf auth login` or set HF_TOKEN",
    "label_smoothing_factor": "the Trainer does not shift the labels before it smooths: set --label_smoothing",
    "generation_num_beams": "set --num_beams",
    "generation_max_length": "set --max_new_tokens",
    "generation_config": "set --num_beams, --max_new_tokens and the other decode settings",
    "hub_revision": "a run is pushed to the main branch",
    "batch_eval_metrics": "scores are computed over the whole split",
    "dataloader_drop_last": "it would drop rows of the evaluation too",
    "use_liger_kernel": "Liger has no kernels for captioning models such as BLIP",
    "save_only_model": "a run cannot be resumed from a checkpoint without the optimizer",
    "deepspeed": "evaluation calls parts of the model one by one; see docs/distributed.md",
    "fsdp": "evaluation calls parts of the model one by one, whose weights are not gathered; see docs/distributed.md",
    "fsdp_config": "see fsdp",
}
# What other programs call a field, without dashes and underscores
OTHER_NAMES = {
    "per_device_train_batch_size": "batchsize batch bs b trainbatchsize", "weight_decay": "wd",
    "per_device_eval_batch_size": "evalbatchsize", "learning_rate": "lr", "max_steps": "steps",
    "num_train_epochs": "epochs epoch e numepochs", "validation_fraction": "valsplit validationsplit",
    "gradient_accumulation_steps": "gradaccum accumulationsteps", "push_to_hub": "push",
    "warmup_steps": "warmup warmupratio", "output_dir": "output out outputfolder outputpath savedir",
    "model_name_or_path": "model modelname modelpath", "tokenizer_name": "tokenizer", "config_name": "config",
    "dataset_name": "dataset data datadir datapath trainfile", "caption_column": "textcolumn",
    "image_folder": "imagedir images imageroot", "max_caption_length": "maxlength", "num_beams": "beams beamsize",
    "dataloader_num_workers": "workers numworkers", "eval_strategy": "evaluationstrategy", "use_cpu": "cpu",
    "resume_from_checkpoint": "resume checkpoint", "hub_model_id": "repo repoid",
}  # fmt: skip
# By flag, the keys of a recipe that belong to what the flag replaces
REPLACED_BY_FLAG = {
    "model_name_or_path": ("model_revision", "config_name", "model_config", "tokenizer_name"),
    "config_name": ("model_config", "model_name_or_path", "model_revision"),
    "dataset_name": ("dataset_revision",),
    "retriever": ("retriever_revision",),
    **dict.fromkeys((*DEFAULTS, "tune_decoding"), ("tuned_decoding",)),
}
# Where a run's output and logs go
DESTINATION_FIELDS = {
    "output_dir", "resume_from_checkpoint", "run_name", "push_to_hub", "hub_model_id", "hub_strategy",
    "hub_private_repo", "hub_always_push", "hub_token", "report_to", "project", "trackio_space_id",
}  # fmt: skip
# Not written, so that a rerun does not depend on them; the last seven are written under another name, or anew
UNWRITTEN_FIELDS = DESTINATION_FIELDS | {
    "disable_tqdm", "local_rank", "log_level", "log_level_replica", "resume_despite_changes", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "package_versions", "hardware", "code", "fingerprint", "changed_on_resume",
}  # fmt: skip
# Written even where they are at their default: what a reader of a recipe looks for first
ALWAYS_WRITTEN_FIELDS = {
    "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "bf16", "fp16", "use_cpu", "num_beams", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size",
    "length_penalty",
}  # fmt: skip


# --- The command line -----------------------------------------------------------------------------------------


class RecipeParser(OneLineParser, HfArgumentParser):
    """An `HfArgumentParser` whose errors are `UserError`s, and where a flag alone is true also for `bool | None`."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument; see `argparse`."""
        if options.get("type") is string_to_bool:
            options |= {"nargs": "?", "const": True}
        return super().add_argument(*names, **options)


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, CaptioningArguments]:
    """Parse `[recipe.json] [--flag value ...]` into the three dataclasses; a mistake is a UserError that names it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = RecipeParser(
        DATACLASSES,
        prog="python run_captioning.py",
        usage="%(prog)s [recipe.json | hf://user/model/recipe.json] [--flag value ...]\n"
        "       %(prog)s --push_only output_folder [--hub_model_id user/name] [--hub_private_repo]",
        description="Fine-tune and score an image captioning model. Flags win over the recipe, it over the defaults.",
        allow_abbrev=False,
    )
    if argv and not argv[0].startswith("-"):
        recipe = read_recipe(address := argv.pop(0))
        replaced = {name for flag in _flags(argv) for name in (flag, *REPLACED_BY_FLAG.get(flag, ()))}
        kept = {key: value for key, value in recipe.items() if key not in replaced}
        parser.set_defaults(**refuse_local_names(address, kept) if address.startswith("hf://") else kept)
    values = _parse(parser, argv, recipe_fields())
    given = values["output_dir"]
    values["output_dir"] = given or _default_output_dir(values)
    try:
        model_args, data_args, args = parser.parse_dict(values)
        args.has_default_output_dir = not given
        if model_args.config_name and (args.objective == "self_critical" or args.retrieved_captions):
            wanted = "retrieved_captions" if args.retrieved_captions else "objective self_critical"
            raise UserError(f"{wanted} starts from a trained model; give one by --model_name_or_path")
        if args.retrieved_captions and data_args.streaming:
            raise UserError("retrieved_captions needs the features of all images first; leave out --streaming")
        return model_args, data_args, args
    except (ValueError, TypeError, ImportError) as error:  # from the Trainer's checks of its arguments, and from ours
        raise UserError(" ".join(str(error).split())) from error


def parse_push_arguments(argv: list[str] | None = None) -> PushArguments | None:
    """Parse `--push_only <output folder> ...`; return None where that flag is not given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "push_only" not in _flags(argv):
        return None
    parser = RecipeParser((PushArguments,), prog="python run_captioning.py", allow_abbrev=False)
    return PushArguments(**_parse(parser, argv, [item.name for item in fields(PushArguments)]))


def _parse(parser: RecipeParser, argv: list[str], known: Iterable[str]) -> dict[str, Any]:
    if refused := sorted(_flags(argv) & REPLACED_FIELDS.keys()):  # whatever the value, also one of another type
        raise UserError(f"{refused[0]} is not used here; {REPLACED_FIELDS[refused[0]]}")
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"'{flag}' is not a flag; the recipe goes first, then --flag value")
        hint = _meant(flag.lstrip("-"), known).replace("did you mean '", "did you mean '--")
        raise UserError(f"unknown flag '{flag}'{hint}")
    return vars(namespace)


def _meant(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the field that other programs call `name`, or for a similar one."""
    fields_of = {other: field for field, others in OTHER_NAMES.items() for other in (*others.split(), _plain(field))}
    field = fields_of.get(_plain(name))
    return f"; did you mean '{field}'?" if field in known else did_you_mean(name, set(known) - REPLACED_FIELDS.keys())


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name).lower()


def _flags(argv: list[str]) -> set[str]:
    return {item.split("=")[0].removeprefix("--").replace("-", "_") for item in argv if item.startswith("--")}


def _default_output_dir(values: dict[str, Any]) -> str:
    model = Path(values["model_name_or_path"] or values["config_name"] or "model")
    name = model.stem if model.suffix == ".json" else model.name
    data = Path(values["dataset_name"])
    return os.path.join("outputs", f"{name}-{data.stem if data.suffix in TABLE_ENDINGS else data.name}")


# --- Read a recipe --------------------------------------------------------------------------------------------


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe, a file or `hf://<user>/<model>[@<revision>]/recipe.json`.

    A key that is no field of the three dataclasses, and a value of another type than its, are UserErrors.
    """
    from_hub = path.startswith("hf://")
    recipe = _read_json_object(Path(download_recipe(path) if from_hub else path), path)
    known = recipe_fields()
    for key, value in recipe.items():
        if key not in known:
            raise UserError(f"recipe '{path}': unknown key '{key}'{_meant(key, known)}")
        if key in REPLACED_FIELDS:
            raise UserError(f"recipe '{path}': {key} is not used here; {REPLACED_FIELDS[key]}")
        if not _fits(value, known[key].type):
            wanted = _type_name(known[key].type)
            raise UserError(f"recipe '{path}': '{key}' is {json.dumps(value)[:200]}, which is not of type {wanted}")
        if from_hub and key in DESTINATION_FIELDS:  # a recipe from a stranger must not say where files are written
            raise UserError(f"recipe '{path}' sets '{key}'; a recipe from the Hub must not: download and edit it")
    return recipe


def _read_json_object(file: Path, name: str) -> dict[str, Any]:
    with as_user_error(f"recipe '{name}' cannot be read", "recipes are in recipes/"):
        if file.exists() and (not file.is_file() or file.stat().st_size > MAX_RECIPE):
            raise UserError(f"recipe '{name}' is not a file of at most {MAX_RECIPE:,} bytes; recipes are in recipes/")
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
        # Fails for NaN, and for half of a surrogate pair
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    if not isinstance(content, dict):
        raise UserError(f"recipe '{name}' must be one JSON object of names and values")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"key '{key}' occurs twice")
    return dict(pairs)


def recipe_fields() -> dict[str, Field]:
    """Return all fields of the three dataclasses by name, with their types resolved."""
    found = {}
    for dataclass_type in DATACLASSES:
        hints = typing.get_type_hints(dataclass_type)
        for item in fields(dataclass_type):
            if item.init:
                item.type = hints[item.name]
                found[item.name] = item
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value read from JSON is of a field's type; of lists and dicts the items are not checked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint in (None, types.NoneType):
        return value is None
    if origin is typing.Literal:
        return value in arguments
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if origin in (list, dict):
        return isinstance(value, origin)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _type_name(hint: Any) -> str:
    names = [getattr(argument, "__name__", str(argument)) for argument in typing.get_args(hint) or (hint,)]
    return " or ".join("null" if name == "NoneType" else name for name in names)


# --- Write a recipe -------------------------------------------------------------------------------------------


def resolved_recipe(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> dict[str, Any]:
    """Return a recipe that repeats this run: our fields, the Trainer's that were changed, versions and hardware."""
    recipe = asdict(model_args) | asdict(data_args)
    # On the same device as `args`: for another one, their checks would end the process group
    defaults = CaptioningArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, ddp_backend=args.ddp_backend)
    values, default = args.to_dict(), defaults.to_dict()
    wanted = (ALWAYS_WRITTEN_FIELDS | {name for name in values if values[name] != default[name]}) - UNWRITTEN_FIELDS
    recipe |= {name: value for name, value in values.items() if name in wanted}
    versions = {name: version(name) for name in PACKAGES}
    return recipe | {"package_versions": versions, "hardware": _hardware(args), "code": code_version()}


def code_version() -> dict[str, Any]:
    """Return the address of this project by `CITATION.cff`, and its commit where it is a git repository."""
    found: dict[str, Any] = {}
    with suppress(OSError):
        citation = (PROJECT / "CITATION.cff").read_text(encoding="utf-8")
        if stated := re.search(r"""^repository-code: *["']?([^\s"']+)""", citation, re.MULTILINE):
            found["address"] = stated[1]
    with suppress(OSError, subprocess.SubprocessError):
        if (PROJECT / ".git").exists():  # not a repository that the project merely lies in
            git = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            commit = subprocess.run(git, cwd=PROJECT, capture_output=True, check=True, text=True, timeout=30).stdout
            found |= {"commit": commit.split("-")[0].strip(), "modified": "-dirty" in commit}
    return found


def _hardware(args: CaptioningArguments) -> dict[str, Any]:
    """Return the properties of this machine that the last digits of a run depend on."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    threads = torch.get_num_threads()
    return {"device": device, "processor": _processor_name(), "processes": args.world_size, "threads": threads}


def _processor_name() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
