"""The demo in a real browser: a server of its own, files as users send them, and nothing that leaves the machine."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from helpers import make_noise, save_captioner
from PIL import Image
from processes import ROOT, server
from pydicom.data import get_testdata_file

from captioning.__main__ import main
from captioning.data.images import open_image
from captioning.errors import UserError
from captioning.inference import app
from captioning.inference.app import _read_upload, _Shown, _write
from captioning.inference.model import InferenceModel
from captioning.inference.page_parts import banner, caption_text, details, fault
from captioning.inference.writer import Alternative, Writer, Written
from captioning.training.decoding import DEFAULTS, generation_config


SECONDS = 30_000  # milliseconds that anything may take
# What `python -m captioning` does, in a process that may have looked for its folder of temporary files before
START = """import sys, tempfile
from captioning.__main__ import exit_on_user_error, main
tempfile.tempdir = None
exit_on_user_error(lambda: main(sys.argv[1:]))"""
# Until nothing of the page has changed for a while: Gradio mounts its parts one by one, and one does nothing before
SETTLED = """() => new Promise((done) => {
  let timer;
  const wait = () => { clearTimeout(timer); timer = setTimeout(done, 400); };
  new MutationObserver(wait).observe(document.body, {childList: true, subtree: true, attributes: true});
  wait();
})"""
IN_VIEW = "document.querySelector('#caption p').getBoundingClientRect().bottom <= innerHeight"
MAP = "#picture canvas:not([hidden])"

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed: see requirements-demo.txt")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tiny_captioner, tmp_path_factory):
    tiny_captioner.set_generation_config(generation_config(DEFAULTS | {"num_beams": 3, "max_new_tokens": 12}))
    folder = save_captioner(tiny_captioner, tmp_path_factory.mktemp("demo") / "my-run")
    (folder / "sample.png").write_bytes(png(make_noise(9)))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return InferenceModel(str(folder))


@pytest.fixture(scope="module")
def proxy():
    """A proxy that all requests of the server to others would go through; nobody should come."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


@pytest.fixture(scope="module")
def demo(folder, proxy, tmp_path_factory):
    """The command in a process of its own, its address, and its folder for temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    environment = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), f"http://127.0.0.1:{proxy.getsockname()[1]}")
    words = ["-c", START, "demo", folder, "--port", free_port()]
    process, end = server().start(words, environment=environment | {"TMPDIR": str(temporary)}), time.monotonic() + 60
    while not (found := re.search(r"http://\S+", process.output().decode())):
        assert process.poll() is None and time.monotonic() < end, process.output(error=True).decode()
        time.sleep(0.1)
    yield SimpleNamespace(process=process, url=found[0], temporary=temporary)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)


def files_of(demo):
    return [path.read_bytes() for path in demo.temporary.rglob("*") if path.is_file()]


@pytest.fixture
def open_demo(browser, demo):
    """Return a function that opens the demo as a user of its own, and check that each asks the demo alone."""
    others = []

    def open_demo(width=1200, **options):
        page = browser.new_context(viewport={"width": width, "height": 800}, **options).new_page()
        allowed = re.compile(rf"^(data:|blob:|{re.escape(demo.url)})")
        page.on("request", lambda request: allowed.match(request.url) or others.append(request.url))
        page.on("pageerror", lambda error: others.append(str(error)))
        return go_to(page, demo.url)

    yield open_demo
    for context in browser.contexts:
        context.close()
    assert others == []


def go_to(page, url):
    page.set_default_timeout(SECONDS)
    page.goto(url)
    page.wait_for_selector("#picture")
    page.evaluate(SETTLED)
    return page


def send(page, content, name="image.png"):
    # The field is emptied by each upload
    page.set_input_files("input[type=file]", {"name": name, "mimeType": "application/octet-stream", "buffer": content})


def set_field(page, label, value):
    field = page.locator(f"label:has-text('{label}') input")
    field.fill(value)
    field.press("Tab")
    playwright.expect(field).to_have_value(value)


def watch(page):
    """Keep in `seen` of the page its image and the text of its caption, whenever one changes."""
    page.evaluate("""() => {
      window.seen = [];
      const text = () => document.querySelector("#caption .caption")?.innerText.trim() ?? "";
      const look = () => seen.push([document.querySelector("#picture img")?.alt ?? "", text()]);
      new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
    }""")


def caption_of(page):
    page.wait_for_selector("#details table")
    return page.wait_for_selector("#caption .done").inner_text().strip()


def refusal_of(page):
    return page.wait_for_selector("#caption [role=alert]").inner_text()


# --- What it shows --------------------------------------------------------------------------------------------


def test_an_upload_gets_the_caption_of_the_model_with_alternatives_and_attention(open_demo, model):
    page, image = open_demo(), make_noise(1)
    send(page, png(image))
    assert caption_of(page) == model.describe([image])[0].caption
    assert page.eval_on_selector("#picture img", "img => [img.naturalWidth, img.naturalHeight]") == [60, 40]
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    rows = page.eval_on_selector_all("#details tbody tr", cells)
    assert len(rows) == 3 and rows[0][0] == caption_of(page)
    assert sum(float(row[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2)
    words = page.locator("#details .tokens button")
    assert words.count() > 1 and page.query_selector(MAP) is None
    words.nth(0).click()
    first = page.wait_for_selector(MAP)
    assert first.get_attribute("aria-label") == f"Attention for {words.nth(0).inner_text()}"
    heights = "parts => parts.map(part => part.getBoundingClientRect().height)"
    of_image, of_map = page.eval_on_selector_all("#picture img, #picture canvas", heights)
    assert of_map == pytest.approx(of_image, abs=1)
    pixels = "canvas => canvas.getContext('2d').getImageData(0, 0, 256, 256).data.join()"
    before = first.evaluate(pixels)
    words.nth(1).hover()
    assert page.wait_for_selector(MAP).evaluate(pixels) != before


def test_what_it_is_not_for_comes_before_all_else(open_demo):
    page = open_demo()
    top = "document.elementFromPoint(200, 40).closest('.banner').innerText"
    assert page.evaluate(top).startswith("Research only: not for clinical use.")
    assert "stay on this machine" in page.inner_text(".banner")
    assert page.inner_text("h1") == "my-run: captions of radiology images"


def test_the_caption_appears_while_it_is_written(open_demo):
    page = open_demo()
    watch(page)
    page.click("text=Sample of the card")
    last = caption_of(page)
    unfinished = {text for _, text in page.evaluate("seen") if text.endswith("…")}
    assert len(unfinished) > 2 and last not in unfinished
    assert page.get_attribute("#caption", "aria-live") == "polite"
    assert page.get_attribute("#caption", "aria-busy") == "false", "read aloud now, not at each token"


def test_other_settings_caption_the_image_again(open_demo, folder):
    page, image = open_demo(), make_noise(2)
    send(page, png(image))
    first = caption_of(page)
    page.click("text=Decode settings")
    page.evaluate(SETTLED)
    set_field(page, "Beams", "1")
    set_field(page, "Most new tokens", "5")
    page.click("text=Caption again")
    page.wait_for_selector("text=Greedy search finds one caption")
    greedy = InferenceModel(str(folder), settings={"num_beams": 1, "max_new_tokens": 5}).describe([image])[0].caption
    assert caption_of(page) == greedy != first
    set_field(page, "Most new tokens", "200")
    page.click("text=Caption again")
    assert "64 text positions" in refusal_of(page)


def test_a_new_image_ends_the_caption_of_the_one_before(open_demo, model):
    page, image = open_demo(), make_noise(3)
    page.click("text=Decode settings")
    page.evaluate(SETTLED)
    set_field(page, "Beams", "10")
    set_field(page, "Most new tokens", "63")
    watch(page)
    page.click("text=Drawing: CT")
    page.wait_for_selector("#caption:has-text('…')")
    send(page, png(image))
    page.wait_for_selector("#picture img[alt*='60 by 40']")
    last = caption_of(page)
    writer = Writer(model)
    *steps, found = writer.write(image, writer.settings({"num_beams": 10, "max_new_tokens": 63}))
    assert last == found.alternatives[0].caption
    below = {text.removesuffix("…").strip() for alt, text in page.evaluate("seen") if "60 by 40" in alt}
    assert below <= {*steps, last, "", "waiting for the model"}


@pytest.mark.parametrize(
    "values, message",
    [
        ((0, None, None, None), "Beams: 0 is not from 1 to 10"),
        ((None, 257, None, None), "Most new tokens: 257 is not from 1 to 256"),
        ((None, None, float("nan"), None), "Length penalty: nan is not"),
        ((None, None, None, -1), "No sequence of this many tokens twice: -1 is not"),
    ],
)
def test_a_setting_out_of_range_is_a_message(model, values, message):
    ((told, rest),) = _write(None, Writer(model), _Shown(make_noise()), *values)
    assert message in told and rest == ""


def test_an_empty_setting_is_that_of_the_model(model):
    *_, (told, _) = _write(None, Writer(model), _Shown(make_noise(1)), None, None, None, None)
    assert caption_text(model.describe([make_noise(1)])[0].caption) == told


def test_nothing_more_is_written_below_an_image_that_was_replaced(model):
    shown, settings = _Shown(make_noise()), (1, 60, 1.0, 0)
    steps = _write(None, Writer(model), shown, *settings)
    next(steps)
    assert shown.writing.locked()
    shown.replaced.set()
    assert list(steps) == []
    assert not shown.writing.locked()


# --- Other files ----------------------------------------------------------------------------------------------


def test_unusable_files_get_one_message_each_and_the_server_goes_on(open_demo, model):
    page = open_demo()
    large = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(large, "PNG")
    files = {
        b"%PDF-1.7 a report": "not an image: starts with b'%PDF-1.7",
        png(make_noise(4))[:300]: "cannot be decoded",
        large.getvalue(): "at most 67,108,864 are decoded",
        b"": "is empty",
        b"\x89PNG\r\n\x1a\n<script>window.hacked=1</script>": "",
    }
    for content, message in files.items():
        send(page, content, "patient <b>Smith</b>.png")
        page.wait_for_selector(f'#caption [role=alert]:has-text("{message}")')
        assert page.query_selector("#picture img") is None
        assert "Smith" not in page.inner_text("body")
        page.click("text=Sample of the card")
        caption_of(page)
    assert page.evaluate("window.hacked") is None
    send(page, png(make_noise(5, (50, 40))))
    page.wait_for_selector("#picture img[alt*='50 by 40']")
    assert caption_of(page) == model.describe([make_noise(5, (50, 40))])[0].caption


def test_a_dicom_is_shown_and_captioned_as_it_is_read(open_demo, model):
    page, content = open_demo(), Path(get_testdata_file("CT_small.dcm", download=False)).read_bytes()
    image = open_image({"bytes": content, "path": None})
    send(page, content)
    page.wait_for_selector(f"#picture img[alt*='{image.width} by {image.height}']")
    assert caption_of(page) == model.describe([image])[0].caption
    mean = "image => { const context = document.createElement('canvas').getContext('2d');"
    mean += "context.drawImage(image, 0, 0, 64, 64);"
    mean += "return context.getImageData(0, 0, 64, 64).data.reduce((sum, value) => sum + value) / 16384 }"
    expected = np.asarray(image.convert("RGBA").resize((64, 64))).mean()
    assert page.eval_on_selector("#picture img", mean) == pytest.approx(expected, abs=3), "windowed"
    assert "CompressedSamples" not in page.inner_text("body")


def test_a_dicom_without_pixels_is_refused_and_burned_in_text_is_named(open_demo):
    page = open_demo()
    send(page, Path(get_testdata_file("rtplan.dcm", download=False)).read_bytes(), "plan.dcm")
    assert "a DICOM without pixels" in refusal_of(page)
    file = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    file.BurnedInAnnotation, buffer = "YES", io.BytesIO()
    file.save_as(buffer)
    send(page, buffer.getvalue())
    page.wait_for_selector("text=Text is burned into this image")
    caption_of(page)


def test_two_users_at_once_get_their_own_captions(open_demo, model):
    pages, images = [open_demo(), open_demo()], [make_noise(6), make_noise(7, (50, 40))]
    expected = [model.describe([image])[0].caption for image in images]
    assert expected[0] != expected[1]
    for _ in range(2):
        for page, image in zip(pages, images, strict=True):
            send(page, png(image))
        for page, image, text in zip(pages, images, expected, strict=True):
            page.wait_for_selector(f"#picture img[alt*='{image.width} by']")
            assert caption_of(page) == text
        images.reverse()
        expected.reverse()


def test_two_users_can_send_the_same_file_at_once(tmp_path, monkeypatch):
    file, seen = tmp_path / "image.png", []
    file.write_bytes(png(make_noise()))
    with monkeypatch.context() as patch:  # the second reads it while that of the first is decoded
        patch.setattr(app, "open_image", lambda image: seen.append(file.exists()) or open_image(image))
        first, _ = _read_upload(str(file))
    assert seen == [True] and not file.exists()
    assert _read_upload(str(file)) == (first, ""), "both were sent before the first was read"
    del first
    assert _read_upload(str(file)) == (None, "the file did not arrive; choose it again")


# --- Who uses it, and where -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_horizontal_scroll_and_axe_finds_nothing(open_demo, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_demo(width=390, color_scheme=scheme, has_touch=True)
    page.tap("text=Decode settings")
    page.evaluate(SETTLED)
    send(page, b"%PDF")
    refusal_of(page)
    page.wait_for_function(IN_VIEW)
    page.evaluate("scrollTo(0, 0)")
    page.tap("text=Sample of the card")
    caption_of(page)
    page.wait_for_function(IN_VIEW)
    page.tap("#details .tokens button >> nth=0")
    page.wait_for_selector(MAP)
    page.wait_for_timeout(500)  # the colors of the button change slowly
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")


def test_the_keyboard_alone_captions_and_shows_attention(open_demo):
    def tab_to(condition):
        for presses in range(1, 31):
            page.keyboard.press("Tab")
            if page.evaluate(condition):
                return presses

    page = open_demo()
    presses = tab_to("document.activeElement.innerText?.includes('Sample of the card')")
    assert presses > 1, "the drop zone comes before the examples"
    page.keyboard.press("Enter")
    caption_of(page)
    tab_to("!!document.activeElement.closest('.tokens')")
    assert page.wait_for_selector(MAP)


def test_nothing_is_kept_on_the_disk_or_asked_of_others(open_demo, demo, proxy):
    page, contents = open_demo(), [png(make_noise(10)), b"%PDF-1.7 patient Smith" * 100]
    send(page, contents[0], "Smith^John.png")
    caption_of(page)
    send(page, contents[1], "Smith^John.dcm")
    refusal_of(page)
    kept = files_of(demo)
    assert list(demo.temporary.iterdir()), "the server has its files here"
    assert not [content for content in contents if content in kept]
    assert "Smith" not in str(list(demo.temporary.rglob("*")))
    printed = (demo.process.output() + demo.process.output(error=True)).decode()
    assert "Smith" not in printed and "Traceback" not in printed
    with pytest.raises(BlockingIOError):
        proxy.accept()
    endpoints = page.evaluate("fetch('gradio_api/info').then(answer => answer.json())")
    assert endpoints == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_client_reaches_no_file_but_its_uploads(demo, tmp_path):
    """Whatever it sends: a file that it names is neither read nor deleted."""
    (tmp_path / "private.png").write_bytes(png(make_noise()))
    data = [None, {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}]
    body = json.dumps({"data": data, "fn_index": 0, "session_hash": "client"}).encode()
    join = urllib.request.Request(f"{demo.url}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(join).read()
    answer = urllib.request.urlopen(f"{demo.url}gradio_api/queue/data?session_hash=client").read()
    assert b'"success":false' in answer and b"image/jpeg" not in answer
    assert (tmp_path / "private.png").is_file()


def test_a_signal_ends_it_and_its_files(demo, open_demo):
    """The last test of this server."""
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(timeout=30) == 0
    assert files_of(demo) == []


def test_text_of_a_model_or_a_name_is_never_html():
    hostile = "<script>window.hacked=1</script>"
    written = Written([Alternative(hostile, 1.0, 3, False)], [(f"'{hostile}", np.eye(3))], [(hostile, 0.5)])
    parts = [details(written), caption_text(hostile), fault(hostile), banner(hostile, True)]
    assert not [part for part in parts if "<script" in part]
    assert "Greedy search finds one caption" in parts[0] and "Cosine" in parts[0]
    assert "has no attention maps" in details(Written([Alternative("x", 1.0, 3, True)], None, []))


# --- Command and Space ----------------------------------------------------------------------------------------


def test_without_gradio_one_line_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs gradio; run `pip install -r requirements-demo\.txt`"):
        main(["demo", str(folder)])


def test_an_address_that_is_taken_or_impossible_is_a_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen at 127.0.0.1, port {port}: .*in use"):
            main(["demo", str(folder), "--port", str(port)])
    for words in (["--port", "99999"], ["--host", "300.1.2.3"], ["--host", "192.0.2.1"]):  # of no machine
        with pytest.raises(UserError, match=f"cannot listen at .*{words[1]}"):
            main(["demo", str(folder), *words])


@pytest.mark.slow  # it imports everything in a process of its own
def test_a_space_runs_from_its_own_folder(folder, browser, tmp_path, model):
    for name in ("training_args.bin", "checkpoint-5/model.safetensors", "predictions/test.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    space = tmp_path / "space"
    main(["demo", str(folder), "--export_space", str(space)])
    with pytest.raises(UserError, match="is not an empty folder"):
        main(["demo", str(folder), "--export_space", str(space)])
    assert not [path for path in space.rglob("*") if path.is_file() and path.read_bytes() == b"private"]
    front = (space / "README.md").read_text().split("---")[1]
    pins = (space / "requirements.txt").read_text().splitlines()
    assert "sdk: gradio\n" in front and "app_file: app.py\n" in front
    assert 'python_version: "3.11"\n' in front, "the Hub's default is 3.10, for which the pins have no packages"
    version = re.search(r"sdk_version: (\S+)", front)[1]
    assert f"gradio=={version}" in pins and not [line for line in pins if line.startswith("-r")]
    assert set((ROOT / "requirements.txt").read_text().split()) < set(pins)
    port = free_port()
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    environment["GRADIO_SERVER_PORT"] = str(port)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, **output)
    try:
        assert any(f"127.0.0.1:{port}" in line for line in process.stdout)
        page = go_to(browser.new_page(), f"http://127.0.0.1:{port}")
        send(page, png(make_noise(1)))
        assert caption_of(page) == model.describe([make_noise(1)])[0].caption
        page.close()
    finally:
        process.terminate()
        process.wait()


def test_a_space_is_refused_whose_files_name_a_path_of_this_machine(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "my-run")
    tokenizer = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"source": str(tmp_path / "data")}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        main(["demo", str(copied), "--export_space", str(tmp_path / "space")])
    assert list((tmp_path / "space").iterdir()) == []
    with pytest.raises(UserError, match="holds no model"):
        main(["demo", str(tmp_path), "--export_space", str(tmp_path / "space")])


def test_a_space_of_a_model_on_the_hub_names_it(tmp_path):
    main(["demo", "user/name", "--revision", "v1", "--export_space", str(tmp_path / "space")])
    assert "models: [user/name]" in (tmp_path / "space" / "README.md").read_text()
    assert '"demo", *["user/name", "--revision", "v1"]' in (tmp_path / "space" / "app.py").read_text()
    assert not (tmp_path / "space" / "model").exists()
