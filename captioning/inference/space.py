"""The demo as a Hugging Face Space: a folder that runs wherever its requirements are installed."""

import json
import shutil
from pathlib import Path

from captioning.errors import UserError
from captioning.files import PROJECT
from captioning.hub.repository import copy_model
from captioning.models.lora import base_of_adapter


MODEL_FOLDER = "model"
FILES = ("metrics.py", "LICENSE")  # which the package needs beside it
APP = '''"""The demo of a captioning model."""

import os

from captioning.__main__ import main
from captioning.command_line import exit_on_user_error


os.chdir(os.path.dirname(os.path.abspath(__file__)))
# Of Spaces; on another machine the page is for that machine alone
host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT")
arguments = ["demo", *{model}, "--host", host]
exit_on_user_error(lambda: main(arguments + (["--port", port] if port else [])))
'''
README = """---
title: {quoted}
sdk: gradio
sdk_version: {version}
python_version: "3.11"
app_file: app.py
license: apache-2.0
models: {models}
short_description: Captions of radiology images, for research only
---

# {title}

**Research only: not for clinical use.** The model describes findings that are not there, and misses some that are.
Send no image of a patient.

The code is Apache-2.0; the model has the license that its card states. On your machine: `pip install -r
requirements.txt`, then `python app.py`.
"""


def export_space(name: str, revision: str | None, folder: Path) -> None:
    """Write a Space that shows the demo of a model.

    Raises:
        UserError: the folder holds something, the model is neither on the Hub nor complete in its folder, or one of
            its files has a path of this machine in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export_space: '{folder}' is not an empty folder; give a new one")
    is_local = Path(name).is_dir()
    base = base_of_adapter(name, revision) if is_local else None
    if base and Path(base[0]).exists():
        raise UserError(f"export_space: '{name}' adapts '{base[0]}', which is no Hub id; merge it by --merge_lora")
    if is_local and not (Path(name) / "config.json").is_file() and not base:
        raise UserError(f"export_space: '{name}' holds no model; give a folder with config.json, or a Hub id")
    folder.mkdir(parents=True, exist_ok=True)
    if is_local:
        try:
            copy_model(Path(name), folder / MODEL_FOLDER)
        except UserError:
            shutil.rmtree(folder / MODEL_FOLDER)  # what is refused must not be pushed by mistake
            raise
    shutil.copytree(PROJECT / "captioning", folder / "captioning", ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copyfile(PROJECT / file, folder / file)
    pins = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    demo = (PROJECT / "requirements-demo.txt").read_text(encoding="utf-8").replace("-r requirements.txt\n", "")
    version = next(line.partition("==")[2] for line in demo.splitlines() if line.startswith("gradio=="))
    title = f"Captions by {Path(name).resolve().name if is_local else name}"
    models = "[]" if is_local else f"[{name}]"
    readme = README.format(title=title, quoted=json.dumps(title), version=version, models=models)
    given = [MODEL_FOLDER] if is_local else [name, *(["--revision", revision] if revision else [])]
    (folder / "requirements.txt").write_text(pins + demo, encoding="utf-8")
    (folder / "app.py").write_text(APP.format(model=json.dumps(given)), encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    print(f"Space: {folder} (run it with `python app.py` in there, or push it to the Hub)")
