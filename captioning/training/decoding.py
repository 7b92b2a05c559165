"""Decode settings in one form, `GenerationConfig`: made from arguments and recipes, and put into words."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from transformers import GenerationConfig

from captioning.errors import UserError, as_user_error


logger = logging.getLogger(__name__)

# The fields of a recipe, and their meaning where a saved config does not name them
DEFAULTS = {"num_beams": 1, "max_new_tokens": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "length_penalty": 1.0}
# The lowest and the highest value of each, both included
LIMITS = {
    "num_beams": (1, 256),
    "max_new_tokens": (1, math.inf),
    "min_new_tokens": (0, math.inf),
    "no_repeat_ngram_size": (0, math.inf),
    "length_penalty": (-100, 100),  # the exponent of a length of some hundreds, which beyond this overflows a double
}
# Nine with those of the run; other length penalties cost little
DEFAULT_GRID = ("num_beams=1", "length_penalty=0.5,2", "num_beams=5 length_penalty=1,2")
DEFAULT_GRID += ("no_repeat_ngram_size=3 length_penalty=1,2", "min_new_tokens=8")


def check_range(name: str, value: float, lowest: float, highest: float) -> None:
    """Raise a UserError if a field of a recipe is NaN or outside of its range, both ends included."""
    if not lowest <= value <= highest:
        limits = f"from {lowest} to {highest}" if math.isfinite(highest) else f"to {lowest} or more"
        raise UserError(f"{name} is {value}; set --{name} {limits}")


def check_decoding(fields: Mapping[str, Any]) -> None:
    """Raise a UserError if a decode setting among the `fields` of a recipe is impossible."""
    for name, limits in LIMITS.items():
        check_range(name, fields[name], *limits)
    least, most = fields["min_new_tokens"], fields["max_new_tokens"]
    if least > most:
        raise UserError(f"min_new_tokens {least} exceeds max_new_tokens {most}; lower the former")


def decode_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decode settings among the `fields` of a recipe, without those that have no effect."""
    settings = {name: fields[name] for name in ("num_beams", "max_new_tokens")}
    settings |= {name: fields[name] for name in ("min_new_tokens", "no_repeat_ngram_size") if fields[name]}
    # It has no effect in greedy search, for which `GenerationConfig.save_pretrained` refuses it
    return settings | ({"length_penalty": fields["length_penalty"]} if fields["num_beams"] > 1 else {})


def generation_config(fields: Mapping[str, Any]) -> GenerationConfig:
    """Return the decode settings among the `fields` of a recipe; nothing is sampled."""
    return GenerationConfig(do_sample=False, **decode_settings(fields))


def settings_of_grid(fields: Mapping[str, Any], grid: Sequence[str]) -> list[dict[str, Any]]:
    """Return the decode settings of a recipe, and those of each combination of values in each part of a grid.

    A part that is not like 'num_beams=3,5 length_penalty=1,2', or has more than 100 combinations, is a UserError.
    """
    own = {name: fields[name] for name in DEFAULTS if name != "max_new_tokens"}
    found = {repr(decode_settings(fields)): own}
    for part in grid:
        with as_user_error(f"tune_decoding_grid '{part}' is not like 'num_beams=3,5 length_penalty=1,2'"):
            texts = dict(item.split("=") for item in part.split())
            values = [[type(DEFAULTS[name])(text) for text in texts[name].split(",")] for name in texts]
            if not own.keys() >= texts.keys() or len(texts) < len(part.split()) or math.prod(map(len, values)) > 100:
                raise ValueError(f"it takes {', '.join(own)}, each once, and 100 combinations at most")
            for combination in product(*values):
                settings = own | dict(zip(texts, combination, strict=True))
                found.setdefault(repr(decode_settings({**fields, **settings})), settings)
    return list(found.values())


def in_words(config: GenerationConfig) -> str:
    """Return decode settings in words: "3 beams, at most 64 new tokens, length penalty 1"."""
    parts = ["greedy search" if config.num_beams == 1 else f"{config.num_beams} beams"]
    parts.append(f"at most {config.max_new_tokens} new tokens")
    if config.min_new_tokens:
        parts.append(f"at least {config.min_new_tokens}")
    if config.no_repeat_ngram_size:
        parts.append(f"no {config.no_repeat_ngram_size}-gram twice")
    if config.num_beams > 1:
        parts.append(f"length penalty {config.length_penalty:g}")
    return ", ".join(parts)


def warn_of_other_settings(recorded: GenerationConfig, config: GenerationConfig) -> None:
    """Log each setting with which a checkpoint was evaluated, by its own record, otherwise than in this run."""
    message = "The model's own scores are with %s %s, not %s; for them, --%s %s"
    for name, default in DEFAULTS.items():
        was, now = getattr(recorded, name) or default, getattr(config, name) or default
        if was != now and recorded.num_beams:
            logger.warning(message, name, was, now, name, was)
