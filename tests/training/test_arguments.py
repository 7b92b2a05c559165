"""Recipes and flags: flags win, and a mistake is one line that names it."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from families import save_tiny
from helpers import flags, save_captioner
from processes import ROOT
from safetensors.torch import load_file
from transformers import GenerationConfig

import run_captioning
from captioning.errors import UserError
from captioning.models.load import build_captioner
from captioning.training import recipe as recipe_module
from captioning.training.arguments import FIXED_FIELDS, RANGES, CaptioningArguments
from captioning.training.recipe import (
    OTHER_NAMES,
    REPLACED_FIELDS,
    parse_arguments,
    parse_push_arguments,
    read_recipe,
    recipe_fields,
    resolved_recipe,
)


RECIPES = sorted((ROOT / "recipes").glob("*.json"))
MODEL = ["--model_name_or_path", "some/model"]
FAMILIES = {"blip2": "blip-2-opt", "qwen3_vl_4b": "qwen3_vl", "medgemma_4b": "gemma3", "llava": "llava"}
# The size of a short run; all else is the recipe's
SHORT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, max_train_samples=8)
SHORT |= dict.fromkeys(("learning_rate", "max_new_tokens", "vocab_size"))
SHORT |= {"preprocessing_num_workers": 1, "dataloader_num_workers": 0, "max_eval_samples": 3, "max_predict_samples": 3}


@pytest.fixture
def recipe(tmp_path):
    def write(content) -> str:
        path = tmp_path / "recipe.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


# --- The recipes of the repository ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    model_args, data_args, args = parse_arguments([str(path)])
    assert model_args.model_name_or_path or model_args.config_name
    for name, value in json.loads(path.read_text()).items():
        parsed = next(getattr(a, name) for a in (model_args, data_args, args) if hasattr(a, name))
        assert getattr(parsed, "value", parsed) == value, name


def test_the_table_of_recipes_has_them_all():
    table = (ROOT / "recipes" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.json)\)", table)) == {path.name for path in RECIPES}


def test_the_rocov2_recipes_differ_as_their_names_say():
    recipes = {path.stem: read_recipe(str(path)) for path in RECIPES}
    base = recipes["rocov2_blip_base"]
    assert (base["num_beams"], base["max_new_tokens"], base["lr_scheduler_type"]) == (3, 64, "linear")

    def changes(name):
        other = recipes[name]
        return {key: other.get(key) for key in base.keys() | other.keys() if other.get(key) != base.get(key)}

    assert changes("rocov2_blip_base_frozen_vision") == {"freeze_vision_model": True}
    longer = {"max_caption_length": 128, "max_new_tokens": 128, "no_repeat_ngram_size": 3}
    assert changes("rocov2_blip_base_long") == longer
    assert changes("rocov2_blip_large")["model_name_or_path"].endswith("large")
    assert changes("rocov2_blip_large_4gpu").keys() <= changes("rocov2_blip_large").keys()
    for name in recipes.keys() - {"quickstart", "quickstart_self_critical", "quickstart_concepts"}:
        sizes = recipes[name]["per_device_train_batch_size"], recipes[name]["gradient_accumulation_steps"]
        assert math.prod(sizes) * (4 if name.endswith("4gpu") else 1) == 32, name


@pytest.mark.parametrize("name", [f"{model}_lora" for model in (*FAMILIES, "blip_base")] + ["vit_gpt2"])
def test_a_recipe_trains_all_that_it_is_to_train(name, parquet_folder, tmp_path):
    recipe, model, run = ROOT / "recipes" / f"rocov2_{name}.json", tmp_path / "model", tmp_path / "run"
    if name == "blip_base_lora":
        save_captioner(build_captioner("recipes/configs/blip_small.json", 0, None, ["chest"] * 9, 200), model)
    else:
        save_tiny(FAMILIES.get(name.removesuffix("_lora"), "vit-gpt2"), model)
    run_captioning.main([str(recipe), *flags(None, parquet_folder, run, model_name_or_path=model, **SHORT)])
    if name.endswith("_lora"):  # the second matrix of an adapter is 0 until a gradient has reached it
        adapter = load_file(run / "adapter_model.safetensors")
        assert all(value.any() for value in adapter.values())
    else:
        before, after = (load_file(folder / "model.safetensors") for folder in (model, run))
        assert {key.split(".")[1] for key in before if after[key].equal(before[key])} == {"pooler"}  # it is not used


# --- Defaults and precedence ----------------------------------------------------------------------------------


def test_the_defaults_are_the_contract():
    _, data_args, args = parse_arguments(["--model_name_or_path", "Salesforce/blip-image-captioning-base"])
    assert data_args.dataset_name == "eltorio/ROCOv2-radiology"
    assert (args.do_train, args.do_eval, args.do_predict, args.predict_with_generate) == (True,) * 4
    assert (args.num_beams, args.max_new_tokens, args.lr_scheduler_type) == (3, 64, "linear")
    assert 0 < args.warmup_steps < 1 and args.optim.startswith("adamw")
    assert args.output_dir == "outputs/blip-image-captioning-base-ROCOv2-radiology"
    assert parse_arguments([*MODEL, "--dataset_name", "a/labels.csv"])[2].output_dir == "outputs/model-labels"


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    path = recipe({"model_name_or_path": "a/b", "num_beams": 5, "max_new_tokens": 20, "do_predict": False})
    model_args, _, args = parse_arguments([path, "--num_beams", "2", "--do-predict", "true"])
    assert model_args.model_name_or_path == "a/b"
    assert (args.num_beams, args.max_new_tokens, args.do_predict) == (2, 20, True)


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("--report_to=none", {"metric_for_best_model": "rougeL", "greater_is_better": True}),
        ("--do_eval=false", {"do_eval": False, "eval_strategy": "no", "load_best_model_at_end": False}),
        ("--predict_with_generate=false", {"metric_for_best_model": "loss", "greater_is_better": False}),
        ("--metric_for_best_model=perplexity", {"greater_is_better": False}),
        ("--save_strategy=no", {"load_best_model_at_end": False}),
    ],
)
def test_stages_that_are_off_switch_off_what_needs_them(flag, fields):
    args = parse_arguments([*MODEL, flag])[2]
    assert {name: getattr(args, name) for name in fields} == fields


def test_decode_settings_that_do_nothing_are_left_out():
    args = parse_arguments([*MODEL, "--num_beams", "1", "--length_penalty", "2"])[2]
    settings = {"num_beams": 1, "max_new_tokens": 64, "do_sample": False}
    assert args.decoding() == GenerationConfig(**settings)
    changed = {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "min_new_tokens": 4}
    flags = [f"--{name}={value}" for name, value in changed.items()]
    assert parse_arguments([*MODEL, *flags])[2].decoding() == GenerationConfig(**settings | changed)


# --- Mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_beam": 3}, "unknown key 'num_beam'; did you mean 'num_beams'"),
        ({"zzz": 3}, "unknown key 'zzz'$"),
        ({"num_beams": "3"}, "'num_beams' is \"3\", which is not of type int"),
        ({"num_beams": True}, "'num_beams' is true, which is not of type int"),
        ({"learning_rate": "1e-5"}, "'learning_rate' is \"1e-5\", which is not of type float"),
        ({"do_train": "yes"}, "which is not of type bool"),
        ({"max_train_samples": [1]}, "which is not of type int or null"),
        ({"seed": None}, "'seed' is null, which is not of type int"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "must be one JSON object"),
        ('{"seed": 1, "seed": 2}', "key 'seed' occurs twice"),
        ('{"lr_scheduler_kwargs": {"a": 1, "a": 2}}', "key 'a' occurs twice"),
        ('{"lr_scheduler_kwargs": {"a": NaN}}', "not JSON compliant"),
    ],
)
def test_a_bad_recipe_is_named_with_its_key(recipe, content, message):
    path = recipe(content)
    with pytest.raises(UserError, match=message) as error:
        parse_arguments([path])
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named():
    with pytest.raises(UserError, match=r"recipe 'recipes/nowhere\.json' cannot be read: .*No such file"):
        parse_arguments(["recipes/nowhere.json"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --model_name_or_path"),
        ([*MODEL, "--config_name", "x"], "give either --model_name_or_path"),
        ([*MODEL, "--num_beam", "3"], "unknown flag '--num_beam'; did you mean '--num_beams'"),
        ([*MODEL, "stray"], "'stray' is not a flag"),
        ([*MODEL, "--num_beams", "three"], "invalid int value: 'three'"),
        ([*MODEL, "--num_beams", "0"], "num_beams is 0; set --num_beams from 1 to 256"),
        ([*MODEL, "--min_new_tokens", "9", "--max_new_tokens", "8"], "min_new_tokens 9 exceeds max_new_tokens 8"),
        ([*MODEL, "--max_rejected_fraction", "2"], "set --max_rejected_fraction from 0 to 1"),
        ([*MODEL, "--tokenizer_name", "x"], "tokenizer_name goes with config_name"),
        ([*MODEL, "--eval_strategy", "sometimes"], "sometimes"),
        ([*MODEL, "--eval_strategy", "steps"], "load_best_model_at_end requires the save and eval strategy to match"),
        ([*MODEL, "--metric_for_best_model", "rougel"], "'rougel' is not measured; did you mean 'rougeL'"),
        ([*MODEL, "--metric_for_best_model", "bleu"], "there are loss, perplexity"),
        ([*MODEL, "--learning_rate", "nan"], "learning_rate is nan"),
        ([*MODEL, "--max_grad_norm", "inf"], "max_grad_norm is inf; set --max_grad_norm to 0 to clip nothing"),
        ([*MODEL, "--adam_epsilon", "nan"], "adam_epsilon is nan; set --adam_epsilon to a finite number"),
        ([*MODEL, "--seed", str(10**30)], "set --seed from 0 to 4294967295"),
        ([*MODEL, "--length_penalty", "nan"], "length_penalty is nan"),
        ([*MODEL, "--train_sampling_strategy", "group_by_length"], "invalid choice: 'group_by_length'"),
        ([*MODEL, "--dataloader_drop_last", "true"], "drop rows of the evaluation"),
        ([*MODEL, "--remove_unused_columns", "true"], "remove_unused_columns must stay false"),
        ([*MODEL, "--gradient_checkpointing_kwargs", '{"reentrant": 0}'], "Unexpected keyword.*reentrant"),
        ([*MODEL, "--length_penalty", "1e308"], "length_penalty is 1e\\+308; set --length_penalty from -100 to 100"),
        ([*MODEL, "--dataloader_persistent_workers", "true"], "dataloader_persistent_workers needs workers"),
    ],
)
def test_a_bad_flag_is_named_with_its_mend(flags, message):
    with pytest.raises(UserError, match=message) as error:
        parse_arguments(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RANGES)
def test_a_number_below_its_range_is_named(name):
    with pytest.raises(UserError, match=f"^{name} is -?[0-9.]+; set --{name} "):
        parse_arguments([*MODEL, "--use_peft", f"--{name}={RANGES[name][0] - 1}"])


@pytest.mark.parametrize("name", REPLACED_FIELDS)
def test_trainer_fields_that_would_mislead_are_refused(recipe, name):
    """T5, T7, T15: each would be ignored, be wrong for BLIP, or end in clear text in `training_args.bin`.

    Every value is refused, also those that mean "no" or "none", and before it is read.
    """
    said = re.escape(f"{name} is not used here; {REPLACED_FIELDS[name]}")
    for value in ("hf_secret", "none", "{}", "", 0, 0.1, None):
        flag = [f"--{name}", *([] if value is None else [str(value)])]
        for argv in ([*MODEL, *flag], [recipe({name: value}), *MODEL]):
            with pytest.raises(UserError, match=said) as error:
                parse_arguments(argv)
            assert "hf_secret" not in str(error.value)


def test_no_hint_leads_to_a_field_that_is_refused(recipe):
    for name in ("token", "generation_beams", "fsdp_conf"):
        for argv in ([*MODEL, f"--{name}", "x"], [recipe({name: 1}), *MODEL]):
            with pytest.raises(UserError, match="unknown") as error:
                parse_arguments(argv)
            assert not any(f"'{dash}{field}'" in str(error.value) for field in REPLACED_FIELDS for dash in ("", "--"))


def test_a_field_that_is_fixed_is_refused_at_every_other_value(recipe):
    for name, (needed, _) in FIXED_FIELDS.items():
        for argv in ([recipe({name: not needed}), *MODEL], [*MODEL, f"--{name}={int(not needed)}"]):
            with pytest.raises(UserError, match=f"{name} must stay"):
                parse_arguments(argv)
        assert getattr(parse_arguments([recipe({name: needed}), *MODEL, f"--{name}", str(needed)])[2], name) is needed


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("Learning-Rate", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("output", "output_dir"),
        ("output-folder", "output_dir"),
        ("model", "model_name_or_path"),
        ("data", "dataset_name"),
        ("text_column", "caption_column"),
        ("grad_accum", "gradient_accumulation_steps"),
        ("val_split", "validation_fraction"),
        ("e", "num_train_epochs"),
    ],
)
def test_names_of_other_programs_lead_to_the_field(recipe, name, field):
    with pytest.raises(UserError, match=f"unknown flag '--{name}'; did you mean '--{field}'"):
        parse_arguments([*MODEL, f"--{name}", "1"])
    with pytest.raises(UserError, match=f"unknown key '{name}'; did you mean '{field}'"):
        parse_arguments([recipe({name: 1}), *MODEL])


def test_the_names_of_other_programs_are_no_fields_and_lead_to_one():
    known = recipe_fields()
    others = [other for others in OTHER_NAMES.values() for other in others.split()]
    assert len(set(others)) == len(others)
    assert set(OTHER_NAMES) <= known.keys()
    assert not set(others) & {re.sub("[-_]", "", name) for name in known}
    with pytest.raises(UserError, match=r"unknown flag '--lr'$"):  # not a flag of a push
        parse_push_arguments(["--push_only", "x", "--lr", "1"])


@pytest.mark.parametrize(
    "name", ["hub_private_repo", "do_train", "greater_is_better", "streaming", "ddp_find_unused_parameters"]
)
def test_a_boolean_flag_is_true_by_itself(name):
    for words, value in (([f"--{name}"], True), ([f"--{name}", "true"], True), ([f"--{name}=false"], False)):
        parsed = parse_arguments([*MODEL, *words, "--seed", "3"])
        assert next(getattr(part, name) for part in parsed if hasattr(part, name)) is value
    assert parse_push_arguments(["--push_only", "x", "--hub_private_repo"]).hub_private_repo is True


# --- Write back -----------------------------------------------------------------------------------------------


def test_the_resolved_recipe_is_a_recipe_of_the_same_run(recipe, tmp_path):
    flags = ["--num_beams", "4", "--prompt", "a picture of", "--weight_decay", "0.1", "--dataloader_num_workers", "2"]
    first = parse_arguments([*MODEL, *flags])
    written = resolved_recipe(*first)
    again = parse_arguments([recipe(written), "--output_dir", str(tmp_path)])
    assert resolved_recipe(*again) == written
    assert {"num_beams": 4, "dataloader_num_workers": 2, "seed": 42}.items() <= written.items()
    assert written["package_versions"]["transformers"]


def test_the_resolved_recipe_holds_no_place_and_no_secret():
    written = resolved_recipe(*parse_arguments([*MODEL, "--output_dir", "/tmp/secret-place"]))
    assert not {"output_dir", "resume_from_checkpoint", "hub_token", "local_rank"} & written.keys()
    assert "secret-place" not in json.dumps(written)


def test_a_flag_makes_void_what_it_replaces(recipe):
    """Also with dashes, which the parser takes: the revision of one model means nothing for another."""
    model = {"model_name_or_path": "a/b", "model_revision": "0" * 40}
    path = recipe(model | {"dataset_name": "c/d", "dataset_revision": "v1"})
    for flag in ("--model_name_or_path", "--model-name-or-path"):
        model_args, data_args, _ = parse_arguments([path, flag, "e/f"])
        assert (model_args.model_name_or_path, model_args.model_revision) == ("e/f", "main")
        assert data_args.dataset_revision == "v1"
    assert parse_arguments([path, "--dataset_name", "phantoms"])[1].dataset_revision is None
    model_args, _, _ = parse_arguments([path, "--config_name", "recipes/configs/blip_small.json"])
    assert (model_args.model_name_or_path, model_args.model_revision) == (None, "main")


# --- What the machine decides ---------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes the tests' machine one with or without GPUs, whatever it is."""

    def be(gpus: int, has_bf16: bool = True) -> None:
        def devices(args) -> torch.device:
            args._n_gpu, args.distributed_state = 0 if args.use_cpu else gpus, None
            return torch.device("cuda" if args._n_gpu else "cpu")

        monkeypatch.setattr(CaptioningArguments, "_setup_devices", property(devices))
        for module in (torch.cuda, torch.accelerator):
            monkeypatch.setattr(module, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpus > 0 and has_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")

    return be


@pytest.mark.parametrize(
    ("gpus", "has_bf16", "flags", "bf16", "pinned"),
    [
        (0, False, [], False, False),
        (1, True, [], True, True),
        (1, False, [], False, True),
        (1, True, ["--use_cpu"], False, False),
        (1, True, ["--fp16"], False, True),
        (1, True, ["--bf16", "false"], False, True),
        (1, True, ["--dataloader_pin_memory", "false"], True, False),
    ],
)
def test_precision_and_pinned_memory_follow_the_machine(machine, gpus, has_bf16, flags, bf16, pinned):
    machine(gpus, has_bf16)
    _, _, args = parse_arguments([*MODEL, *flags])
    assert (args.bf16, args.dataloader_pin_memory) == (bf16, pinned)


def test_several_gpus_in_one_process_are_refused(machine):
    machine(2)
    with pytest.raises(UserError, match=r"would use 2 GPUs by DataParallel.*torchrun --nproc_per_node"):
        parse_arguments(MODEL)
    assert parse_arguments([*MODEL, "--use_cpu"])[2].n_gpu == 0


@pytest.mark.parametrize(("gpus", "processes", "use_cpu"), [(0, 2, True), (0, 1, False), (1, 2, False)])
def test_several_processes_without_gpus_train_on_the_cpu(machine, monkeypatch, gpus, processes, use_cpu):
    """Else accelerate starts no process group, and each process trains on its own."""
    machine(gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert parse_arguments(MODEL)[2].use_cpu is use_cpu


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "NVIDIA H100")])
def test_the_hardware_of_the_run_is_written_into_its_recipe(machine, gpus, device):
    machine(gpus)
    assert resolved_recipe(*parse_arguments(MODEL))["hardware"]["device"] == device


def test_the_processor_is_named_where_linux_names_it_and_elsewhere(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "cpu\t: 0\nmodel name\t: Some CPU\n")
    assert recipe_module._processor_name() == "Some CPU"
    monkeypatch.setattr(Path, "read_text", lambda self: os.stat("/no/such/file"))
    monkeypatch.setattr(recipe_module.platform, "processor", lambda: "arm")
    assert recipe_module._processor_name() == "arm"
