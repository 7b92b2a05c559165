"""Concepts learned beside captions: the loss, which does not depend on how a batch is split, and whole runs."""

import copy
import signal

import numpy as np
import pytest
import torch
from families import save_tiny
from helpers import flags, losses, one_step, outcome, run, run_ranks, save_captioner, signal_when, start
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration

import run_captioning
from captioning.errors import UserError
from captioning.models.captioner import IGNORE_INDEX
from captioning.models.load import load_captioner
from captioning.training.concept_loss import CaptionAndConceptLoss, asymmetric_loss, set_up_concept_head


HEAD = "concept_head.safetensors"
CONCEPTS = ["C0817096", "C1306645"]


@pytest.fixture
def make(make_trainer, splits):
    """Return a function that makes a trainer that learns concepts beside captions."""

    def make_with_concepts(captioner, **arguments):
        arguments = {"concept_loss_weight": "0.5", "min_concept_count": 3} | arguments
        trainer = make_trainer(captioner=captioner, splits=splits, **arguments)
        if captioner.concept_head is None:
            set_up_concept_head(captioner, splits["train"], trainer.args)
            trainer = make_trainer(captioner=captioner, splits=splits, **arguments)
        trainer.objective = CaptionAndConceptLoss(captioner, trainer.args, splits["train"])
        trainer.data_collator.concepts = captioner.concept_head.concepts
        trainer.data_collator.unlabeled_are_negative = trainer.args.unlabeled_are_negative
        return trainer

    return make_with_concepts


# --- The loss -------------------------------------------------------------------------------------------------


def test_the_asymmetric_loss_is_that_of_its_paper():
    """Equations 4 to 7 of arXiv:2009.14119 with gamma+ 0, gamma- 4, m .05, written out for each number alone."""
    logits = torch.linspace(-9, 9, 61, dtype=torch.float64)
    probabilities = (1 / (1 + np.exp(-logits.numpy()))).tolist()
    shifted = [max(probability - 0.05, 0) for probability in probabilities]
    positive = [-np.log(probability) for probability in probabilities]
    negative = [-(q**4) * np.log(1 - q) for q in shifted]
    for label, expected in ((0.0, negative), (1.0, positive)):
        found = asymmetric_loss(logits, torch.full_like(logits, label))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    extreme = torch.tensor([-200.0, 200.0], requires_grad=True)
    asymmetric_loss(extreme, torch.tensor([0.0, 0.0])).sum().backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["asymmetric", "bce"])
def test_the_loss_of_a_step_is_written_out(make, captioner, splits, kind):
    """Of 8 images every second has no concept: it counts neither above nor below the line."""
    loss, _ = one_step(lambda **a: make(**a, concept_loss=kind), captioner, 8, 1)
    captions, _ = one_step(lambda **a: make(**a, concept_loss_weight="0.0000001"), captioner, 8, 1)
    rows = [row for row in splits["train"].select(range(8)) if row["cui"]]
    # Half of the 24 images have concepts, each of these both: an untrained head predicts .99, the highest that it may
    of_label = -np.log(0.99) * (1 if kind == "asymmetric" else np.sqrt(1 / 12))
    assert len(rows) == 4
    assert loss == pytest.approx(captions + 0.5 * 2 * of_label, rel=1e-4)


def test_images_without_concepts_are_negatives_only_if_the_recipe_says_so(make, captioner, splits):
    rows = [splits["train"][i] for i in range(2)]  # the second has none
    for negative, expected in ((False, IGNORE_INDEX), (True, 0)):
        collator = make(copy.deepcopy(captioner), unlabeled_are_negative=negative).data_collator
        assert collator(rows)["concept_labels"].tolist() == [[1, 1], [expected] * 2]
        collator.unreadable = lambda *args: None
        broken = rows[0] | {"image": {"bytes": b"no image", "path": None}}
        assert collator([broken])["concept_labels"].tolist() == [[IGNORE_INDEX] * 2]
    collator.concepts = ()
    assert "concept_labels" not in collator(rows)


@pytest.mark.parametrize("weight", ["0.5", "auto"])
def test_losses_and_weights_do_not_depend_on_accumulation(make, captioner, weight):
    found = {}
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        arguments |= {"train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no"}
        own = make(copy.deepcopy(captioner), concept_loss_weight=weight, do_eval=False, optim="sgd", **arguments)
        with torch.no_grad():
            own.captioner.concept_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
            own.captioner.concept_head.bias.fill_(-1)
        own.train()
        log = [entry for entry in own.state.log_history if "loss" in entry]
        keys = ("loss", "grad_norm", "caption_loss", "concept_loss", "concept_loss_weight")
        found[size] = torch.tensor([[entry[key] for key in keys] for entry in log], dtype=torch.float64)
        expected = found[size][:, 2] + found[size][:, 4].roll(1 if weight == "auto" else 0) * found[size][:, 3]
        assert torch.allclose(found[size][1:, 0], expected[1:], rtol=1e-5), "the parts are not those of the loss"
    assert len({float(value) for value in found[8][:, 4]}) == (4 if weight == "auto" else 1)
    for size in (4, 1):
        torch.testing.assert_close(found[size], found[8], rtol=2e-6, atol=1e-6)


def test_the_weight_follows_the_losses_within_its_limits(make, captioner):
    trainer = make(captioner, concept_loss_weight="auto", max_steps=1, do_eval=False, save_strategy="no")
    head, objective = captioner.concept_head, trainer.objective
    for captions, concepts, weight in ((4.0, 2.0, 0.2), (4.0, 100.0, 0.05), (4.0, 0.01, 5.0), (4.0, 0.0, 5.0)):
        objective._step = torch.tensor([captions, concepts])
        objective._end_step(trainer, head)
        assert head.loss_weight.item() == pytest.approx(weight)


# --- Runs -----------------------------------------------------------------------------------------------------


def arguments(config_file, data, folder, **more):
    more = {"concept_loss_weight": "auto", "min_concept_count": 3, "logging_steps": 1, "num_train_epochs": 2} | more
    return flags(config_file, data, folder, **more)


def test_a_killed_run_resumes_to_the_same_head(config_file, parquet_folder, tmp_path):
    short = {"num_beams": 1, "do_predict": False, "neighbor_samples": 0}
    words = [arguments(config_file, parquet_folder, tmp_path / name, **short) for name in ("whole", "killed")]
    run_captioning.main(words[0])
    process = start(words[1])
    signal_when(lambda: any((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")), signal.SIGKILL, process)
    assert process.wait() == -signal.SIGKILL
    run_captioning.main([*words[1], "--resume_from_checkpoint", "true"])
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    whole, killed = (load_file(tmp_path / name / HEAD) for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    assert whole["weight"].any() and whole["loss_weight"] > 0


def test_training_goes_on_from_a_head_of_the_same_concepts(config_file, parquet_folder, tmp_path):
    short = {"do_predict": False, "num_beams": 1, "max_steps": 2, "save_strategy": "no", "num_train_epochs": None}
    run_captioning.main(arguments(config_file, parquet_folder, tmp_path / "first", **short))
    again = short | {"model_name_or_path": tmp_path / "first", "vocab_size": None}
    run_captioning.main(arguments(None, parquet_folder, tmp_path / "again", **again | {"learning_rate": 0}))
    first, second = (load_file(tmp_path / name / HEAD)["weight"] for name in ("first", "again"))
    assert torch.equal(first, second) and first.any()
    run_captioning.main(arguments(None, parquet_folder, tmp_path / "without", **again | {"concept_loss_weight": "0"}))
    assert not list((tmp_path / "without").glob("concept_head*"))
    head = load_captioner(str(tmp_path / "first")).concept_head
    assert head.concepts == CONCEPTS
    head.concepts = ["C0000001", "C1306645"]
    head.save_config(tmp_path / "first")
    with pytest.raises(UserError, match="has 2 concepts, the training split 2 others of 3 images"):
        run_captioning.main(arguments(None, parquet_folder, tmp_path / "other", **again))


@pytest.mark.parametrize(("family", "merge"), [("llava", False), ("blip", True)])
def test_an_adapter_has_a_head_too(captioner, parquet_folder, tmp_path, family, merge):
    save_captioner(captioner, tmp_path / "start") if merge else save_tiny(family, tmp_path / "start")
    more = {"model_name_or_path": tmp_path / "start", "use_peft": True, "merge_lora": merge, "vocab_size": None}
    run_captioning.main(arguments(None, parquet_folder, tmp_path / "run", **more, num_beams=1))
    before, head = load_captioner(str(tmp_path / "start")), load_captioner(str(tmp_path / "run")).concept_head
    assert head.concepts == CONCEPTS and head.weight.any()
    if merge:
        _, loading = BlipForConditionalGeneration.from_pretrained(tmp_path / "run", output_loading_info=True)
        assert not any(loading.values())
        assert load_captioner(str(tmp_path / "run" / "adapter")).concept_head is not None
    else:
        weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
        assert all("lora_" in name for name in weights)
        PeftModel.from_pretrained(before.model, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["blip", "llava"])
def test_two_processes_train_as_one(family, captioner, parquet_folder, tmp_path):
    """Of BLIP all parameters are used, of the other family DDP looks for those that are not."""
    save_captioner(captioner, tmp_path / "start") if family == "blip" else save_tiny(family, tmp_path / "start")
    more = {"model_name_or_path": tmp_path / "start", "vocab_size": None, "num_train_epochs": 1, "num_beams": 1}
    # 24 images in global batches of 5: the last one is filled by blank rows
    for name, processes, size in (("one", 1, 10), ("two", 2, 5)):
        words = arguments(None, parquet_folder, tmp_path / name, **more, per_device_train_batch_size=size)
        run(words) if processes == 1 else run_ranks(2, words)
    for key in ("loss", "concept_loss", "concept_loss_weight"):
        one, two = (losses(tmp_path / name, key) for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-4) and len(one) == 3


# --- Mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"concept_loss_weight": "much"}, "concept_loss_weight is 'much'"),
        ({"concept_loss_weight": "-1"}, "concept_loss_weight is -1.0; set auto, or a number from 0"),
        ({"concept_loss_weight": "nan"}, "concept_loss_weight is nan"),
        ({"concept_loss": "focal"}, "invalid choice: 'focal'"),
        ({"concept_thresholds": "all"}, "invalid choice: 'all'"),
        ({"min_concept_count": 13}, "no concept has 13 training images"),
        ({"objective": "self_critical"}, "goes with --objective likelihood"),
    ],
)
def test_a_mistake_is_told_in_a_line(config_file, parquet_folder, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        run_captioning.main(arguments(config_file, parquet_folder, tmp_path, **more))
    assert "\n" not in str(error.value)
