"""Scores as tables, of text, Markdown or LaTeX: those of one system, and the paired test of two."""

import html
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from captioning.errors import printable
from captioning.reporting.page_scores import items_in_words
from captioning.scoring.baselines import BASELINES
from captioning.scoring.bertscore import NOT_COMPUTED
from captioning.scoring.bootstrap import num_decimals
from captioning.scoring.concept_detection import NAMES, SYSTEMS
from captioning.scoring.score import BY_MODALITY, DETECTION_F1


CAPTION_WIDTH = 400  # characters of a caption on the terminal
SHOWN_CONCEPTS = 20  # all are in --json
CELL_WIDTH = 300  # characters of a text in Markdown


def score_table(scores: Mapping[str, Any], format: str = "text") -> str:
    """Return the dict of `score` as a table: as `text` with all baselines and details, else with the best baseline."""
    known = {key: BASELINES[key].heading for key in scores["baselines"] if format == "text"}
    rows = [["", "score", "95 % interval", *(known.values() or ["best baseline"])]]
    for name, entry in scores["scores"].items():
        *cells, best = score_cells(entry)
        baselines = [in_digits(entry)(entry["baselines"].get(key)) for key in known]
        rows.append([name, *cells, *(baselines or [best])])
    head = f"captions: {scores['captions']:,}, {scores['unique_captions']:.1%} of them distinct"
    details = _details(scores) if format == "text" else []
    return _with_notes(head, rows, [*details, *not_computed(scores), scores["verdict"]], format)


def comparison_table(result: Mapping[str, Any], format: str = "text") -> str:
    """Return the result of `compare_captions`; `captions` is their number, `systems` the names of the two."""
    rows = [["", "first", "second", "difference", "95 % interval", "p", "p, Holm"]]
    for name, row in result["scores"].items():
        show = in_digits(row)
        values = (show(row["first"]), show(row["second"]), show(row["difference"], sign="+"))
        p_values = (number_text(row[key]) for key in ("p_value", "p_holm"))
        rows.append([name, *values, interval_in_words(row, sign="+"), *p_values])
    p_note = "p: approximate randomization, two-sided, and corrected for the number of scores by Holm's method."
    notes = [*not_computed(result), p_note, "The difference is the first score minus the second."]
    first, second = result["systems"]
    return _with_notes(f"captions: {result['captions']:,}; first: {first}; second: {second}", rows, notes, format)


def concepts_table(result: Mapping[str, Any], format: str = "text") -> str:
    """Return the dict of `score_concepts` as a table; as text, below it the most frequent concepts one by one."""
    rows = [["", "score", "95 % interval", "most frequent concepts"]]
    for name, entry in result["scores"].items():
        show = in_digits(entry)
        rows.append([name, show(entry["value"]), interval_in_words(entry), show(entry["baselines"].get("constant"))])
    notes = [f"most frequent concepts, {name}: {', '.join(cuis)}" for name, cuis in result["constant"].items()]
    lines = [["concept", "images", "right", "wrong", "missed", ""]]
    for row in result["concepts"][:SHOWN_CONCEPTS]:
        numbers = (f"{row[key]:,}" for key in ("support", "tp", "fp", "fn"))
        lines.append([printable(row["cui"], 20), *numbers, NAMES.get(row["cui"], "")])
    notes += ["", *_text_table(lines)] if format == "text" else []
    return _with_notes(f"images: {result['images']:,}", rows, notes, format)


def _details(scores: Mapping[str, Any]) -> list[str]:
    """Return lines on counts of attributes, the baselines, and the scores by modality."""
    entries, modalities = scores["scores"], scores["modalities"]
    lines = [f"{name}: {items_in_words(entry)}" for name, entry in entries.items() if "stated" in entry]
    known = {name: number_text(entry["references"]) for name, entry in entries.items() if "references" in entry}
    lines += [f"{name}: the references themselves score {value}" for name, value in known.items()] + [""]
    for key, note in scores["baselines"].items():
        among = f", found among {note['found_among']}" if "found_among" in note else ""
        lines += [f"{BASELINES[key].heading}: {note['what']}{among}"]
    lines += [f"  {printable(scores['baselines']['constant']['caption'], CAPTION_WIDTH)}", ""]
    rows = [["by modality", *modalities], ["captions", *(f"{own['captions']:,}" for own in modalities.values())]]
    for key in (key for key in BY_MODALITY if key in entries):
        rows.append([key, *(in_digits(own[key])(own[key]["value"]) for own in modalities.values())])
    return [*lines, *_text_table(rows), ""]


def not_computed(scores: Mapping[str, Any]) -> list[str]:
    """Return a line for each score that is missing, with what it needs; one for those that nearly every run lacks."""
    missing = scores["missing"]
    usual = [name for name in missing if name in NOT_COMPUTED]
    lines = [f"not computed: {name}: {reason}" for name, reason in missing.items() if name not in usual]
    return lines + [f"not computed: {', '.join(usual)}; docs/metrics.md says how to get them"] * bool(usual)


def detection_rows(detection: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each system that predicts concepts: its name, F1 and interval of all and of manual ones."""
    return [
        [SYSTEMS[key].name, *(cell for name in DETECTION_F1 for cell in score_cells(found[name])[:2])]
        for key, found in detection["systems"].items()
    ]


def number_text(value: float | None, digits: int = 4, sign: str = "") -> str:
    """Return a number as text, a dash for None, NaN and infinity."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def in_digits(entry: Mapping[str, Any]) -> Callable[..., str]:
    """Return `number_text` with the decimals that the interval of `entry` deserves."""
    return partial(number_text, digits=num_decimals(entry["low"], entry["high"]))


def interval_in_words(entry: Mapping[str, Any], sign: str = "") -> str:
    """Return the confidence interval of a score or a difference, a dash if it has none."""
    low, high = (in_digits(entry)(entry[end], sign=sign) for end in ("low", "high"))
    return "-" if entry["low"] is None else f"{low} to {high}"


def score_cells(entry: Mapping[str, Any]) -> list[str]:
    """Return a score, its confidence interval, and the highest of its baselines with its name, a dash without one."""
    known = {key: value for key, value in entry.get("baselines", {}).items() if value is not None}
    best, show = max(known, key=known.get, default=None), in_digits(entry)
    baseline = f"{show(known[best])} ({BASELINES[best].name})" if best else "-"
    return [show(entry["value"]), interval_in_words(entry), baseline]


def markdown(text: str, width: int | None = CELL_WIDTH) -> str:
    """Return text from the data so that it shows as it is in a Markdown table: on one line, no markup, no HTML."""
    visible = "".join(" " if unicodedata.category(char) in ("Cc", "Cf") else char for char in text)
    short = " ".join(visible.split())
    if width and len(short) > width:
        short = short[: width - 1].rstrip() + "…"
    escaped = re.sub(r"([\\`*_{}\[\]|~$#!@])", r"\\\1", html.escape(short, quote=False))
    return escaped.replace("://", r"\://").replace("www.", r"www\.")  # GitHub's Markdown makes links of bare addresses


def _with_notes(head: str, rows: Sequence[Sequence[str]], notes: Sequence[str], format: str) -> str:
    """Return a table, the first of its rows the heading, between a line and others, which LaTeX has as comments."""
    if format == "text":
        return "\n".join([head, "", *_text_table(rows), "", *notes])
    if format == "markdown":
        lines = [f"| {' | '.join(map(markdown, row))} |" for row in rows]
        lines.insert(1, "|:--|" + "--:|" * (len(rows[0]) - 1))
        return "\n".join([markdown(head, None), "", *lines, "", *(f"* {markdown(note, None)}" for note in notes)])
    # What LaTeX takes for a command, and the minus of a number
    rows = [[re.sub(r"-(?=\d)", "$-$", re.sub(r"[&%$#_{}]", r"\\\g<0>", cell)) for cell in row] for row in rows]
    heading, *lines = [" & ".join(row) + r" \\" for row in rows]
    head, *notes = (f"% {printable(line)}" for line in (head, *notes))
    begin = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}", "\\toprule"]
    return "\n".join([head, *begin, heading, "\\midrule", *lines, "\\bottomrule", "\\end{tabular}", *notes])


def _text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["   ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
