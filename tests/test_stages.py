"""Where the time of a run went is told for whole runs, also for those that end by an error or were resumed."""

import json

import pytest
from helpers import flags, read_json, run, score_flags
from processes import server

from captioning import stages
from captioning.stages import begin_stages, keep_stages, stage, stage_times, time_in_words


@pytest.fixture
def wait(monkeypatch):
    """Return a function that lets time pass: so many seconds, and a tenth of them of processor time."""
    clock = [100.0, 10.0]
    monkeypatch.setattr(stages, "_now", lambda: tuple(clock))
    begin_stages(imported=False)
    return lambda seconds: clock.__setitem__(slice(None), [clock[0] + seconds, clock[1] + seconds / 10])


def test_a_stage_in_another_is_counted_once_and_ends_with_its_error(wait):
    @stage("inner")
    def inner():
        wait(30)
        raise ValueError

    with stage("outer"):
        wait(20)
        for _ in range(2):
            with pytest.raises(ValueError):
                inner()
    wait(1)
    seconds = {"outer": 20, "inner": 60, "other": 1}
    expected = {name: {"seconds": value, "processor_seconds": value / 10} for name, value in seconds.items()}
    assert stage_times() == expected


def test_the_line_names_large_shares_first_and_leaves_small_ones_out(wait):
    for name, seconds in (("load", 39.5), ("training", 160), ("leaks", 0.5)):
        with stage(name):
            wait(seconds)
    assert time_in_words() == "time: 200 s, training 80 %, load 20 %"


def test_an_interrupted_run_keeps_its_times_and_those_before_it(tmp_path):
    for number in range(3):  # the second resumes the first, the third begins anew
        begin_stages(imported=False)
        kept = keep_stages(tmp_path, resumed=number == 1, should_save=True)
        with pytest.raises(KeyboardInterrupt), kept, stage("training"), stage(f"part {number}"):
            raise KeyboardInterrupt
        names = [set(each) - {"other", "training"} for each in read_json(tmp_path / "stages.json")]
        assert names == [[{"part 0"}], [{"part 0"}, {"part 1"}], [{"part 2"}]][number]
    with keep_stages(tmp_path / "of another process", resumed=True, should_save=False):
        pass


@pytest.mark.parametrize("before", ["[{", "5", '{"training": {}}', "", "\ud800"])
def test_a_broken_file_of_the_run_before_is_replaced_and_hides_no_error(before, tmp_path):
    (tmp_path / "stages.json").write_bytes(before.encode(errors="surrogatepass"))
    with (
        pytest.raises(KeyError, match="own"),
        keep_stages(tmp_path, resumed=True, should_save=True),
        stage("training"),
    ):
        raise KeyError("own")
    assert ["training" in each for each in read_json(tmp_path / "stages.json")] == [True]


def test_a_folder_that_is_full_or_gone_hides_no_error_and_is_no_error(tmp_path):
    with pytest.raises(ValueError, match="the first"), keep_stages(tmp_path / "gone", False, True), stage("training"):
        raise ValueError("the first")
    with keep_stages(tmp_path / "gone", False, True), stage("training"):
        pass


def test_a_run_that_ends_before_it_begins_leaves_the_file_of_the_run_before(tmp_path, wait):
    """Else its folder would pass for that of a run, or lose the times that belong to its scores."""
    with pytest.raises(ValueError), keep_stages(tmp_path, resumed=False, should_save=True), stage("load"):
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_run_says_where_its_time_went(config_file, parquet_folder, tmp_path):
    """Each part of the script is a stage."""
    run_of_all = run(flags(config_file, parquet_folder, tmp_path / "run"))
    [found] = read_json(tmp_path / "run" / "stages.json")
    parts = "imports load checks tokenize model leaks training saving prediction scores baselines page card other"
    assert found.keys() == {*parts.split(), "evaluation in training"}
    assert run_of_all.stdout.rstrip().splitlines()[-1].startswith("time: ")
    scored = score_flags(tmp_path / "run", parquet_folder, tmp_path / "scored")
    run(scored)
    [found] = read_json(tmp_path / "scored" / "stages.json")
    assert not found.keys() & {"training", "saving", "evaluation in training"}


# --- Images ---------------------------------------------------------------------------------------------------

COUNTED = """
import json, sys
from collections import Counter
from PIL import Image
from captioning import stages
import run_captioning

opened, original = Counter(), Image.open

def count(*args, **kwargs):
    opened[stages._open[-1]] += 1
    return original(*args, **kwargs)

Image.open = count
run_captioning.main(sys.argv[1:])
print(json.dumps(opened))
"""


def test_each_stage_opens_an_image_once(config_file, raw_dataset, tmp_path):
    """24 images to train on, 10 of validation, 7 of test, in two epochs; the page shows attention maps of some."""
    raw_dataset.save_to_disk(tmp_path / "data")  # its own, which no other test has checked
    result = server().run(["-c", COUNTED, *flags(config_file, tmp_path / "data", tmp_path / "run")])
    found = json.loads(result.stdout.splitlines()[-1])
    assert 7 <= found.pop("page") <= 7 + 7
    expected = {"checks": 24 + 10 + 7, "training": 2 * 24, "evaluation in training": 2 * 10, "prediction": 10 + 7}
    assert found == expected | {"baselines": 24}
