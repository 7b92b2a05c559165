"""Captions as people write them, from what the tokenizer leaves of them."""

import json

import numpy as np
import pytest
from helpers import SHARED, real_captions

from captioning.errors import UserError
from captioning.hub.private_strings import refuse_private_strings
from captioning.models.load import build_captioner
from captioning.models.surface_form import FILE, SurfaceForm, without_accents
from captioning.models.tokenizer import load_tokenizer
from metrics import imageclef_rouge1, rouge


CAPTIONS = [
    "T2-weighted MRI and PA X-ray of the chest (arrow) show a 3.5 cm non-contrast mass.",
    "AP X-ray, 2.5 cm. The patient's COVID-19 pneumonia (arrow) is seen; T2-weighted and/or CT.",
    "CT at 37 °C, ±5 µm, ≥3 mm: follow-up (A) and L4/5 (B).",
    "The chest is clear. No mass is seen.",
]


@pytest.fixture
def captioner(config_file):
    captioner = build_captioner(str(config_file), 0, None, CAPTIONS, vocab_size=400)
    captioner.learn_surface_form(CAPTIONS * 2)
    return captioner


@pytest.fixture(scope="module")
def real():
    """Captions and what BERT's tokenizer makes of them, of two splits."""
    found = {split: real_captions(splits=(split,)) for split in ("validation", "test")}
    tokenizer = load_tokenizer(str(SHARED / "bert_vocab"))
    for split, captions in found.items():
        tokens = tokenizer(captions, add_special_tokens=False, verbose=False)["input_ids"]
        found[split] = captions, [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return found


def test_captions_are_written_as_they_were_in_training(captioner):
    assert captioner.round_trip(CAPTIONS) == CAPTIONS
    assert captioner.round_trip(["", "Chest MRI (Arrow), 4.5 cm"]) == ["", "Chest MRI (arrow), 4.5 cm"]
    captioner.surface_form = None
    assert captioner.round_trip(CAPTIONS[:1])[0].startswith("t2 - weighted mri and pa x - ray of the chest ( arrow )")


def test_what_the_tokenizer_loses_is_not_invented(captioner):
    assert captioner.round_trip(["CT 漢 scan", "Méchant 37 °C"]) == ["CT scan", "Mechant 37 °C"]
    captioner.learn_surface_form([*CAPTIONS, "CT 漢-SCAN"] * 2)
    assert "scan" not in captioner.surface_form.forms, "the caption is left out: its pieces do not match"


def test_text_stays_as_decoded_where_the_score_would_see_other_words():
    assert SurfaceForm({"ct": "MRI"}, [""]).restore("ct of x - ray") == "ct of x - ray"
    assert SurfaceForm({"x": "X", "-": "-"}, ["."]).restore("ct of x - ray. ok") == "ct of X-ray . Ok"


def test_a_file_that_was_saved_is_read_and_a_broken_one_named(captioner, tmp_path):
    assert SurfaceForm.load(str(tmp_path)) is None
    captioner.surface_form.save(tmp_path)
    assert SurfaceForm.load(str(tmp_path)) == captioner.surface_form
    values = ({"a": 1}, []), ({"a": " "}, []), ({}, None)
    wrong = [json.dumps({"forms": forms, "capital_after": kinds}) for forms, kinds in values]
    for content in ("{", "[]", *wrong):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(UserError, match=f"{FILE} cannot be read"):
            SurfaceForm.load(str(tmp_path))


def test_published_captions_are_restored_and_rouge_does_not_change_by_a_digit(real, tmp_path):
    """Learned on one split of ROCO, tried on the other: without the captions whose accents are lost."""
    form = SurfaceForm.learn(*real["validation"])
    captions, decoded = real["test"]
    restored = [form.restore(text) for text in decoded]
    for key, values in rouge(restored, captions).items():
        np.testing.assert_array_equal(values, rouge(decoded, captions)[key])
    kept = [(a, b, c) for a, b, c in zip(decoded, restored, captions, strict=True) if without_accents(c) == c]
    before, after, true = zip(*kept, strict=True)
    assert imageclef_rouge1(before, true).mean() < 0.95 and imageclef_rouge1(after, true).mean() > 0.995
    form.save(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 20_000
    refuse_private_strings(tmp_path, tmp_path)
