"""Attributes read from captions, and their agreement."""

import csv
from pathlib import Path

import numpy as np
import pytest

from captioning.data import phantoms
from captioning.scoring import clinical
from captioning.scoring.clinical import agreement, item_counts, modality_of, stated_attributes


def read(caption: str, attribute: str) -> str:
    """The values of one attribute, sorted, as one text."""
    return " ".join(sorted(value.replace(" ", "_") for value in stated_attributes(caption)[attribute]))


# --- The readers ------------------------------------------------------------------------------------------------

# By attribute, what is read from which captions, with " | " between these. BLIP decodes "x-ray" as "x - ray", "3.5" as
# "3. 5"; published captions lose the full stop of a title; MR is also mitral regurgitation
READ = {
    "modality": {
        "CT": "CT scan of the chest | computed tomography | Contrast-enhanced computerised tomography | "
        "HRCT of the lungs | CT angiography | computed tomography angiography | CT pulmonary angiogram | "
        "a hypodense lesion | CT fluoroscopy",
        "X-ray": "chest x - ray | AP radiograph | Mammography | Lateral X-RayDorsal column stimulator | "
        "IOPA of tooth 26 | anteroposterior view of the knee | supine film of the abdomen | plain abdominal film",
        "MRI": "MR–angiography | T2-weighted image | axial t2 - weighted image | MR imaging | "
        "magnetic resonance imaging | MR angiogram | gradient echo image | a hyperintense lesion | hypointense, in T2",
        "": "Moderate MR and TR in an apical view | which allowed us to operate | a photograph of the patient | "
        "The ductal structure | optical coherence tomography | fluorescein angiography",
        "ultrasound": "transthoracic echocardiography | US image of the kidney | a hypoechoic mass | "
        "parasternal long axis view",
        "angiography": "Coronary angiogram",
        "CT PET": "PET/CT | pet - ct",
    },
    "region": {
        "chest": "thorax | right lung | pulmonary embolism",
        "head": "brain | Left cerebral hemisphere | lateral ventricles | frontal lobe | periapical lesion | IOPA | "
        "opacified sinuses | internal carotid artery",
        "lower_limb": "femoral head | femoral neck | legs | head-neck offset of the femur | both femurs",
        "abdomen": "head of the pancreas | hepatic and renal | renal pelvis | gall bladder | "
        "craniocaudal view of the abdomen",
        "": "arrow heads | neck of the aneurysm | on the other hand | frontal view | the apical part | "
        "a sinus tract | the septal part | endorectal probe",
        "neck": "neck | cervical lymph nodes",
        "spine": "cervical spine | thoracic spine",
        "pelvis": "cervical cancer | urinary bladder",
        "heart": "left ventricle | ventricular septal defect | transesophageal echocardiogram",
        "breast": "breast",
        "upper_limb": "hand and forearm | DIP joints",
    },
    "laterality": {
        "left": "left lung | Left-sided pneumothorax | left - sided pneumothorax | leftward shift | Lt. kidney",
        "bilateral": "both lungs | both the upper lobes | bilaterally",
        "left right": "the right and the left kidney",
        "": "a nodule (right arrow) | left white arrows | CT (right panel) and MRI (left panel) | "
        "the left upper image | top left | the left side of the image | Left: CT. Right: MRI | "
        "the drain was left in place | if left untreated | the catheter was left | right anterior oblique view | "
        "left - to - right shunt | right after surgery",
        "right": "right hand | shift to the right | left side of image shows right kidney | Rt kidney",
    },
    "negation": {
        "fracture": "no fracture | No acute fractures are seen",
        "effusion": "without pleural effusion | no effusion, the heart is normal | no effusion and a small nodule | "
        "no effusion but a nodule | no effusion, small nodule in the lung",
        "metastasis": "no evidence of pulmonary metastases",
        "calculus": "without calculi - the so-called classic description",
        "calculus embolus": "no emboli or calculi",
        "state-of-the-art": "no state - of - the - art",
        "invasion": "without any direct signs of invasion of the wall",
        "kidney": "absence of the left kidney",
        "pneumothorax": "negative for pneumothorax.",
        "consolidation effusion pneumothorax": "no pneumothorax, effusion or consolidation",
        "effusion metastasis": "no associated effusion or signs of pulmonary metastases",
        "edema": "no surrounding edema | no edema surrounding the mass",
        "lesion": "no secondary lesion | no visible lesion associated with it",
        "cardiomegaly": "there was no cardiomegaly | didn't show cardiomegaly",
        "artery": "in this phase the splenic artery is no longer visible",
        "abscess": "without well-defined, rim-enhancing abscess",
        "dislocation effusion fracture": "no fracture, dislocation, or joint effusion in the knee",
        "effusion fracture": "no fracture, and effusion in the joint",
        "leakage stricture": "neither ureteral stricture nor a leakage",
        "tract": "The fistulous tract to the anorectum is not seen",
        "duct": "cystic duct could not be visualized",
        "calcification": "does not show calcification",
        "disease": "no residual or recurrent disease",
        "": "CT without contrast shows a large mass | CT without intravenous contrast | arteries (not shown) | "
        "patient no. 15 | a nodule, an effusion and a fracture | nodular opacity | no interval change | "
        "a fracture cannot be excluded | CT without contrast demonstrates a mass | the duct is not clearly seen",
        "thrombus": "The thrombus is no longer visible",
    },
    "measurement": {
        "35": "3.5 cm mass | 3. 5 cm mass",
        "7": "increased atlanto-dens interval (7 mm) | interval growth to 7 mm | interval resolution of a 7 mm nodule",
        "12": "1,2 cm | a 12-mm nodule | a 12 - mm nodule",
        "20 30": "2 x 3 cm",
        "20 31 40": "2 × 3.1 × 4 cm | 2 × 3.1 × 4 cm3",
        "27 41 9": "4.1x0.9x2.7cm",
        "50 60": "6 cm x 5 cm | 6cmx5cm | 6 cm x5 cm",
        "30 5": "a 5 mm and a 3 cm lesion",
        "25": "25 millimeters",
        "": "a 45-year-old man | 45 HU and 30 % | gradient of 40 mmHg | gradient of 40 mm Hg | 3 cm2 and 4 cm³ | "
        "30 cm/s | slice thickness 5 mm | 5 mm slices | T2 and C3 | 20 mM | at intervals of 5 mm | "
        "slice interval = 5 mm | a resolution of 2 mm",
    },
}
CASES = [
    (name, caption, value)
    for name, table in READ.items()
    for value, captions in table.items()
    for caption in captions.split(" | ")
]


@pytest.mark.parametrize(("name", "caption", "value"), CASES)
def test_an_attribute_is_read_from_a_caption(name, caption, value):
    assert read(caption, name) == value


LABELED = Path(__file__).with_name("labeled_captions.csv")


@pytest.mark.parametrize("part", ["tune", "held-out"])
@pytest.mark.parametrize("name", clinical.ATTRIBUTES)
def test_readers_agree_with_labels_by_hand(name, part):
    """Micro precision and recall of at least .95 on real captions; `docs/metrics.md` has the definitions."""
    with open(LABELED, encoding="utf-8", newline="") as file:
        next(file)  # the license
        rows = [row for row in csv.DictReader(file) if row["part"] == part]
    found = [stated_attributes(row["caption"])[name] for row in rows]
    labels = [{value for value in row[name].split(";") if value} for row in rows]
    counts = item_counts(clinical.item_agreement(name, found, labels))
    wrong = [(row["roco_id"], a, b) for row, a, b in zip(rows, found, labels, strict=True) if a != b]
    assert counts["stated"] >= 15, counts
    assert min(counts["precision"], counts["recall"]) >= 0.95, (counts, wrong)


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
    assert scores["modality"].value == pytest.approx(2 * 1 / (2 + 2)) and scores["modality"].part([0]).value == 1
    assert scores["laterality"].statistics.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert scores["region"].value == pytest.approx(2 * 2 / (2 + 3))
    assert scores["measurement"].value == pytest.approx(2 * 1 / (1 + 2)), "3 cm is said twice, and is one length"
    with pytest.raises(ValueError, match="zip"):
        agreement(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("predicted", "stated", "pairs"),
    [
        ("35", "32", 1),
        ("35", "31", 0),
        ("1.1", "0.99", 1),  # a tenth of the larger, the bound included
        ("100", "95 105", 1),  # one length matches one
        ("95 105", "100 110", 2),  # the most pairs, not the nearest
        ("9 100", "10 98", 2),  # lengths are ordered as numbers, not as text
        ("", "3", 0),
    ],
)
def test_lengths_match_one_to_one_within_a_tenth(predicted, stated, pairs):
    texts = [" and ".join(f"{length} mm" for length in lengths.split()) for lengths in (predicted, stated)]
    assert agreement(*([text] for text in texts))["measurement"].statistics[0, 0] == pairs


def test_what_nobody_says_is_undefined_and_what_is_missed_is_0():
    assert np.isnan(agreement(["a nodule"], ["an effusion"])["laterality"].value)
    assert agreement(["a nodule"], ["left lung"])["laterality"].value == 0


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


def test_precision_recall_and_numbers_stand_behind_an_f1():
    found = agreement(["left lung", "no effusion", "lung"], ["left lung", "right lung, no effusion", "left kidney"])
    assert item_counts(found["laterality"]) == {"precision": 1, "recall": 1 / 3, "predicted": 1, "stated": 3}
    assert item_counts(found["measurement"]) == {"precision": None, "recall": None, "predicted": 0, "stated": 0}
