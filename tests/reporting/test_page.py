"""The report page in a real browser: what it shows, that nothing of the data runs, and that it stays quick."""

import csv
import functools
import re
import time
import weakref
from urllib.parse import quote

import numpy as np
import pytest
from helpers import make_noise, make_predictions, make_record

from captioning.reporting import page as page_module
from captioning.reporting import page_images
from captioning.reporting.page import write_report
from captioning.reporting.page_images import encode_image
from captioning.reporting.page_scores import score_label
from captioning.reporting.run_record import RunRecord


FOCUSED = "document.activeElement.closest('.card')?.querySelector('.meta a').textContent"
UNRESERVED = "!'()*"  # JavaScript leaves them in an address
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


def scored(value, low=None, high=None, **more):
    return {"value": value, "low": low, "high": high, "baselines": {}} | more


BASELINES = {"constant": 0.37, "nearest_image": 0.62, "shuffled_images": 0.7, "shuffled_references": 0.36}
SCORES = {
    "captions": 6,
    "unique_captions": 0.5,
    "verdict": "Above every baseline.",
    "beats_constant": True,
    "missing": {"coco_meteor": "needs Java"},
    "scores": {
        "rougeL": scored(0.635, 0.61, 0.65, baselines=BASELINES, signature="rouge_score 0.1.2"),
        "coco_cider": scored(2.5),
        "modality_f1": scored(None),
        "negation_f1": scored(0.0, precision=None, recall=0.0, predicted=0, stated=687),
        "concept_f1": scored(0.8, baselines={"constant": None}, references=0.9),
    },
    "baselines": {
        "constant": {"what": "one caption for all", "caption": "Axial CT.", "found_among": "12,000 training captions"},
        "typical_of_modality": {"what": "one for each", "captions": {"CT": "Axial CT.", "MRI": "Sagittal MRI."}},
        **{name: {"what": "another's"} for name in ("nearest_image", "shuffled_references", "shuffled_images")},
    },
    "modalities": {"CT": {"captions": 4, "rougeL": scored(0.6, 0.5, 0.7)}, "": {"captions": 2, "rougeL": scored(0.7)}},
}
LOG = [{"step": 5, "loss": 2.0}, *({"step": i, "eval_loss": 2 - i / 10, "eval_rougeL": i / 50} for i in (5, 10))]


def corner(row, column, side=6):
    values = np.zeros((side, side))
    values[row, column] = 3.0
    return values


def make_page(folder, rows, log=(), scores=None, images=None, modalities=None, recipe=None, **more):
    """Write the page of a run into `folder`, and return this."""
    images, modalities = images or [make_noise()] * len(rows), modalities or ["CT"] * len(rows)
    write_report(make_record(folder, rows, log, scores, **(recipe or {})), "test", images, modalities, **more)
    return folder


# --- Browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(browser):
    """One tab for all tests, and in `tab.faults` what it logged, refused or requested."""
    tab = browser.new_page()
    tab.faults = faults = []
    tab.set_default_timeout(5000)
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    allowed = re.compile("^data:|^about:|^blob:|/report.html")
    tab.on("request", lambda request: allowed.search(request.url) or faults.append(request.url))
    return tab


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
    captions = ["lung clear", "the same", "liver", "the same", "", "the same"]
    return make_page(
        tmp_path_factory.mktemp("run") / "my-run",
        make_predictions(6, prediction=captions, rougeL=[0.3, 0.9, 0.1, 0.5, float("nan"), 0.9]),
        LOG,
        {"test": SCORES},
        images=[*(make_noise(i) for i in range(5)), None],
        modalities=["CT", "CT", "MRI", "CT", "MRI", ""],
        attention={"image_1": [("the", corner(0, 0)), (".", corner(0, 0)), ("same", corner(5, 5))]},
    )


@pytest.fixture(scope="module")
def marked_run(tmp_path_factory):
    """The folder of a run with a wrong side, a wrong modality and a false negation."""
    texts = [
        ("=Chest CT, left lung", "chest CT, RIGHT lung scan"),
        ("chest CT", "chest MRI"),
        ("pelvis CT with fracture", "pelvis CT without fracture"),
        ("X-ray of the hand", "nothing alike"),
        ("the same", "the same"),
        ("same", "the same"),
    ]
    columns = dict(zip(("reference", "prediction"), zip(*texts, strict=True), strict=True))
    rows = make_predictions(6, **columns, rougeL=[0.6, 0.5, 0.4, 0.0, 1.0, 0.7], cui=[["C0040405"]] * 6)
    return make_page(tmp_path_factory.mktemp("marked") / "marked", rows)


@pytest.fixture
def page(run, open_page):
    return open_page(run)


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    """Ten thousand captions and images, the hardest to compress; equal images are encoded once, to save time."""
    words = "of a radiology caption with its usual length and words " * 3
    rows = make_predictions(10_000, reference=[f"reference {i} {words}" for i in range(10_000)])
    hard = [make_noise(i, (640, 520)) for i in range(4)] * 2_500
    by_id = {id(image): image for image in hard}
    encode_once = functools.cache(lambda key, most: encode_image(by_id[key], most))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_images, "encode_image", lambda image, most: encode_once(id(image), most))
        return make_page(tmp_path_factory.mktemp("large") / "run", rows, images=hard, modalities=["CT", "MRI"] * 5_000)


def wait_until(page, condition):
    """Wait for a JavaScript expression; Playwright's own function for this needs `unsafe-eval`."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def texts(page, selector):
    return page.eval_on_selector_all(selector, "elements => elements.map(element => element.textContent)")


def ids(page):
    return texts(page, "#cards .meta a")


# --- What the page says ---------------------------------------------------------------------------------------


def test_retrieved_captions_stand_under_the_caption_whose_prompt_they_were_in(tmp_path, open_page):
    retrieved = [[("train_7", HOSTILE[0]), ("train_2", "An effusion")], [("train_2", "An effusion")], []]
    tab = open_page(make_page(tmp_path, make_predictions(3), retrieved=retrieved))
    assert texts(tab, "#cards .card:nth-child(1) .label")[-2:] == ["In the prompt: train_7", "In the prompt: train_2"]
    assert texts(tab, "#cards .card:nth-child(1) .caption")[-2:] == [HOSTILE[0], "An effusion"]
    assert not tab.query_selector(".card:nth-child(1) .caption:last-of-type mark")
    assert texts(tab, "#cards .card:nth-child(2) .label")[-1:] == ["In the prompt: train_2"]
    assert texts(tab, "#cards .card:nth-child(3) .label") == ["Reference", "Prediction"]
    assert tab.evaluate("window.hacked") is None


def test_header_names_the_run_and_its_verdict_without_a_folder_of_the_machine(page):
    header = page.inner_text("header")
    facts = ["fine-tuned from Salesforce/blip @ 0123456\n", "the folder my-data", "3 beams, at most 64", "50%"]
    for text in [*facts, "my-run", "test, 6 captions", "Above every baseline.", "Not for clinical use"]:
        assert text in header
    assert page.inner_text(".verdict strong") == "✓ Better than a constant caption, but below: shuffled images"
    assert "somebody" not in page.content()
    assert page.title().startswith("my-run")
    assert page.query_selector(".verdict.bad") is None


def test_a_model_below_the_constant_caption_is_named_first(odd_run, open_page):
    page = open_page(odd_run)
    assert page.inner_text(".verdict.bad strong") == "▲ The model does not beat one constant caption for all images"
    assert "Look next at the captions" in page.inner_text(".verdict")
    assert page.eval_on_selector(".verdict", "box => box.getBoundingClientRect().bottom < innerHeight")


def test_score_tables_have_values_intervals_baselines_and_what_is_missing(page):
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))"
    assert page.eval_on_selector_all(".scroll tr:not(.group)", script)[1:] == [
        ["ROUGE-L rouge_score 0.1.2", "0.635 0.610 – 0.650", "0.370", "–", "~ 0.620", "0.360", "▲ 0.700", "–"],
        ["CIDEr", "2.500", *["–"] * 6],
        ["Modality", "–", *["–"] * 6],
        ["Negation the captions never state one, the references 687", "0.000", *["–"] * 6],
        ["Concept", "0.800", *["–"] * 5, "0.900"],
        ["Modality", "Captions", "ROUGE-L, from 0 to 1", "ROUGE-L"],
        ["CT", "4", "", "0.600 0.500 – 0.700"],
        ["(unknown)", "2", "", "0.700"],
    ]
    assert "Not computed: COCO METEOR: needs Java" in page.inner_text("#section-scores-1")
    notes = " ".join(page.text_content(".notes").split())
    assert notes.startswith("constant caption") and "found among 12,000 training captions" in notes
    assert "Axial CT." in notes and "MRI: Sagittal MRI." in notes


def test_the_top_has_the_verdict_then_scores_among_their_baselines_then_images_then_tables(page):
    assert texts(page, ".bars caption b") == ["ROUGE-L", "COCO CIDEr", "Concept F1"]
    bars = "rows => rows.map(row => [row.cells[0].innerText, row.querySelector('rect').width.baseVal.value])"
    shown = dict(page.eval_on_selector_all(".bars >> nth=0 >> tr", bars))
    assert [name.split()[0] for name in shown] == ["shuffled", "this", "nearest", "constant", "shuffled"]
    assert list(shown.values()) == pytest.approx([100 * x / 0.7 for x in (0.7, 0.635, 0.62, 0.37, 0.36)], abs=0.1)
    interval = page.query_selector("tr.own .interval").evaluate("bar => [bar.x, bar.width].map(x => x.baseVal.value)")
    assert interval == pytest.approx([100 * 0.61 / 0.7, 100 * 0.04 / 0.7], abs=0.15)
    order = [".verdict", ".headlines", "#highlights", ".scroll", "#cards"]
    tops = [page.eval_on_selector(part, "e => e.getBoundingClientRect().top") for part in order]
    assert tops == sorted(tops)


def test_scores_have_the_names_of_their_field():
    names = {"rougeL": "ROUGE-L", "coco_bleu4": "COCO BLEU-4", "imageclef_bertscore": "ImageCLEF BERTScore"}
    names |= {"laterality_f1": "Laterality F1", "nlgeval_lower_rougeL": "nlg-eval, lower case: ROUGE-L"}
    names |= {"imageclef_bleurt": "ImageCLEF BLEURT", "imageclef_medcat_f1": "ImageCLEF MedCAT F1"}
    assert {key: score_label(key, full=True) for key in names} == names
    assert page_module.page_scores.CLINICAL not in page_module.page_scores.score_groups({"nlgeval_lower_cider": {}})


def test_learning_curves_are_drawn_in_the_colors_of_the_scheme(run, open_page):
    strokes = []
    for scheme in ("light", "dark"):
        page = open_page(run, scheme=scheme)
        _, rouge = page.query_selector_all(".curves svg")
        line = rouge.query_selector("path[stroke='var(--accent)'][fill=none]")
        assert line.evaluate("line => line.getBBox().height") > 20, "ROUGE-L rises"
        strokes.append(line.evaluate("line => getComputedStyle(line).stroke"))
    assert strokes == ["rgb(10, 90, 168)", "rgb(116, 179, 242)"]


def test_a_run_without_scores_and_log_has_its_captions(tmp_path, open_page):
    page = open_page(make_page(tmp_path / "bare", make_predictions(2), images=[None, make_noise()]))
    assert "No verdict" in page.inner_text(".verdict")
    assert page.query_selector("#section-curves, .scroll") is None
    assert ids(page) == ["image_0", "image_1"]
    page.eval_on_selector("#section-gallery", "gallery => gallery.scrollIntoView()")
    page.wait_for_selector("#cards .open img")
    assert page.inner_text("#cards .open .none") == "no image"


# --- Gallery --------------------------------------------------------------------------------------------------


def test_orders_follow_the_scores_and_the_use_of_a_caption(page):
    assert ids(page) == [f"image_{i}" for i in range(6)]
    # Equal scores in the order of the data, a missing one last
    for order, indices in {"0 highest": "153024", "0 lowest": "203154", "uses": "135024"}.items():
        page.select_option("#order", order)
        assert ids(page) == [f"image_{i}" for i in indices], order
    assert "same caption on 3 images" in page.text_content("#cards .card >> nth=2")
    assert "same caption" not in page.text_content("#cards .card >> nth=3")


def test_captions_are_sorted_by_any_score_and_by_nats_per_token(tmp_path, open_page):
    rows = make_predictions(3, prediction=["reference 0", "reference", "x"], nll=[9.0, 4.0, None])
    page = open_page(make_page(tmp_path / "run", rows, num_tokens=[9, 2, 3]))
    names = [text.split(",")[0] for text in texts(page, "#order option")[2::2]]
    assert names == ["ROUGE-L", "ROUGE-1", "ROUGE-2", "ImageCLEF ROUGE-1", "NLL", "nats per token"]
    for label, indices in {"ROUGE-1": "012", "NLL": "012", "nats per token": "102"}.items():
        page.select_option("#order", label=f"{label}, highest first")
        assert ids(page) == [f"image_{i}" for i in indices], label
    assert "NLL 9.0nats per token 1.000" in page.text_content("#cards .scores >> nth=1")


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
    page.click("text=Nothing found. >> text=Show all captions")
    assert (len(ids(page)), page.is_visible("#nothing")) == (6, False)
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
    page.click("#close")
    wait_until(page, "!location.hash")
    page.evaluate("location.hash = 'image_1'")
    page.wait_for_selector("dialog[open]")
    page.go_back()
    wait_until(page, "!document.querySelector('dialog').open")


def test_every_step_works_by_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.type("j/k")
    assert page.input_value("#search:focus") == "j/k", "in the search field letters are letters"
    page.fill("#search", "")
    page.keyboard.press("Escape")
    columns = page.evaluate("getComputedStyle(cards).gridTemplateColumns.split(' ').length")
    steps = [("j", 0), ("j", 1), ("j", 2), ("k", 1), ("ArrowRight", 2), ("ArrowLeft", 1)]
    for key, card in [*steps, ("ArrowDown", 1 + columns), ("ArrowUp", 1)]:
        page.keyboard.press(key)
        assert page.evaluate(FOCUSED) == f"image_{card}", key
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is visible"
    for key, example in {"Enter": 1, "j": 2}.items():
        page.keyboard.press(key)
        assert page.inner_text("dialog[open] h2") == f"Example image_{example}"
    page.keyboard.press("Escape")
    assert page.query_selector("dialog[open]") is None
    wait_until(page, f"{FOCUSED} === 'image_2'")  # the example that was read last


def test_every_control_is_reached_by_tab(page):
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        visible = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert visible == "3px" or page.evaluate("document.activeElement === document.body")
    assert {"theme", "search", "kind", "modality", "order", "attended", "csv", "open", "scroll", "skip"} <= reached


def test_a_word_shows_where_the_attention_lay(run, open_page):
    page = open_page(run, "#image_1")
    page.wait_for_selector("dialog img")
    assert "Attention is not an explanation" in page.inner_text("dialog")
    assert not page.is_visible(".stage canvas")
    first, second = page.query_selector_all(".tokens button")  # none for the punctuation
    assert page.is_visible(".legend")
    opacity = """at => { const map = document.querySelector('.stage canvas');
        return map.getContext('2d').getImageData(at * map.width, at * map.height, 1, 1).data[3]; }"""
    first.hover()
    assert page.evaluate(opacity, 0.08) > 130 > 60 > page.evaluate(opacity, 0.92)
    second.focus()
    assert page.evaluate(opacity, 0.92) > 130 > 60 > page.evaluate(opacity, 0.08)
    second.click()
    page.hover("#close")
    page.focus("#close")
    assert page.is_visible(".stage canvas"), "a pressed word stays"
    assert second.get_attribute("aria-pressed") == "true"
    box = "e => Object.values(e.getBoundingClientRect().toJSON())"
    image, canvas = (page.eval_on_selector(tag, box) for tag in ("dialog img", ".stage canvas"))
    assert image == pytest.approx(canvas, abs=1.5), "the map covers the image"
    levels = "canvas => new Set(canvas.getContext('2d').getImageData(200, canvas.height - 20, 56, 1).data).size"
    assert page.eval_on_selector(".stage canvas", levels) > 30, "the upscaling is smooth"
    second.click()
    assert not page.is_visible(".stage canvas"), "a second press hides it, as a finger cannot leave the button"
    first.hover()
    page.hover("#close")
    page.focus("#close")
    assert not page.is_visible(".stage canvas")


def test_differing_words_are_marked_and_tags_say_what_each_text_states(marked_run, open_page):
    page = open_page(marked_run)
    assert texts(page, "#cards .card >> nth=0 >> mark") == ["left", "RIGHT", "scan"]
    assert page.eval_on_selector("mark", "mark => getComputedStyle(mark).textDecorationLine") == "underline"
    tags = ["concept of the image: C0040405 CT", "in both: ✓ CT", "in both: ✓ chest"]
    tags += ["only in the reference: – left", "only in the prediction: + right"]
    assert texts(page, "#cards .card >> nth=0 >> .tags li") == tags


def test_right_missed_and_wrong_concepts_are_told_apart_by_words(tmp_path, open_page):
    rows = make_predictions(1, cui=[["C0040405", "C0817096"]], concepts=[["C0817096", "C0030797"]])
    keys = (f"concept_detection_{name}" for name in ("f1", "manual_f1", "precision", "recall"))
    head = dict.fromkeys(keys, scored(0.5, 0.4, 0.6)) | {"threshold": 0.37}
    counts = {"tp": 1, "fp": 0, "name": "<b>bone</b>"}
    table = [{"cui": f"C{i:07}", "support": 200 - i, "fn": 199 - i, **counts} for i in range(120)]
    detection = {"systems": {"head": head}, "of": "head", "concepts": table}
    page = open_page(make_page(tmp_path / "run", rows, scores={"test": SCORES | {"concept_detection": detection}}))
    shown = texts(page, "#cards .tags .concept")
    assert shown == ["concept, predicted: ✓ C0817096 chest", "missed: C0040405 CT", "wrong: C0030797 pelvis"]
    border = "all => all.map(e => getComputedStyle(e).borderStyle)"
    assert page.eval_on_selector_all("#cards .tags .concept", border) == ["solid", "dashed", "solid"]
    text = page.inner_text("main")
    assert "concept head 0.37" in text and "missed by it" in text
    page.click("text=Concept by concept")
    assert "C0000000 <b>bone</b>\t200\t1\t199\t0\t0.010" in page.inner_text("main")
    assert "The 100 most frequent of 120" in page.inner_text("main")


def test_examples_of_errors_come_first_and_lead_to_all_of_their_kind(marked_run, open_page):
    page = open_page(marked_run)
    examples = zip(texts(page, "#highlights h3"), texts(page, "#highlights .meta a"), strict=True)
    assert list(examples) == [
        ("Best ROUGE-L", "image_4"),
        ("Worst ROUGE-L", "image_3"),
        ("Wrong side: 1", "image_0"),
        ("Wrong modality: 1", "image_1"),
        ("False negation: 1", "image_2"),
        ("Most repeated: 2 times", "image_4"),
    ]
    page.click("#highlights >> text=More >> nth=3")
    assert (page.input_value("#kind"), ids(page)) == ("wrong_modality", ["image_1"])
    page.fill("#search", "MRI c0040405")
    assert ids(page) == ["image_1"], "tags and concepts are searched, too"


def test_the_chosen_captions_are_saved_as_csv(marked_run, open_page):
    page = open_page(marked_run)
    page.select_option("#kind", "wrong_laterality")
    with page.expect_download() as download:
        page.click("#csv")
    with open(download.value.path(), encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    texts = ["'=Chest CT, left lung", "chest CT, RIGHT lung scan"]
    assert [row[:5] for row in rows] == [["image_0", "CT", "C0040405 CT", *texts]]
    assert dict(zip(header, rows[0], strict=True))["kind"] == "wrong side"
    assert rows[0][header.index("ROUGE-1")] == "0.6667"


def test_zoom_window_and_level_change_the_image(run, open_page):
    page = open_page(run, "#image_1")
    page.wait_for_selector("dialog img")
    set_to = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }"
    for name, value in {"zoom": 3, "width": 64, "level": 32}.items():
        page.eval_on_selector(f"#view [name={name}]", set_to, value)
    channel = "channel => [channel.slope, channel.intercept].map(x => x.baseVal)"
    assert page.eval_on_selector("feFuncG", channel) == [4, 0]  # gray 0 to 64 fills the scale
    assert page.eval_on_selector("dialog img", "image => image.style.filter") == 'url("#window")'
    zoom = page.eval_on_selector("#stage", "stage => stage.scrollWidth / stage.clientWidth")
    assert zoom == pytest.approx(3, abs=0.1)
    page.focus("#view [name=zoom]")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("dialog h2") == "Example image_1", "an arrow moves the slider, not to the next example"
    page.click("#view button")
    wait_until(page, "document.querySelector('dialog img').style.filter === ''")


# --- Hostile data ---------------------------------------------------------------------------------------------


def test_nothing_of_the_data_runs_and_all_of_it_shows_as_text(tmp_path, open_page):
    everything = " ".join(HOSTILE)
    scores = SCORES | {
        "verdict": everything,
        "missing": {everything: everything},
        "scores": {everything: scored(0.5), "rougeL": scored(0.5)},
        "baselines": {
            "constant": {"what": everything, "caption": everything, "found_among": everything},
            "typical_of_modality": {"what": everything, "captions": {everything: everything}},
        },
        "modalities": {everything: {"captions": 1, "rougeL": scored(0.5), everything: scored(0.5)}},
    }
    folder = make_page(
        tmp_path / "<script>window.hacked=1<",
        make_predictions(len(HOSTILE), image_id=HOSTILE, reference=HOSTILE, prediction=HOSTILE),
        scores={everything: scores, "test": scores},
        modalities=HOSTILE,
        attention={text: [(text, corner(0, 0))] for text in HOSTILE},
        recipe={"model_name_or_path": everything, "dataset_name": everything, "dataset_revision": "0" * 40},
    )
    page = open_page(folder)
    for part in (".verdict", ".facts", "#section-scores-2"):
        assert all(text in page.text_content(part) for text in HOSTILE[:7]), part
    for selector in (".caption", ".meta bdi"):
        assert texts(page, f"#cards {selector}") == [text for text in HOSTILE for _ in range(2)]
    for index, text in enumerate(HOSTILE):
        page.select_option("#modality", index=index + 1)
        assert page.inner_text("#hits") == f"1 of {len(HOSTILE)} captions"
        page.select_option("#modality", index=0)
        page.goto((folder / "report.html").as_uri() + "#" + quote(text, safe=UNRESERVED))
        page.wait_for_selector("dialog[open] .tokens")
        assert texts(page, "dialog h2 bdi, .tokens button") == [text, text]
        page.focus(".tokens button")
        page.keyboard.press("Escape")
        page.fill("#search", text)
        assert text in ids(page)
        page.fill("#search", "")
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


ODD = ["\ud800 alone", "nul \0", "x" * 100_000, "", "   ", "\u202eoverride"]


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """The folder of a run whose texts and numbers are hard to show."""
    scores = SCORES | {"verdict": "\ud800 \0", "missing": {"\ud800": "\0"}, "beats_constant": False}
    rows = make_predictions(
        6,
        image_id=["first", "second", "\udc00", "x" * 5000, "a/b'c\"", "\0"],
        reference=["\u05e8\u05d9\u05d0\u05d4", *(f"reference {i}" for i in range(1, 6))],
        prediction=ODD,
        rougeL=[float("nan"), float("inf"), 0.5, 0.5, 1, 0],
        nll=[float("nan")] * 6,
    )
    modalities = ["\ud800", "\0", "", "CT", "x" * 5000, "\u202e"]
    folder = tmp_path_factory.mktemp("odd") / "odd"
    scores, attention = {"\ud800": scores, "test": scores}, {"first": [("a", corner(0, 0))]}
    return make_page(folder, rows, (), scores, modalities=modalities, attention=attention)


def test_a_browser_without_the_functions_of_2023_shows_the_page(run, browser):
    """Firefox before 119 lacks both; either would end the page's script."""
    old = browser.new_page()
    old.add_init_script("delete Map.groupBy; delete String.prototype.toWellFormed")
    old.goto((run / "report.html").as_uri())
    assert texts(old, "#cards .meta a")[0] == "image_0" and len(ids(old)) == 6
    assert old.inner_text("#modality option:checked").startswith("all")
    old.close()


def test_odd_texts_and_numbers_do_not_break_the_page(odd_run, open_page):
    page = open_page(odd_run)
    captions = texts(page, "#cards .caption")[1::2]
    expected = ["\ud800 alone", "nul \0", "xxxxxxxxxx", "(empty)", "(empty)", "\u202eoverride"]
    assert [text[:10] for text in captions] == expected
    assert len(captions[2]) < 1000, "a long caption is cut on its card"
    page.click("#cards .open >> nth=2")
    assert texts(page, "dialog .caption")[1] == ODD[2]
    page.click("#close")
    assert "ROUGE-L –" in page.inner_text("#cards .card")
    isolated = page.eval_on_selector_all(".caption, .meta bdi", "e => e.map(e => getComputedStyle(e).unicodeBidi)")
    assert set(isolated) <= {"isolate", "plaintext"}
    directions = page.eval_on_selector_all("#cards .caption", "e => e.map(e => getComputedStyle(e).direction)")
    assert directions[:2] == ["rtl", "ltr"], "Hebrew runs from right to left"
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    fits = "texts => texts.every(text => text.scrollWidth <= text.clientWidth)"
    assert page.eval_on_selector_all(".caption, .meta", fits), "long words are broken"


def test_an_odd_id_is_an_address_and_a_broken_one_is_none(odd_run, open_page):
    page = open_page(odd_run, "#" + quote("a/b'c\"", safe=UNRESERVED))
    assert page.inner_text("dialog[open] .caption >> nth=0") == "reference 4"
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '%E0%A4%A'")
    assert page.query_selector("dialog[open]") is None


def test_of_a_card_higher_than_the_window_the_focus_is_in_view(odd_run, open_page):
    page = open_page(odd_run, width=300)
    for key in "jjjjkkk":
        page.keyboard.press(key)
        top, bottom = page.evaluate("(box => [box.top, box.bottom])(document.activeElement.getBoundingClientRect())")
        assert -1 <= top < 800 and bottom > 0, key
        assert page.evaluate("document.activeElement.className") == "open"


# --- Looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, scheme", [(360, "light"), (1366, "dark")])
@pytest.mark.parametrize("folder", ["run", "odd_run", "marked_run"])
def test_axe_finds_nothing(request, open_page, folder, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")
    page = open_page(request.getfixturevalue(folder), width=width, scheme=scheme, motion="reduce")
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    page.evaluate(axe.AXE_FILE_PATH.read_text())
    for opened in (False, True):
        if opened:
            page.click("#cards .open >> nth=1")
            for word in page.query_selector_all(".tokens button")[:1]:
                word.click()
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []


def test_theme_and_motion_follow_the_system_until_the_button_is_pressed(run, open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    dark = open_page(run, scheme="dark").evaluate(background)
    page = open_page(run)
    light = page.evaluate(background)
    assert light != dark
    for theme, expected in {"light": light, "dark": dark, "system": light}.items():
        page.click("#theme")
        assert (page.inner_text("#theme"), page.evaluate(background)) == (f"Theme: {theme}", expected)
    motion = """[getComputedStyle(document.documentElement).scrollBehavior,
        getComputedStyle(document.querySelector('.card')).transitionDuration]"""
    assert page.evaluate(motion) == ["smooth", "0.12s"]
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(motion) == ["auto", "0s"]


@pytest.mark.parametrize("width", [360, 1366])
def test_tables_fold_on_a_phone_scroll_and_never_break_a_word_and_the_page_never_scrolls_sideways(
    run, open_page, width
):
    page = open_page(run, width=width)
    assert page.eval_on_selector(".fold", "fold => fold.open") == (width > 1000)
    page.click("nav >> text=Scores")
    assert page.is_visible(".scroll"), "a link to a folded table opens it"
    # The range of a broken word has two boxes
    broken = """cells => cells.flatMap(cell => [cell, ...cell.children]).flatMap(cell => [...cell.childNodes])
        .filter(node => node.nodeType === 3).flatMap(node => [...node.data.matchAll(/\\w+/g)].filter(word => {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            return range.getClientRects().length > 1;
        }).map(word => word[0]))"""
    assert page.eval_on_selector_all("th, td", broken) == []
    page.click("#cards .open >> nth=1")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert page.eval_on_selector("dialog", "dialog => dialog.scrollWidth <= dialog.clientWidth")


def test_print_is_light_has_all_captions_and_tables_and_leaves_the_controls_out(tmp_path, open_page):
    folder = make_page(tmp_path / "run", make_predictions(60), scores={"test": SCORES})
    page = open_page(folder, width=390, scheme="dark")
    assert (len(ids(page)), page.is_visible(".scroll")) == (24, False)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert (len(ids(page)), page.is_visible(".scroll")) == (60, True)
    assert page.evaluate("document.querySelectorAll('#cards .open img').length") == 60
    page.emulate_media(media="print")
    assert [page.is_visible(part) for part in (".toolbar", "nav", "#cards .card")] == [False, False, True]
    colors = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    assert page.evaluate(colors) == ["rgb(255, 255, 255)", "rgb(26, 32, 39)"]


# --- Ten thousand ---------------------------------------------------------------------------------------------


def test_ten_thousand_images_stay_below_60_mb_and_come_as_they_are_scrolled_to(large_run, open_page):
    assert (large_run / "report.html").stat().st_size < 60e6
    page = open_page(large_run)
    assert page.inner_text("#hits") == "10,000 captions"
    assert page.evaluate("document.images.length < 40 && document.querySelectorAll('#cards .card').length < 100")
    to_gallery = "document.querySelector('#section-gallery').scrollIntoView({behavior: 'instant'})"
    page.evaluate(to_gallery)
    wait_until(page, "document.images[0]?.naturalWidth > 0")
    for _ in range(3):
        before = page.evaluate("document.querySelectorAll('#cards .card').length")
        page.evaluate("scrollTo({top: 1e9, behavior: 'instant'})")
        wait_until(page, f"document.querySelectorAll('#cards .card').length > {before}")
    page.evaluate(to_gallery)
    seen = set()
    for _ in range(12):
        page.evaluate("scrollBy({top: 1000, behavior: 'instant'})")
        wait_until(page, "[...document.images].some(image => Math.abs(image.getBoundingClientRect().y - 400) < 400)")
        seen |= set(page.eval_on_selector_all("img", "images => images.map(image => image.alt)"))
    assert len(seen) > 70
    assert page.evaluate("document.images.length") < 50, "images out of sight are let go"
    page.select_option("#order", "0 lowest")
    wait_until(page, "cards.firstChild.getBoundingClientRect().top >= 0")  # the first hit is in view, not the last


def test_one_of_ten_thousand_is_found_by_search_and_by_its_address(large_run, open_page):
    page = open_page(large_run, "#image_9998")
    page.wait_for_selector("dialog[open] img")
    assert page.inner_text("dialog h2") == "Example image_9998"
    page.keyboard.press("Escape")
    wait_until(page, f"{FOCUSED} == 'image_9998' && document.activeElement.querySelector('img')?.complete")
    place = "document.activeElement.getBoundingClientRect().toJSON()"
    wait_until(page, f"{place}.top >= 0 && {place}.top < innerHeight")  # the gallery is where the example was
    page.fill("#search", "reference 9999 ")
    assert (ids(page), page.inner_text("#hits")) == (["image_9999"], "1 of 10,000 captions")
    page.wait_for_selector("#cards .open img")


def test_images_are_taken_one_at_a_time(tmp_path):
    taken, alive = [], []

    def images():
        for i in range(120):
            image = make_noise(i)
            taken.append(weakref.ref(image))
            alive.append(sum(reference() is not None for reference in taken))
            yield image
            del image

    make_page(tmp_path / "run", make_predictions(120), images=images())
    assert max(alive) <= 3


# --- The file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, modalities", [([None], ["CT"] * 2), ([None] * 2, ["CT"])])
def test_the_page_appears_whole_or_not_at_all_and_is_the_same_for_the_same_run(tmp_path, images, modalities):
    record, pages = make_record(tmp_path / "run", make_predictions(2), LOG, {"test": SCORES}), []
    for _ in range(2):
        with pytest.raises(ValueError, match="zip"):
            write_report(record, "test", images, modalities)
        assert [path.read_text() for path in record.folder.glob("report*")] == pages
        write_report(RunRecord(record.folder), "test", [None] * 2, ["CT"] * 2)
        pages = pages or [(record.folder / "report.html").read_text()]
    assert (record.folder / "report.html").read_text() == pages[0]
    assert pages[0].endswith("</html>")


def test_long_captions_leave_less_of_the_page_to_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "PAGE_BUDGET", 500_000)
    rows = make_predictions(30, reference=["рак лёгкого " * 300] * 30)  # two bytes a letter, six in ASCII JSON
    folder = make_page(tmp_path / "run", rows, images=[make_noise(i, (300, 300)) for i in range(30)])
    page = (folder / "report.html").read_bytes()
    assert 300_000 < len(page) < 550_000
    assert "рак лёгкого" in page.decode()


def test_links_stay_in_a_frame_that_has_no_address(run, tab):
    tab.goto("about:blank")
    tab.set_content("<iframe sandbox='allow-scripts' style='width: 900px; height: 900px'></iframe>")
    source = (run / "report.html").read_text()
    tab.eval_on_selector("iframe", "(frame, source) => { frame.srcdoc = source; }", source)
    frame = tab.frame_locator("iframe")
    frame.locator("nav a").last.click()
    frame.locator("#cards .meta a").first.click()
    frame.locator("dialog[open] img").wait_for()
    frame.locator("#close").click()
    assert frame.locator(".card").count() > 0, "the frame has left the page"
