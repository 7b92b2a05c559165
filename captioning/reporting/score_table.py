"""Scores as tables of plain text: those of one system, and the paired test of two."""

import math
from collections.abc import Mapping
from typing import Any

from captioning.errors import printable
from captioning.scoring.baselines import BASELINES
from captioning.scoring.score import BY_MODALITY


CAPTION_WIDTH = 400  # characters of a caption on the terminal


def score_table(scores: Mapping[str, Any]) -> str:
    """Return the dict of `score` as text: scores with intervals and baselines, modalities, what is missing."""
    baselines = list(scores["baselines"])
    width = max(len(name) for name in scores["scores"]) + 2
    headings = "".join(f"{BASELINES[key].heading:>13}" for key in baselines)
    lines = [f"{scores['captions']:,} captions, {scores['unique_captions']:.1%} of them distinct", ""]
    lines += [f"{'':<{width}}{'score':>8}  {'95 % interval':<17}{headings}"]
    for name, entry in scores["scores"].items():
        row = f"{name:<{width}}{four_digits(entry['value']):>8}"
        row += f"  {four_digits(entry['low'])} - {four_digits(entry['high']):<8}"
        row += "".join(f"{four_digits(entry['baselines'].get(key)):>13}" for key in baselines)
        lines += [row + (f"   references {four_digits(entry['references'])}" if "references" in entry else "")]
    counted = {name: entry for name, entry in scores["scores"].items() if "stated" in entry}
    lines += ["", *(f"{name}: {items_in_words(entry)}" for name, entry in counted.items()), ""]
    for key, note in scores["baselines"].items():
        among = f", found among {note['found_among']}" if "found_among" in note else ""
        lines += [f"{BASELINES[key].heading}: {note['what']}{among}"]
    lines += [f"  {printable(scores['baselines']['constant']['caption'], CAPTION_WIDTH)}", ""]
    modalities = scores["modalities"]
    lines += [f"{'by modality':<{width}}" + "".join(f"{name:>13}" for name in modalities)]
    lines += [f"{'captions':<{width}}" + "".join(f"{own['captions']:>13,}" for own in modalities.values())]
    for key in (key for key in BY_MODALITY if key in scores["scores"]):
        values = "".join(f"{four_digits(own[key]['value']):>13}" for own in modalities.values())
        lines += [f"{key:<{width}}{values}"]
    return "\n".join([*lines, "", *not_computed(scores), scores["verdict"]])


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the result of `compare_captions` as text; `captions` is their number, `systems` the names of the two."""
    first, second = result["systems"]
    width = max(len(name) for name in result["scores"]) + 2
    lines = [f"{result['captions']:,} captions; first: {first}; second: {second}", ""]
    lines += [f"{'':<{width}}{'first':>8}{'second':>8}{'difference':>12}  {'95 % interval':<20}{'p':>9}{'p, Holm':>9}"]
    for name, row in result["scores"].items():
        difference, low, high = (four_digits(row[key], sign="+") for key in ("difference", "low", "high"))
        values = f"{four_digits(row['first']):>8}{four_digits(row['second']):>8}{difference:>12}"
        p_values = "".join(f"{four_digits(row[key]):>9}" for key in ("p_value", "p_holm"))
        lines += [f"{name:<{width}}{values}  {f'{low} to {high}':<20}{p_values}"]
    lines += ["", *not_computed(result)]
    lines += ["p: approximate randomization, two-sided, and corrected for the number of scores by Holm's method."]
    lines += ["The difference is the first score minus the second."]
    return "\n".join(lines)


def items_in_words(entry: Mapping[str, Any]) -> str:
    """Say how often an attribute is stated, and how often rightly."""
    if not entry["stated"]:
        return f"no reference states one, the captions {entry['predicted']:,}"
    if not entry["predicted"]:
        return f"the captions never state one, the references {entry['stated']:,}"
    shares = f"precision {entry['precision']:.3f}, recall {entry['recall']:.3f}"
    return f"{shares}; stated by the captions {entry['predicted']:,} times, by the references {entry['stated']:,}"


def four_digits(value: float | None, sign: str = "") -> str:
    """Return a number as text, a dash for None, NaN and infinity."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.4f}"


def not_computed(scores: Mapping[str, Any]) -> list[str]:
    """Return a line for each score that is missing, with what it needs."""
    return [f"not computed: {name}: {reason}" for name, reason in scores["missing"].items()]
