"""Low-rank adapters: what learns, what is saved, and that stock peft does the same with it."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, save_tiny
from helpers import (
    change,
    flags,
    kill_and_resume,
    losses,
    make_noise,
    outcome,
    output_of_card,
    predictions,
    read_json,
    run,
    run_ranks,
    save_captioner,
    score_flags,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BlipForConditionalGeneration

import run_captioning
from captioning.errors import UserError
from captioning.models.load import load_captioner
from captioning.models.lora import add_lora
from captioning.models.surface_form import SurfaceForm
from captioning.training.checkpoints import checkpoint_fault


@pytest.fixture(scope="module")
def blip(tiny_captioner, tmp_path_factory):
    return save_captioner(tiny_captioner, tmp_path_factory.mktemp("blip") / "blip")


def lora_flags(model, data, folder, **values):
    adapts = {"use_peft": True, "lora_dropout": 0.1} if values.get("use_peft", True) else {}
    values = {"model_name_or_path": model, "learning_rate": 3e-2} | adapts | values
    return flags(None, data, folder, **values, vocab_size=None)


@pytest.fixture(scope="module")
def adapted(blip, parquet_folder, tmp_path_factory):
    """The output folder of a run that has learned an adapter of a tiny BLIP."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    run_captioning.main(lora_flags(blip, parquet_folder, folder))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_of_the_text_model_learn_by_default(family, tmp_path):
    captioner = load_captioner(str(save_tiny(family, tmp_path)))
    vision, text = captioner.vision_model, captioner.text_model
    add_lora(captioner, str(tmp_path), None)
    learning = {name for name, value in captioner.model.named_parameters() if value.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    adapted = {module for module in captioner.model.modules() if isinstance(module, BaseTunerLayer)}
    assert adapted <= set(text.modules()) and not adapted & set(vision.modules())
    assert captioner.model.get_output_embeddings() not in adapted
    attended = [name for name, module in captioner.model.named_modules() if module in adapted]
    assert len(attended) >= 2 * 4, "attention and MLP of both layers"
    batch = captioner.collate([make_noise(0)], captioner.tokenize(["An effusion"], 40)[0])
    captioner.forward(captioner.model, batch).loss.backward()
    assert all(value.grad is not None for value in captioner.model.parameters() if value.requires_grad)


def test_a_run_saves_the_adapter_alone_and_stock_peft_captions_with_it_as_the_run_did(blip, adapted, raw_dataset):
    assert not list(adapted.glob("model*.safetensors")) and not (adapted / "adapter").exists()
    for folder in (adapted, *adapted.glob("checkpoint-*")):
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
        assert (folder / "base_config.json").is_file()
    for checkpoint in adapted.glob("checkpoint-*"):
        assert checkpoint_fault(checkpoint) is None and not (checkpoint / "README.md").exists()
    processor, base = load_captioner(str(blip)).processor, BlipForConditionalGeneration.from_pretrained(blip)
    rows, form = predictions(adapted), SurfaceForm.load(str(adapted))
    assert len({row["prediction"] for row in rows}) > 1
    for model in (PeftModel.from_pretrained(base, adapted), AutoModelForImageTextToText.from_pretrained(adapted)):
        model.eval()
        for row, example in zip(rows, raw_dataset["test"], strict=True):
            inputs = processor(images=example["image"], return_tensors="pt")
            tokens = model.generate(**inputs, num_beams=3, max_new_tokens=12)
            assert form.restore(processor.decode(tokens[0], skip_special_tokens=True).strip()) == row["prediction"]


def test_an_adapter_is_scored_alone_as_at_the_end_of_its_training(adapted, parquet_folder, tmp_path):
    scored = run_captioning.main(score_flags(adapted, parquet_folder, tmp_path))
    assert predictions(tmp_path) == predictions(adapted)
    assert scored["predict_loss"] == read_json(adapted / "all_results.json")["predict_loss"]


def test_the_card_is_that_of_an_adapter_and_its_code_runs(blip, adapted, monkeypatch, capsys):
    card = (adapted / "README.md").read_text()
    for fact in ("library_name: peft", "- lora", "a low-rank adapter of", "million in the adapter", "peft\n"):
        assert fact in card
    printed = output_of_card(adapted, monkeypatch, capsys, blip=str(blip))
    assert printed == read_json(adapted / "sample.json")["decoded"]


def test_merged_it_is_a_plain_model_and_the_adapter_lies_beside_it(blip, adapted, parquet_folder, tmp_path):
    folder = tmp_path / "run"
    run_captioning.main(lora_flags(blip, parquet_folder, folder, merge_lora=True))
    assert not [name for name in ("adapter_config.json", "base_config.json") if (folder / name).exists()]
    found, start = load_file(folder / "model.safetensors"), load_file(blip / "model.safetensors")
    assert found.keys() == start.keys(), "plain BLIP"
    changed = {name for name in found if not torch.equal(found[name], start[name])}
    assert changed and all("text_decoder.bert.encoder" in name for name in changed)
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (folder / "adapter", adapted))
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert [row["prediction"] for row in predictions(folder)] == [row["prediction"] for row in predictions(adapted)]
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert (folder / "adapter/surface_form.json").read_bytes() == (folder / "surface_form.json").read_bytes()


def test_a_killed_training_is_resumed_to_the_same_adapter(blip, adapted, parquet_folder, tmp_path):
    kill_and_resume(lora_flags(blip, parquet_folder, tmp_path / "run"), tmp_path / "run")
    weights = "adapter_model.safetensors"
    assert outcome(tmp_path / "run", weights) == outcome(adapted, weights)


@pytest.mark.slow
def test_other_ways_to_save_memory(blip, parquet_folder, tmp_path):
    weights = []
    for number, options in enumerate(({}, {"gradient_checkpointing": True}, {"torch_dtype": "bfloat16"})):
        folder = tmp_path / str(number)
        run_captioning.main(lora_flags(blip, parquet_folder, folder, lora_dropout=0.0, max_steps=4, **options))
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert {value.dtype for value in weights[2].values()} == {torch.float32}, "what learns is not rounded"
    assert all(torch.allclose(value, weights[1][name], atol=1e-5) for name, value in weights[0].items())


@pytest.mark.slow
def test_two_processes_learn_the_adapter_that_one_does(blip, parquet_folder, tmp_path):
    common = {"lora_dropout": 0.0, "num_train_epochs": 1, "logging_steps": 1, "learning_rate": 1e-3}
    run(lora_flags(blip, parquet_folder, tmp_path / "one", **common))
    run_ranks(2, lora_flags(blip, parquet_folder, tmp_path / "two", per_device_train_batch_size=2, **common))
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"lora_target_modules": "nothing"}, r"LoRA cannot be added: .*nothing.*; set --lora_target_modules to names"),
        ({"lora_target_modules": "decoder"}, "'text_decoder.cls.predictions.decoder', whose weight is also"),
        ({"lora_target_modules": "word_embeddings"}, "word_embeddings', whose weight is also that of another"),
        ({"image_size": 40}, "image_size 40 changes weights that an adapter does not hold; leave it out"),
        ({"use_peft": False, "merge_lora": True}, "merge_lora goes with use_peft"),
        ({"use_peft": False, "lora_r": 8}, "lora_r goes with use_peft, without which all weights learn"),
        ({"use_peft": False, "torch_dtype": "bfloat16"}, "torch_dtype bfloat16 is for weights that do not learn"),
        ({"torch_dtype": "float8"}, "invalid choice: 'float8'"),
        ({"lora_r": 0}, "lora_r is 0; set --lora_r from 1 to 4096"),
        ({"gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "use_reentrant must be false with use_peft"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_one_line(blip, parquet_folder, tmp_path, wrong, reason):
    with pytest.raises(UserError, match=reason):
        run_captioning.main(lora_flags(blip, parquet_folder, tmp_path / "run", **wrong))


def test_an_adapter_is_not_adapted_again_but_merged_and_trained(adapted, parquet_folder, tmp_path):
    with pytest.raises(UserError, match=r"is an adapter, and one of it could not be loaded; train it with --merge"):
        run_captioning.main(lora_flags(adapted, parquet_folder, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    run_captioning.main(lora_flags(adapted, parquet_folder, tmp_path / "run", use_peft=False, max_steps=1))
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_damaged_or_foreign_adapter_is_one_line(adapted, parquet_folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(UserError, match=r"adapter_config.json names no model: .*; set base_model_name_or_path in it"):
        load_captioner(str(tmp_path))
    broken = shutil.copytree(adapted, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"adapter '.*broken' cannot be loaded: .*; it must be one of this model"):
        load_captioner(str(broken))
    change(broken / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"model '.*gone', which '.*broken' adapts, cannot be loaded"):
        load_captioner(str(broken))


def test_the_decode_settings_of_the_start_reach_neither_an_adapter_nor_a_merged_model(
    parquet_folder, tmp_path, monkeypatch, capsys
):
    """It samples, and penalizes repetitions, as Qwen2.5-VL does."""
    sampling = save_tiny("llava", tmp_path / "llava")
    own = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 5.0, "eos_token_id": 2, "pad_token_id": 0}
    (sampling / "generation_config.json").write_text(json.dumps(own))
    for name, values in {"adapted": {}, "merged": {"merge_lora": True}, "start": {"do_train": False}}.items():
        run_captioning.main(lora_flags(sampling, parquet_folder, tmp_path / name, max_steps=1, **values))
    run_captioning.main(score_flags(tmp_path / "merged", parquet_folder, tmp_path / "scored"))
    adapted, merged, scored = (
        [row["prediction"] for row in predictions(tmp_path / name)] for name in ("adapted", "merged", "scored")
    )
    assert adapted == merged == scored
    for name in ("adapted", "merged"):
        settings = read_json(tmp_path / name / "generation_config.json")
        assert settings["num_beams"] == 3 and not settings["do_sample"] and "repetition_penalty" not in settings
    for name in ("adapted", "start"):
        printed = output_of_card(tmp_path / name, monkeypatch, capsys, llava=str(sampling))
        assert printed == read_json(tmp_path / name / "sample.json")["caption"]


@pytest.mark.parametrize("family", ["git", "llava"])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(family, tmp_path):
    captioner = load_captioner(str(save_tiny(family, tmp_path)))
    add_lora(captioner, str(tmp_path), None, dropout=0.0)
    batch = captioner.collate([make_noise(0)], captioner.tokenize(["An effusion"], 40)[0])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            captioner.model.activation_checkpointing_enable()
            captioner.model.train()
        captioner.model.zero_grad()
        captioner.forward(captioner.model, batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in captioner.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


def test_each_target_names_a_layer_and_a_head_that_is_not_tied_can_be_one(tmp_path):
    folder = save_tiny("llava", tmp_path)
    with pytest.raises(UserError, match=r"no layer is named 'v_porj'; correct or leave it out"):
        add_lora(load_captioner(str(folder)), str(folder), None, target_modules=["q_proj", "v_porj"])
    captioner = load_captioner(str(folder))
    assert not captioner.config.get_text_config().tie_word_embeddings
    add_lora(captioner, str(folder), None, target_modules=["q_proj", "lm_head"])
    assert isinstance(captioner.model.get_output_embeddings(), BaseTunerLayer)
