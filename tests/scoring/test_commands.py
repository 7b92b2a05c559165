"""`python -m captioning score` and `check`; what `prepare` does is tested with the data."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from processes import ROOT, server

from captioning.__main__ import main
from captioning.errors import UserError
from captioning.reporting.score_table import comparison_table, score_table
from captioning.scoring.bertscore import NOT_COMPUTED
from captioning.scoring.bootstrap import num_decimals
from captioning.scoring.captions import write_predictions
from captioning.scoring.concept_detection import concept_table, detection_scores
from captioning.scoring.constants import best_concepts
from captioning.scoring.score import score
from captioning.scoring.training_split import Training


@pytest.fixture(scope="module")
def files(tmp_path_factory, captions, training):
    """A folder with one system's captions as JSON lines and as CSV, another system's, references and training data."""
    folder = tmp_path_factory.mktemp("files")
    for name, changed in {
        "good": {},
        "poor": {"predictions": captions.references[::-1]},
        "other": {"references": [f"x {text}" for text in captions.references]},
    }.items():
        write_predictions(folder / f"{name}.jsonl", replace(captions, **changed), np.zeros(len(captions)))
    lines = (folder / "good.jsonl").read_text().splitlines(keepends=True)
    (folder / "short.jsonl").write_text(lines[0])
    (folder / "reversed.jsonl").write_text("".join(lines[::-1]))
    for name, column, texts in (
        ("good", "Caption", captions.predictions),
        ("references", "Caption", captions.references),
        ("concepts", "CUIs", map(";".join, captions.cuis)),
        ("train", "Caption", training.captions),
        ("train_concepts", "CUIs", map(";".join, training.cuis)),
    ):
        rows = "".join(f'id{i},"{text}"\n' for i, text in enumerate(texts))
        (folder / f"{name}.csv").write_text(f"ID,{column}\n{rows}")
    return folder


@pytest.fixture
def run(files, capsys):
    """Return a function that runs a command, with file names for paths, and returns what it prints."""

    def run_command(*arguments: str) -> str:
        main([str(files / item) if item.endswith((".csv", ".jsonl")) else item for item in arguments])
        return capsys.readouterr().out

    return run_command


TRAIN = ("--train", "train.csv", "--train_concepts", "train_concepts.csv")


def test_predictions_of_a_run_and_the_csv_of_any_system_score_alike(run, captions, training):
    expected = score(captions, Training(training.captions, training.cuis), None, tokenizer=None)
    assert json.loads(run("score", "good.jsonl", *TRAIN, "--tokenizer", "none", "--json")) == expected
    given = ("--references", "references.csv", "--concepts", "concepts.csv")
    assert json.loads(run("score", "good.csv", *given, *TRAIN, "--tokenizer", "none", "--json")) == expected
    assert run("score", "good.jsonl", *TRAIN, "--tokenizer", "none") == f"{score_table(expected)}\n"


def test_two_systems_are_tested_pair_by_pair(run, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which takes seconds
    pair = ("score", "good.jsonl", "--against", "poor.jsonl", *TRAIN, "--tokenizer", "whitespace")
    found = json.loads(run(*pair, "--json"))
    for name in ("rougeL", "concept_f1", "nlgeval_bleu4", "nlgeval_cider"):
        row = found["scores"][name]
        assert row["difference"] == pytest.approx(row["first"] - row["second"])
        assert 0 < row["low"] < row["difference"] < row["high"], name
        assert row["p_value"] < 0.001 and row["p_value"] <= row["p_holm"] < 0.02, name
    undefined = found["scores"]["measurement_f1"]
    assert undefined["difference"] is undefined["low"] is undefined["p_value"] is None
    assert run(*pair) == f"{comparison_table(found)}\n"
    assert list(found["missing"]) == ["nlgeval_meteor", *NOT_COMPUTED]
    assert found["scores"]["nlgeval_bleu4"]["signature"] == "case:mixed|tok:whitespace|pycocoevalcap:1.2"
    swapped = run("score", "poor.jsonl", "--against", "good.jsonl", "--tokenizer", "none")
    assert f"{-found['scores']['rougeL']['difference']:+.3f}" in swapped
    assert swapped.startswith("captions: 120; first: ")


def test_two_systems_are_matched_by_id_and_not_by_row(run):
    found = json.loads(run("score", "good.jsonl", "--against", "reversed.jsonl", "--tokenizer", "none", "--json"))
    assert found["scores"]["rougeL"]["difference"] == 0 and found["scores"]["rougeL"]["p_value"] == 1


@pytest.mark.parametrize("others", [[], ["--against", "a|b_%&.jsonl"]], ids=["one system", "two systems"])
def test_tables_for_a_paper_have_the_numbers_of_the_json_and_the_escapes_of_their_format(run, files, others):
    words = ("score", "poor.jsonl", *others, *TRAIN, "--tokenizer", "none", "--format")
    shutil.copy(files / "good.jsonl", files / "a|b_%&.jsonl")
    scores = json.loads(run(*words, "json"))["scores"]
    latex, markdown = run(*words, "latex"), run(*words, "markdown")
    code = "".join(line for line in latex.splitlines(keepends=True) if not line.startswith("%"))
    frame = r"\\begin{tabular}{(lr+)}\n\\toprule\n(.*)\\bottomrule\n\\end{tabular}\n"
    columns, body = re.fullmatch(frame, code, re.DOTALL).groups()
    assert r"95 \% interval" in body and r"concept\_f1" in body and r"concept\_f1" in markdown
    assert not re.search(r"(?<!\\)[%#_{}$]|[ +]-\d", body.replace("$-$", ""))
    heading, middle, *rows = body.splitlines()
    rows = [row.removesuffix(r" \\").split(" & ") for row in (heading, *rows) if row.endswith(r" \\")]
    assert middle == r"\midrule" and len(rows) == 1 + len(scores)
    assert {len(row) for row in rows} == {len(columns)}
    lines = re.findall(r"^\| (.*) \|$", markdown, re.MULTILINE)
    assert (r"a\|b\_%&amp;.jsonl" in markdown) == bool(others)
    plain = [[cell.replace("$-$", "-").replace("\\", "") for cell in row] for row in rows]
    assert plain == [[cell.replace("\\", "") for cell in re.split(r" (?<!\\)\| ", line)] for line in lines]
    for name, *cells in plain[1:]:
        own = scores[name]
        best = sorted(value for value in own.get("baselines", {}).values() if value is not None)[-1:]
        keys = ("value", "first", "second", "difference", "low", "high", "p_value", "p_holm")
        wanted = [own[key] for key in keys if own.get(key) is not None] + best
        shown = [float(number) for number in re.findall(r"[+-]?\d+\.\d+", " ".join(cells))]
        assert shown == pytest.approx(wanted, abs=0.5001 * 10 ** -num_decimals(own["low"], own["high"])), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.csv"], "has no reference; add --references"),
        (["none.jsonl"], "none.jsonl' is not a file; see `python -m captioning score --help`"),
        (["."], "argument predictions: '.' is not a file"),
        (["good.jsonl", "--train_concepts", "train_concepts.csv"], "--train_concepts goes with --train"),
        (["good.jsonl", "--train", "train_concepts.csv"], "columns ['ID', 'CUIs']; give a CSV of ID,Caption"),
        (["good.jsonl", "--against", "short.jsonl"], ": 119 (id1, id2, id3)"),
        (["good.jsonl", "--against", "other.jsonl"], "differ in the references of images: 120 (id0)"),
        (["good.jsonl", "--tokenizer", "moses"], "invalid choice: 'moses'"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    with pytest.raises(UserError) as error:
        run("score", *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_concepts_are_scored_beside_the_most_frequent_ones(run, files, captions, training):
    (files / "own_concepts.csv").write_text("ID,CUIs\n" + "".join(f"id{i},C0040405\n" for i in range(len(captions))))
    arguments = ("own_concepts.csv", "--references", "concepts.csv", "--train_concepts", "train_concepts.csv")
    scores = json.loads(run("score", *arguments, "--json"))
    truth = [set(cuis) for cuis in captions.cuis]
    own = detection_scores([{"C0040405"}] * len(truth), truth)
    values = {name: entry["value"] for name, entry in scores["scores"].items()}
    assert values == pytest.approx({name: score.value for name, score in own.items()})
    constant = set(best_concepts([set(cuis) for cuis in training.cuis]))
    assert set(scores["constant"]["concept_detection"]) == constant
    entry, of_constant = scores["scores"]["concept_detection_f1"], detection_scores([constant] * len(truth), truth)
    assert entry["baselines"]["constant"] == of_constant["concept_detection_f1"].value
    assert entry["low"] < entry["value"] < entry["high"]
    assert scores["concepts"] == concept_table([{"C0040405"}] * len(truth), truth)
    table = run("score", *arguments)
    assert "computed tomography" in table and "most frequent concepts, concept_detection: C" in table
    assert "computed tomography" in run("score", *arguments[:3]), "without a training split"
    manual = run("score", *arguments, "--concepts", "own_concepts.csv", "--json")
    assert json.loads(manual)["scores"]["concept_detection_manual_f1"]["value"] == 1


def test_a_valid_submission_is_said_to_be_one_and_faults_are_listed(run, files, capsys):
    assert "is a valid submission\n" in run("check", "good.csv", "--references", "references.csv")
    assert "ids and their order were not checked: give --references" in run("check", "good.csv")
    rows = "".join(f" \x1b[31mid{i},x\n" for i in range(30))
    (files / "faults.csv").write_text(f"ID,Caption\n{rows}")
    with pytest.raises(UserError, match="faults found: 30; a submission must have none"):
        run("check", "faults.csv")
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 20, "the first ones are enough"
    assert "\x1b" not in shown


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_control_characters_and_unpaired_surrogates_do_not_reach_the_terminal(tmp_path, monkeypatch, as_json):
    row = {"image_id": "a", "prediction": "x", "reference": "CT \x1b[31mred\x1b[0m\u202eevil"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"image_id": "b\ud800"}) + "\n")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["score", str(tmp_path / "odd.jsonl"), "--tokenizer", "none", *as_json])
    terminal.flush()
    shown = terminal.buffer.getvalue()
    assert b"CT" in shown and b"\x1b" not in shown


# --- Processes: what only they have -------------------------------------------------------------------------


def test_a_mistake_ends_the_process_with_one_line_and_status_2(files):
    result = server().run(["-m", "captioning", "score", files / "good.csv"], code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


HELP = [[], ["--help"], *([path.stem, "--help"] for path in ROOT.glob("captioning/commands/[a-z]*.py"))]
MISTAKES = [line.split() for line in ("scor", "prepare", "score metrics.py --refs", "score a.csv", "check a.csv")]


@pytest.mark.parametrize("words", [*HELP, *MISTAKES], ids=" ".join)
def test_help_and_a_mistake_are_answered_before_a_library_is_imported(words):
    command = [sys.executable, "-X", "importtime", "-m", "captioning", *words]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == (0 if words in HELP else 2) and bool(found.stdout) == (words in HELP)
    assert words or all(f"\n    {name} " in found.stdout for name in ("prepare", "score", "check"))
    imported = {line.split("|")[-1].strip() for line in found.stderr.splitlines() if line.startswith("import time:")}
    assert {"captioning.command_line", "argparse"} <= imported
    slow = ("torch", "transformers", "datasets", "pandas", "pyarrow", "numpy", "scipy", "sklearn", "huggingface_hub")
    assert not imported.intersection(slow)


def test_a_reader_that_closes_the_pipe_early_causes_no_traceback():
    code = "import captioning.command_line as c; c.exit_on_user_error(lambda: print('x' * 10**6))"
    command = f'{sys.executable} -c "{code}" | true'
    assert subprocess.run(command, cwd=ROOT, shell=True, capture_output=True).stderr == b""
