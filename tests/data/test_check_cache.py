"""The check of rows is cached between runs, whatever the source, until a file or the code changes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image, load_from_disk
from helpers import make_png
from processes import ROOT
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.pixels import get_decoder
from source_files import write_images, write_parquet, write_table

from captioning.data.checks import mark_rows


COUNT = """
import json, sys
from PIL import Image
from captioning.data import checks, phantoms, sources

phantoms.SPLIT_SIZES.update(train=3, validation=2, test=2)
original, opened = Image.open, []
Image.open = lambda *args, **kwargs: opened.append(1) or original(*args, **kwargs)
found = {}
for name in sys.argv[1:]:
    opened.clear()
    checks.check_rows(sources.load_source(name), 0.0, None)
    found[name.rpartition("/")[2]] = len(opened)
print(json.dumps(found))
"""


def make_sources(root: Path, raw_dataset) -> list[str]:
    """Write each kind of source; return their names."""
    small = DatasetDict({split: rows.select(range(3)) for split, rows in raw_dataset.items()})
    small.save_to_disk(root / "saved")
    write_parquet(root / "parquet", **small)
    names = [f"{i}.png" for i in range(3)]
    write_images(root / "own", *names)
    write_table(root / "own" / "captions.csv", *({"file_name": name, "caption": "a cyst"} for name in names))
    write_images(root / "zenodo" / "train_images", *names)
    write_table(root / "zenodo" / "train_captions.csv", *({"ID": name[0], "Caption": "a cyst"} for name in names))
    write_images(root / "paths", *names)
    paths = {"image": [{"bytes": None, "path": str(root / "paths" / name)} for name in names]}
    rows = Dataset.from_dict(paths | {"image_id": names, "caption": ["a cyst"] * 3})
    pq.write_table(rows.cast_column("image", Image(decode=False)).data.table, root / "paths" / "train-0.parquet")
    return [*(str(root / name) for name in ("saved", "parquet", "own", "zenodo", "paths")), "phantoms"]


def images_opened_by_checks(names: list[str], cache: Path, project: Path = ROOT, seed: int = 0) -> dict[str, int]:
    """Return by source how many images the check opens in a new process."""
    environment = os.environ | {"HF_HOME": str(cache), "PYTHONPATH": str(project), "PYTHONHASHSEED": str(seed)}
    run = subprocess.run([sys.executable, "-c", COUNT, *names], cwd=cache, env=environment, stdout=-1, check=True)
    return json.loads(run.stdout)


def test_a_second_run_opens_no_image_again_but_where_a_file_or_the_code_has_changed(raw_dataset, tmp_path):
    (cache := tmp_path / "cache").mkdir()
    names = make_sources(tmp_path, raw_dataset)
    all_images = {"saved": 9, "parquet": 9, "own": 3, "zenodo": 3, "paths": 3, "phantoms": 7}
    assert images_opened_by_checks(names, cache, seed=1) == all_images
    assert images_opened_by_checks(names, cache, seed=2) == dict.fromkeys(all_images, 0)

    for folder in ("own", "zenodo/train_images", "paths"):
        (tmp_path / folder / "1.png").write_bytes(make_png(77))  # another image of the same name
    again = images_opened_by_checks(names, cache)
    assert {name for name, opened in again.items() if opened} == {"own", "zenodo", "paths"}

    shutil.copytree(ROOT / "captioning", tmp_path / "code" / "captioning")
    shutil.copy(ROOT / "metrics.py", tmp_path / "code")
    module = tmp_path / "code" / "captioning" / "data" / "images.py"
    module.write_text(module.read_text().replace("MIN_IMAGE_SIDE = 8", "MIN_IMAGE_SIDE = 9"))
    newer = images_opened_by_checks(["phantoms", *names[:2]], cache, tmp_path / "code")
    assert newer == {"phantoms": 7, "saved": 9, "parquet": 9}, "a stricter check looks again"


def test_a_dicom_is_looked_at_again_once_its_decoder_is_installed(tmp_path):
    path = get_testdata_file("MR_small_RLE.dcm")
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": path}], "image_id": ["a"], "caption": ["a cyst"]})
    rows.cast_column("image", Image(decode=False)).save_to_disk(tmp_path)
    rows = load_from_disk(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_decoder(uid.RLELossless), "_available", {})
        assert "pip install" in mark_rows(rows, "train")["rejected"][0]
    assert mark_rows(rows, "train")["rejected"][0] is None
