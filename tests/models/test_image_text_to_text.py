"""Other families than BLIP, each on a tiny model: what stock computes, and what the trainer makes of it.

What is stock's is `stock_inputs`: the processor is called with a prompt and one image, tokens of a caption are put
behind it, and nothing of `Captioner` is asked.
"""

import copy
import json

import pytest
import torch
from datasets import DatasetDict
from families import FAMILIES, save_tiny, stock_inputs, stock_tokens
from helpers import (
    change,
    flags,
    kill_and_resume,
    losses,
    make_noise,
    make_rows,
    one_step,
    outcome,
    output_of_card,
    predictions,
    read_json,
    run,
    run_ranks,
    score_flags,
    tokenized,
)
from transformers import AutoModelForImageTextToText, AutoTokenizer, BertTokenizer, GenerationConfig

import run_captioning
from captioning.data.images import open_image
from captioning.errors import UserError
from captioning.models.load import load_captioner


BEAMS = GenerationConfig(num_beams=3, max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def captioner(checkpoint):
    return load_captioner(str(checkpoint))


@pytest.fixture
def splits(checked, captioner) -> DatasetDict:
    return tokenized(checked, captioner, 40)


def prompt_of(captioner):
    return (captioner.prompt_arguments.get("text") or [""])[0]


def spaced(captioner, caption):
    """A caption as it follows the prompt: after a word with a space, after a line break without."""
    text = prompt_of(captioner)
    ends = captioner.config.is_encoder_decoder or captioner.prompt == "caption en" or text == "<s>"
    return caption if ends or not text[-1:].strip() else f" {caption}"


def generate(captioner, images, captions=None):
    rows = captioner.tokenize(captions, 40)[0] if captions else [[]] * len(images)
    captioner.model.eval()
    encoded = captioner.encode_images(captioner.collate(images, rows))
    return [captioner.without_padding(row).tolist() for row in captioner.generate(encoded, BEAMS).numpy()]


def test_the_evaluation_loss_is_that_of_stock_whatever_the_batch_size(make_trainer, captioner, splits):
    total, number, model = 0.0, 0, captioner.model.eval()
    for row in splits["validation"]:
        ids = captioner.tokenizer(spaced(captioner, row["caption"]), add_special_tokens=False)["input_ids"]
        ids.append(captioner.end_token_id)
        inputs = stock_inputs(captioner, open_image(row["image"]), prompt_of(captioner), ids)
        with torch.no_grad():
            targets = int((inputs["labels"] != -100).sum())
            total, number = total + float(model(**inputs).loss) * targets, number + targets
    for batch_size in (1, 4):
        trainer = make_trainer(captioner=captioner, splits=splits, per_device_eval_batch_size=batch_size)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / number, rel=1e-6)


def test_loss_and_gradients_do_not_depend_on_accumulation(make_trainer, captioner, splits):
    whole, *parts = (one_step(make_trainer, captioner, *sizes, splits=splits) for sizes in ((8, 1), (4, 2), (2, 4)))
    norm = torch.stack([gradient.norm() for gradient in whole[1].values()]).norm()
    for loss, gradients in parts:
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert gradients.keys() == whole[1].keys()
        difference = torch.stack([(gradients[name] - whole[1][name]).norm() for name in gradients]).norm()
        assert difference < 1e-5 * norm


def test_the_training_loss_is_smoothed_if_the_run_says_so(captioner, images):
    captions = ["An effusion", "A small nodule", "No abnormality at all"]
    batch = captioner.collate(images, captioner.tokenize(captions, 40)[0])
    captioner.model.eval()
    logits = captioner.model(**batch).logits
    stock = captioner.model(**batch).loss
    torch.testing.assert_close(captioner.forward(captioner.model, batch).loss, stock, rtol=1e-6, atol=1e-6)
    captioner.adapt(label_smoothing=0.1)
    labels = batch["labels"]
    if not captioner.config.is_encoder_decoder:
        logits, labels = logits[:, :-1][:, 1 - labels.shape[1] :], labels[:, 1:]  # GIT's begin with those of the image
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(captioner.forward(captioner.model, batch).loss, expected, rtol=1e-6, atol=1e-6)


def test_predictions_are_those_of_stock_generate_and_do_not_see_the_references(captioner, images):
    predicted = generate(captioner, images, ["An effusion", "A small nodule in the right upper lobe", "Normal"])
    for image, tokens in zip(images, predicted, strict=True):
        stock = stock_tokens(captioner, captioner.model, image, prompt_of(captioner), num_beams=3, max_new_tokens=8)
        assert captioner.without_padding(stock.numpy()).tolist() == tokens
    assert generate(captioner, images, ["Chest", "B", "A CT of the abdomen and of the pelvis"]) == predicted


def test_another_image_gives_other_logits(captioner, images):
    rows = captioner.tokenize(["An effusion"] * 2, 40)[0]
    nll = []
    captioner.model.eval()
    for pair in ((images[0], images[0]), (images[0], images[1])):
        batch = captioner.collate(pair, rows)
        with torch.no_grad():
            encoded = captioner.encode_images(batch)
            nll.append(captioner.caption_nll(encoded, batch))
            features = captioner.image_features(captioner.encode_images(batch))
        torch.testing.assert_close(captioner.image_features(encoded), features)
        assert torch.equal(features[0], features[1]) == (pair[0] is pair[1])
    assert nll[0][0] == pytest.approx(float(nll[0][1]), rel=1e-6)
    assert abs(float(nll[1][0] - nll[1][1])) > 1e-3


def test_two_captions_are_learned_saved_and_repeated_by_stock(make_trainer, checked, captioner, tmp_path):
    rows, first = make_rows(2), checked["train"].select(range(2))
    two = tokenized(DatasetDict(train=first, validation=first), captioner, 40)
    values = dict(max_steps=80, learning_rate=1e-2, weight_decay=0.0, lr_scheduler_type="constant")
    values |= dict(per_device_train_batch_size=2, max_new_tokens=40, num_beams=1)
    trainer = make_trainer(captioner=captioner, splits=two, save_strategy="no", eval_strategy="no", **values)
    trainer.train()
    found = trainer.predict(two["validation"]).predictions
    assert found.captions == [caption.strip() for caption in rows["caption"]]
    captioner.set_generation_config(trainer.generation_config)
    trainer.save_model()
    folder = trainer.args.output_dir
    again = load_captioner(folder)
    assert generate(again, rows["image"]) == generate(captioner, rows["image"])
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for image, caption in zip(rows["image"], found.captions, strict=True):
        tokens = stock_tokens(again, stock, image, prompt_of(again), num_beams=1, max_new_tokens=40)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption


def test_a_resumed_training_ends_with_the_same_weights(make_trainer, captioner, splits):
    short = dict(per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-3, predict_with_generate=False)
    start = copy.deepcopy(captioner)
    trainer = make_trainer(captioner=captioner, splits=splits, **short)
    trainer.train()
    first = f"{trainer.args.output_dir}/checkpoint-3"
    make_trainer(captioner=start, splits=splits, **short).train(resume_from_checkpoint=first)
    expected = captioner.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in start.model.state_dict().items())


@pytest.fixture(scope="module", params=["qwen3_vl", "blip-2-t5", "llava"])
def tiny(request, tmp_path_factory):
    """Images of several sizes in one batch; an encoder-decoder; weights that no loss depends on."""
    return save_tiny(request.param, tmp_path_factory.mktemp("start") / request.param)


def train_flags(tiny, data, folder, **values):
    return flags(None, data, folder, model_name_or_path=tiny, vocab_size=None, logging_steps=1, **values)


@pytest.fixture(scope="module")
def trained(tiny, parquet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(train_flags(tiny, parquet_folder, folder))
    return folder


def test_a_run_has_scores_a_page_a_card_and_a_recipe_that_repeats_it(trained, parquet_folder, tmp_path):
    scores, card = read_json(trained / "scores.json")["test"], (trained / "README.md").read_text()
    assert scores["scores"]["rougeL"]["baselines"]["nearest_image"] is not None, "it needs features of the images"
    page = (trained / "report.html").read_text()
    assert '"attention":{}' in page.replace(" ", "") and "this model gives none" in page
    assert f"A {read_json(trained / 'config.json')['model_type']} model that writes" in card and "BLIP " not in card
    run_captioning.main([str(trained / "recipe.json"), "--output_dir", str(tmp_path / "again")])
    assert outcome(tmp_path / "again") == outcome(trained)
    scored = run_captioning.main(score_flags(trained, parquet_folder, tmp_path / "check"))
    assert scored["predict_loss"] == read_json(trained / "all_results.json")["predict_loss"]
    assert predictions(tmp_path / "check") == predictions(trained)


def test_the_code_of_its_card_repeats_the_caption_of_the_sample(trained, monkeypatch, capsys):
    if read_json(trained / "config.json")["model_type"] == "qwen3_vl":
        pytest.skip("stock's processor of this family needs torchvision, which is not there for this PyTorch")
    assert output_of_card(trained, monkeypatch, capsys) == read_json(trained / "sample.json")["caption"]


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_weights_and_two_processes_train_as_one(
    tiny, trained, parquet_folder, tmp_path
):
    kill_and_resume(train_flags(tiny, parquet_folder, tmp_path / "killed"), tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(trained)
    run_ranks(2, train_flags(tiny, parquet_folder, tmp_path / "two", per_device_train_batch_size=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-4)


def test_what_does_not_fit_is_one_line(captioner):
    with pytest.raises(UserError, match="leaves no room for a caption"):
        captioner.tokenize(["x"], 1)
    if "t5" not in str(captioner.config.get_text_config()):
        reason = r"max_new_tokens 9000 after \d+ tokens .* positions; set --max_new_tokens to \d+"
        with pytest.raises(UserError, match=reason):
            captioner.check_lengths(40, 9000)
    if captioner.family.image_size is None:
        with pytest.raises(UserError, match=r"takes images of .* leave out --image_size"):
            captioner.adapt(image_size=48)
    if not captioner.family.takes_prompt:
        with pytest.raises(UserError, match="takes no prompt; leave out --prompt"):
            captioner.set_prompt("Describe.")
    for token in captioner._image_tokens():
        with pytest.raises(UserError, match=r"holds '.*', which is put there anyway; leave it out"):
            captioner.set_prompt(f"{token} Describe.")


def test_an_old_processor_of_blip2_gets_its_image_tokens(tmp_path):
    """T19: without them it would write captions without having seen the image."""
    save_tiny("blip-2-opt", tmp_path)
    change(tmp_path / "processor_config.json", num_query_tokens=None)
    change(tmp_path / "config.json", image_token_index=None, image_token_id=None)
    captioner = load_captioner(str(tmp_path))
    ids = captioner.collate([make_noise(0)], [[]])["input_ids"][0]
    assert int((ids == captioner.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 4
    captioner.processor.num_query_tokens = 0
    with pytest.raises(UserError, match="has no place for the image"):
        captioner.set_prompt("Describe.")


def test_a_decoder_without_an_end_token_of_its_own_ends_by_that_of_bert(tmp_path):
    save_tiny("vit-gpt2", tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
    for path in [*tmp_path.glob("*token*"), tmp_path / "generation_config.json"]:
        path.unlink()
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path)
    none = dict.fromkeys(("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"))
    change(tmp_path / "config.json", **none, decoder=read_json(tmp_path / "config.json")["decoder"] | none)
    captioner = load_captioner(str(tmp_path))
    assert captioner.end_token_ids == [3] and captioner.tokenize(["ab"], 40)[0] == [[5, 6, 3]]
    assert captioner.config.decoder_start_token_id == 2
    assert len(generate(captioner, [make_noise(0)])) == 1


def test_an_old_checkpoint_without_a_processor_config_is_completed_or_refused(tmp_path):
    for family in ("llava", "llava_onevision"):
        folder = save_tiny(family, tmp_path / family)
        content = read_json(folder / "processor_config.json")
        (folder / "processor_config.json").unlink()
        images = content["image_processor"] | {"processor_class": content["processor_class"]}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    captioner = load_captioner(str(tmp_path / "llava"))
    assert len(generate(captioner, [make_noise(0)])) == 1, "as many image tokens as features"
    with pytest.raises(UserError, match=r"its processor makes no prompt: .*; it needs a whole processor_config.json"):
        load_captioner(str(tmp_path / "llava_onevision"))
    (tmp_path / "llava/chat_template.jinja").write_text("{{ messages[0].role + messages[0].content }}")
    with pytest.raises(UserError, match=r"its processor makes no prompt: .*; it needs .* a chat template of images"):
        load_captioner(str(tmp_path / "llava"))
