"""Attributes read from captions, and their agreement."""

import csv

import numpy as np
import pytest
from helpers import SHARED

from captioning.data import phantoms
from captioning.scoring import clinical
from captioning.scoring.clinical import agreement, modality_of, stated_attributes


def read(caption: str, attribute: str) -> str:
    """The values of one attribute, sorted, as one text."""
    return " ".join(sorted(value.replace(" ", "_") for value in stated_attributes(caption)[attribute]))


# --- The readers, by tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("CT scan of the chest", "CT"),
        ("computed tomography", "CT"),
        ("Contrast-enhanced computerised tomography", "CT"),
        ("HRCT of the lungs", "CT"),
        ("chest x - ray", "X-ray"),  # as BLIP decodes it
        ("AP radiograph", "X-ray"),
        ("MR–angiography", "MRI"),
        ("Mammography", "X-ray"),
        ("T2-weighted image", "MRI"),
        ("axial t2 - weighted image", "MRI"),
        ("MR imaging", "MRI"),
        ("magnetic resonance imaging", "MRI"),
        ("Moderate MR and TR in an apical view", ""),  # mitral regurgitation
        ("transthoracic echocardiography", "ultrasound"),
        ("US image of the kidney", "ultrasound"),
        ("which allowed us to operate", ""),
        ("CT angiography", "CT"),
        ("computed tomography angiography", "CT"),
        ("MR angiogram", "MRI"),
        ("Coronary angiogram", "angiography"),
        ("PET/CT", "CT PET"),
        ("pet - ct", "CT PET"),
        ("a photograph of the patient", ""),
        ("The ductal structure", ""),
        ("Lateral X-RayDorsal column stimulator", "X-ray"),  # published captions lose the full stop of a title
    ],
)
def test_modality(caption, expected):
    assert read(caption, "modality") == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("thorax", "chest"),
        ("right lung", "chest"),
        ("pulmonary embolism", "chest"),
        ("brain", "head"),
        ("Left cerebral hemisphere", "head"),
        ("femoral head", "lower_limb"),
        ("head of the pancreas", "abdomen"),
        ("arrow heads", ""),
        ("neck", "neck"),
        ("femoral neck", "lower_limb"),
        ("neck of the aneurysm", ""),
        ("cervical spine", "spine"),
        ("cervical lymph nodes", "neck"),
        ("cervical cancer", "pelvis"),
        ("thoracic spine", "spine"),
        ("hepatic and renal", "abdomen"),
        ("renal pelvis", "abdomen"),
        ("gall bladder", "abdomen"),
        ("urinary bladder", "pelvis"),
        ("left ventricle", "heart"),
        ("lateral ventricles", "head"),
        ("breast", "breast"),
        ("hand and forearm", "upper_limb"),
        ("on the other hand", ""),
        ("legs", "lower_limb"),
        ("frontal view", ""),
        ("frontal lobe", "head"),
        ("craniocaudal view of the abdomen", "abdomen"),
    ],
)
def test_region(caption, expected):
    assert read(caption, "region") == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("left lung", "left"),
        ("Left-sided pneumothorax", "left"),
        ("left - sided pneumothorax", "left"),
        ("both lungs", "bilateral"),
        ("both the upper lobes", "bilateral"),
        ("bilaterally", "bilateral"),
        ("the right and the left kidney", "left right"),
        ("a nodule (right arrow)", ""),
        ("left white arrows", ""),
        ("CT (right panel) and MRI (left panel)", ""),
        ("the left upper image", ""),
        ("top left", ""),
        ("the left side of the image", ""),
        ("Left: CT. Right: MRI", ""),
        ("the drain was left in place", ""),
        ("if left untreated", ""),
        ("the catheter was left", ""),
        ("right anterior oblique view", ""),
        ("left - to - right shunt", ""),
        ("right after surgery", ""),
        ("right hand", "right"),
        ("shift to the right", "right"),
    ],
)
def test_laterality(caption, expected):
    assert read(caption, "laterality") == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("no fracture", "fracture"),
        ("No acute fractures are seen", "fracture"),
        ("without pleural effusion", "effusion"),
        ("no evidence of pulmonary metastases", "metastasis"),
        ("without any direct signs of invasion of the wall", "invasion"),
        ("absence of the left kidney", "kidney"),
        ("negative for pneumothorax.", "pneumothorax"),
        ("no fracture, dislocation, or joint effusion in the knee", "dislocation effusion fracture"),
        ("neither ureteral stricture nor a leakage", "leakage stricture"),
        ("no effusion, the heart is normal", "effusion"),
        ("no effusion and a small nodule", "effusion"),
        ("no effusion but a nodule", "effusion"),
        ("The fistulous tract to the anorectum is not seen", "tract"),
        ("cystic duct could not be visualized", "duct"),
        ("does not show calcification", "calcification"),
        ("no residual or recurrent disease", "disease"),
        ("CT without contrast shows a large mass", ""),
        ("CT without intravenous contrast", ""),
        ("arteries (not shown)", ""),
        ("patient no. 15", ""),
        ("The thrombus is no longer visible", "thrombus"),
        ("a nodule, an effusion and a fracture", ""),
        ("nodular opacity", ""),
    ],
)
def test_negation(caption, expected):
    assert read(caption, "negation") == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("3.5 cm mass", "35"),
        ("3. 5 cm mass", "35"),  # as BLIP decodes it
        ("1,2 cm", "12"),
        ("a 12-mm nodule", "12"),
        ("a 12 - mm nodule", "12"),
        ("2 x 3 cm", "20 30"),
        ("2 × 3.1 × 4 cm", "20 31 40"),
        ("4.1x0.9x2.7cm", "27 41 9"),
        ("6 cm x 5 cm", "50 60"),
        ("a 5 mm and a 3 cm lesion", "30 5"),
        ("25 millimeters", "25"),
        ("a 45-year-old man", ""),
        ("45 HU and 30 %", ""),
        ("gradient of 40 mmHg", ""),
        ("gradient of 40 mm Hg", ""),
        ("3 cm2 and 4 cm³", ""),
        ("30 cm/s", ""),
        ("slice thickness 5 mm", ""),
        ("5 mm slices", ""),
        ("T2 and C3", ""),
    ],
)
def test_measurement(caption, expected):
    assert read(caption, "measurement") == expected


# Read by eye, and kept so; no measure of how often the readers are right.
# Modality, region, laterality, negation, measurement
REAL = {
    "ROCO_30523": ("CT", "abdomen pelvis", "bilateral", "", ""),
    "ROCO_55930": ("ultrasound", "abdomen", "", "", "25"),
    "ROCO_00264": ("X-ray", "chest", "left right", "", ""),
    "ROCO_16759": ("CT", "abdomen", "left", "", ""),
    "ROCO_05634": ("CT", "pelvis", "", "tract", ""),
    "ROCO_50305": ("X-ray", "chest", "left", "", ""),
    "ROCO_08759": ("X-ray", "abdomen", "bilateral left", "", ""),
    "ROCO_58525": ("X-ray", "heart", "", "", ""),
    "ROCO_28613": ("MRI", "pelvis", "", "", ""),
    "ROCO_75294": ("CT", "lower_limb", "left", "", "24 26 28"),
    "ROCO_30996": ("CT", "abdomen breast", "right", "", "33"),
    "ROCO_30002": ("CT", "abdomen", "", "enhancement", ""),
    "ROCO_71717": ("CT", "spine", "", "", ""),
    "ROCO_69017": ("ultrasound", "abdomen", "right", "", "27 41 9"),
    "ROCO_08256": ("CT", "head", "right", "", ""),
    "ROCO_79296": ("X-ray", "chest", "left right", "", ""),
    "ROCO_14810": ("angiography", "heart", "", "", ""),
    "ROCO_74653": ("CT PET", "head heart", "left", "", ""),
    "ROCO_42949": ("X-ray", "breast", "left", "", "25 32"),
    "ROCO_16358": ("angiography", "heart", "left", "", ""),
    "ROCO_41981": ("CT", "pelvis", "bilateral left", "", ""),
    "ROCO_05900": ("CT", "head", "", "bleeding fracture", ""),
    "ROCO_60345": ("angiography", "abdomen", "", "leak", ""),
    "ROCO_73170": ("X-ray", "upper_limb", "left", "", ""),
    "ROCO_05906": ("X-ray", "upper_limb", "right", "", ""),
    "ROCO_74638": ("CT", "lower_limb", "", "", "40 60"),
    "ROCO_76965": ("", "", "", "", ""),
}


def test_real_captions_are_read_as_by_eye():
    folder = SHARED / "roco_captions_ccby"
    if not folder.is_dir():
        pytest.skip("the published captions are not beside the project")
    captions = {}
    for name in ("validation", "test"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            captions |= {row["roco_id"]: row["caption"] for row in csv.DictReader(file)}
    for roco_id, expected in REAL.items():
        found = tuple(read(captions[roco_id], name) for name in clinical.ATTRIBUTES)
        assert found == expected, captions[roco_id]


def test_phantoms_are_read_as_they_were_drawn():
    names = {"radiograph": "X-ray"}
    rng = np.random.default_rng(0)
    for attributes in phantoms.combinations("test"):
        found = stated_attributes(phantoms.reword(attributes, rng))
        assert found["modality"] == {names.get(attributes["modality"], attributes["modality"])}
        assert attributes["region"] in found["region"]
        assert found["laterality"] == ({attributes["side"]} if attributes["side"] else set())


@pytest.mark.parametrize("caption", ["", " ", "\u202f", "·", "no", "without", "x" * 5000, "no " * 2000, "5 x " * 2000])
def test_odd_captions_do_not_raise(caption):
    assert set(stated_attributes(caption)) == set(clinical.ATTRIBUTES)


# --- Agreement ---------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    predictions = ["CT of the left lung", "MRI of the brain, 31 mm", "a nodule"]
    references = ["CT of the right lung", "CT of the brain, 3 cm and 3 cm and 9 mm", "Right femur"]
    scores = agreement(predictions, references)
    assert scores["modality"].statistics.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 0]]
    assert scores["modality"].value == pytest.approx(2 * 1 / (2 + 2))
    assert scores["laterality"].statistics.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert scores["region"].value == pytest.approx(2 * 2 / (2 + 3))
    assert scores["measurement"].value == pytest.approx(2 * 1 / (1 + 2)), "3 cm is said twice, and is one length"
    assert scores["modality"].part(np.array([0])).value == 1.0


def test_lengths_match_one_to_one_within_a_tenth():
    assert clinical._same_lengths({"35"}, {"32"}) == 1
    assert clinical._same_lengths({"35"}, {"31"}) == 0
    assert clinical._same_lengths({"1.1"}, {"0.99"}) == 1, "a tenth of the larger, the bound included"
    assert clinical._same_lengths({"100"}, {"95", "105"}) == 1, "one length matches one"
    assert clinical._same_lengths({"95", "105"}, {"100", "110"}) == 2, "the most pairs, not the nearest"
    assert clinical._same_lengths({"9", "100"}, {"10", "98"}) == 2, "lengths are ordered as numbers, not as text"
    assert clinical._same_lengths(set(), {"3"}) == 0


def test_what_nobody_says_is_undefined_and_what_is_missed_is_0():
    assert np.isnan(agreement(["a nodule"], ["an effusion"])["laterality"].value)
    assert agreement(["a nodule"], ["left lung"])["laterality"].value == 0


def test_sums_combine_for_many_resamples_at_once():
    score = agreement(["left lung", "CT"], ["left lung", "right lung"])["laterality"]
    sums = np.stack([score.statistics.sum(axis=0), score.statistics[:1].sum(axis=0), np.zeros(3)])[None]
    combined = score.combine(sums, 2)
    assert combined.shape == (1, 3)
    np.testing.assert_allclose(combined[0], [2 / 3, 1.0, np.nan])


def test_agreement_rejects_lists_of_unequal_length():
    with pytest.raises(ValueError, match="zip"):
        agreement(["a"], ["a", "b"])


# --- The modality of an image -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuis", "caption", "expected"),
    [
        (["C0817096", "C1306645"], "", "X-ray"),
        (["C0040405", "C0032743"], "", "PET"),
        (["C1306645", "C0002978"], "", "angiography"),
        (["C0040405"], "MRI of the brain", "CT"),
        (["C0817096"], "MRI of the brain, CT not shown", "MRI"),
        ([], "X-ray; later a PET was made", "X-ray"),
        (["nan"], "", "unknown"),
        ([], "A nodule", "unknown"),
    ],
)
def test_modality_of_an_image(cuis, caption, expected):
    assert modality_of(cuis, caption) == expected
