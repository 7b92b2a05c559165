"""The learning curves: the same log gives the same drawing, odd values do not break it, and the page may show it."""

import re
from xml.etree import ElementTree

import pytest
from helpers import make_record
from PIL import Image as PIL

from captioning.reporting.curves import curves_of_log, draw_training_curve, inline_curves


LOG = [
    {"step": 5, "loss": 2.0, "eval_loss": 2.1, "eval_rougeL": 0.1},
    {"step": 9, "loss": 1.0, "eval_rougeL": None},
    {"step": 10, "eval_loss": 1.1, "eval_rougeL": 0.2},
]


def test_the_card_gets_a_curve_unless_the_run_did_not_train(tmp_path):
    for name, log in {"none": [], "short": LOG[:1], "long": LOG, "again": LOG}.items():
        draw_training_curve(make_record(tmp_path / name, [], log))
    short, long, again = (tmp_path / name / "training_curve.png" for name in ("short", "long", "again"))
    assert short.read_bytes() != long.read_bytes() == again.read_bytes()
    assert PIL.open(long).size == (960, 360)
    assert not (tmp_path / "none" / "training_curve.png").exists()


def test_curves_have_the_finite_points_of_the_log():
    assert curves_of_log(LOG) == {
        "loss (nats per token)": {"training": [(5, 2.0), (9, 1.0)], "validation": [(5, 2.1), (10, 1.1)]},
        "ROUGE-L": {"validation": [(5, 0.1), (10, 0.2)]},
    }
    assert curves_of_log([{"step": 1, "loss": None}, {"step": 2, "train_runtime": 1.0}]) == {}


def test_svgs_fit_into_a_page_that_forbids_styles():
    loss, rouge = inline_curves(LOG)
    assert inline_curves(LOG) == [loss, rouge], "the same log gives another drawing"
    assert "training from 2.000 at step 5 to 1.000 at step 9; validation from 2.100 at step 5" in loss
    assert not re.search(r"style|#000000|#ffffff|metadata|xmlns|DejaVu", loss + rouge)
    assert {"var(--second)", "var(--accent)", "var(--muted)"} <= set(re.findall(r'"(var\(--\w+\))"', loss))
    ids = re.findall(r' id="([^"]*)"', loss + rouge)
    assert len(ids) == len(set(ids)) > 0, "two plots share an id"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', loss + rouge)) <= set(ids)
    labels = [element.text for element in ElementTree.fromstring(loss).iter("text")]
    assert {"step", "loss (nats per token)", "training", "validation"} <= set(labels)


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("values", [[1e-11], [1e38, -1e38], [5.0, 5.0 + 1e-10], [0.0, 0.0], [-3.0]], ids=str)
def test_curves_of_odd_values_are_drawn(tmp_path, values):
    log = [{"step": i + 1, "eval_loss": value, "eval_rougeL": value} for i, value in enumerate(values)]
    draw_training_curve(make_record(tmp_path, [], log))
    assert PIL.open(tmp_path / "training_curve.png").size == (960, 360)
    for svg in inline_curves(log):
        numbers = re.findall(r'(?:[MLxy]|x="|y=")\s*(-?[\d.]+|nan|inf)', svg)
        assert numbers and all(abs(float(number)) < 1000 for number in numbers)
