"""How long does evaluation take (loss and captions by beam search) against stock BLIP in a Seq2SeqTrainer?

    python benchmarks/evaluation.py [--device cuda --dtype bfloat16 --batch_size 64] [--json evaluation.json]

Stock is the `Seq2SeqTrainer` that most fine-tunes use, corrected so that `prediction_step` generates from
`pixel_values`: it runs the model for the loss and generates, and encodes the images for each. Ours is
`CaptioningTrainer.prediction_step`. The model is BLIP-base at 384 pixels with random weights and 3 beams. It never
ends a caption, so all have 64 new tokens. In the same run:

* the limit: the matrix products of our evaluation and, for each token, one read of the images' keys and values, at the
  machine's measured rates; our own parts one by one;
* captions that end as real ones do, since `[SEP]` is made to win after 15 to 45 tokens: what finished captions save;
* image features, which the baselines need: what it would cost to encode the images of the split again for them;
* batches of 4 to 32 images: time per image, and memory that is still held afterwards.

The exit status is 1 if the tokens of both sides differ in float32. In bfloat16 rounding decides some of them;
`gpu_check.py tokens` tells ties from errors.
"""

import contextlib
import gc
import io
import resource
import sys
import tempfile

import numpy as np
import torch
from datasets import Dataset
from measure import (
    END,
    START,
    alternate,
    autocast,
    build_captioner,
    make_batch,
    matrix_rate,
    now,
    parser,
    read_rate,
    report,
)
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, Seq2SeqTrainer

from captioning.models.fast_blip import decoder
from captioning.training.arguments import CaptioningArguments
from captioning.training.trainer import CaptioningTrainer
from collator import CaptioningCollator


TARGET = 5.0
SHARE = 0.6  # of the time on a GPU, in products and reads that cannot be saved
DECODING = {"num_beams": 3, "max_new_tokens": 64}


class StockTrainer(Seq2SeqTrainer):
    """What most fine-tunes do, but without the reference as a prompt."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Return loss, generated tokens and labels of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss
            tokens = model.generate(pixel_values=inputs["pixel_values"], **gen_kwargs)
        return loss, tokens, inputs["labels"]


class EndsLikeRealCaptions(LogitsProcessor):
    """Let `[SEP]` win after 15 to 45 tokens, by the first token of the caption, and never before."""

    def __call__(self, input_ids, scores):
        """Return `scores` `[rows, V]`, changed at `[SEP]`."""
        length, spread = input_ids.shape[1], input_ids[:, min(1, input_ids.shape[1] - 1)] % 31
        scores[:, END] = scores.amax(dim=-1) + torch.where(length > 15 + spread, 5.0, -9.0)
        return scores


def main(arguments) -> bool:
    captioner = build_captioner(arguments)
    decoding = DECODING if not arguments.quick else DECODING | {"max_new_tokens": 16}
    batch_size = arguments.batch_size or (16 if arguments.device == "cpu" else 64)
    batch = make_batch(captioner.model, batch_size)
    ours = make_trainer(captioner, decoding, batch_size, arguments)
    rates = [matrix_rate(arguments)]
    seconds, same = against_stock(ours, decoding, batch, arguments)
    rates.append(matrix_rate(arguments))
    flops, rate, reading = count_flops(ours, batch), max(rates), read_rate(arguments)
    read = bytes_of_images(captioner.model, batch_size, arguments) * decoding["max_new_tokens"]
    limit = flops / rate + read / reading
    parts = time_parts(captioner, batch, ours.generation_config, arguments)
    ending, ending_same = captions_that_end(captioner, batch, ours.generation_config, arguments)
    captioner.adapt(fast=True)
    split = time_split(ours, split_of(batch, 2 * batch_size), arguments)
    sizes = (2, 4) if arguments.quick else (4, 8, 16, 32)
    linear = {number: time_and_memory(ours, captioner.model, number, arguments) for number in sizes}

    ratio = {"ratio": seconds["stock"] / seconds["ours"], "target": TARGET}
    share = {"ratio": limit / seconds["ours"], "target": SHARE} if arguments.device == "cuda" else {}
    rows = [
        {"what": f"ours, {batch_size} images, seconds", "value": f"{seconds['ours']:.2f}"},
        {"what": "stock Seq2SeqTrainer", "value": f"{seconds['stock']:.2f}"} | ratio,
        {"what": f"matrix products at {rate / 1e9:.0f} GFLOP/s", "value": f"{flops / rate:.2f}"},
        {"what": f"keys and values of images, read at {reading / 1e9:.0f} GB/s", "value": f"{read / reading:.2f}"},
        {"what": "the limit, both: stock would be slower by", "value": f"{seconds['stock'] / limit:.2f}x"},
        {"what": "  its share of our time", "value": f"{limit / seconds['ours']:.2f}"} | share,
        {"what": "tokens are those of stock", "value": str(same)},
        *({"what": f"ours: {name}", "value": f"{value:.2f}"} for name, value in parts.items()),
        {"what": "decoding of captions that end, ours", "value": f"{ending['ours']:.2f}"},
        {"what": "  stock", "value": f"{ending['stock']:.2f}"},
        {"what": "  stock is slower by", "value": f"{ending['stock'] / ending['ours']:.2f}x"},
        {"what": "  tokens are those of stock", "value": str(ending_same)},
        {"what": "split and its image features, now", "value": f"{split['now']:.2f}"},
        {"what": "  with its images encoded again", "value": f"{split['again']:.2f}"},
        {"what": "  that is slower by", "value": f"{split['again'] / split['now']:.2f}x"},
    ]
    rows += [
        {"what": f"ours, {number:>2} images: seconds an image; MiB held after it", "value": f"{each:.3f} {kept:.0f}"}
        for number, (each, kept) in linear.items()
    ]
    figures = {"seconds": seconds, "parts": parts, "split": split, "matrix_rate": rate, "flops": flops}
    figures |= {"read_rate": reading, "read": read, "images_per_second": batch_size / seconds["ours"]}
    same_tokens = arguments.dtype == "bfloat16" or (same and ending_same)
    return report(arguments, "Evaluation", rows, **figures) and same_tokens


def make_trainer(captioner, decoding: dict[str, int], batch_size: int, arguments) -> CaptioningTrainer:
    """Return our trainer, which is not trained."""
    with tempfile.TemporaryDirectory() as folder:
        args = CaptioningArguments(
            output_dir=folder,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
            per_device_eval_batch_size=batch_size,
            use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16",
            bf16_full_eval=False,
            disable_tqdm=True,
            **decoding,
        )
    collate = CaptioningCollator(captioner)
    return CaptioningTrainer(captioner=captioner, args=args, generation_config=args.decoding(), data_collator=collate)


def against_stock(ours, decoding: dict[str, int], batch, arguments) -> tuple[dict[str, float], bool]:
    """Return the seconds of an evaluation of the batch by ours and stock, and whether their tokens agree."""
    stock = StockTrainer(model=ours.model, args=ours.args, processing_class=ours.captioner.tokenizer)
    found = {}

    def evaluate(trainer, fast, **settings) -> None:
        ours.captioner.adapt(fast=fast)
        _, found[trainer], _ = trainer.prediction_step(ours.model, dict(batch), False, **settings)

    steps = {"ours": lambda: evaluate(ours, True), "stock": lambda: evaluate(stock, False, **decoding)}
    seconds = alternate(steps, 1 if arguments.quick else arguments.rounds, arguments.device)
    tokens = torch.nn.functional.pad(found[ours][2], (1, 0), value=START)
    return seconds, torch.equal(tokens, found[stock])


def count_flops(ours, batch) -> int:
    """Return the products of our evaluation of the batch."""
    ours.captioner.adapt(fast=True)
    with countable(), FlopCounterMode(display=False) as counter:
        ours.prediction_step(ours.model, dict(batch), False)
    return counter.get_total_flops() + attention_flops(ours.model, len(batch["labels"]))


def bytes_of_images(model, batch_size: int, arguments) -> int:
    """Return the bytes of the keys and values of `batch_size` images in all layers of the text decoder."""
    text, patches = model.config.text_config, model.vision_model.embeddings.num_positions
    values = 2 * batch_size * patches * text.hidden_size * text.num_hidden_layers
    return values * getattr(torch, arguments.dtype).itemsize


def time_parts(captioner, batch, config: GenerationConfig, arguments) -> dict[str, float]:
    """Return the seconds of each part of our evaluation, the least of two runs."""
    found: dict[str, list[float]] = {}

    def done(name: str) -> None:
        nonlocal started
        found.setdefault(name, []).append(now(arguments.device) - started)
        started = now(arguments.device)

    for _ in range(2):
        started = now(arguments.device)
        with torch.no_grad(), autocast(arguments), captioner.evaluation():
            done("layout of weights")
            encoded = captioner.encode_images(batch)
            done("vision model")
            captioner._cross_attention(encoded)
            done("keys and values of the images")
            captioner.caption_nll(encoded, batch)
            done("loss")
            captioner.generate(encoded, config)
            done("beam search")
    return {name: min(seconds) for name, seconds in found.items()}


def captions_that_end(captioner, batch, config: GenerationConfig, arguments) -> tuple[dict[str, float], bool]:
    """Return the seconds that both sides decode captions of very different lengths, and whether their tokens agree."""
    decoder, found = captioner.model.text_decoder, {}
    with torch.no_grad(), autocast(arguments):
        encoded = captioner.encode_images(batch)

        def generate(name: str) -> None:
            captioner.adapt(fast=name == "ours")
            original = type(decoder)._get_logits_processor

            def with_ends(self, *args, **kwargs):
                return LogitsProcessorList([*original(self, *args, **kwargs), EndsLikeRealCaptions()])

            decoder._get_logits_processor = with_ends.__get__(decoder)
            try:
                with captioner.evaluation():
                    found[name] = captioner.generate(encoded, config)
            finally:
                del decoder._get_logits_processor

        seconds = alternate(
            {name: lambda name=name: generate(name) for name in ("ours", "stock")}, 1, arguments.device
        )
    return seconds, torch.equal(found["ours"], found["stock"])


def split_of(batch, number: int) -> Dataset:
    """Return a tokenized split of `number` images of noise, with the captions of a batch."""
    rng, files = np.random.default_rng(0), []
    for _ in range(number):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (520, 640), dtype=np.uint8)).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    tokens = [row[row != -100].tolist() for row in batch["labels"].cpu()]
    rows = {"image": files, "image_id": [str(i) for i in range(number)], "caption": [""] * number}
    return Dataset.from_dict(rows | {"input_ids": [[START, *tokens[i % len(tokens)]] for i in range(number)]})


def time_split(trainer, split: Dataset, arguments) -> dict[str, float]:
    """Return the seconds of a split's predictions and features, and with a second pass over its images for these."""
    steps = {
        "now": lambda: trainer.predict(split),
        "again": lambda: (trainer.predict(split), trainer.image_features(split)),
    }
    return alternate(steps, 1, arguments.device)


def time_and_memory(trainer, model, number, arguments) -> tuple[float, float]:
    """Return seconds an image, and MiB of memory that evaluation of `number` images leaves behind."""
    batch = make_batch(model, number)
    trainer.prediction_step(model, dict(batch), False)
    before, started = held(arguments), now(arguments.device)
    trainer.prediction_step(model, dict(batch), False)
    seconds = now(arguments.device) - started
    return seconds / number, held(arguments) - before


def held(arguments) -> float:
    """Return MiB of memory that is held."""
    gc.collect()
    if arguments.device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@contextlib.contextmanager
def countable():
    """Decode without packed weights and recorded steps, whose products torch does not count."""
    before = torch.backends.mkldnn.is_available, decoder.GRAPHS_ON
    torch.backends.mkldnn.is_available = lambda: False  # what `packed_weights` asks for
    decoder.GRAPHS_ON = set()
    try:
        yield
    finally:
        torch.backends.mkldnn.is_available, decoder.GRAPHS_ON = before


def attention_flops(model, batch_size) -> int:
    """Return the products of the fused attention of the vision model, which torch does not count on a CPU."""
    vision = model.config.vision_config
    patches = model.vision_model.embeddings.num_positions
    counted = model.device.type != "cpu"
    return 0 if counted else 2 * 2 * batch_size * vision.num_hidden_layers * patches**2 * vision.hidden_size


if __name__ == "__main__":
    sys.exit(0 if main(parser(__doc__).parse_args()) else 1)
