"""A recipe JSON and flags become the three dataclasses of `arguments.py`; the resolved recipe is written back.

Flags win over the recipe, the recipe over the defaults.
"""

import json
import os
import platform
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
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from captioning.errors import UserError, did_you_mean
from captioning.hub.revisions import download_recipe, is_hub_recipe
from captioning.training.arguments import (
    MAX_RECIPE,
    REPLACED_FIELDS,
    CaptioningArguments,
    DataArguments,
    ModelArguments,
    PushArguments,
)


PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "evaluate", "rouge_score", "pillow")
DATACLASSES = (ModelArguments, DataArguments, CaptioningArguments)
# Of a recipe, what a flag makes void
REPLACED_BY_FLAG = {
    "model_name_or_path": ("model_revision", "config_name", "tokenizer_name"),
    "config_name": ("model_name_or_path", "model_revision"),
    "dataset_name": ("dataset_revision",),
}


# --- Parse ----------------------------------------------------------------------------------------------------


class RecipeParser(HfArgumentParser):
    """An `HfArgumentParser` whose errors are `UserError`s instead of a usage of 200 lines."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(f"{message}; see `python run_captioning.py --help`")


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, CaptioningArguments]:
    """Parse `[recipe.json] [--flag value ...]` into the three dataclasses.

    Raises:
        UserError: the recipe is missing or malformed, a key or flag is unknown, a value has the wrong type or range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = RecipeParser(
        DATACLASSES,
        prog="run_captioning.py",
        usage="%(prog)s [recipe.json | hf://user/model/recipe.json] [--flag value ...]\n"
        "       %(prog)s --push_only output_folder [--hub_model_id user/name] [--hub_private_repo true]",
        description=__doc__,
        allow_abbrev=False,
    )
    if argv and not argv[0].startswith("-"):
        recipe = read_recipe(argv.pop(0))
        parser.set_defaults(**_without_replaced(recipe, flags=_flags(argv)))
    values = _parse(parser, argv, _fields())
    values["output_dir"] = values["output_dir"] or default_output_dir(values)
    try:
        return parser.parse_dict(values)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # the Trainer's arguments check themselves by these
        raise UserError(" ".join(str(error).split())) from error


def parse_push_arguments(argv: list[str] | None = None) -> PushArguments | None:
    """Parse `--push_only <output folder> ...`; return None where a run is asked for.

    Raises:
        UserError: beside `--push_only` stands a flag that has no effect on it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "push_only" not in _flags(argv):
        return None
    parser = RecipeParser((PushArguments,), prog="run_captioning.py", allow_abbrev=False)
    return PushArguments(**_parse(parser, argv, [item.name for item in fields(PushArguments)]))


def _parse(parser: RecipeParser, argv: list[str], known: Iterable[str]) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"'{flag}' is no flag; the recipe goes first, then --flag value")
        raise UserError(f"unknown flag '{flag}'{did_you_mean(flag, [f'--{name}' for name in known])}")
    return vars(namespace)


def _flags(argv: list[str]) -> set[str]:
    return {item.split("=")[0].removeprefix("--").replace("-", "_") for item in argv if item.startswith("--")}


def _without_replaced(recipe: dict[str, Any], flags: set[str]) -> dict[str, Any]:
    """Leave out what a flag makes void: the revision of another model or data set, the other kind of model."""
    replaced = {name for flag in flags for name in REPLACED_BY_FLAG.get(flag, ()) if name not in flags}
    return {key: value for key, value in recipe.items() if key not in replaced}


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe and check that each key is a field of the three dataclasses and its value of the field's type.

    Args:
        path: a file, or `hf://<user>/<model>[@<revision>]/recipe.json`.

    Raises:
        UserError: naming the file and the key.
    """
    from_hub = is_hub_recipe(path)
    try:
        file = Path(download_recipe(path) if from_hub else path)
        if file.exists() and not file.is_file():
            raise UserError(f"recipe '{path}' is no file; recipes are in recipes/")
        if file.stat().st_size > MAX_RECIPE:
            raise UserError(
                f"recipe '{path}' has {file.stat().st_size:,} bytes, no recipe does; recipes are in recipes/"
            )
        text = file.read_text(encoding="utf-8-sig")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"recipe '{path}' cannot be read: {reason}; recipes are in recipes/") from error
    try:
        recipe = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_number)
        json.dumps(recipe, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"recipe '{path}' holds half a surrogate pair, which is no text; write the character"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"recipe '{path}' is not valid JSON: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe '{path}' must be one JSON object of names and values")
    known = _fields()
    for key, value in recipe.items():
        if key not in known:
            raise UserError(f"recipe '{path}': unknown key '{key}'{did_you_mean(key, known)}")
        if value and key in REPLACED_FIELDS:  # said before its type: no value of it is right
            raise UserError(f"recipe '{path}': {key} is not used here; {REPLACED_FIELDS[key]}")
        if not _fits(value, known[key].type):
            raise UserError(
                f"recipe '{path}': '{key}' is {json.dumps(value)[:200]}, which is no {_type_name(known[key].type)}"
            )
        if from_hub and key in DESTINATION_FIELDS:
            # A stranger's recipe says what is run, not where it is written and which repository it is pushed to
            raise UserError(f"recipe '{path}' sets '{key}'; a recipe from the Hub must not: download and edit it")
    return recipe


def default_output_dir(values: dict[str, Any]) -> str:
    """Return `outputs/<model>-<dataset>`."""
    model = Path(values["model_name_or_path"] or values["config_name"] or "model")
    name = model.stem if model.suffix == ".json" else model.name
    return os.path.join("outputs", f"{name}-{Path(values['dataset_name']).name}")


def _fields() -> dict[str, Field]:
    """Return all fields by name, with their types resolved."""
    found = {}
    for dataclass_type in DATACLASSES:
        hints = typing.get_type_hints(dataclass_type)
        for item in fields(dataclass_type):
            if item.init:
                item.type = hints[item.name]
                found[item.name] = item
    return found


def _fits(value: Any, hint: Any) -> bool:
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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        repeated = next(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(f"key '{repeated}' stands twice")
    return dict(pairs)


# --- Write back -----------------------------------------------------------------------------------------------

# Where a run's output and logs go
DESTINATION_FIELDS = {
    "output_dir", "resume_from_checkpoint", "run_name", "push_to_hub", "hub_model_id", "hub_strategy",
    "hub_private_repo", "hub_always_push", "hub_token", "report_to", "project", "trackio_space_id",
}  # fmt: skip
# Left out of a written recipe, so that a rerun does not depend on them; the last four are written otherwise
PLACE_FIELDS = DESTINATION_FIELDS | {
    "disable_tqdm", "local_rank", "log_level", "log_level_replica", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "package_versions", "hardware",
}  # fmt: skip
# Written although they are defaults: what a reader of a recipe looks for first
SPOKEN_FIELDS = {
    "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "bf16", "fp16", "use_cpu", "num_beams", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size",
    "length_penalty",
}  # fmt: skip


def resolved_recipe(model_args: ModelArguments, data_args: DataArguments, args: CaptioningArguments) -> dict[str, Any]:
    """Return a recipe that repeats this run: our fields, the Trainer's that are not at their default, versions."""
    recipe = asdict(model_args) | asdict(data_args)
    # Resolved on this machine, as `args` were; on another device than theirs, they would end the process group
    defaults = CaptioningArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, ddp_backend=args.ddp_backend)
    for item in fields(args):
        value = getattr(args, item.name)
        spoken = item.name in SPOKEN_FIELDS or value != getattr(defaults, item.name)
        if spoken and item.init and item.name not in PLACE_FIELDS:
            recipe[item.name] = _plain(value)
    return recipe | {"package_versions": {name: version(name) for name in PACKAGES}, "hardware": _hardware(args)}


def _hardware(args: CaptioningArguments) -> dict[str, Any]:
    """Return what of this machine the last digits of a run depend on."""
    gpu = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(args.device) if gpu else args.device.type,
        "processor": _processor_name(),
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
    }


def _processor_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
