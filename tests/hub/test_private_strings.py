"""No path and no token leaves; no caption, weight or vocabulary is taken for one."""

import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import real_captions
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from captioning.errors import UserError
from captioning.hub.private_strings import refuse_private_strings


TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrSt" + "0123456789"
WEIGHTS = {"a": np.random.default_rng(0).standard_normal(5000).astype("float32")}


def jsonl(**values) -> bytes:
    return (json.dumps({"image_id": "ok_1", "prediction": "x"}) + "\n" + json.dumps(values) + "\n").encode()


def png(text: str) -> bytes:
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Source", text)
    Image.new("L", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def zipped(name: str, content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Return a function that looks through one file, pushed from an output folder in the home folder."""
    home = tmp_path / "hömë"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SOME_API_KEY", "not-a-known-form-of-token")

    def look(name: str, content: bytes) -> None:
        path = tmp_path / "stage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        refuse_private_strings(tmp_path / "stage", home / "out" / "run")

    look.home = str(home)
    return look


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("predictions/test.jsonl", jsonl(image_id="/home/x/1.png"), "line 2, holds a path, '/home/x/1.png'"),
        ("predictions/test.jsonl", jsonl(image_id="/gpfs7/radiology/1.png"), "'/gpfs7/radiology/1.png'"),
        ("predictions/test.jsonl", jsonl(image_id="/1.dcm"), "'/1.dcm'"),
        ("predictions/test.jsonl", jsonl(image_id="../scans/1.png"), "'../scans/1.png'"),
        ("predictions/test.jsonl", jsonl(image_id="~/scans/1.png"), "'~/scans/1.png'"),
        ("predictions/test.jsonl", jsonl(image_id=r"C:\scans\1.png"), r"'C:\scans\1.png'"),
        ("predictions/test.jsonl", jsonl(image_id=r"\\server\scans"), "server"),
        ("predictions/test.jsonl", jsonl(image_id="file:///scans/1.png"), "'file:///scans/1.png'"),
        ("predictions/test.jsonl", jsonl(prediction="seen in /mnt/pacs/1.png, left"), "'/mnt/pacs/1.png'"),
        ("predictions/test.jsonl", jsonl(image_id="/My scans/1.png"), "'/My scans/1.png'"),
        ("predictions/test.jsonl", b"\xef\xbb\xbf" + jsonl(image_id="/nas1/1.png"), "'/nas1/1.png'"),
        ("predictions/test.jsonl", jsonl(prediction="as in /nas1/pacs/1.dcm, left"), "'/nas1/pacs/1.dcm'"),
        ("predictions/test.jsonl", jsonl(prediction=r"as in C:\Users\x\1.png"), r"'C:\Users\x\1.png'"),
        ("predictions/test.jsonl", jsonl(prediction=r"as in \\server\scans"), r"'\\server\scans'"),
        ("README.md", b"as in ~/scans/1.png and\n", "'~/scans/1.png'"),
        ("README.md", b"[scan](file:///scans/1.png)\n", "'file:///scans/1.png'"),
        ("README.md", f"MY_{TOKEN}".encode(), "holds a token, 'hf_AbC…'"),
        ("examples/best.jpg", b"\xff" * 80 + rb"C:\Users\someone\scans" + b"\xff" * 80, r"'C:\Users\someone\scans'"),
        ("scores.json", json.dumps({"missing": {"meteor": "no HOME/java, sorry"}}).encode(), "hömë/java'"),
        ("scores.json", b'{"missing": {"meteor": "ESCAPED/java"}}', "hömë/java'"),
        ("config.json", json.dumps({"_name_or_path": "/nas1/models/blip"}).encode(), "'/nas1/models/blip'"),
        ("README.md", b"# a\n\n| worst | /nas1/a\\_1.png | x |\n", "line 3, holds a path, '/nas1/a_1.png'"),
        ("submission.csv", b'ID,Caption\n/nas1/scans/1,"a, b"\n', "line 2, holds a path, '/nas1/scans/1'"),
        ("submission.zip", zipped("submission.csv", "ID,Caption\n/nas1/1,a\n"), "'submission.zip/submission.csv'"),
        ("training_curve.png", png("/home/someone/scans"), "'/home/someone/scans'"),
        ("last-checkpoint/optimizer.pt", pickle.dumps({"path": "HOME"}), "hömë'"),
        ("model.safetensors", b"x" * 2**20 + b"HOME/data", "hömë'"),
        ("tokenizer.json", json.dumps({"vocab": {"HOME/x": 1}}, ensure_ascii=False).encode(), "hömë"),
        ("README.md", f"login with {TOKEN}".encode(), "holds a token, 'hf_AbC…': remove it, and revoke it"),
        ("model.safetensors", b"\0" * (2**20 - 7) + TOKEN.encode(), "holds a token, 'hf_AbC…'"),
        ("scores.json", json.dumps({"a": "ghp_" + "a1" * 18}).encode(), "holds a token"),
        ("scores.json", b'{"a": "-----BEGIN RSA PRIVATE KEY-----"}', "holds a token"),
        ("README.md", b"short but known: hf_secret", "holds a token, 'hf_sec"),
        ("model.safetensors", b"\0\1hf_secret\0\1", "holds a token, 'hf_sec"),
        ("scores.json", b'{"damaged": "/home/x/y', "'/home/x/y'"),
        ("scheduler.pt", b"\0\1not-a-known-form-of-token\0", "holds a token, 'not-a-…'"),
    ],
)  # fmt: skip
def test_a_path_or_a_token_is_named_with_its_file(look, name, content, message):
    content = content.replace(b"HOME", look.home.encode()).replace(b"ESCAPED", json.dumps(look.home)[1:-1].encode())
    with pytest.raises(UserError) as error:
        look(name, content)
    assert message in str(error.value)
    assert name.split("/")[-1] in str(error.value)
    assert TOKEN not in str(error.value)


def test_a_path_in_the_header_of_weights_is_found(look, tmp_path):
    save_file(WEIGHTS, tmp_path / "weights", metadata={"source": "/mnt/storage/someone"})
    with pytest.raises(UserError, match="'/mnt/storage/someone'"):
        look("model.safetensors", (tmp_path / "weights").read_bytes())


CAPTIONS = (
    "AP/PA view, 5 mg/dl and/or 3/4 of it", "/ findings: none", "~3/4 of the lung, ~1/2", "T2:/FLAIR", "5 mg /kg/day",
    "see https://example.org/home/x and http://a.b/mnt/c", "A: B\n\nC", "w/o contrast", "a /b", "(L/R)/home", "../..",
    "scans/data/x", "./data/x", r"A:\nB: none", r"\alpha\beta", "M/F:/x",
    "high-risk-pulmonary-embolism-and-its-management-in-2019", "C: /D", "r/o TB; s/p CABG", "hf_short", "",
)  # fmt: skip


def test_captions_links_and_vocabularies_are_not_taken_for_paths(look, monkeypatch):
    monkeypatch.setattr(Path, "cwd", lambda: Path("/data"))  # "scans/data/x" is below another
    captions = [*CAPTIONS, *real_captions()]
    rows = (json.dumps({"image_id": f"scans/{i}.png", "prediction": text}) for i, text in enumerate(captions))
    look("predictions/test.jsonl", "\n".join(rows).encode())
    cells = "".join(f"| best | scans/1.png | {text.splitlines()[0] if text else ''} |\n" for text in captions)
    links = "[a](/user/model/b) <img src='/user/model/c.png'> `hf://user/model/recipe.json` data:;base64,/9j/4AAQ\n"
    look("README.md", (cells + links).encode())
    vocabulary = {"/usr/local/bin": 1, "/home/user": 2, "</s>": 3, "/": 4, "~/.ssh/x": 5}
    look("tokenizer.json", json.dumps({"model": {"vocab": vocabulary}}).encode())


def test_weights_are_read_in_bounded_memory_and_short_strings_in_them_are_chance(look):
    random = np.random.default_rng(1).integers(0, 256, 2**25, dtype=np.uint8).tobytes()
    chance = b"\0".join(
        (b"/tmp/ab", b"/mnt/x/y", b"/root/a", b"/home", b"hf_abcdef", b"sk-123456", b"AKIA", b"\1/work/\1")
    )
    tracemalloc.start()
    look("model.safetensors", random + chance)
    peak = tracemalloc.get_traced_memory()[1] - len(random)
    tracemalloc.stop()
    assert peak < 2**24
