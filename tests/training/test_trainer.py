"""The traps of fine-tuning BLIP with a Trainer: each test shows what stock does, and that this recipe does not."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import one_step, read_json, stock_copy
from transformers import BlipForConditionalGeneration, BlipProcessor, Seq2SeqTrainer
from transformers.trainer_pt_utils import LabelSmoother

from captioning.data.checks import usable
from captioning.data.tokenize_captions import tokenize
from captioning.models.captioner import sum_nll
from captioning.training.checkpoints import last_complete_checkpoint
from captioning.training.trainer import mean_training_loss


@pytest.fixture(params=["fast", "stock"])
def make_trainer(request, make_trainer):
    """Each test runs twice, with fast BLIP and with stock; `stock_copy` is what it compares with."""
    return partial(make_trainer, fast=request.param == "fast")


def batch_of(trainer, rows, number=4):
    return trainer.data_collator([rows[i] for i in range(number)])


def stock_trainer(ours, model) -> Seq2SeqTrainer:
    """The trainer that most BLIP fine-tunes use, with our arguments, collator and data."""
    return Seq2SeqTrainer(
        model=stock_copy(model),
        args=ours.args,
        data_collator=ours.data_collator,
        train_dataset=ours.train_dataset,
        eval_dataset=ours.eval_dataset,
        processing_class=ours.captioner.tokenizer,
    )


@torch.no_grad()
def stock_loss(model, collator, rows) -> float:
    """The mean token NLL of rows, one row at a time through stock BLIP's own loss."""
    model, total, number = stock_copy(model).eval(), 0.0, 0
    for batch in (collator([row]) for row in rows):
        targets = int((batch["labels"] != -100).sum())
        total, number = total + float(model(**batch).loss) * targets, number + targets
    return total / number


# --- Generation -----------------------------------------------------------------------------------------------


def test_predictions_of_an_untrained_model_do_not_start_with_the_references(make_trainer, splits, model):
    """T1: stock `prediction_step` passes the reference to `generate` as its prompt."""
    trainer = make_trainer()
    batch = batch_of(trainer, splits["test"])
    stock = stock_trainer(trainer, model)
    _, leaked, _ = stock.prediction_step(stock.model, copy.deepcopy(batch), False, max_new_tokens=12)
    _, (_, _, tokens, _), _ = trainer.prediction_step(model, copy.deepcopy(batch), False)
    texts = (trainer.captioner.decode(generated.numpy()) for generated in (leaked, tokens))
    for reference, stocks, ours in zip(splits["test"]["caption"][:4], *texts, strict=True):
        assert ours.split()[:3] != reference.lower().split()[:3] == stocks.split()[:3]


def test_predictions_do_not_depend_on_the_references(make_trainer, splits):
    """T1 again: other captions, same images, same predictions."""
    trainer = make_trainer()
    swapped = splits["test"].select(range(7)).remove_columns("input_ids")
    swapped = swapped.add_column("input_ids", [splits["train"][i]["input_ids"] for i in range(7)])
    tokens, others = (trainer.predict(rows).predictions.tokens for rows in (splits["test"], swapped))
    assert np.array_equal(tokens, others)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 2, "length_penalty": 2.0, "min_new_tokens": 9},
        {"num_beams": 3, "max_new_tokens": 5},
    ],
)
def test_decode_settings_reach_the_decoder(make_trainer, splits, model, settings):
    """T7: the text decoder ignores the `generation_config` of the whole model; ours is passed to it."""
    trainer = make_trainer(**settings)
    batch = batch_of(trainer, splits["test"])
    _, (_, _, tokens, _), _ = trainer.prediction_step(model, batch, False)
    model = stock_copy(model)
    expected = model.generate(pixel_values=batch["pixel_values"], **{"max_new_tokens": 12} | settings)
    assert torch.equal(tokens, expected[:, 1:])
    model.generation_config.max_new_tokens, model.generation_config.num_beams = 3, 3
    assert model.generate(pixel_values=batch["pixel_values"]).shape[1] > 4, "stock reads it now: simplify"


def test_generation_and_training_start_from_the_same_token(make_trainer, splits, model):
    """T3: the tokenizer writes `[CLS]` first, `generate` starts from `[DEC]`."""
    trainer = make_trainer()
    batch = batch_of(trainer, splits["train"])
    start = stock_copy(model).generate(pixel_values=batch["pixel_values"], max_new_tokens=1)[:, 0]
    assert trainer.captioner.tokenizer("chest")["input_ids"][0] != start[0]
    assert torch.equal(batch["input_ids"][:, 0], start)
    assert trainer.captioner.prompt_row == [int(start[0])]


def test_prediction_leaves_its_inputs_alone(make_trainer, splits, model):
    """T10: `generate` overwrites the first prompt token in place."""
    trainer = make_trainer(prompt="chest radiograph")
    start = trainer.captioner.prompt_row
    batch = batch_of(trainer, splits["test"])
    before = copy.deepcopy(batch)
    for _ in range(2):
        trainer.prediction_step(model, batch, False)
        assert all(torch.equal(batch[key], before[key]) for key in batch)
        assert trainer.captioner.prompt_row == start
    prompt = torch.tensor([[5, *start[1:], 3]])
    stock_copy(model).generate(pixel_values=batch["pixel_values"][:1], input_ids=prompt, max_new_tokens=2)
    assert prompt[0, 0] != 5, "stock no longer writes into its prompt: this test can go"


# --- Losses ---------------------------------------------------------------------------------------------------


def test_loss_and_gradients_do_not_depend_on_accumulation(make_trainer, captioner):
    """T2: in stock BLIP both grow with the accumulation steps."""
    loss, gradients = one_step(make_trainer, captioner, 8, 1)
    scale = max(float(g.abs().max()) for g in gradients.values())
    for batch_size, accumulation in ((4, 2), (2, 4)):
        other_loss, others = one_step(make_trainer, captioner, batch_size, accumulation)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert max(float((gradients[n] - others[n]).abs().max()) for n in gradients) < 1e-5 * scale

    def make_stock(captioner, **arguments):
        return stock_trainer(make_trainer(captioner=captioner, **arguments), captioner.model)

    assert one_step(make_stock, captioner, 2, 4)[0] > 3 * loss, "stock normalizes now: compute_loss can go"


def test_training_loss_and_gradients_equal_stock_blip_on_one_batch(make_trainer, splits, captioner):
    loss, gradients = one_step(make_trainer, captioner, 8, 1)
    stock = stock_copy(captioner.model).train()
    expected = stock(**batch_of(make_trainer(), splits["train"], 8)).loss
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


def test_label_smoothing_is_that_of_the_config_and_in_training_only(make_trainer, splits, model):
    """T5: the Trainer's own smoother compares each logit with its input instead of the next token."""
    trainer = make_trainer(max_steps=40, learning_rate=5e-3, do_eval=False, save_strategy="no")
    trainer.train()  # before that, every loss is about as bad as any other
    batch = batch_of(trainer, splits["train"], 8)
    plain = stock_copy(model).eval()(**batch).loss.item()
    model.config.text_config.label_smoothing = model.text_decoder.label_smoothing = 0.1
    smoothed = stock_copy(model).eval()(**batch).loss.item()
    assert smoothed > plain + 0.1
    assert trainer.compute_loss(model.train(), dict(batch)).item() == pytest.approx(smoothed, rel=1e-6)
    _, (nll, num_tokens, *_), _ = trainer.prediction_step(model.eval(), batch, False)
    assert float(nll.sum() / num_tokens.sum()) == pytest.approx(plain, rel=1e-6)
    stock = stock_trainer(trainer, model)
    stock.label_smoother = LabelSmoother(epsilon=0.1)
    assert stock.compute_loss(stock.model, dict(batch)).item() > 1.1 * smoothed, "the smoother shifts now"


def test_eval_loss_is_the_token_level_loss_whatever_the_batch_size(make_trainer, splits, model):
    """T6: the stock mean of batch means moves with the batch size."""
    trainer = make_trainer()
    expected = stock_loss(model, trainer.data_collator, splits["validation"])
    for batch_size in (1, 3, 4, 10):
        metrics = make_trainer(per_device_eval_batch_size=batch_size).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["eval_perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    loss_only = (make_trainer(per_device_eval_batch_size=size, predict_with_generate=False) for size in (1, 4))
    one, four = (stock_trainer(ours, model).evaluate()["eval_loss"] for ours in loss_only)
    assert abs(one - four) > 1e-4, "stock weighs by tokens now: compute_metrics can take its loss"


def test_nll_is_summed_over_the_targets_of_each_caption():
    labels = torch.tensor([[-100, 3, 4, -100, -100], [-100, -100, 1, 2, 6], [-100, -100, -100, -100, -100]])
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(-1)
    nll = sum_nll(logits, labels)
    assert nll.dtype == torch.float64
    expected = [-(log_probs[0, 3] + log_probs[1, 4]), -(log_probs[2, 1] + log_probs[3, 2] + log_probs[4, 6]), 0.0]
    assert nll.tolist() == pytest.approx([float(value) for value in expected], abs=1e-6)


# --- Metrics --------------------------------------------------------------------------------------------------


def test_scores_are_against_the_full_captions(make_trainer, checked, captioner):
    """T9: decoded labels are truncated, which flatters the score."""
    cut = {split: usable(rows) for split, rows in tokenize(checked, captioner, max_length=6).items()}
    trainer, seen = make_trainer(splits=cut), []
    trainer._metrics_of_texts = lambda prediction: seen.append(prediction) or {}
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "test")
    assert seen[0].predictions is output.predictions
    assert seen[0].label_ids == cut["validation"]["caption"][:]
    labels = captioner.decode(output.label_ids)
    assert all(len(label) < len(reference) for label, reference in zip(labels, seen[0].label_ids, strict=True))


def test_evaluation_runs_in_the_precision_of_training(make_trainer, splits, model):
    """Accelerate puts autocast on `model.forward`, which evaluation does not call."""
    seen = []
    model.text_decoder.cls.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        trainer = make_trainer(bf16=bf16, max_new_tokens=2)
        trainer.prediction_step(model, batch_of(trainer, splits["test"], 2), False)
        assert set(seen) == {dtype}
        seen.clear()


def test_gradient_checkpointing_changes_no_gradient(make_trainer, captioner):
    loss, gradients = one_step(make_trainer, captioner, 8, 1)
    other_loss, others = one_step(make_trainer, captioner, 8, 1, activation_checkpointing=True)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(gradients[name], others[name], atol=1e-6) for name in gradients)


def test_loss_only_evaluation_generates_nothing(make_trainer, captioner, monkeypatch):
    monkeypatch.setattr(type(captioner), "generate", None)
    metrics = make_trainer(predict_with_generate=False).evaluate()
    assert "eval_loss" in metrics and "eval_rougeL" not in metrics


# --- Checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_whole_processor(make_trainer, tmp_path):
    """T8: with `processing_class=tokenizer` the image processor is not saved."""
    make_trainer(max_steps=2, save_strategy="epoch").train()
    checkpoint = last_complete_checkpoint(str(tmp_path / "run"))
    processor = BlipProcessor.from_pretrained(checkpoint)
    assert (processor.image_processor.size["height"], processor.tokenizer.bos_token) == (32, "[DEC]")
    BlipForConditionalGeneration.from_pretrained(checkpoint)


def test_the_running_loss_is_logged_before_each_checkpoint(make_trainer, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer(max_steps=4, logging_steps=100, **arguments)
    output = trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    state = read_json(tmp_path / "run" / "checkpoint-2" / "trainer_state.json")
    assert state["log_history"][0]["step"] == 2
    assert output.training_loss == pytest.approx(mean_training_loss(trainer.state.log_history))


def test_mean_training_loss_weighs_by_steps():
    log = [{"loss": 4.0, "step": 3}, {"eval_loss": 9.0, "step": 3}, {"loss": 1.0, "step": 4}]
    assert mean_training_loss(log) == pytest.approx((3 * 4.0 + 1.0) / 4)
    assert mean_training_loss([]) == 0.0


# --- Features and attention -----------------------------------------------------------------------------------


def test_image_features_are_the_mean_of_the_patches_in_the_order_of_the_rows(make_trainer, splits, model):
    trainer = make_trainer(per_device_eval_batch_size=3)
    features = trainer.image_features(splits["test"])
    assert (features.shape, features.dtype) == ((7, 32), np.float32)
    for row in (0, 4, 6):
        pixel_values = trainer.data_collator([splits["test"][row]])["pixel_values"]
        with torch.no_grad():
            expected = model.eval().vision_model(pixel_values).last_hidden_state[0, 1:].mean(dim=0)
        assert features[row] == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.array_equal(trainer.predict(splits["test"]).predictions.features, features), "computed twice for nothing"


def test_each_word_of_a_caption_has_the_mean_map_of_its_tokens(make_trainer, splits, captioner):
    trainer, tokenizer = make_trainer(), captioner.tokenizer
    caption = "septum at the left xylophone"
    ids = [*tokenizer(caption, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert any(piece.startswith("##") for piece in pieces), "no word is in pieces: the test sees nothing"
    tokens = np.array([[*ids, tokenizer.pad_token_id, -100]])
    (words,) = trainer.word_attention(splits["test"].select([2]), tokens)
    assert [word for word, _ in words] == caption.split()
    with torch.no_grad():
        encoded = captioner.encode_images(trainer.data_collator([splits["test"][2]]))
        maps = captioner.attention_maps(encoded, torch.tensor(ids)).numpy()
    last = [i for i, piece in enumerate(pieces[:-1]) if not piece.startswith("##")][-1]
    assert len(pieces[last:-1]) > 1
    assert words[-1][1] == pytest.approx(maps[last:-1].mean(axis=0), abs=1e-6)
    assert words[-1][1].shape == (4, 4)
