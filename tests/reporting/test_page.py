"""The report page in a real browser: what it shows, that nothing of the data runs, and that it stays quick."""

import functools
import re
import shutil
import time
import weakref
from itertools import pairwise
from urllib.parse import quote

import numpy as np
import pytest
from helpers import make_noise, make_predictions, make_record

from captioning.reporting import page as page_module
from captioning.reporting import page_images
from captioning.reporting.page import write_report
from captioning.reporting.page_images import encode_image
from captioning.reporting.page_scores import spread_labels
from captioning.reporting.run_record import RunRecord


CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "<!--<script>",
    "{{7*7}} {% raw %} ${window.hacked=1}",
    "javascript:window.hacked=1",
    "a/b \\ 'c' \"d\" #e?f&g;h %41 __proto__",
    "\u202etxet\u202c \u2028\u2029 \u0007",
)
NO_INTERVAL = {"low": None, "high": None, "baselines": {}}
BASELINES = {"constant": 0.37, "nearest_image": 0.62, "shuffled_images": 0.7, "shuffled_references": 0.34}
SCORED = {
    "captions": 6,
    "unique_captions": 0.5,
    "verdict": "Above every baseline.",
    "beats_constant": True,
    "missing": {"coco_meteor": "needs Java"},
    "scores": {
        "rougeL": {"value": 0.635, "low": 0.61, "high": 0.65, "baselines": BASELINES},
        "coco_cider": {"value": 2.5, **NO_INTERVAL},
        "modality_f1": {"value": None, **NO_INTERVAL},
        "concept_f1": {"value": 0.8, **NO_INTERVAL, "baselines": {"constant": None}, "upper_bound": 0.9},
    },
    "baselines": {
        "constant": {"what": "one caption for all", "caption": "Axial CT.", "found_among": "12,000 training captions"},
        "typical_of_modality": {"what": "one for each", "captions": {"CT": "Axial CT.", "MRI": "Sagittal MRI."}},
        **{name: {"what": "another's"} for name in ("nearest_image", "shuffled_references", "shuffled_images")},
    },
    "modalities": {
        "CT": {"captions": 4, "rougeL": {"value": 0.6, "low": 0.5, "high": 0.7}},
        "MRI": {"captions": 2, "rougeL": {"value": 0.7, "low": None, "high": None}},
    },
}
LOG = [
    {"step": 5, "loss": 2.0},
    {"step": 5, "eval_loss": 2.1, "eval_rougeL": 0.1},
    {"step": 10, "eval_loss": 1.1, "eval_rougeL": 0.2},
]


def corner(row, column, side=6):
    values = np.zeros((side, side))
    values[row, column] = 3.0
    return values


# --- Browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab():
    """One tab of a browser for all tests, and in `tab.faults` what it logged, refused or requested."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: the page is not read by a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        tab = browser.new_page()
        tab.faults = faults = []
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        allowed = re.compile("^data:|^about:|/report.html")
        tab.on("request", lambda request: allowed.search(request.url) or faults.append(request.url))
        yield tab
        browser.close()


@pytest.fixture
def open_page(tab):
    """Return a function that opens a page, and at the end check that it has no faults."""

    def open_page(folder, fragment="", width=1200, scheme="light", motion="no-preference"):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(media="screen", color_scheme=scheme, reduced_motion=motion)
        tab.mouse.move(0, 0)
        tab.goto("about:blank")
        tab.goto((folder / "report.html").as_uri() + fragment)
        return tab

    tab.faults.clear()
    yield open_page
    assert tab.faults == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run with all its files: six captions, three of them the same."""
    predictions = ["lung clear", "the same", "liver", "the same", "", "the same"]
    rows = make_predictions(6, prediction=predictions, rougeL=[0.3, 0.9, 0.1, 0.5, float("nan"), 0.9])
    record = make_record(tmp_path_factory.mktemp("run") / "my-run", rows, LOG, {"test": SCORED})
    images = [*(make_noise(i) for i in range(5)), None]
    attention = {"image_1": [("the", corner(0, 0)), ("same", corner(5, 5))]}
    write_report(record, "test", images, ["CT", "CT", "MRI", "CT", "MRI", ""], attention)
    return record.folder


@pytest.fixture
def page(run, open_page):
    return open_page(run)


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    """Ten thousand captions and images, the hardest to compress; equal images are encoded once, to save time."""
    number = 10_000
    words = "of a radiology caption with its usual length and words " * 3
    rows = make_predictions(number, reference=[f"reference {i} {words}" for i in range(number)])
    record = make_record(tmp_path_factory.mktemp("large") / "run", rows)
    hard = [make_noise(i, (640, 520)) for i in range(4)]
    numbers = {id(image): i for i, image in enumerate(hard)}
    encode_once = functools.cache(lambda number, most: encode_image(hard[number], most))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_images, "encode_image", lambda image, most: encode_once(numbers[id(image)], most))
        write_report(record, "test", (hard[i % 4] for i in range(number)), ["CT", "MRI"] * (number // 2))
    return record.folder


def wait_until(page, condition):
    """Wait for a JavaScript expression; Playwright's own function for this needs `unsafe-eval`."""
    end = time.monotonic() + 5
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def texts(page, selector):
    return page.eval_on_selector_all(selector, "elements => elements.map(element => element.textContent)")


def ids(page):
    return texts(page, ".card .meta a")


def cells(page, rows):
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))"
    return page.eval_on_selector_all(rows, script)


# --- What the page says ---------------------------------------------------------------------------------------


def test_header_names_the_run_and_its_verdict_without_a_folder_of_the_machine(page):
    header = page.inner_text("header")
    for text in ("my-run", "fine-tuned from Salesforce/blip @ 0123456\n", "the folder my-data", "test, 6 captions"):
        assert text in header
    for text in ("3 beams, at most 64 new tokens", "50%", "Above every baseline.", "Not for clinical use"):
        assert text in header
    assert "constant caption" not in header
    assert "somebody" not in page.content()
    assert page.title().startswith("my-run")
    assert page.query_selector(".verdict.bad") is None


def test_a_model_below_the_constant_caption_is_named_first(tmp_path, open_page):
    scores = {"test": SCORED | {"beats_constant": False, "verdict": "Below the constant caption."}}
    write_report(make_record(tmp_path / "low", make_predictions(1), scores=scores), "test", [make_noise()], ["CT"])
    page = open_page(tmp_path / "low")
    assert page.inner_text(".verdict.bad strong") == "▲ The model does not beat a constant caption"
    assert page.eval_on_selector(".verdict", "box => box.getBoundingClientRect().bottom < innerHeight")


def test_score_tables_have_values_intervals_baselines_and_what_is_missing(page):
    table = {row[0]: [row[1], *row[3:]] for row in cells(page, ".ranked tbody tr:not(.group)")}
    assert table["ROUGE-L"] == ["0.635 0.610 – 0.650", "0.370", "–", "~ 0.620", "0.340", "▲ 0.700", "–"]
    assert table["CIDEr"] == ["2.500", *["–"] * 6]
    assert table["Modality"] == ["–"] * 7
    assert table["Concept"] == ["0.800", *["–"] * 5, "0.900"]
    assert "Not computed: COCO METEOR: needs Java" in page.inner_text("#section-scores-1")
    notes = page.inner_text(".notes").split("\n")
    assert notes[0] == "constant caption"
    assert "found among 12,000 training captions" in notes[1]
    assert "Axial CT." in notes and "MRI: Sagittal MRI." in notes
    rows = [[row[0], row[1], row[3]] for row in cells(page, ".scroll tbody tr")]
    assert rows == [["CT", "4", "0.600 0.500 – 0.700"], ["MRI", "2", "0.700"]]


def test_picture_of_a_score_places_interval_baselines_and_upper_bound_on_one_axis(page):
    picture, _, concept, *_ = page.query_selector_all("#section-scores-1 .ranked .picture")
    assert picture.get_attribute("aria-label").startswith("ROUGE-L 0.635, 95 % interval 0.610 – 0.650, ")
    assert texts(picture, ".mark") == ["R", "C", "N", "I"]
    assert spread_labels([300, 300, 310, 312], [13] * 4, 312) == [273, 286, 299, 312]
    assert spread_labels([5, 5, 100], [13] * 3, 312) == [5, 18, 100]
    start, axis = picture.eval_on_selector(".axis", "axis => [axis.getBBox().x, axis.getBBox().width]")
    assert picture.query_selector_all(".tick")[1].text_content() == "0.8"
    point = picture.eval_on_selector(".point", "point => point.cx.baseVal.value")
    assert (point - start) / axis * 0.8 == pytest.approx(0.635, abs=2e-3)
    bar = picture.eval_on_selector(".interval", "bar => [bar.getBBox().x, bar.getBBox().width]")
    assert (bar[0] - start) / axis * 0.8 == pytest.approx(0.61, abs=2e-3)
    assert bar[1] / axis * 0.8 == pytest.approx(0.04, abs=2e-3)
    ends = picture.eval_on_selector_all(".baseline", "lines => lines.map(line => line.getPointAtLength(1e6).x)")
    assert [(end - start) / axis * 0.8 for end in ends] == pytest.approx([0.34, 0.37, 0.62, 0.7], abs=2e-3)
    assert concept.eval_on_selector_all(".upper_bound", "lines => lines.length") == 1
    boxes = picture.eval_on_selector_all(
        ".mark", "marks => marks.map(mark => mark.getBBox()).map(box => [box.x, box.width])"
    )
    assert all(a + width <= b for (a, width), (b, _) in pairwise(boxes)), "letters overlap"


def test_learning_curves_are_drawn_in_the_colors_of_the_scheme(run, open_page):
    strokes = []
    for scheme in ("light", "dark"):
        page = open_page(run, scheme=scheme)
        loss, rouge = page.query_selector_all(".curves svg")
        assert "training from 2.000 at step 5" in loss.get_attribute("aria-label")
        assert {"step", "training", "validation"} <= set(texts(loss, "text"))
        line = rouge.query_selector("path[stroke='var(--accent)'][fill=none]")
        assert line.evaluate("line => line.getBBox().height") > 20, "ROUGE-L rises"
        strokes.append(line.evaluate("line => getComputedStyle(line).stroke"))
    assert strokes == ["rgb(10, 90, 168)", "rgb(116, 179, 242)"]


def test_a_run_without_scores_and_log_has_its_captions(tmp_path, open_page):
    write_report(make_record(tmp_path / "bare", make_predictions(2)), "test", [None, make_noise()], ["CT", "CT"])
    page = open_page(tmp_path / "bare")
    assert "No verdict" in page.inner_text(".verdict")
    assert page.query_selector("#section-curves, .ranked") is None
    assert ids(page) == ["image_0", "image_1"]
    page.eval_on_selector("#section-gallery", "gallery => gallery.scrollIntoView()")
    page.wait_for_selector(".open img")
    assert page.inner_text(".open .none") == "no image"


# --- Gallery --------------------------------------------------------------------------------------------------


def test_orders_follow_the_scores_and_the_use_of_a_caption(page):
    assert ids(page) == [f"image_{i}" for i in range(6)]
    expected = {
        "best": [1, 5, 3, 0, 2, 4],  # equal scores in the order of the data, a missing one last
        "worst": [2, 0, 3, 1, 5, 4],
        "generic": [1, 3, 5, 0, 2, 4],
    }
    for order, indices in expected.items():
        page.select_option("#order", order)
        assert ids(page) == [f"image_{i}" for i in indices], order
    page.select_option("#order", "generic")
    assert "same caption on 3 images" in page.text_content(".card >> nth=2")
    assert "same caption" not in page.text_content(".card >> nth=3")


def test_filter_and_search_count_their_hits(page):
    assert page.inner_text("#hits") == "6 captions"
    assert texts(page, "#modality option") == ["all", "CT (3)", "MRI (2)", "(unknown) (1)"]
    page.select_option("#modality", label="CT (3)")
    assert (ids(page), page.inner_text("#hits")) == (["image_0", "image_1", "image_3"], "3 of 6 captions")
    page.fill("#search", "SAME the")
    assert (ids(page), page.inner_text("#hits")) == (["image_1", "image_3"], "2 of 6 captions")
    page.select_option("#modality", label="all")
    for search, found in {"reference 4": ["image_4"], "image_2": ["image_2"], "nothing of the kind": []}.items():
        page.fill("#search", search)
        assert (ids(page), page.inner_text("#hits")) == (found, f"{len(found)} of 6 captions")
    page.fill("#search", "")
    page.check("#attended")
    assert ids(page) == ["image_1"]


def test_a_link_opens_its_example_and_going_back_closes_it(run, open_page):
    page = open_page(run, "#image_3")
    assert page.inner_text("dialog[open] h2") == "Example image_3"
    page.evaluate("location.hash = 'image_1'")
    wait_until(page, "document.querySelector('dialog h2').textContent == 'Example image_1'")
    page.keyboard.press("Escape")
    page.fill("#search", "liver")
    page.evaluate("location.hash = 'image_0'")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("dialog h2") == "Example image_0"
    assert page.inner_text("#hits") == "6 captions", "a search that hides the example is dropped"
    assert page.url.endswith("#image_0")
    page.click("#close")
    wait_until(page, "!location.hash")
    page.evaluate("location.hash = 'image_1'")
    page.wait_for_selector("dialog[open]")
    page.go_back()
    wait_until(page, "!document.querySelector('dialog').open")


def test_every_step_works_by_keyboard(page):
    focused = "document.activeElement.closest('.card')?.querySelector('.meta a').textContent"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("j/k")
    assert page.input_value("#search") == "j/k", "in the search field letters are letters"
    page.fill("#search", "")
    page.keyboard.press("Escape")
    for key, card in [("j", 0), ("j", 1), ("j", 2), ("k", 1), ("ArrowRight", 2), ("ArrowLeft", 1)]:
        page.keyboard.press(key)
        assert page.evaluate(focused) == f"image_{card}", key
    columns = page.evaluate("getComputedStyle(cards).gridTemplateColumns.split(' ').length")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == f"image_{1 + columns}"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is visible"
    page.keyboard.press("Enter")
    assert page.inner_text("dialog[open] h2") == "Example image_1"
    page.keyboard.press("j")
    assert page.inner_text("dialog[open] h2") == "Example image_2"
    page.keyboard.press("Escape")
    assert page.query_selector("dialog[open]") is None
    wait_until(page, f"{focused} === 'image_2'")  # the example that was read last


def test_every_control_is_reached_by_tab(page):
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        visible = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert visible == "3px" or page.evaluate("document.activeElement === document.body")
    assert {"theme", "search", "modality", "order", "attended", "open", "scroll", "skip"} <= reached


def test_landmarks_images_and_pictures_have_names(run, open_page):
    page = open_page(run, "#image_1")
    page.wait_for_selector("dialog img")
    assert page.get_attribute("dialog img", "alt") == "Image image_1, enlarged"
    unnamed = """[...document.querySelectorAll('section, nav, form, dialog, button, svg, img, [role=region]')].filter(
        e => !(e.getAttribute('aria-label') || e.alt || e.textContent.trim() && e.tagName == 'BUTTON'
               || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent))
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(unnamed) == []
    landmarks = ("header", "main", "footer", "nav")
    assert [len(page.query_selector_all(name)) for name in landmarks] == [1] * 4


def test_a_word_shows_where_the_attention_lay(run, open_page):
    page = open_page(run, "#image_1")
    page.wait_for_selector("dialog img")
    assert "Attention is not an explanation" in page.inner_text("dialog")
    assert not page.is_visible("canvas")
    opacity = """() => { const context = document.querySelector('canvas').getContext('2d');
        const at = (x, y) => context.getImageData(x, y, 1, 1).data[3]; return [at(20, 20), at(235, 235)]; }"""
    page.hover(".tokens button >> nth=0")
    first, last = page.evaluate(opacity)
    assert first > 130 > 60 > last, "the first map lies in the upper left"
    page.focus(".tokens button >> nth=1")
    first, last = page.evaluate(opacity)
    assert last > 130 > 60 > first, "the second map lies in the lower right"
    page.click(".tokens button >> nth=1")
    page.hover("#close")
    page.focus("#close")
    assert page.is_visible("canvas"), "a pressed word stays"
    assert page.get_attribute(".tokens button >> nth=1", "aria-pressed") == "true"
    box = "e => Object.values(e.getBoundingClientRect().toJSON())"
    image, canvas = (page.eval_on_selector(tag, box) for tag in ("dialog img", "canvas"))
    assert image == pytest.approx(canvas, abs=1.5), "the map covers the image"
    levels = "canvas => new Set(canvas.getContext('2d').getImageData(200, 235, 56, 1).data).size"
    assert page.eval_on_selector("canvas", levels) > 30, "the upscaling is smooth"
    page.click(".tokens button >> nth=1")
    assert not page.is_visible("canvas"), "a second press hides it, as a finger cannot leave the button"
    page.hover(".tokens button >> nth=0")
    page.hover("#close")
    page.focus("#close")
    assert not page.is_visible("canvas")


# --- Hostile data ---------------------------------------------------------------------------------------------


def test_nothing_of_the_data_runs_and_all_of_it_shows_as_text(tmp_path, open_page):
    number = len(HOSTILE)
    rows = make_predictions(number, image_id=HOSTILE, reference=HOSTILE, prediction=HOSTILE)
    everything = " ".join(HOSTILE)
    number_of = {"value": 0.5, **NO_INTERVAL}
    scored = SCORED | {
        "verdict": everything,
        "missing": {everything: everything},
        "scores": {everything: number_of},
        "baselines": {
            "constant": {"what": everything, "caption": everything, "found_among": everything},
            "typical_of_modality": {"what": everything, "captions": {everything: everything}},
        },
        "modalities": {everything: {"captions": 1, "rougeL": number_of, everything: number_of}},
    }
    folder = tmp_path / "<script>window.hacked=1<"
    recipe = {"model_name_or_path": everything, "dataset_name": everything, "dataset_revision": "0" * 40}
    record = make_record(folder, rows, scores={everything: scored, "test": scored}, **recipe)
    write_report(record, "test", [make_noise()] * number, HOSTILE, {text: [(text, corner(0, 0))] for text in HOSTILE})
    page = open_page(folder)
    for selector in (".card .caption", ".card .meta bdi"):
        assert texts(page, selector) == [text for text in HOSTILE for _ in range(2)]
    for index, text in enumerate(HOSTILE):
        page.click(f".open >> nth={index}")
        assert texts(page, "dialog h2 bdi, .tokens button") == [text, text]
        page.focus(".tokens button")
        page.keyboard.press("Escape")
        page.select_option("#modality", index=index + 1)
        assert page.inner_text("#hits") == f"1 of {number} captions"
        page.select_option("#modality", index=0)
        page.goto((folder / "report.html").as_uri() + "#" + quote(text, safe=""))
        page.wait_for_selector("dialog[open]")
        assert texts(page, "dialog h2 bdi") == [text]
        page.keyboard.press("Escape")
        page.fill("#search", text)
        assert text in ids(page)
        page.fill("#search", "")
    for text in HOSTILE[:7]:
        assert text in page.text_content(".verdict")
        assert text in page.text_content(".facts")
        assert text in page.text_content("#section-scores-2")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('script').length") == 2 + 1, "payload, script, one block of images"


def test_only_the_pages_own_script_may_run(run, tab, tmp_path):
    """The hash is what stops an injection that escaping would let through."""
    page_text = (run / "report.html").read_text(encoding="utf-8")
    attack = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    (tmp_path / "injected.html").write_text(page_text.replace("</header>", f"{attack}</header>"), encoding="utf-8")
    tab.goto((tmp_path / "injected.html").as_uri())
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.query_selector(".card") is not None
    policy = page_text.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_odd_texts_and_numbers_do_not_break_the_page(tmp_path, open_page):
    odd = ["\ud800 alone", "nul \0", "x" * 100_000, "", "   ", "\u202eoverride"]
    rows = make_predictions(
        6,
        image_id=["same", "same", "\udc00", "", "a/b'c\"", "\0"],
        reference=["\u05e8\u05d9\u05d0\u05d4", *(f"reference {i}" for i in range(1, 6))],
        prediction=odd,
        rougeL=[float("nan"), float("inf"), 0.5, 0.5, 1, 0],
        nll=[float("nan")] * 6,
    )
    scored = SCORED | {"verdict": "\ud800 \0", "missing": {"\ud800": "\0"}}
    folder = tmp_path / "odd"
    record = make_record(folder, rows, scores={"\ud800": scored, "test": scored})
    write_report(record, "test", [make_noise()] * 6, ["\ud800", "\0", "", "CT", "x" * 5000, "\u202e"])
    page = open_page(folder)
    assert page.query_selector("dialog[open]") is None, "an empty id is no address"
    predictions = "cards => cards.map(card => card.querySelectorAll('.caption')[1].textContent)"
    captions = page.eval_on_selector_all(".card", predictions)
    expected = ["\ud800 alone", "nul \0", "xxxxxxxxxx", "(empty)", "(empty)", "\u202eoverride"]
    assert [text[:10] for text in captions] == expected
    assert len(captions[2]) < 1000
    page.click("text=Show all 100,000 characters")
    assert page.eval_on_selector_all(".card", predictions)[2] == odd[2]
    assert "ROUGE-L –" in page.inner_text(".card")
    links = page.eval_on_selector_all(".meta a", "links => links.map(link => link.getAttribute('href'))")
    assert len(set(links)) == 6, "a repeated id has an address of its own"
    page.evaluate("location.hash = 'same~2'")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("dialog .caption >> nth=0") == "reference 1"
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '%E0%A4%A'")
    assert page.query_selector("dialog[open]") is None
    isolated = page.eval_on_selector_all(".caption, .meta bdi", "e => e.map(e => getComputedStyle(e).unicodeBidi)")
    assert set(isolated) <= {"isolate", "plaintext"}
    directions = page.eval_on_selector_all(".caption", "e => e.map(e => getComputedStyle(e).direction)")
    assert directions[:2] == ["rtl", "ltr"], "Hebrew runs from right to left"
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    fits = "texts => texts.every(text => text.scrollWidth <= text.clientWidth)"
    assert page.eval_on_selector_all(".caption, .meta", fits), "long words are broken"


# --- Looks ----------------------------------------------------------------------------------------------------

# Contrast (WCAG 2.2, 1.4.3) of every element with text of its own, against the backgrounds laid over each other
LOW_CONTRAST = """() => {
  const parse = color => { const [r, g, b, a] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a ?? 1]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const luminance = color => color.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const background = element => {
    const below = element.parentElement ? background(element.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), below);
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.disabled || element.closest('script, noscript')) continue;
    const style = getComputedStyle(element), behind = background(element);
    const text = over(parse(element.closest('svg') ? style.fill : style.color), behind);
    const [a, b] = [luminance(text), luminance(behind)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.push([element.outerHTML.slice(0, 80), (a + .05) / (b + .05)]);
  }
  return low;
}"""


@pytest.mark.parametrize("beats", [True, False])
def test_text_is_readable_in_both_schemes(tmp_path, open_page, beats):
    scores = {"test": SCORED | {"beats_constant": beats}}
    record = make_record(tmp_path / "run", make_predictions(3, prediction=["", "a", "b"]), LOG, scores)
    images = [None, make_noise(), make_noise()]
    write_report(record, "test", images, ["CT"] * 3, {"image_1": [("a", corner(0, 0))]})
    for scheme in ("light", "dark"):
        page = open_page(record.folder, scheme=scheme, motion="reduce")
        assert page.evaluate(LOW_CONTRAST) == []
        page.click(".open >> nth=1")
        page.click(".tokens button")
        assert page.evaluate(LOW_CONTRAST) == []


def test_theme_and_motion_follow_the_system_until_the_button_is_pressed(run, open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    dark = open_page(run, scheme="dark").evaluate(background)
    page = open_page(run)
    light, seen = page.evaluate(background), []
    assert light != dark
    for _ in range(3):
        page.click("#theme")
        seen.append((page.inner_text("#theme"), page.evaluate(background)))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", light)]
    motion = """[getComputedStyle(document.documentElement).scrollBehavior,
        getComputedStyle(document.querySelector('.card')).transitionDuration]"""
    assert page.evaluate(motion) == ["smooth", "0.12s"]
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(motion) == ["auto", "0s"]


def test_a_phone_never_scrolls_sideways(run, open_page):
    page = open_page(run, width=390)
    width = "document.scrollingElement.scrollWidth"
    assert page.evaluate(width) <= 390
    page.click(".open >> nth=1")
    assert page.evaluate(width) <= 390
    assert page.eval_on_selector("dialog", "dialog => dialog.scrollWidth <= dialog.clientWidth")


def test_print_leaves_the_controls_out_and_is_light(run, open_page):
    page = open_page(run, scheme="dark")
    page.emulate_media(media="print")
    assert [page.is_visible(part) for part in (".toolbar", "nav", ".card")] == [False, False, True]
    colors = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    assert page.evaluate(colors) == ["rgb(255, 255, 255)", "rgb(26, 32, 39)"]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('.open img').length") == 5


# --- Ten thousand ---------------------------------------------------------------------------------------------


def test_ten_thousand_images_stay_below_60_mb_and_come_as_they_are_scrolled_to(large_run, open_page):
    assert (large_run / "report.html").stat().st_size < 60e6
    page = open_page(large_run)
    assert page.inner_text("#hits") == "10,000 captions"
    assert page.evaluate("document.images.length < 30 && document.querySelectorAll('.card').length < 100")
    page.eval_on_selector("#section-gallery", "gallery => gallery.scrollIntoView({behavior: 'instant'})")
    wait_until(page, "document.images.length > 0 && document.images[0].complete")
    assert page.evaluate("document.images[0].naturalWidth") > 0
    for _ in range(3):
        before = page.evaluate("document.querySelectorAll('.card').length")
        page.evaluate("scrollTo({top: 1e9, behavior: 'instant'})")
        wait_until(page, f"document.querySelectorAll('.card').length > {before}")
    page.eval_on_selector("#section-gallery", "gallery => gallery.scrollIntoView({behavior: 'instant'})")
    seen = set()
    for _ in range(12):
        page.evaluate("scrollBy({top: 1000, behavior: 'instant'})")
        wait_until(page, "[...document.images].some(image => Math.abs(image.getBoundingClientRect().y - 400) < 400)")
        seen |= set(page.eval_on_selector_all("img", "images => images.map(image => image.alt)"))
    assert len(seen) > 70
    assert page.evaluate("document.images.length") < 50, "images out of sight are let go"
    page.select_option("#order", "worst")
    wait_until(page, "cards.firstChild.getBoundingClientRect().top >= 0")  # the first hit is in view, not the last
    page.fill("#search", "reference 9999 ")
    assert (ids(page), page.inner_text("#hits")) == (["image_9999"], "1 of 10,000 captions")
    page.wait_for_selector(".open img")
    page.goto((large_run / "report.html").as_uri() + "#image_9998")
    page.reload()
    page.wait_for_selector("dialog[open] img")
    assert page.inner_text("dialog h2") == "Example image_9998"
    page.keyboard.press("Escape")
    wait_until(page, "document.activeElement.closest('.card')?.querySelector('.meta a').textContent == 'image_9998'")
    wait_until(page, "document.activeElement.querySelector('img')?.complete")
    place = "document.activeElement.getBoundingClientRect().toJSON()"
    wait_until(page, f"{place}.top >= 0 && {place}.top < innerHeight")  # the gallery is where the example was


def test_images_are_taken_one_at_a_time(tmp_path):
    taken, most = [], 0

    def images():
        nonlocal most
        for i in range(120):
            image = make_noise(i)
            taken.append(weakref.ref(image))
            most = max(most, sum(reference() is not None for reference in taken))
            yield image
            del image

    write_report(make_record(tmp_path / "run", make_predictions(120)), "test", images(), ["CT"] * 120)
    assert most <= 3


# --- The file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, modalities", [([None], ["CT"] * 2), ([None] * 3, ["CT"] * 2), ([None] * 2, ["CT"])])
def test_the_page_appears_whole_or_not_at_all(tmp_path, images, modalities):
    record = make_record(tmp_path / "run", make_predictions(2), LOG, {"test": SCORED})
    before = {path.name for path in record.folder.iterdir()}
    with pytest.raises(ValueError, match="zip"):
        write_report(record, "test", images, modalities)
    assert {path.name for path in record.folder.iterdir()} == before
    write_report(record, "test", [None] * 2, ["CT"] * 2)
    whole = (record.folder / "report.html").read_text()
    assert whole.endswith("</html>")
    with pytest.raises(ValueError, match="zip"):
        write_report(record, "test", images, modalities)
    assert (record.folder / "report.html").read_text() == whole
    write_report(RunRecord(record.folder), "test", [None] * 2, ["CT"] * 2)
    assert (record.folder / "report.html").read_text() == whole, "the same run makes another page"


def test_long_captions_leave_less_of_the_page_to_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "PAGE_BUDGET", 1_000_000)
    rows = make_predictions(60, reference=["рак лёгкого " * 300] * 60)  # two bytes a letter, six in ASCII JSON
    record = make_record(tmp_path / "run", rows)
    write_report(record, "test", (make_noise(i, (300, 300)) for i in range(60)), ["CT"] * 60)
    page = (tmp_path / "run" / "report.html").read_bytes()
    assert 600_000 < len(page) < 1_050_000
    assert "рак лёгкого" in page.decode()


def test_links_stay_in_a_frame_that_has_no_address(run, tab):
    tab.goto("about:blank")
    tab.set_content("<iframe sandbox='allow-scripts' style='width: 900px; height: 900px'></iframe>")
    source = (run / "report.html").read_text()
    tab.eval_on_selector("iframe", "(frame, source) => { frame.srcdoc = source; }", source)
    frame = tab.frame_locator("iframe")
    frame.locator("nav a").last.click()
    frame.locator(".card .meta a").first.click()
    frame.locator("dialog[open] img").wait_for()
    frame.locator("#close").click()
    assert frame.locator(".card").count() > 0, "the frame has left the page"


def test_of_a_card_higher_than_the_window_the_focus_is_in_view(tmp_path, open_page):
    record = make_record(tmp_path / "run", make_predictions(9, reference=["a long reference " * 200] * 9))
    write_report(record, "test", (make_noise(i) for i in range(9)), [""] * 9)
    page = open_page(record.folder, width=390)
    for button in page.query_selector_all(".more"):
        button.click()
    page.evaluate("document.activeElement.blur()")
    for key in "jjjjkk":
        page.keyboard.press(key)
        top, bottom = page.evaluate("(box => [box.top, box.bottom])(document.activeElement.getBoundingClientRect())")
        assert -1 <= top < 800 and bottom > 0, key
        assert page.evaluate("document.activeElement.className") == "open"
