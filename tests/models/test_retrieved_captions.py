"""Captions of similar images in the prompt: what each family makes of them, in any batch, against stock.

The prompts are written out here; what is expected of them comes from `stock_inputs`.
"""

import re

import pytest
import torch
from families import FAMILIES, save_tiny, stock_inputs, stock_tokens
from helpers import make_noise
from transformers import GenerationConfig

from captioning.errors import UserError
from captioning.models.image_text_to_text import RETRIEVED_TOKENS
from captioning.models.load import load_captioner, refuse_retrieved


ASK = "Write a caption for this radiology image."
CHAT = "user: {}IMAGE" + ASK + "\nassistant:"
QWEN = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
# By family, the whole prompt; {} is the place of retrieved captions
PROMPTS = {
    "llava": "USER: {}<image>\n" + ASK + " ASSISTANT:",
    "llava_onevision": CHAT.replace("IMAGE", "<image>"),
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "gemma3": "<s>" + CHAT.replace("IMAGE", "<start_of_image>"),
    "idefics3": CHAT.replace("IMAGE", "<image>"),
    "smolvlm": CHAT.replace("IMAGE", "<image>"),
}
RETRIEVED = [["An effusion"], ["A large cyst at the left lower pole", "No abnormality", "Chest radiograph"], []]
WRITTEN = [
    "Captions of similar images:\n- An effusion\n",
    "Captions of similar images:\n- A large cyst at the left lower pole\n- No abnormality\n- Chest radiograph\n",
    "",
]
CAPTIONS = ["A nodule", "Renal ultrasound shows an effusion", "Normal"]
BEAMS = GenerationConfig(num_beams=3, max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module", params=PROMPTS)
def captioner(request, tmp_path_factory):
    captioner = load_captioner(str(save_tiny(request.param, tmp_path_factory.mktemp("tiny"))))
    captioner.model.eval()
    captioner.name = request.param
    return captioner


def batch_of(captioner, images, retrieved, captions=CAPTIONS):
    return captioner.collate(images, captioner.tokenize(captions, 40)[0], retrieved)


def test_each_row_is_read_as_stock_reads_it_alone_whatever_stands_in_the_other_prompts(captioner, images):
    with torch.no_grad():
        batch = batch_of(captioner, images, RETRIEVED)
        nll = captioner.caption_nll(captioner.encode_images(batch), batch)
        tokens = captioner.generate(captioner.encode_images(batch), BEAMS).numpy()
        features = captioner.image_features(captioner.encode_images(batch))
        for row, image in enumerate(images):
            own = slice(row, row + 1)
            alone = batch_of(captioner, images[own], RETRIEVED[own], CAPTIONS[own])
            for name in ("input_ids", "labels"):
                kept = batch["attention_mask"][row].bool()
                assert batch[name][row][kept].tolist() == alone[name][0].tolist()
            encoded = captioner.encode_images(alone)
            assert float(nll[row]) == pytest.approx(float(captioner.caption_nll(encoded, alone)), rel=1e-5)
            torch.testing.assert_close(features[own], captioner.image_features(encoded), rtol=1e-4, atol=1e-5)

            text = PROMPTS[captioner.name].format(WRITTEN[row])
            stock = stock_tokens(captioner, captioner.model, image, text, num_beams=3, max_new_tokens=8)
            found = (captioner.without_padding(found).tolist() for found in (tokens[row], stock.numpy()))
            assert next(found) == next(found)
            inputs = stock_inputs(captioner, image, text, captioner.tokenize(CAPTIONS[own], 40)[0][0])
            assert alone["input_ids"].tolist() == inputs["input_ids"].tolist()
            number = int((inputs["labels"] != -100).sum())
            assert float(nll[row]) == pytest.approx(float(captioner.model(**inputs).loss) * number, rel=1e-5)


def test_retrieved_captions_change_what_is_predicted(captioner, images):
    batches = [batch_of(captioner, images, retrieved) for retrieved in (RETRIEVED, RETRIEVED[::-1])]
    with torch.no_grad():
        one, other = (captioner.caption_nll(captioner.encode_images(batch), batch) for batch in batches)
    assert ((one - other).abs() > 1e-3).tolist() == [True, False, True]
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=0)


def test_samples_of_self_critical_training_are_scored_behind_the_same_prompts(captioner, images):
    batch = batch_of(captioner, images, RETRIEVED)
    rows = captioner.tokenize([*CAPTIONS, "B", "C c", "D"], 40)[0]
    with torch.no_grad():
        nll = captioner.nll_of_captions(captioner.model, batch, rows)
        expected = captioner.caption_nll(captioner.encode_images(batch), batch)
    torch.testing.assert_close(nll[:3], expected, rtol=1e-5, atol=0)


def test_without_retrieved_captions_a_batch_is_what_it_was(captioner, images):
    none = batch_of(captioner, images, [[], [], []])
    plain = captioner.collate(images, captioner.tokenize(CAPTIONS, 40)[0])
    assert none.keys() == plain.keys()
    assert all(torch.equal(none[name], plain[name]) for name in plain)


def test_special_tokens_and_line_breaks_in_a_retrieved_caption_do_no_harm(captioner, images):
    tokens = [str(token) for token in (*captioner._image_tokens(), captioner.tokenizer.eos_token)]
    hostile = f"A {tokens[0]}nodule\n\n- {' '.join(tokens)} on the {tokens[0][:3]}{tokens[0]}{tokens[0][3:]} left"
    plain = f"A nodule - on the {tokens[0][:3]} {tokens[0][3:]} left"
    found, expected = (batch_of(captioner, images, [[text], [], []]) for text in (hostile, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_caption_to_learn_never_holds_the_tokens_of_an_image_or_an_end_before_its_end(captioner, images):
    tokens = [*captioner._image_tokens(), captioner.tokenizer.eos_token]
    rows, cut = captioner.tokenize([f"A {' '.join(tokens)} nodule", f"{tokens[0]}Normal"], 40)
    special = {token for token, added in captioner.tokenizer.added_tokens_decoder.items() if added.special}
    assert not any(special.intersection(row[:-1]) for row in rows) and cut == [False, False]
    assert rows[1] == captioner.tokenize(["Normal"], 40)[0][0]
    captioner.forward(captioner.model, captioner.collate(images[:2], rows))  # as many features as image tokens


def test_a_long_retrieved_caption_is_cut_so_that_the_lengths_that_were_checked_hold(captioner, monkeypatch):
    plain, long = captioner.prompt_length, "left renal cyst " * 99
    monkeypatch.setattr(captioner, "retrieved_captions", 2)
    image = make_noise(0, (64, 64))  # that of which the prompt is measured
    number = captioner.collate([image], [[]], [[long, long]])["input_ids"].shape[1]
    assert number > plain + RETRIEVED_TOKENS * 2
    with pytest.raises(UserError, match=r"tokens of the prompt .* or less or set fewer --retrieved") as error:
        captioner.check_lengths(1, 512 - plain)
    most = int(re.search(r"max_new_tokens to (\d+)", str(error.value))[1])
    captioner.check_lengths(1, most)
    assert 512 - 32 < number + most <= 512 + 1, "a row without a caption has one padding token"
    captioner.retrieved_captions = 64  # no length of a caption would do
    with pytest.raises(UserError, match=r"512 text positions; set fewer --retrieved_captions"):
        captioner.check_lengths(1, most)
    text = captioner.tokenizer.decode(captioner.collate([image], [[]], [["a" + "胸" * 99]])["input_ids"][0])
    assert "- a胸" in text and "\ufffd" not in text, "it is cut between two characters"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_prompt_has_no_known_place_for_them_are_one_line(family, tmp_path):
    folder = str(save_tiny(family, tmp_path))
    if family in PROMPTS:
        refuse_retrieved(folder)
        return
    with pytest.raises(UserError, match=r"^a [\w-]+ takes no retrieved captions, only llava, .*smolvlm; leave out --"):
        refuse_retrieved(folder)


def test_a_chat_template_without_a_known_place_is_one_line(tmp_path):
    captioner = load_captioner(str(save_tiny("qwen3_vl", tmp_path)))
    captioner.retrieved_captions = 1
    captioner.processor.chat_template = captioner.processor.chat_template.replace("<|vision_start|>", "")
    with pytest.raises(UserError, match=r"has no '<\|vision_start\|>', before which retrieved captions are written"):
        captioner.set_prompt(None)
