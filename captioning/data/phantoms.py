"""Phantoms: a small synthetic radiology dataset in ROCOv2's schema that needs no network.

Every image is drawn from six attributes (modality, region, finding, side, place, size) and its caption states them in
one of many wordings. Test and validation hold combinations of attributes that training never shows: a model that
scores there has learned to look, not to recall. The pictures are drawings, not simulations: they teach nothing about
patients.
"""

import hashlib
import io
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage


SIDE = 96  # image height and width, pixels
SPLIT_SIZES = {"train": 12000, "validation": 200, "test": 400}
FEATURES = Features(
    {"image": Image(), "image_id": Value("string"), "caption": Value("string"), "cui": List(Value("string"))}
)
ATTRIBUTES = ("modality", "region", "finding", "side", "place", "size")

# --- Attributes: what an image can show, and which combinations each split may draw ----------------------------

# The concepts that ROCOv2 itself uses. ROCOv2 gives the region of radiographs only; here every image has both.
CUIS = {
    "CT": "C0040405", "radiograph": "C1306645", "MRI": "C0024485", "ultrasound": "C0041618",
    "chest": "C0817096", "head": "C0037303", "abdomen": "C0000726", "pelvis": "C0030797", "lower limb": "C0023216",
}  # fmt: skip
FRONTAL = ("upper", "middle", "lower")
AXIAL = ("anterior", "middle", "posterior")
DEPTH = ("superficial", "middle", "deep")
# (modality, region): view, places from the top of the image down, findings that occur there, organ
STUDIES = {
    ("CT", "chest"): ("axial", AXIAL, ("nodule", "bulla", "cavity"), "lung"),
    ("CT", "head"): ("axial", AXIAL, ("hemorrhage", "cyst", "abscess"), "hemisphere"),
    ("CT", "abdomen"): ("coronal", FRONTAL, ("mass", "cyst", "abscess"), "flank"),
    ("radiograph", "chest"): ("PA", FRONTAL, ("nodule", "bulla", "cavity"), "lung"),
    ("radiograph", "pelvis"): ("AP", FRONTAL, ("sclerotic lesion", "lytic lesion", "abscess"), "hemipelvis"),
    ("radiograph", "lower limb"): ("AP", FRONTAL, ("sclerotic lesion", "lytic lesion", "abscess"), "tibia"),
    ("MRI", "head"): ("contrast-enhanced", AXIAL, ("mass", "cyst", "abscess"), "hemisphere"),
    ("MRI", "abdomen"): ("coronal", FRONTAL, ("mass", "cyst", "abscess"), "flank"),
    ("MRI", "lower limb"): ("coronal", FRONTAL, ("mass", "cyst", "abscess"), "thigh"),
    ("ultrasound", "abdomen"): ("transverse", DEPTH, ("calcification", "cyst", "abscess"), "hepatic lobe"),
    ("ultrasound", "pelvis"): ("transverse", DEPTH, ("calcification", "cyst", "abscess"), "adnexa"),
}
BRIGHT = ("nodule", "hemorrhage", "mass", "sclerotic lesion", "calcification")
DARK = ("bulla", "cyst", "lytic lesion")
RING = ("cavity", "abscess")  # a bright wall around a dark center
NORMAL_SHARE = 0.12  # share of images without a finding


def combinations(split: str) -> list[dict[str, str | None]]:
    """Return the combinations of attributes that `split` may show.

    Of the 36 of each study with a finding, training has 30, validation 2 and test 4, the same for every seed, and no
    two splits share one. A normal study has no side, place or size to combine: every split shows it.
    """
    rng = np.random.default_rng(2024)
    kept = []
    for (modality, region), (_, places, findings, _) in STUDIES.items():
        shown = list(product(findings, ("right", "left"), places, ("small", "large")))
        order = rng.permutation(len(shown))
        cut = {"test": order[:4], "validation": order[4:6], "train": order[6:]}[split]
        values = [("normal", None, None, None)] + [shown[i] for i in sorted(cut)]
        kept += [dict(zip(ATTRIBUTES, (modality, region, *v), strict=True)) for v in values]
    return kept


# --- Captions -------------------------------------------------------------------------------------------------

# No wording may be part of one of another value of its attribute: a reader could not tell them apart.
WORDS = {
    "modality": {
        "CT": ("CT", "CT scan", "computed tomography"),
        "radiograph": ("radiograph", "X-ray"),
        "MRI": ("MRI", "magnetic resonance imaging"),
        "ultrasound": ("ultrasound", "sonography"),
    },
    "region": {
        "chest": ("chest", "thorax"),
        "head": ("head", "brain"),
        "abdomen": ("abdomen",),
        "pelvis": ("pelvis",),
        "lower limb": ("lower limbs", "legs"),
    },
    "finding": {name: (name,) for name in BRIGHT + DARK + RING}
    | {
        "cavity": ("cavity", "cavitary lesion"),
        "hemorrhage": ("hemorrhage", "hematoma"),
        "mass": ("mass", "tumor"),
        "cyst": ("cyst", "cystic lesion"),
        "normal": ("no abnormality", "no focal lesion", "normal"),
    },
    "side": {name: (name,) for name in ("right", "left")},
    "place": {name: (name,) for name in dict.fromkeys(FRONTAL + AXIAL + DEPTH)},
    "size": {name: (name,) for name in ("small", "large")},
}
# The order of the attributes varies, so that none can be guessed from those before it.
FRAMES = (
    "{study} {shows} a {size} {finding} in the {where}.",
    "{study} {shows} a {size} {finding} in the {where}.",
    "the {where} {shows} a {size} {finding} on {study}.",
    "a {size} {finding} in the {where} on {study}.",
)
NORMAL_FRAMES = ("{study} {shows} no abnormality.", "{study} {shows} no focal lesion.", "normal {study}.")
SHOWS = ("shows", "showing", "demonstrates", "reveals")


def reword(attributes: dict[str, str | None], rng: np.random.Generator) -> str:
    """Return a caption in the style of ROCOv2 that states `attributes`, in a wording drawn from `rng`."""

    def pick(options):
        return options[rng.integers(len(options))]

    words = {name: pick(WORDS[name][value]) for name, value in attributes.items() if value}
    view, _, _, organ = STUDIES[attributes["modality"], attributes["region"]]
    study = f"{words['modality']} of the {words['region']}"
    if rng.random() < 0.6:
        study = f"{view} {study}"
    if attributes["finding"] == "normal":
        caption = pick(NORMAL_FRAMES).format(study=study, shows=pick(SHOWS))
    else:
        where = f"{words['place']} {words['side']} {organ}"
        caption = pick(FRAMES).format(study=study, shows=pick(SHOWS), where=where, **words)
    return caption[0].upper() + caption[1:]


# --- Images -----------------------------------------------------------------------------------------------------
# Coordinates run from -1 to 1, x to the right, y down; gray values from 0 (black) to 1 (white). An `np.abs(x)` draws
# on both sides at once.

_AXIS = np.linspace(-1, 1, SIDE, dtype=np.float32)
RADIUS = {"small": 0.13, "large": 0.27}


def _ellipse(x, y, cx, cy, rx, ry, edge=0.08):
    """Return the coverage, 0 to 1, of a soft-edged ellipse."""
    return np.clip((1 - np.hypot((x - cx) / rx, (y - cy) / ry)) * min(rx, ry) / edge + 0.5, 0, 1)


def _paint(canvas, coverage, value):
    """Blend `value` into `canvas` in place where `coverage` is 1."""
    canvas += coverage * (value - canvas)


def _clouds(rng, cells, stretch=1):
    """Return a smooth random field of about `cells` bumps down, `stretch` times fewer across; mean 0, deviation 1."""
    coarse = rng.standard_normal((cells, max(2, cells // stretch)), dtype=np.float32)
    return np.asarray(PILImage.fromarray(coarse).resize((SIDE, SIDE), PILImage.Resampling.BICUBIC))


def _ct_chest(canvas, x, y, rng):
    _paint(canvas, _ellipse(x, y, 0, 0, 0.96, 0.84), 0.5)
    angle = np.arctan2(y / 0.84, x / 0.96)
    rim = _ellipse(x, y, 0, 0, 0.9, 0.78) - _ellipse(x, y, 0, 0, 0.84, 0.72)
    _paint(canvas, rim * (np.cos(angle * 9 + rng.uniform(0, 6)) > 0.1), 0.9)  # ribs
    _paint(canvas, _ellipse(np.abs(x), y, 0.44, 0, 0.36, 0.66), 0.34)  # both lungs
    canvas += 0.025 * _clouds(rng, 24)  # vessels
    _paint(canvas, _ellipse(x, y, 0.08, -0.14, 0.22, 0.3), 0.6)  # the heart, to the patient's left
    _paint(canvas, _ellipse(x, y, 0, 0.54, 0.14, 0.14), 0.95)  # vertebra


def _ct_head(canvas, x, y, rng):
    _paint(canvas, _ellipse(x, y, 0, 0, 0.74, 0.9), 1.0)
    _paint(canvas, _ellipse(x, y, 0, 0, 0.65, 0.81), 0.45)
    canvas += 0.02 * _clouds(rng, 20) * (canvas < 0.5)
    for side in (-1, 1):
        _paint(canvas, _ellipse(x, y, side * (0.09 + 0.06 * np.abs(y)), 0, 0.06, 0.3), 0.25)  # ventricles
    _paint(canvas, (np.abs(x) < 0.015) * (np.abs(y) > 0.38) * (np.abs(y) < 0.8), 0.6)  # falx


def _mri_head(canvas, x, y, rng):
    _paint(canvas, _ellipse(x, y, 0, 0, 0.76, 0.92), 0.8)  # fat of the scalp
    _paint(canvas, _ellipse(x, y, 0, 0, 0.71, 0.87), 0.04)  # skull, black on MRI
    _paint(canvas, _ellipse(x, y, 0, 0, 0.63, 0.79), 0.36)
    white = _ellipse(x, y, 0, 0, 0.52, 0.68, 0.12) * (0.8 + 0.5 * np.sin(14 * np.arctan2(y, x) + 2 * _clouds(rng, 6)))
    _paint(canvas, np.clip(white, 0, 1), 0.52)  # white matter reaches into the gyri
    for side in (-1, 1):
        _paint(canvas, _ellipse(x, y, side * (0.09 + 0.06 * np.abs(y)), 0, 0.06, 0.3), 0.12)
    _paint(canvas, (np.abs(x) < 0.02) * (np.abs(y) > 0.35) * (np.abs(y) < 0.78), 0.15)


def _trunk(canvas, x, y, rng, fat, bone, organ, gut):
    """Draw a coronal section of the abdomen: liver at image left, spleen at image right, spine and pelvis."""
    waist = 0.72 + 0.08 * np.cos(3 * y)
    _paint(canvas, _ellipse(x / waist, y, 0, 0, 1.1, 1.4), fat)
    _paint(canvas, _ellipse(x / waist, y, 0, 0, 0.98, 1.3), gut)
    canvas += 0.03 * _clouds(rng, 10) * (canvas > 0.1)
    _paint(canvas, _ellipse(x, y, -0.4, -0.6, 0.32, 0.34), organ)  # liver
    _paint(canvas, _ellipse(x, y, 0.46, -0.66, 0.2, 0.24), organ)  # spleen
    _paint(canvas, (np.abs(x) < 0.11) * 1.0, bone)
    _paint(canvas, (np.abs(x) < 0.11) * (np.sin(18 * y) > 0.8), gut)  # discs
    _paint(canvas, _ellipse(np.abs(x), y, 0.45, 1.05, 0.28, 0.2), bone)  # iliac crests


def _xray_chest(canvas, x, y, rng):
    canvas += 0.72
    _paint(canvas, _ellipse(np.abs(x), y, 1.0, -1.0, 0.4, 0.5, 0.2), 0.05)  # air above the shoulders
    _paint(canvas, _ellipse(np.abs(x), y, 0.42, 0.05, 0.34, 0.78, 0.1), 0.34)  # both lungs
    _paint(canvas, _ellipse(x, y, 0.14, 0.4, 0.27, 0.3, 0.1), 0.8)  # the heart, to the patient's left
    _paint(canvas, np.clip((y - 0.78 - 0.1 * np.cos(4 * x)) * 8, 0, 1), 0.8)  # diaphragm
    ribs = np.sin(16 * (y - 0.28 * np.abs(x)) + rng.uniform(0, 1)) > 0.6
    canvas += 0.07 * ribs * (np.abs(x) > 0.14) * (np.abs(x) < 0.8)


def _xray_pelvis(canvas, x, y, rng):
    _paint(canvas, _ellipse(x, y, 0, 0, 1.15, 1.2, 0.2), 0.3)
    _paint(canvas, _ellipse(np.abs(x), y, 0.5, -0.36, 0.36, 0.46), 0.6)  # iliac wings
    _paint(canvas, _ellipse(np.abs(x), y, 0.52, 0.0, 0.28, 0.26), 0.6)  # acetabula
    _paint(canvas, _ellipse(np.abs(x), y, 0.46, 0.42, 0.32, 0.3), 0.6)  # ischia
    _paint(canvas, _ellipse(np.abs(x), y, 0.84, 0.3, 0.13, 0.6), 0.66)  # femurs
    _paint(canvas, _ellipse(x, y, 0, -0.4, 0.2, 0.4), 0.68)  # sacrum
    _paint(canvas, _ellipse(x, y, 0, 0.2, 0.22, 0.26), 0.3)  # pelvic inlet


def _xray_legs(canvas, x, y, rng):
    _paint(canvas, _ellipse(np.abs(x), y, 0.46, 0, 0.36, 1.8, 0.1), 0.25)
    width = 0.16 + 0.06 * np.abs(y) ** 3  # bones widen towards knee and ankle
    _paint(canvas, np.clip((width - np.abs(np.abs(x) - 0.42)) * 15 + 0.5, 0, 1), 0.62)
    _paint(canvas, np.clip((0.05 - np.abs(np.abs(x) - 0.72)) * 15 + 0.5, 0, 1), 0.55)  # fibula, outside


def _mri_legs(canvas, x, y, rng):
    for side in (-1, 1):
        _paint(canvas, _ellipse(x, y, side * 0.46, 0, 0.43, 1.8), 0.85)  # fat
        _paint(canvas, _ellipse(x, y, side * 0.46, 0, 0.36, 1.7), 0.42)  # muscle
        _paint(canvas, np.clip((0.06 - np.abs(x - side * 0.48)) * 20 + 0.5, 0, 1), 0.62)  # marrow
    canvas += 0.04 * _clouds(rng, 24, 1).T * (canvas > 0.1)


def _us_abdomen(canvas, x, y, rng):
    canvas += 0.42 + 0.05 * _clouds(rng, 8)
    _paint(canvas, np.abs(y + 0.78 + 0.05 * x) < 0.05, 0.75)  # abdominal wall
    for _ in range(4):  # vessels of the liver
        _paint(canvas, _ellipse(x, y, rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.6), 0.1, 0.03, 0.04), 0.2)
    _paint(canvas, np.abs(y - 0.86 - 0.2 * x**2) < 0.05, 0.9)  # diaphragm


def _us_pelvis(canvas, x, y, rng):
    canvas += 0.36 + 0.09 * _clouds(rng, 12, 2)
    _paint(canvas, np.abs(np.sin(14 * y)) * (y < -0.65), 0.7)  # layers of the abdominal wall
    _paint(canvas, _ellipse(x, y, 0, -0.2, 0.12, 0.3), 0.1)  # bladder: fluid is black
    _paint(canvas, _ellipse(x, y, 0, 0.42, 0.15, 0.2), 0.55)  # uterus


# (modality, region): the drawing, and where the middle of a finding lies: x to either side, y for each of three places
ANATOMY = {
    ("CT", "chest"): (_ct_chest, 0.42, (-0.36, 0.0, 0.36)),
    ("CT", "head"): (_ct_head, 0.34, (-0.44, 0.0, 0.44)),
    ("CT", "abdomen"): (partial(_trunk, fat=0.22, bone=0.95, organ=0.56, gut=0.46), 0.38, (-0.55, 0.0, 0.55)),
    ("radiograph", "chest"): (_xray_chest, 0.42, (-0.45, 0.02, 0.48)),
    ("radiograph", "pelvis"): (_xray_pelvis, 0.52, (-0.42, 0.0, 0.42)),
    ("radiograph", "lower limb"): (_xray_legs, 0.42, (-0.6, 0.0, 0.6)),
    ("MRI", "head"): (_mri_head, 0.34, (-0.44, 0.0, 0.44)),
    ("MRI", "abdomen"): (partial(_trunk, fat=0.85, bone=0.3, organ=0.48, gut=0.4), 0.38, (-0.55, 0.0, 0.55)),
    ("MRI", "lower limb"): (_mri_legs, 0.42, (-0.6, 0.0, 0.6)),
    ("ultrasound", "abdomen"): (_us_abdomen, 0.36, (-0.42, 0.06, 0.54)),
    ("ultrasound", "pelvis"): (_us_pelvis, 0.36, (-0.42, 0.06, 0.54)),
}


def _finding(canvas, x, y, attributes, rng):
    study = attributes["modality"], attributes["region"]
    _, offset, heights = ANATOMY[study]
    # Radiological convention: the patient faces the reader, so the patient's right is at image left. Never flip.
    cx = (-offset if attributes["side"] == "right" else offset) + rng.uniform(-0.05, 0.05)
    cy = heights[STUDIES[study][1].index(attributes["place"])] + rng.uniform(-0.06, 0.06)
    radius = RADIUS[attributes["size"]] * rng.uniform(0.9, 1.1)
    squeeze = rng.uniform(0.9, 1.1)
    x, y = (x - cx) / squeeze, (y - cy) * squeeze
    disc = _ellipse(x, y, 0, 0, radius, radius, 0.04)
    if attributes["finding"] in BRIGHT:
        if study[0] == "ultrasound":
            _paint(canvas, (np.abs(x) < radius * 0.8) * (y > 0) * 0.75, 0.02)  # calcium throws an acoustic shadow
        _paint(canvas, disc, 0.97)
    elif attributes["finding"] in DARK:
        if study[0] == "ultrasound":
            canvas += 0.15 * (np.abs(x) < radius * 0.8) * (y > 0)  # fluid enhances the echoes behind it
        _paint(canvas, disc, 0.02)
    else:
        _paint(canvas, _ellipse(x, y, 0, 0, radius + 0.04, radius + 0.04, 0.04), 0.97)
        _paint(canvas, _ellipse(x, y, 0, 0, radius - 0.03, radius - 0.03, 0.04), 0.02)


def draw(attributes: dict[str, str | None], rng: np.random.Generator) -> np.ndarray:
    """Return an image of `attributes`, uint8 `[SIDE, SIDE]`.

    The same state of `rng` gives the same patient and noise whatever the finding: two such images differ by it alone.
    """
    study = attributes["modality"], attributes["region"]
    # Every patient lies differently: shift, zoom and tilt, in canvas units and radians.
    dx, dy, zoom, tilt = rng.uniform((-0.03, -0.03, 0.96, -0.04), (0.03, 0.03, 1.04, 0.04)).astype(np.float32)
    gx, gy = _AXIS[None, :] - dx, _AXIS[:, None] - dy
    x, y = (gx + tilt * gy) / zoom, (gy - tilt * gx) / zoom
    canvas = np.zeros((SIDE, SIDE), np.float32)
    finding_rng = np.random.default_rng(rng.integers(2**32))
    ANATOMY[study][0](canvas, x, y, rng)
    if attributes["finding"] != "normal":
        _finding(canvas, x, y, attributes, finding_rng)
    noise = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    if study[0] == "CT":
        canvas += 0.03 * noise * (0.3 + (canvas > 0.05))
    elif study[0] == "radiograph":
        canvas += 0.015 * noise
    elif study[0] == "MRI":  # uneven sensitivity of the coil, and noise that is never negative
        canvas *= 1 + 0.08 * _clouds(rng, 3)
        canvas = np.hypot(canvas + 0.03 * noise, 0.03)
    else:  # speckle, coarser across the beam than along it, in the sector of a curved array
        speckle = np.hypot(noise + np.roll(noise, 1, 1), _clouds(rng, 48, 2))
        canvas *= 0.6 + 0.28 * speckle
        across, down = _AXIS[None, :], _AXIS[:, None] + 2.0
        depth = np.hypot(across, down)
        canvas *= (depth > 1.1) * (depth < 2.95) * (np.abs(across) < 0.56 * down / 1.6 + 0.02)
    return (canvas.clip(0, 1) * rng.uniform(225, 255)).astype(np.uint8)


# --- Dataset ---------------------------------------------------------------------------------------------------


def _phantom_rows(split: str, seed: int, size: int, edition: str):
    # Each row has its own random generator, so that a smaller dataset is the beginning of a larger one.
    sets = combinations(split)
    normal = [c for c in sets if c["finding"] == "normal"]
    shown = [c for c in sets if c["finding"] != "normal"]
    for i in range(size):
        rng = np.random.default_rng((seed, list(SPLIT_SIZES).index(split), i))
        pool = normal if rng.random() < NORMAL_SHARE else shown
        attributes = pool[rng.integers(len(pool))]
        image = PILImage.fromarray(draw(attributes, rng))
        if rng.random() < 0.05:  # ROCOv2 mixes gray images stored as L and as RGB
            image = image.convert("RGB")
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=1)
        yield {
            "image": {"bytes": png.getvalue(), "path": None},
            "image_id": f"phantom_{split}_{i + 1:06d}",
            "caption": reword(attributes, rng),
            "cui": [CUIS[attributes["modality"]], CUIS[attributes["region"]]],
        }


def load_phantoms(seed: int = 0, sizes: dict[str, int] | None = None) -> DatasetDict:
    """Return phantoms in ROCOv2's columns, by split; equal seeds give equal bytes.

    The seed, an integer from 0, changes images and wordings, but not which combinations a split may show; `sizes` are
    images per split, by default `SPLIT_SIZES`.
    """
    # `datasets` names its cache by these arguments; the digest makes a changed drawing a new dataset.
    edition = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    splits = {}
    for split, size in (sizes or SPLIT_SIZES).items():
        arguments = {"split": split, "seed": seed, "size": size, "edition": edition}
        splits[split] = Dataset.from_generator(_phantom_rows, features=FEATURES, split=split, gen_kwargs=arguments)
    return DatasetDict(splits)
