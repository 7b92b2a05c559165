"""The page of two systems: who wins on which image, and the thumbnails of a run."""

import json
import re

import pytest
from helpers import make_noise, make_predictions, make_record

from captioning.__main__ import main
from captioning.errors import UserError
from captioning.reporting.comparison_page import system_names
from captioning.reporting.page import write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of 20 captions; the second is right once and wrong else, and only the first has a page."""
    folder = tmp_path_factory.mktemp("runs")
    references = [f"CT of a lung with nodule number {i}" for i in range(20)]
    right, wrong = ["nothing", *references[1:19], "the end"], [references[0], *["MRI"] * 18, "the end"]
    for name, texts in {"good": right, "bad": wrong}.items():
        record = make_record(folder / name, make_predictions(20, reference=references, prediction=texts))
        if name == "good":
            write_report(record, "test", [*(make_noise(i) for i in range(19)), None], ["CT"] * 20)
    return folder


def compare(runs, first, second):
    arguments = [str(runs / name / "predictions" / "test.jsonl") for name in (first, second)]
    main(["score", arguments[0], "--against", arguments[1], "--tokenizer", "none", "--html", str(runs / "page.html")])
    page = (runs / "page.html").read_text(encoding="utf-8")
    scripts = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page, re.DOTALL)
    return page, {name: json.loads(text) for name, text in scripts}


def test_wins_and_losses_stand_side_by_side_with_the_images_of_the_run(runs):
    page, data = compare(runs, "good", "bad")
    gallery, images = data["payload"], data["images-0"]
    assert gallery["systems"] == ["good", "bad"]
    assert [row["kinds"] for row in gallery["rows"]] == [["loss"], *[["win"]] * 18, ["tie"]]
    examples = [(example["title"], example["row"]) for example in gallery["highlights"]]
    assert examples[2:] == [("good ahead by 1.000", 3), ("bad ahead by 1.000", 0)]
    assert "good scores higher than bad in ROUGE-L." in page
    assert "good is higher on 18, bad on 1, the same on 1" in page
    assert re.search(r'scope="row"><bdi>ROUGE-L</bdi></th>\s*<td class="number">0.900', page)
    assert len(images) == 20 and images[19] is None and images[0] != images[1]


def test_the_images_of_either_run_are_found_and_a_page_without_any_lists_texts(runs):
    _, data = compare(runs, "bad", "good")
    assert data["images-0"][0]
    _, data = compare(runs, "bad", "bad")
    assert (list(data), data["payload"]["hasImages"], len(data["payload"]["rows"])) == (["payload"], False, 20)


def test_systems_are_named_by_what_differs_in_their_paths():
    assert system_names("outputs/a/predictions/test.jsonl", "outputs/b/predictions/test.jsonl") == ("a", "b")
    assert system_names("x/run.csv", "x/y/run.csv") == ("run.csv", "y/run.csv")
    assert system_names("run.csv", "run.csv") == ("run.csv (1)", "run.csv (2)")


def test_a_page_needs_two_systems_a_folder_that_exists_and_a_name_that_no_captions_have(runs):
    run = str(runs / "good" / "predictions" / "test.jsonl")
    with pytest.raises(UserError, match="--html compares two systems; add --against"):
        main(["score", run, "--html", "page.html"])
    for page, fault in {"none/page.html": "its folder is missing", run: "must end with .html"}.items():
        with pytest.raises(UserError, match=fault):
            main(["score", run, "--against", run, "--tokenizer", "none", "--html", page])


def test_a_single_caption_has_a_page_without_an_interval(runs, capsys):
    for name in ("one", "other"):
        make_record(runs / name, make_predictions(1, reference=["CT"], prediction=[f"{name} CT"]))
    page, _ = compare(runs, "one", "other")
    assert "95 % interval –, p = 1.0000" in page and ">1 caption<" in page
    main(["score", str(runs / "one" / "predictions" / "test.jsonl"), "--tokenizer", "none"])
    assert "state 1, the references 1" in (printed := capsys.readouterr().out) and "1 captions" not in printed


@pytest.mark.parametrize("flag", ["--against", "--references"])
def test_a_page_does_not_replace_a_file_that_is_read(runs, tmp_path, flag):
    run, read = str(runs / "good" / "predictions" / "test.jsonl"), tmp_path / "read.html"
    read.write_text("mine")
    arguments = {"--against": run, "--tokenizer": "none", "--html": str(read)} | {flag: str(read)}
    with pytest.raises(UserError, match="--html would overwrite"):
        main(["score", run, *(word for pair in arguments.items() for word in pair)])
    assert read.read_text() == "mine"
