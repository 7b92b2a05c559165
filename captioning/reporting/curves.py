"""The learning curves of a run, drawn by matplotlib: a PNG for the card, inline SVG for the page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from captioning.files import write_whole
from captioning.reporting.run_record import RunRecord
from captioning.stages import stage


# The label of each plot's y-axis; the keys of the log that it shows, with their names
PLOTS = {
    "loss (nats per token)": {"loss": "training", "eval_loss": "validation"},
    "ROUGE-L": {"eval_rougeL": "validation"},
}
STYLES = {"training": {"color": "#8a5a00", "linestyle": "--"}, "validation": {"color": "#0a5aa8", "marker": "o"}}
# The page has a dark color scheme, so that its SVG takes the colors of the page's style sheet
PAGE_COLORS = {"#8a5a00": "var(--second)", "#0a5aa8": "var(--accent)", "#000000": "var(--muted)"}

Curves = dict[str, list[tuple[int, float]]]


@stage("card")
def draw_training_curve(record: RunRecord) -> None:
    """Draw `training_curve.png`, loss and ROUGE-L by optimizer step, unless the run did not train."""
    plots = curves_of_log(record.log_history)
    if not plots:
        return
    figure = Figure(figsize=(4 * len(plots), 3), dpi=120, layout="constrained")  # inches; not pyplot: global state
    for axes, (label, curves) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots.items(), strict=True):
        _plot(axes, label, curves)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    write_whole(record.folder / "training_curve.png", file.getvalue())


def inline_curves(log_history: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Return an SVG element for each plot, the same one for the same log, with colors from CSS variables."""
    elements = []
    for label, curves in curves_of_log(log_history).items():
        # The ids of markers and clip paths are hashes; the salt makes those of two plots on a page differ
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
            figure = Figure(figsize=(6.4, 3), layout="constrained")  # 461 units of the SVG, about as many pixels
            _plot(figure.subplots(), label, curves)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        ends = [(name, *points[0], *points[-1]) for name, points in curves.items()]
        said = [f"{name} from {v0:.3f} at step {s0} to {v1:.3f} at step {s1}" for name, s0, v0, s1, v1 in ends]
        elements.append(_inline(file.getvalue(), f"{label} by step: {'; '.join(said)}"))
    return elements


def curves_of_log(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Curves]:
    """Return the curves of each plot that has any, as points of step and value, None left out."""
    plots: dict[str, Curves] = {}
    for label, names in PLOTS.items():
        for key, name in names.items():
            points = [(row["step"], row[key]) for row in log_history if row.get(key) is not None]
            if points:
                plots.setdefault(label, {})[name] = points
    return plots


def _plot(axes: Axes, label: str, curves: Curves) -> None:
    for name, points in curves.items():
        single = {"marker": "o"} if len(points) == 1 else {}  # of which no line is drawn
        axes.plot(*zip(*points, strict=True), label=name, **STYLES[name] | single)
    axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if label == "ROUGE-L":
        axes.set_ylim(bottom=0)


def _inline(svg: str, alternative: str) -> Markup:
    """Turn an SVG file of matplotlib into an element of a page, with presentation attributes in place of styles."""
    root = ElementTree.fromstring(svg)
    for element in list(root.iter()):
        element.tag = element.tag.split("}")[-1]  # without its namespace, which HTML implies
        attributes = {name.split("}")[-1]: value for name, value in element.attrib.items()}
        styles = [style.split(": ", 1) for style in attributes.pop("style", "").split("; ") if style]
        attributes |= {name: PAGE_COLORS.get(value, value) for name, value in styles if not name.startswith("font")}
        if element.tag == "g":
            attributes.pop("id", None)  # a name that nothing refers to and that both plots have
        element.attrib = attributes
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
    size = {"viewBox": root.get("viewBox")}
    root.attrib = size | {"role": "img", "aria-label": alternative, "stroke-linejoin": "round"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
