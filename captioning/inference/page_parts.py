"""The parts of the demo's page: HTML in which each text is escaped, its style and its script."""

import json
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from captioning.data.dicom import burned_in
from captioning.inference.writer import Written
from captioning.reporting.page_images import encode_image, map_levels, to_base64
from captioning.reporting.render_page import ATTENTION_SCRIPT


HERE = Path(__file__).parent
STYLE = (HERE / "demo.css").read_text(encoding="utf-8")
# A scope of its own: the page may run what stands in its head more than once
HEAD = f"<script>(() => {{\n{ATTENTION_SCRIPT}{(HERE / 'demo.js').read_text(encoding='utf-8')}}})();</script>"
MAX_JPEG = 300_000  # bytes of the image as it is shown
NO_MAPS = Markup("<p class=muted>This family of models has no attention maps.</p>")
BURNED_IN = Markup("<p class=fault>Text is burned into this image, by its header: it may name a patient.</p>")
BANNER = Markup(
    "<div class=banner role=note><strong>Research only: not for clinical use.</strong> The model describes findings "
    "that are not there, and misses some that are. {}</div><h1>{}</h1>"
)
ALTERNATIVES = Markup(
    "<h2>Captions that the search found</h2><table><thead><tr><th scope=col>Caption<th scope=col>Share"
    "<th scope=col>Per token</thead><tbody>{}</tbody></table><p class=muted>In the order of the search, its length "
    "penalty included. Share: the probability of this caption given the image, by the model, among those listed. Per "
    "token: the geometric mean of the probabilities of its tokens. Neither says how likely a finding is.{}</p>"
)
ROW = Markup("<tr><td>{}<td>{:.1%}<td>{:.1%}")
GREEDY = " Greedy search finds one caption: set two beams or more for others."
CUT = " Here the caption ends at the most new tokens."
NEIGHBORS = Markup(
    "<h2>Captions of the nearest training images</h2><ol>{}</ol><p class=muted>Cosine of the model's features of the "
    "two images, less their mean.</p>"
)
CONCEPTS = Markup(
    "<h2>Concepts</h2><ul>{}</ul><p class=muted>UMLS concepts that the model's concept head finds in the image.</p>"
)


def banner(name: str, is_local: bool) -> Markup:
    """Return the top of the page: what it is not for, what becomes of images, and which model it is."""
    where = "Images stay on this machine" if is_local else "Send no image of a patient: it goes to a server"
    return BANNER.format(f"{where}; a file is deleted once it is read.", name)


def picture(image: Image.Image | None) -> Markup:
    """Return the image as the model gets it, but for its size; without one, an empty place."""
    jpeg = encode_image(image, MAX_JPEG)
    if jpeg is None:
        return Markup("<p class=empty>No image yet</p>")
    what = f"The image that is captioned, {image.width} by {image.height} pixels"
    stage = Markup("<div class=stage><img alt='{}' src='data:image/jpeg;base64,{}'></div>{}")
    return stage.format(what, to_base64(jpeg), BURNED_IN if burned_in(image) else "")


def caption_text(text: str, state: str = "") -> Markup:
    """Return a caption; `state` says that it is not finished."""
    kind = "caption" if state else "caption done"
    return Markup("<p class='{}'>{} <span class=muted>{}</span></p>").format(kind, text, state)


def fault(message: str) -> Markup:
    """Return what is wrong, which a screen reader reads at once."""
    return Markup("<p class=fault role=alert><strong>No caption:</strong> {}</p>").format(message)


def details(written: Written) -> Markup:
    """Return the words over their attention, the alternatives, concepts, and the nearest training captions."""
    maps = map_levels(written.words or ())
    words = Markup("<div class=words data-maps='{}'></div>").format(json.dumps(maps)) if maps else NO_MAPS
    found = zip(written.alternatives, written.shares, strict=True)
    rows = Markup().join(ROW.format(one.caption or "(empty)", share, one.token_probability) for one, share in found)
    notes = GREEDY * (len(written.alternatives) == 1) + CUT * written.alternatives[0].is_cut
    near = Markup().join(Markup("<li>{} <span class=muted>{:.2f}</span>").format(*one) for one in written.neighbors)
    names = Markup().join(Markup("<li>{}").format(name) for name in written.concepts or ["none"])
    concepts = "" if written.concepts is None else CONCEPTS.format(names)
    return words + ALTERNATIVES.format(rows, notes) + concepts + (NEIGHBORS.format(near) if near else "")
