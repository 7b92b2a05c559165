"""Take demo.png, a picture of the demo: `python docs/images/demo.py outputs/quickstart`, with requirements-dev.txt.

It needs chromium, and a model of the quickstart, whose training images are those that the page compares with.
"""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


EXAMPLE, WORD = "Drawing: CT, abdomen", "cystic"
SIZE, COLORS = {"width": 1200, "height": 1000}, 256


def main() -> None:
    """Start the demo, caption an example, hold a word, and write the picture in few colors."""
    command = [
        sys.executable,
        "-m",
        "captioning",
        "demo",
        sys.argv[1],
        "--train",
        "phantoms",
        "--train_images",
        "1000",
    ]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = next(found[0] for line in demo.stdout if (found := re.search(r"http://\S+", line)))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.goto(url)
            page.click(f"text={EXAMPLE}")
            page.wait_for_selector("#details ol")
            page.click(f"#details .tokens button:has-text('{WORD}')")
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)  # the colors of the word change slowly
            shot = page.screenshot(full_page=True)
            browser.close()
    finally:
        demo.terminate()
        demo.wait()
    picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLORS)
    picture.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
