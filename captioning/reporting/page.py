"""The report page, `report.html` of the output folder: scores beside their baselines, curves, and every caption."""

from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from captioning.reporting import page_scores
from captioning.reporting.curves import inline_curves
from captioning.reporting.page_captions import CONCEPT_NAMES, caption_payload
from captioning.reporting.page_images import Words, image_blocks, map_levels
from captioning.reporting.render_page import PAGE_BUDGET, render_page
from captioning.reporting.run_record import RunRecord


COMMIT_DIGITS = 7


def write_report(
    record: RunRecord,
    split: str,
    images: Iterable[Image.Image | None],
    modalities: Sequence[str],
    attention: Mapping[str, Words] = {},
    num_tokens: Sequence[int] | None = None,
    retrieved: Sequence[Sequence[tuple[str, str]]] = (),
) -> None:
    """Write `report.html` of the N captions of a split into the output folder of a run, whole or not at all.

    `images` are taken one at a time. `attention` has for some image ids the words of the prediction, each with its
    attention map over the image `[H, W]`, non-negative, rows from the top. `num_tokens` are those of the references,
    for the negative log-likelihood per token, `retrieved` the ids and captions of other images in each prompt, if any.

    Raises:
        ValueError: there are more or fewer images, modalities or numbers of tokens than predictions.
    """
    scores = record.scores.get(split, {})
    known = scores.get("concept_detection", {"concepts": []})["concepts"]
    names = {row["cui"]: row["name"] for row in known if row["name"]} | CONCEPT_NAMES
    gallery = caption_payload(record.predictions(split), modalities, num_tokens, names, retrieved)
    rows = gallery["rows"]
    maps = {i: map_levels(attention[row["id"]]) for i, row in enumerate(rows) if row["id"] in attention}
    gallery["attention"] = {i: own for i, own in maps.items() if own}
    facts = record.facts(COMMIT_DIGITS) | {"split": f"{split}, {len(rows):,} captions"}
    if not gallery["attention"]:
        facts["attention maps"] = "this model gives none"
    if scores:
        facts["distinct captions"] = f"{scores['unique_captions']:.0%}"
    render_page(
        record.folder / "report.html",
        gallery,
        lambda size: image_blocks(images, len(rows), PAGE_BUDGET - size),
        name=record.folder.resolve().name,
        split=split,
        facts=facts,
        verdict=[*([scores["verdict"]] if scores else []), *record.leaks],
        splits={name: record.scores[name] for name in sorted(record.scores, key=lambda name: name != split)},
        curves=inline_curves(record.log_history),
        tuned=record.recipe["tuned_decoding"],
        page_scores=page_scores,
    )
