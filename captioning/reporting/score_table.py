"""Scores as tables of plain text: those of one system, and a test of two."""

import logging
from collections.abc import Mapping
from typing import Any

from captioning.scoring.baselines import BASELINES
from captioning.scoring.captions import printable
from captioning.scoring.score import BY_MODALITY


logger = logging.getLogger(__name__)


# --- One system -----------------------------------------------------------------------------------------------


def score_table(scores: Mapping[str, Any]) -> str:
    """Return the dict of `scoring.score` as text: scores with intervals and baselines, modalities, what is missing."""
    baselines = list(scores["baselines"])
    width = max(len(name) for name in scores["scores"]) + 2
    lines = [f"{scores['captions']:,} captions, {scores['unique_captions']:.1%} of them distinct", ""]
    lines.append(
        " " * width
        + f"{'score':>8}  {'95 % interval':<17}"
        + "".join(f"{BASELINES[f].heading:>13}" for f in baselines)
    )
    for name, entry in scores["scores"].items():
        row = f"{name:<{width}}{_number(entry['value']):>8}  {_number(entry['low'])} - {_number(entry['high']):<8}"
        row += "".join(f"{_number(entry['baselines'].get(baseline)):>13}" for baseline in baselines)
        lines.append(row + (f"   upper bound {_number(entry['upper_bound'])}" if "upper_bound" in entry else ""))
    lines.append("")
    for name, note in scores["baselines"].items():
        among = f", found among {note['found_among']}" if "found_among" in note else ""
        lines.append(f"{BASELINES[name].heading}: {note['what']}{among}")
    lines += [f"  {printable(scores['baselines']['constant']['caption'])}", ""]
    modalities = scores["modalities"]
    lines.append(f"{'by modality':<{width}}" + "".join(f"{name:>13}" for name in modalities))
    lines.append(f"{'captions':<{width}}" + "".join(f"{own['captions']:>13,}" for own in modalities.values()))
    for key in (key for key in BY_MODALITY if key in scores["scores"]):
        lines.append(f"{key:<{width}}" + "".join(f"{_number(own[key]['value']):>13}" for own in modalities.values()))
    lines += ["", *(f"not computed: {name}: {reason}" for name, reason in scores["missing"].items())]
    return "\n".join([*lines, scores["verdict"]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the result of `compare_captions` as text."""
    first, second = result["systems"]
    width = max(len(name) for name in result["scores"]) + 2
    lines = [f"{result['captions']:,} captions; first: {first}; second: {second}", ""]
    lines.append(f"{'':<{width}}{'first':>8}{'second':>8}{'difference':>12}  {'95 % interval':<20}{'p':>8}")
    for name, row in result["scores"].items():
        difference, low, high = (_signed(row[key]) for key in ("difference", "low", "high"))
        values = f"{_number(row['first']):>8}{_number(row['second']):>8}{difference:>12}"
        lines.append(f"{name:<{width}}{values}  {f'{low} to {high}':<20}{_number(row['p_value']):>8}")
    lines += ["", *(f"not computed: {name}: {reason}" for name, reason in result["missing"].items())]
    lines += ["p: approximate randomization, two-sided; the difference is the first's score minus the second's."]
    return "\n".join(lines)
