"""One's own images: found, captioned as the run did, kept while they come, and a line for each that has no caption."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from families import save_tiny
from helpers import flags, make_png, predictions, read_lines, save_captioner, signal_when
from PIL import Image
from processes import ROOT, server
from pydicom.data import get_testdata_file

import run_captioning
from captioning.__main__ import main
from captioning.data.images import open_image
from captioning.errors import UserError
from captioning.inference.caption import write_gallery
from captioning.inference.caption_file import CaptionFile
from captioning.inference.find_images import OwnImage, find_files, own_images
from captioning.inference.model import UNRECORDED, Description, InferenceModel
from captioning.models.concept_head import ConceptHead
from captioning.models.load import load_captioner
from captioning.scoring.submission import check_submission
from captioning.training.arguments import CaptioningArguments
from captioning.training.decoding import generation_config


SETTINGS = {"num_beams": 2, "max_new_tokens": 12, "min_new_tokens": 3, "no_repeat_ngram_size": 0}
SETTINGS["length_penalty"] = 0.5


@pytest.fixture(scope="module")
def model(tiny_captioner, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_captioner(tiny_captioner, folder)
    generation_config(SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture
def scans(tmp_path, monkeypatch) -> Path:
    """A folder of five images, two in a folder below, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans" / "below").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "c", "below/a", "below/d")):
        (tmp_path / "scans" / f"{name}.png").write_bytes(make_png(i))
    return Path("scans")


def caption(*arguments, code=0, **where) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    return server().run(["-m", "captioning", "caption", *arguments], code, cwd=os.getcwd(), **where)


def images_of(*arguments, frame="middle") -> list[OwnImage]:
    return own_images(find_files(map(str, arguments)).paths, frame)


def names(arguments, frame="middle") -> list[str]:
    return [image.id for image in images_of(*arguments, frame=frame)]


# --- The same captions as those of the run ----------------------------------------------------------------------


RUNS = {
    "blip": SETTINGS | {"restore_surface_form": True},
    "stock": {"fast_blip": False, "prompt": "a radiograph of"},
    "lora": {"use_peft": True, "learning_rate": 3e-2, "torch_dtype": "bfloat16"},
    "qwen3_vl": {"num_beams": 2, "prompt": "Say it"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_captions_are_those_of_the_run_for_the_same_images(
    kind, model, config_file, parquet_folder, raw_dataset, tmp_path
):
    values = RUNS[kind]
    if kind in ("lora", "qwen3_vl"):
        start = model if kind == "lora" else save_tiny(kind, tmp_path / "start")
        config_file, values = None, values | {"model_name_or_path": start, "vocab_size": None}
    run_captioning.main(flags(config_file, parquet_folder, tmp_path / "run", **values))
    (tmp_path / "images").mkdir()
    for row in raw_dataset["test"]:
        row["image"].save(tmp_path / "images" / f"{row['image_id']}.png")
    output = tmp_path / "captions.jsonl"
    caption(tmp_path / "run", tmp_path / "images", "--output", output)
    expected = {row["image_id"]: row["prediction"] for row in predictions(tmp_path / "run")}
    assert {row["id"]: row["caption"] for row in read_lines(output)} == expected
    assert len(set(expected.values())) > 1 or kind == "lora"


def test_settings_are_those_of_the_record_then_of_flags_and_a_checkpoint_has_the_prompt_of_its_run(model, tmp_path):
    expected = generation_config(SETTINGS).to_diff_dict().items()
    assert InferenceModel(str(model)).generation_config.to_diff_dict().items() >= expected
    given = InferenceModel(str(model), settings={"num_beams": 1, "max_new_tokens": None}, prompt="axial")
    assert (given.generation_config.num_beams, given.generation_config.max_new_tokens) == (1, 12)
    assert given.prompt == "axial"
    shutil.copytree(model, tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"prompt": "a scan of", "num_beams": 4}))
    inner = InferenceModel(str(tmp_path / "run" / "checkpoint-3"))
    assert (inner.prompt, inner.generation_config.num_beams) == ("a scan of", 4)
    defaults = CaptioningArguments(output_dir=str(tmp_path), use_cpu=True)
    assert {name: getattr(defaults, name) for name in UNRECORDED} == UNRECORDED


@pytest.mark.parametrize(
    "recipe, fault",
    [
        ("[", "cannot be read"),
        ('{"num_beams": 999}', "from 1 to 256"),
        ('{"num_beams": "3"}', "'num_beams' has a value"),
        ('{"max_new_tokens": 5.5}', "'max_new_tokens' has a value"),
        ('{"prompt": ["a"]}', "'prompt' has a value"),
        ('{"torch_dtype": 5}', "'torch_dtype' has a value"),
        ('{"torch_dtype": "float64"}', "torch_dtype is 'float64'"),
        ('{"retrieved_captions": "x"}', "'retrieved_captions' has a value"),
    ],
)
def test_a_recipe_from_elsewhere_that_is_broken_is_one_line(model, tmp_path, recipe, fault):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "recipe.json").write_text(recipe)
    with pytest.raises(UserError, match=fault):
        InferenceModel(str(broken))


# --- Which images, and their names ------------------------------------------------------------------------------


def test_images_are_found_by_files_folders_patterns_and_a_list(scans):
    assert names([scans]) == ["scans/a", "scans/b", "scans/c", "below/a", "below/d"]
    assert names([scans / "b.png", "scans/b*.png", scans / "b.png"]) == ["b"]
    assert names(["scans/**/a.png"]) == ["scans/a", "below/a"]
    assert [Path(path).name for path in find_files(["scans/[ab].png"]).paths] == ["a.png", "b.png"]
    assert find_files(["nothing*", str(scans / "b.png")]).faults.keys() == {"nothing*"}


def test_of_folders_images_are_taken_by_ending_or_content_and_the_rest_is_counted(scans):
    dicom = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    for name in ("1.2.840.7", "IM1", "DICOMDIR", ".hidden"):
        (scans / name).write_bytes(dicom)
    (scans / "notes.txt").write_text("x")
    os.mkfifo(scans / "pipe")
    os.symlink("gone", scans / "link.png")
    found = find_files([str(scans)])
    assert {Path(path).name for path in found.paths} >= {"1.2.840.7", "IM1", "link.png", "a.png"}
    assert found.passed_over == 3, "DICOMDIR, notes.txt and the pipe; a hidden file is not seen"
    assert names([scans / "1.2.840.7", scans / "notes.txt"]) == ["1.2.840.7", "notes.txt"]


def test_ids_can_stand_in_a_submission_and_are_no_paths(scans):
    (scans / 'x, "y".png').write_bytes(make_png(9))
    (scans / "a.jpg").write_bytes(make_png(9))
    assert names([scans / 'x, "y".png']) == ["x_ _y_"]
    assert names([scans / "a.png", scans / "a.jpg"]) == ["a.png", "a.jpg"]
    (scans / "x_ _y_.png").write_bytes(make_png(9))
    (scans / 'x, _y".png').write_bytes(make_png(9))
    with pytest.raises(UserError, match="rename one"):
        names([scans / 'x, "y".png', scans / "x_ _y_.png"])


def test_each_frame_of_a_dicom_has_a_caption_if_asked_for(model, scans):
    shutil.copy(get_testdata_file("examples_ybr_color.dcm"), scans / "us.dcm")
    assert names([scans / "us.dcm"]) == ["us"]
    frames = names([scans / "us.dcm", scans / "b.png"], "all")
    assert frames[:2] == ["us#1", "us#2"] and frames[-1] == "b" and len(frames) == 31
    shown = caption(model, scans / "us.dcm", "--frame", "2", "--max_new_tokens", "4").stdout
    assert shown.startswith("scans/us.dcm\t")
    assert "has 30 frames; frame 31" in caption(model, scans / "us.dcm", "--frame", "31", code=1).stderr


# --- Output -----------------------------------------------------------------------------------------------------


def test_captions_go_to_standard_output_line_by_line(model, scans, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"scans/a.png\nscans/b.png\nscans/c.png\n")))
    main(["caption", str(model), "-"])
    found = capsys.readouterr()
    rows = [line.split("\t") for line in found.out.splitlines()]
    assert [path for path, _ in rows] == ["scans/a.png", "scans/b.png", "scans/c.png"]
    assert all(text for _, text in rows) and found.err == ""


def test_the_csv_is_a_submission_and_a_second_call_does_what_is_missing(model, scans):
    caption(model, scans / "b.png", scans / "below", "--output", "own.csv")
    first = Path("own.csv").read_text()
    assert first.startswith("ID,Caption\n") and check_submission("own.csv") == []
    assert caption(model, scans, "--output", "own.csv", "--batch_size", "2").stderr.endswith("5 in all\n")
    whole = Path("own.csv").read_text()
    assert whole.startswith(first) and len(whole.splitlines()) == 6
    assert check_submission("own.csv") == []
    caption(model, scans, "--output", "own.csv")
    assert Path("own.csv").read_text() == whole
    assert str(Path.cwd()) not in whole + Path("own.csv.state").read_text()


def signaled(number, model, scans, output) -> subprocess.Popen:
    """Return the process of a call on 65 images that got a signal after some of them."""
    for i in range(60):
        (scans / f"{i:03}.png").write_bytes(make_png(i))
    arguments = ["-m", "captioning", "caption", model, scans, "--output", output, "--batch_size", "1"]
    process = server().start(arguments, cwd=os.getcwd())
    signal_when(lambda: output.exists() and output.read_bytes().count(b"\n") > 5, number, process)
    return process


def test_what_a_killed_call_has_written_stays_and_a_torn_row_is_mended(model, scans):
    output = Path("own.jsonl")
    signaled(signal.SIGKILL, model, scans, output).wait()
    kept = output.read_text()
    assert 5 < kept.count("\n") < 65
    with open(output, "a") as file:
        file.write('{"id": "torn')
    caption(model, scans, "--output", output)
    rows = read_lines(output)
    assert output.read_text().startswith(kept)
    assert sorted(row["id"] for row in rows) == sorted(names([scans]))
    assert rows[0].keys() == {"id", "file", "caption"} and rows[0]["file"].endswith(".png")


def test_an_interrupted_call_ends_in_one_line(model, scans):
    output = Path("own.csv")
    process = signaled(signal.SIGINT, model, scans, output)
    errors = process.communicate()[1]
    assert process.returncode == 130 and errors.count("\n") == 1 and "SIGINT" in errors
    assert check_submission(str(output)) == []


def test_files_of_others_of_other_settings_and_of_other_images_are_refused(model, scans):
    Path("theirs.csv").write_text("ID,Caption\nx,y\n")
    caption(model, scans / "b.png", "--output", "own.csv")
    before = Path("own.csv").read_text()
    for arguments, fault in {
        (scans / "b.png", "--output", "theirs.csv"): "was not written by this command",
        (scans / "b.png", "--output", "own.csv", "--num_beams", "1"): "another decoding",
        (scans / "b.png", "--output", "own.csv", "--frame", "1"): "another frame",
        (scans / "b.png", "--output", "own.csv", "--prompt", "axial"): "another prompt",
    }.items():
        assert fault in caption(model, *arguments, code=2).stderr
    shutil.copytree(model, "other")
    (Path("other") / "surface_form.json").write_text('{"forms": {"ct": "CT"}, "capital_after": []}')
    assert "another model" in caption("other", scans / "b.png", "--output", "own.csv", code=2).stderr
    (scans / "b.png").write_bytes(make_png(77))
    assert "another image 'b'" in caption(model, scans / "b.png", "--output", "own.csv", code=2).stderr
    assert (Path("own.csv").read_text(), Path("theirs.csv").read_text()) == (before, "ID,Caption\nx,y\n")
    assert not Path("theirs.csv.state").exists()
    with open("own.csv", "a") as file:
        file.write("theirs,row\n")
    assert "a row 'theirs'" in caption(model, scans / "c.png", "--output", "own.csv", code=2).stderr


def test_a_full_disk_ends_in_one_line_and_the_file_can_be_completed(scans):
    """At the limit of a file's size, as on a disk that is almost full, a part of a write is taken first."""
    one, two = images_of("scans/a.png", "scans/b.png")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        file.add({one: Description("first")})
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize("own.jsonl.state") + 20, before[1]))
        try:
            with pytest.raises(OSError, match=r"File too large: 'own\.jsonl\.state'"):
                file.add({two: Description("second")})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        assert file.captions == {"a": ("first", None)}
        file.add({two: Description("second")})
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        assert file.captions == {"a": ("first", None), "b": ("second", None)}


def test_captions_whose_state_is_lost_are_refused_and_stay(scans):
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        file.add({images_of("scans/a.png")[0]: Description("first")})
    before = Path("own.jsonl").read_text()
    for content in ("", '{"model": "x"}'):  # after a power failure
        Path("own.jsonl.state").write_text(content)
        with pytest.raises(UserError, match="name another --output"):
            CaptionFile("own.jsonl", {"model": "x"})
        assert Path("own.jsonl").read_text() == before


def test_an_image_is_the_earlier_one_only_if_its_file_has_the_same_name(scans):
    shutil.copy(scans / "a.png", scans / "copy.png")
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        file.add({images_of("scans/a.png")[0]: Description("first")})
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        named = [image.id for image in file.with_known_ids(images_of("scans"))]
        assert named == ["a", "scans/b", "scans/c", "scans/copy", "below/a", "below/d"]
        assert [image.id for image in file.with_known_ids(images_of("scans/copy.png"))] == ["copy"]


def test_a_file_whose_name_is_not_text_has_a_row_that_any_reader_takes(scans):
    path = os.fsdecode(b"scans/M\xfcller.png")
    shutil.copy(scans / "a.png", path)
    with CaptionFile("own.jsonl", {"model": "x"}) as file:
        file.add({images_of(path)[0]: Description("first")})
    row = read_lines(Path("own.jsonl"))[0]
    assert row == {"id": "M ller", "file": "M ller.png", "caption": "first"}


def test_two_processes_do_not_write_one_file(model, scans):
    made_by = {"model": "x"}
    with CaptionFile("own.csv", made_by):
        assert "another process" in caption(model, scans, "--output", "own.csv", code=2).stderr
    with CaptionFile("own.csv", made_by) as file:
        assert file.captions == {}


def test_the_page_shows_images_and_captions_and_no_scores(model, scans, browser):
    shown = caption(model, scans, "--html", "own.html").stdout
    page = browser.new_page()
    page.goto(Path("own.html").absolute().as_uri())
    text = page.inner_text("body")
    assert "5 captions" in text and page.locator("#cards .card").count() == 5
    assert all(line.split("\t")[1] in text for line in shown.splitlines())
    assert "no references" in text and "Not for clinical use" in text
    assert not re.search(r"Reference|ROUGE|NLL|\bScore\b|Marked|\(unknown\)", text) and not page.query_selector("mark")
    assert str(Path.cwd()) not in Path("own.html").read_text()


def test_an_image_that_is_gone_when_the_page_is_written_has_a_card_without_it(model, scans):
    one, two = images_of("scans/a.png", "scans/b.png")
    (scans / "a.png").unlink()
    write_gallery("own.html", InferenceModel(str(model)), {one: Description("first"), two: Description("second")})
    images = re.search(r'id="images-0">(.*?)</script>', Path("own.html").read_text())[1]
    assert [bool(image) for image in json.loads(images)] == [False, True]


# --- Bad input --------------------------------------------------------------------------------------------------


def test_each_image_that_cannot_be_used_is_one_line_and_the_rest_goes_on(model, scans):
    bad = scans / "bad"
    bad.mkdir()
    (bad / "cut.png").write_bytes(make_png(1)[:300])
    (bad / "report.pdf").write_bytes(b"%PDF-1.7\n")
    (bad / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (bad / "zero.dcm").write_bytes(b"")
    shutil.copy(get_testdata_file("reportsi.dcm"), bad / "report.dcm")
    Image.new("1", (20_000, 10_000)).save(bad / "slide.png")
    os.symlink("gone", bad / "link.png")
    os.mkfifo(bad / "pipe.png")
    named = [bad / "report.pdf", bad / "film.mp4", "gone.png"]
    ended = caption(model, scans, *named, code=1)
    lines = ended.stderr.splitlines()
    assert len(ended.stdout.splitlines()) == 5
    for name in ("cut.png", "report.pdf", "film.mp4", "zero.dcm", "report.dcm", "slide.png", "link.png", "pipe.png"):
        assert sum(f"bad/{name}: " in line for line in lines) == 1, name
    assert lines[-1] == "error: 9 of 14 images could not be captioned"
    assert "DOS attack" not in ended.stderr, "Pillow's words for a slide"
    assert len(lines) == 11, "and one that counts the files that were passed over"


def test_a_folder_that_cannot_be_read_is_one_line(scans, monkeypatch):
    refusal, scan = PermissionError(13, "Permission denied", "scans/below"), os.scandir
    both = iter([scan(scans), refusal])
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=both))
    found = find_files([str(scans)])
    assert found.faults == {"scans/below": "the folder cannot be read: Permission denied"} and len(found.paths) == 3


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["m", "scans", "--output", "x.txt"], "must end with"),
        (["m", "scans", "--output", "none/x.csv"], "its folder is missing"),
        (["m", "scans", "--batch_size", "0"], "not a whole number"),
        (["m", "scans", "--frame", "first"], "not a whole number"),
        (["m", "nothing.png"], "no images were found"),
        (["m"], "images"),
        (["m", "scans", "--num_beams", "0"], "num_beams is 0"),
        (["m", "scans", "--device", "tpu"], "device 'tpu' cannot be used"),
        (["m", "scans", "--html", "scans/b.png"], "must end with .html"),
        (["m", "scans/b.png", "page.html", "--html", "page.html"], "would overwrite"),
    ],
)
def test_a_mistake_in_the_arguments_is_found_before_the_model_is_loaded(scans, arguments, fault):
    Path("page.html").write_text("mine")
    with pytest.raises(UserError, match=fault):
        main(["caption", *arguments])


def test_full_memory_names_the_batch_size(model, scans, monkeypatch):
    full = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(InferenceModel, "describe", mock.Mock(side_effect=[full, [Description("a caption")], full]))
    with pytest.raises(UserError, match="fewer --num_beams"):
        main(["caption", str(model), str(scans / "b.png")])
    with pytest.raises(UserError, match="batch of 4; set a lower --batch_size"):
        main(["caption", str(model), str(scans)])


def test_of_a_batch_that_cannot_be_processed_only_the_culprit_has_no_caption(model, scans, monkeypatch, capsys):
    original = InferenceModel.describe

    def refuse(self, images):
        if any(image.size == (41, 36) for image in images):
            raise ValueError("an odd image")
        return original(self, images)

    (scans / "below" / "a.png").write_bytes(make_png(3, (41, 36)))
    monkeypatch.setattr(InferenceModel, "describe", refuse)
    with pytest.raises(SystemExit):
        main(["caption", str(model), str(scans)])
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 4
    assert found.err == "scans/below/a.png: an odd image\nerror: 1 of 5 images could not be captioned\n"


def test_a_closed_pipe_ends_quietly(model, scans):
    for i in range(30):
        (scans / f"{i:03}.png").write_bytes(make_png(i))
    command = f"PYTHONPATH={ROOT} {sys.executable} -m captioning caption {model} scans --batch_size 1 | head -1"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert ended.stdout.startswith("scans/000.png\t") and ended.stderr == ""


def test_what_a_caption_does_not_need_is_not_imported():
    """The first caption waits for the imports, the model and itself."""
    unneeded = {"datasets", "pandas", "pyarrow", "sklearn", "evaluate", "matplotlib", "gradio"}
    code = f"import sys, captioning.inference.caption; print(*{unneeded} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


# --- Concepts -------------------------------------------------------------------------------------------------


def test_concepts_of_the_models_head_are_in_rows_terminal_and_page(model, scans, capsys):
    captioner = load_captioner(str(model))
    images = [open_image({"bytes": None, "path": str(path)}) for path in (scans / "a.png", scans / "b.png")]
    encoded = captioner.encode_images(captioner.collate(images, [captioner.prompt_row] * 2))
    features = captioner.image_features(encoded).detach()
    head = ConceptHead(features.shape[1], ["C0000001", "C0000002", "C0000003"], {"C0000001": "Zyste"}, [0.5] * 3)
    with torch.no_grad():  # the first for the first image alone, the second for all, the third for none
        head.weight[0] = 9 * (features[0] - features[1])
        normed = torch.nn.functional.layer_norm(features, features.shape[1:])
        head.bias[:] = torch.tensor([-(normed @ head.weight[0]).mean(), 1.0, -1.0])
    shutil.copytree(model, "with-head")
    head.save("with-head")
    main(["caption", "with-head", str(scans / "a.png"), str(scans / "b.png"), "--html", "own.html"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [set(line[2].split("; ")) for line in lines] == [{"Zyste", "C0000002"}, {"C0000002"}]
    main(["caption", "with-head", str(scans), "--output", "own.jsonl"])
    rows = read_lines(Path("own.jsonl"))
    assert {row["id"]: set(row["concepts"]) for row in rows}["scans/a"] == {"C0000001", "C0000002"}
    page = Path("own.html").read_text()
    assert '"Zyste"' in page and "C0000002" in page and "C0000003" not in page
    head.thresholds = [0.9] * 3
    head.save("with-head")
    with pytest.raises(UserError, match="another model"):
        main(["caption", "with-head", str(scans), "--output", "own.jsonl"])
