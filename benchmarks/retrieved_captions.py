"""Do captions of similar training images in the prompt help a captioner that is trained with them?

    OMP_NUM_THREADS=1 python benchmarks/retrieved_captions.py outputs/retrieved_captions [--seeds 42 43 44]

For 500 and 2,000 phantoms and each seed it trains a small LLaVA from random weights, without retrieved captions and
with those of the 3 nearest training images, in the same number of steps. The retriever is the vision model of the one
that was trained without, so that neither has seen other images. Both caption 2,000 fresh images. Differences and
intervals are those of `concept_head.py`.

What a folder holds is not computed again. About an hour on one core.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from concept_head import STEPS, print_captions, schedule
from datasets import DatasetDict
from higher_scores import FRESH, measure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioning.data.phantoms import load_phantoms
from captioning.files import PROJECT
from captioning.scoring.captions import read_predictions


SIDE, PATCH = 48, 8  # pixels
SHAPE = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
SYSTEMS = ("without", "with retrieved captions")
TRAINING = {
    "per_device_train_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 0.1, "adam_beta2": 0.98,
    "per_device_eval_batch_size": 100, "max_new_tokens": 40, "report_to": "none",
}  # fmt: skip


def main(folder: Path, seeds: list[int]) -> None:
    scores = {}
    for number, steps in STEPS.items():
        data = folder / f"data-{number}"
        if not data.exists():
            phantoms = load_phantoms(0)
            train, fresh = phantoms["train"].select(range(number)), load_phantoms(1, FRESH)["test"]
            splits = {"train": train, "validation": phantoms["validation"], "test": fresh}
            DatasetDict(splits).save_to_disk(data)
        for seed in seeds:
            runs = folder / f"{number}-{seed}"
            if not (runs / "start").exists():
                build(runs / "start", seed, data)
            flags = TRAINING | {"dataset_name": data, "model_name_or_path": runs / "start", "seed": seed}
            train_once(runs / "without", flags, schedule(steps))
            if not (runs / "retriever").exists():
                save_vision_model(runs / "without", runs / "retriever")
            more = {"retrieved_captions": 3, "retriever": runs / "retriever"}
            train_once(runs / "with", flags | more, schedule(steps))
            for system, name in zip(SYSTEMS, ("without", "with"), strict=True):
                rows = read_predictions(runs / name / "predictions" / "test.jsonl")
                captions, references = ([row[key] for row in rows] for key in ("prediction", "reference"))
                scores[number, seed, system] = measure(captions, references)
    print_captions(scores, seeds, SYSTEMS)


def train_once(folder: Path, flags: dict, more: list[str]) -> None:
    """Train into a folder, unless it is done."""
    if not (folder / "README.md").exists():
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        script = [sys.executable, str(PROJECT / "run_captioning.py"), "--output_dir", str(folder)]
        subprocess.run([*script, *given, *more], check=True, stdout=sys.stderr)


def save_vision_model(run_folder: Path, folder: Path) -> None:
    """Save the vision model of a run, and its image processor, as a retriever."""
    AutoModelForImageTextToText.from_pretrained(run_folder).model.vision_tower.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def image_processor() -> CLIPImageProcessorPil:
    """Return the image processor of model and retriever."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def build(folder: Path, seed: int, data: Path) -> None:
    """Save a small LLaVA with random weights, and a tokenizer trained on the captions."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*special.values(), "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(DatasetDict.load_from_disk(data)["train"]["caption"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, extra_special_tokens={"image_token": "<image>"}, **special
    )
    shared = dict(vision_feature_select_strategy="default")
    processor = LlavaProcessor(image_processor(), tokenizer, patch_size=PATCH, num_additional_image_tokens=1, **shared)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)  # the order of `special`
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        num_key_value_heads=4,
        max_position_embeddings=512,
        **SHAPE,
        **ids,
    )
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, num_hidden_layers=4, **SHAPE)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_token, vision_feature_layer=-1, **shared
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    main(arguments.folder, arguments.seeds)
