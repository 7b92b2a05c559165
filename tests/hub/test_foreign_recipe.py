"""A recipe from the Hub opens nothing of the user's machine; a flag of the user may."""

import json
from pathlib import Path

import pytest
from processes import ROOT

from captioning.errors import UserError
from captioning.models.load import read_config
from captioning.training import recipe as recipes
from captioning.training.recipe import parse_arguments


ADDRESS = "hf://some/model/recipe.json"
START = {"model_name_or_path": "some/start", "dataset_name": "some/data"}


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Return a function that parses a recipe as if it came from the Hub, in a working folder of its own."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    (folder / "link").symlink_to("/nowhere")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(recipes, "download_recipe", lambda address: str(tmp_path / "recipe.json"))

    def parse(recipe: dict, *flags: str):
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        return parse_arguments([ADDRESS, "--output_dir", str(tmp_path / "out"), *flags])

    return parse


@pytest.mark.parametrize(
    "key", ["model_name_or_path", "config_name", "tokenizer_name", "dataset_name", "bertscore_model"]
)
@pytest.mark.parametrize(
    "value",
    ["/etc", "../a", "a/../../b", "~/scans", "file:///etc", "C:\\scans", "./mine", "a/b/c", "s3://a", "data", "link"],
)
def test_a_local_name_is_refused_with_its_key_and_the_flag(parse, key, value):
    start = {"config_name": "a/b", "dataset_name": "a/b"} if key in ("config_name", "tokenizer_name") else START
    with pytest.raises(UserError) as error:
        parse(start | {key: value})
    assert str(error.value).startswith(f"recipe '{ADDRESS}': {key} ")
    assert f"'{value}'" in str(error.value) and f"add --{key} " in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim_args", "file=/etc/passwd"),
        ("lr_scheduler_kwargs", {"a": ["~/x"]}),
        ("lr_scheduler_kwargs", '{"a": "../x"}'),
        ("accelerator_config", "accelerate.json"),
        ("dataset_revision", "../../x"),
    ],
)
def test_a_path_in_any_other_field_is_refused(parse, key, value):
    with pytest.raises(UserError, match=f"{key} is '.*, a local path, which a recipe from the Hub must not name"):
        parse(START | {key: value})


def test_what_is_on_the_hub_or_in_the_project_may_be_named(parse):
    hardware = {"device": "cpu", "processor": "Some w/ 2 GHz"}
    model, data, args = parse(START | {"prompt": "/ a/b: ", "hardware": hardware, "bertscore_model": "a/deberta"})
    named = (model.model_name_or_path, data.dataset_name, args.bertscore_model)
    assert named == ("some/start", "some/data", "a/deberta")
    name = "./recipes/configs/blip_small.json"
    model, data, _ = parse({"config_name": name, "dataset_name": "phantoms"})
    assert (model.config_name, data.dataset_name) == (name, "phantoms")
    Path("recipes/configs").mkdir(parents=True)
    Path(name).write_text("{}")
    model, *_ = parse({"config_name": name, "dataset_name": "phantoms"})
    assert model.config_name == str(ROOT / name), "not the file of the user"
    with pytest.raises(UserError, match="config_name is '"):
        parse({"config_name": "./recipes/configs/none.json", "dataset_name": "phantoms"})


@pytest.mark.parametrize("name", ["/a/data", "./data", "data", "recipes/configs/blip_small.json"])
def test_a_recipe_that_brings_its_config_opens_no_file_of_its_name(parse, name):
    if name.endswith(".json"):
        Path(Path(name).name).write_text("{}")
    model, *_ = parse({"config_name": name, "model_config": {"vision_config": {}}, "dataset_name": "phantoms"})
    assert Path(model.config_name).name == Path(name).name and not Path(model.config_name).exists()
    assert read_config(model.config_name, model.model_config) == {"vision_config": {}}


def test_a_flag_of_the_user_supplies_a_local_name(parse):
    recipe = {"config_name": "/a/config", "tokenizer_name": "/a/vocab", "dataset_name": "/a/scans"}
    model, data, _ = parse(recipe, "--model_name_or_path", "./mine", "--dataset_name=data")
    assert (model.model_name_or_path, model.config_name, data.dataset_name) == ("./mine", None, "data")
    model, *_ = parse(recipe, "--dataset_name", "data", "--config_name", "/b", "--tokenizer_name", "./vocab")
    assert (model.config_name, model.tokenizer_name) == ("/b", "./vocab")
