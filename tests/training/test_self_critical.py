"""Self-critical training: its gradient is REINFORCE's, however a batch is split, and it learns what is rewarded."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from families import save_tiny
from helpers import flags, losses, make_batch, one_step, read_json, run_ranks, save_captioner, stock_copy
from rouge_score.rouge_scorer import RougeScorer
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import run_captioning
from captioning.errors import UserError
from captioning.models.captioner import DrawTokens
from captioning.models.load import load_captioner
from captioning.training import self_critical as module
from captioning.training.self_critical import MIN_JUDGED, Reward, SelfCritical, parse_reward


SAMPLED = GenerationConfig(do_sample=True, temperature=0.9, top_k=40, top_p=0.85)


@pytest.fixture
def make(make_trainer, splits):
    """Return a function that makes a trainer whose objective is self-critical."""

    def make_self_critical(captioner, reward=None, weight=0.0, **arguments):
        samples = {"num_samples": 3, "caption_loss_weight": weight}
        trainer = make_trainer(captioner=captioner, **samples, **arguments)
        trainer.data_collator.with_ids = True
        reward = reward or Reward({"rougeL": 0.7, "modality_f1": 0.3}, splits["train"])
        trainer.objective = SelfCritical(captioner, trainer.args, reward)
        return trainer

    return make_self_critical


def assert_same_gradients(found, expected):
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5 * scale


# --- The gradient ---------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_reinforce_with_a_leave_one_out_baseline(make, captioner, splits, monkeypatch):
    seen, sample = [], SelfCritical._sample
    monkeypatch.setattr(SelfCritical, "_sample", lambda *args: seen.append(sample(*args)) or seen[-1])
    rouge = RougeScorer(["rougeL"])
    reward = Reward({"rougeL": 1.0}, splits["train"])
    _, gradients = one_step(partial(make, reward=reward), captioner, 8, 1)
    model, collator, advantages = stock_copy(captioner.model).eval(), make(captioner).data_collator, []
    for row, (_, *samples) in zip(splits["train"].select(range(8)), seen[0], strict=True):
        texts = captioner.decode(np.array(samples))
        scores = [rouge.score(row["caption"], text)["rougeL"].fmeasure for text in texts]
        for tokens, score in zip(samples, scores, strict=True):
            tokens = captioner.without_padding(tokens).tolist()
            batch = collator([row | {"input_ids": [*captioner.prompt_row, *tokens]}])
            batch.pop("image_id")
            advantages.append(score - (sum(scores) - score) / 2)
            (advantages[-1] * model(**batch).loss * len(tokens) / (8 * 3)).backward()
    assert np.abs(advantages).max() > 0.05, "the samples score alike: the test sees nothing"
    assert_same_gradients(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_loss_and_gradients_do_not_depend_on_accumulation(make, captioner, weight):
    sizes = ((8, 1), (4, 2), (2, 4))
    (loss, gradients), *parts = (one_step(partial(make, weight=weight), captioner, *size) for size in sizes)
    for other, others in parts:
        assert other == pytest.approx(loss, rel=1e-5, abs=1e-7)
        assert_same_gradients(others, gradients)


def test_without_rewards_the_caption_loss_is_left(make, make_trainer, captioner):
    same = partial(make, reward=lambda texts, ids: np.ones(len(texts)), weight=2)
    found, expected = one_step(same, captioner, 4, 2), one_step(make_trainer, captioner, 8, 1)
    assert found[0] == pytest.approx(2 * expected[0], rel=1e-5)
    assert_same_gradients(found[1], {name: 2 * gradient for name, gradient in expected[1].items()})


def test_two_processes_train_as_one_and_rewarded_scores_are_marked(captioner, parquet_folder, tmp_path):
    save_captioner(captioner, tmp_path / "start")
    more = {"model_name_or_path": tmp_path / "start", "objective": "self_critical", "vocab_size": None}
    more |= {"num_train_epochs": 1, "logging_steps": 1, "caption_loss_weight": 0.5, "do_predict": False}
    run_captioning.main(flags(None, parquet_folder, tmp_path / "one", **more))
    scores = read_json(tmp_path / "one" / "scores.json")["validation"]["scores"]
    assert [name for name, entry in scores.items() if "rewarded" in entry] == ["rougeL"]
    assert "| `rougeL` (rewarded) |" in (tmp_path / "one" / "README.md").read_text()
    page = (tmp_path / "one" / "report.html").read_text()
    rewarded = re.search(r"Rewarded in training(.*?)</tbody>", page, re.DOTALL)[1]
    assert rewarded.count('<th scope="row">') == 1 and "ROUGE-L" in rewarded
    assert "the most that a model can reach" in page
    run_ranks(2, flags(None, parquet_folder, tmp_path / "two", **more | {"per_device_train_batch_size": 2}))
    for key in ("loss", "reward"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=1e-4)
    assert max(losses(tmp_path / "two", "reward")) > 0


# --- Samples --------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_with_the_probabilities_of_stock(number=20_000):
    scores = 3 * torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    expected = scores
    for warp in (TemperatureLogitsWarper(0.9), TopKLogitsWarper(40), TopPLogitsWarper(0.85)):
        expected = warp(None, expected)
    places = (torch.arange(number) + 0.5) / number
    drawn = DrawTokens(SAMPLED, places[:, None])(None, scores.expand(number, -1)).argmax(dim=-1)
    assert torch.allclose(drawn.bincount(minlength=60) / number, expected.softmax(-1)[0], atol=2 / number)


def test_fast_samples_are_those_of_stock_and_greedy_search_is_at_0(captioner):
    captioner.model.text_decoder.cls.predictions.bias.data[captioner.end_token_id] += 4.0
    batch, tokens = make_batch(captioner.model, number=9), {}
    uniforms = torch.rand(9, 5, 20, generator=torch.Generator().manual_seed(0))
    uniforms[:, 0] = 0
    for fast in (True, False):
        captioner.adapt(fast=fast)
        tokens[fast] = captioner.sample(captioner.encode_images(batch), SAMPLED, uniforms)
    assert torch.equal(tokens[True], tokens[False])
    lengths = {len(captioner.without_padding(row.numpy())) for row in tokens[True].flatten(0, 1)}
    assert len(lengths) > 4, "the captions end together: the test sees nothing"
    greedy = captioner.generate(captioner.encode_images(batch), GenerationConfig(max_new_tokens=20))
    assert torch.equal(tokens[True][:, 0, : greedy.shape[1]], greedy)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "blip-2-t5", "vit-gpt2"])
def test_other_families_learn_from_samples(family, parquet_folder, checked, tmp_path):
    captioner = load_captioner(str(save_tiny(family, tmp_path / "start")))
    images = [row["image"] for row in checked["train"].select(range(3))]
    images = [run_captioning.CaptioningCollator(captioner)._image({"image": image}) for image in images]
    rows, _ = captioner.tokenize(["a cyst", "no mass in the left lung", "an effusion", "", "a", "a mass"], 20)
    batch, twice = captioner.collate(images, rows[:3]), captioner.collate([*images, *images], rows)
    with torch.no_grad():
        nll = captioner.nll_of_captions(captioner.model, batch, rows)
        assert nll == pytest.approx(captioner.caption_nll(captioner.encode_images(twice), twice), rel=1e-4)
    more = {"model_name_or_path": tmp_path / "start", "vocab_size": None, "objective": "self_critical", "max_steps": 1}
    run_captioning.main(flags(None, parquet_folder, tmp_path / "run", **more, logging_steps=1, do_predict=False))
    assert losses(tmp_path / "run", "grad_norm")[0] > 0 and losses(tmp_path / "run", "sample_length")[0] > 1


# --- Learning -------------------------------------------------------------------------------------------------


def test_a_rewarded_word_appears(make, captioner, monkeypatch):
    monkeypatch.setattr(module, "COLLAPSED", 1.0)

    def has_word(captions, image_ids):
        return np.array([float("small" in caption.split()) for caption in captions])

    arguments = {"learning_rate": 2e-3, "logging_steps": 10, "save_strategy": "no", "do_eval": False}
    trainer = make(captioner, reward=has_word, max_steps=60, **arguments)
    trainer.train()
    rewards = [entry["greedy_reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.2 and rewards[-1] > 0.8, rewards


def test_a_resumed_run_ends_with_the_same_weights(make, captioner, tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no", "logging_steps": 2}
    arguments |= {"load_best_model_at_end": False, "learning_rate": 1e-3}
    arguments["reward"] = lambda texts, image_ids: np.array([len(text) % 7 / 7 for text in texts])
    whole, other = (make(copy.deepcopy(captioner), **arguments) for _ in range(2))
    whole.train()
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    rewards = [[log.get("reward") for log in trainer.state.log_history] for trainer in (whole, other)]
    assert rewards[0] == rewards[1] and rewards[0][0] is not None


# --- Mistakes -------------------------------------------------------------------------------------------------


def test_a_collapse_ends_the_run(make, captioner):
    objective = make(captioner).objective
    for caption, ends, message in (("a cyst", True, "'a cyst'"), (None, False, "does not end within 12 tokens")):
        objective._seen = [(caption or str(i), ends, [1, 1, 2, 0]) for i in range(MIN_JUDGED)]
        with pytest.raises(UserError, match=f"has collapsed: 64 of the last 64 images get .*{message}"):
            objective.measured()
    objective._seen = [(str(i % 9), True, [1, 1, 2, 0]) for i in range(90)]
    assert objective.measured()["distinct_captions"] == 0.1
    assert objective.measured() == {}


@pytest.mark.parametrize("reward", ["rougel", "rouge1=0", "rouge1=x", "rouge1=inf", "rouge1,rouge1=2", ""])
def test_a_reward_that_cannot_be_is_refused(reward):
    assert parse_reward("imageclef_rouge1=0.5, concept_f1") == {"imageclef_rouge1": 0.5, "concept_f1": 1.0}
    with pytest.raises(UserError, match=r"^reward '"):
        parse_reward(reward)


def test_a_reward_needs_one_reference_an_image(splits):
    with pytest.raises(UserError, match="some images share an image_id"):
        Reward({"rouge1": 1.0}, splits["train"].select([0, 1, 0]))


def test_random_weights_are_no_start(config_file, parquet_folder, tmp_path):
    with pytest.raises(UserError, match="starts from a trained model"):
        run_captioning.main(flags(config_file, parquet_folder, tmp_path, objective="self_critical"))
