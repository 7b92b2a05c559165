"""How long does evaluation take (loss and captions by beam search) against stock BLIP in a Seq2SeqTrainer?

    python benchmarks/evaluation.py [--device cuda --dtype bfloat16 --batch_size 64] [--json evaluation.json]

Stock is the `Seq2SeqTrainer` that most fine-tunes use, mended so that `prediction_step` generates from `pixel_values`:
it runs the model for the loss and generates, both from the image. Ours is `CaptioningTrainer.prediction_step`. The
model is BLIP-base at 384 pixels with random weights and 3 beams; it never ends a caption, so all have 64 new tokens.
In the same run:

* the limit: the matrix products of our evaluation at the machine's measured rate, and our own parts one by one;
* captions that end as real ones do, since `[SEP]` is made to win after 15 to 45 tokens: what finished captions save;
* batches of 4 to 32 images: time per image, and memory that is still held afterwards.

Tokens must be the same on both sides, or the status is 1.
"""

import contextlib
import gc
import resource
import sys
import tempfile

import torch
from measure import END, START, alternate, autocast, build_model, make_batch, matrix_rate, now, parser, report
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipProcessor, LogitsProcessor, Seq2SeqTrainer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioning.models.blip import (
    caption_logits,
    cross_attention_of,
    encode_images,
    generate_captions,
    packed_for_evaluation,
)
from captioning.models.fast_blip.modules import use_fast_blip, use_stock_blip
from captioning.models.tokenizer import add_blip_tokens, train_tokenizer
from captioning.training.arguments import CaptioningArguments
from captioning.training.trainer import CaptioningTrainer


TARGET = 5.0
DECODING = {"num_beams": 3, "max_new_tokens": 64}


class StockTrainer(Seq2SeqTrainer):
    """What most fine-tunes do, without the reference as a prompt."""

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
    model = build_model(arguments)
    decoding = DECODING if not arguments.quick else DECODING | {"max_new_tokens": 16}
    batch_size = arguments.batch_size or (16 if arguments.device == "cpu" else 64)
    batch = make_batch(model, batch_size)
    side = model.config.vision_config.image_size
    tokenizer = add_blip_tokens(train_tokenizer([__doc__], 200))  # the trainers want one; no text is read
    with tempfile.TemporaryDirectory() as folder:
        args = CaptioningArguments(
            output_dir=folder,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
            use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16",
            bf16_full_eval=False,
        )
        processor = BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), tokenizer)
        ours = CaptioningTrainer(
            model=model, args=args, processing_class=processor, start_ids=[START], decoding=decoding
        )
        stock = StockTrainer(model=model, args=args, processing_class=processor.tokenizer)
    found = {}

    def evaluate(switch, trainer, **settings) -> None:
        switch(model)
        _, outputs, _ = trainer.prediction_step(model, dict(batch), False, **settings)
        found[trainer] = outputs

    rate = matrix_rate(arguments)
    seconds = alternate(
        {
            "ours": lambda: evaluate(use_fast_blip, ours),
            "stock": lambda: evaluate(use_stock_blip, stock, **decoding),
        },
        1 if arguments.quick else arguments.rounds,
        arguments.device,
    )
    rate = max(rate, matrix_rate(arguments))
    tokens = torch.nn.functional.pad(found[ours][2], (1, 0), value=START)
    same = torch.equal(tokens, found[stock])
    use_fast_blip(model)
    with plain_weights(), FlopCounterMode(display=False) as counter:
        ours.prediction_step(model, dict(batch), False)
    flops = counter.get_total_flops() + attention_flops(model, batch_size)

    rows = [
        {"what": f"ours, {batch_size} images, seconds", "value": f"{seconds['ours']:.2f}"},
        {
            "what": "stock Seq2SeqTrainer",
            "value": f"{seconds['stock']:.2f}",
            "ratio": seconds["stock"] / seconds["ours"],
            "target": TARGET,
        },
        {"what": f"the limit: matrix products at {rate / 1e9:.0f} GFLOP/s", "value": f"{flops / rate:.2f}"},
        {"what": "  at the limit, stock would be slower by", "value": f"{seconds['stock'] * rate / flops:.2f}x"},
        {"what": "tokens are those of stock", "value": str(same)},
    ]
    parts = time_parts(model, batch, decoding, arguments)
    rows += [{"what": f"ours: {name}", "value": f"{value:.2f}"} for name, value in parts.items()]
    ending, ending_same = captions_that_end(model, batch, decoding, arguments)
    rows += [
        {"what": "decoding of captions that end, ours", "value": f"{ending['ours']:.2f}"},
        {"what": "  stock", "value": f"{ending['stock']:.2f}"},
        {"what": "  stock is slower by", "value": f"{ending['stock'] / ending['ours']:.2f}x"},
        {"what": "  tokens are those of stock", "value": str(ending_same)},
    ]
    use_fast_blip(model)
    sizes = (2, 4) if arguments.quick else (4, 8, 16, 32)
    linear = {number: time_and_memory(ours, model, number, arguments) for number in sizes}
    rows += [
        {"what": f"ours, {number:>2} images: seconds an image; MiB held after it", "value": f"{each:.3f} {kept:.0f}"}
        for number, (each, kept) in linear.items()
    ]
    reached = report(arguments, "Evaluation", rows, seconds=seconds, parts=parts, matrix_rate=rate, flops=flops)
    return reached and same and ending_same


def time_parts(model, batch, decoding, arguments) -> dict[str, float]:
    """Return the seconds of each part of our evaluation, the least of two runs."""
    labels, images = batch["labels"], batch["pixel_values"]
    found: dict[str, list[float]] = {}

    def done(name: str) -> None:
        nonlocal started
        found.setdefault(name, []).append(now(arguments.device) - started)
        started = now(arguments.device)

    for _ in range(2):
        started = now(arguments.device)
        with torch.no_grad(), autocast(arguments), packed_for_evaluation(model):
            done("layout of weights")
            embeds = encode_images(model, images)
            done("vision model")
            cross = cross_attention_of(model, embeds)
            done("keys and values of the images")
            logits = caption_logits(model, embeds, batch["input_ids"], batch["attention_mask"], labels >= 0, cross)
            torch.nn.functional.cross_entropy(logits, labels[labels >= 0])
            done("loss")
            generate_captions(model, embeds, [START], cross, **decoding)
            done("beam search")
    return {name: min(seconds) for name, seconds in found.items()}


def captions_that_end(model, batch, decoding, arguments) -> tuple[dict[str, float], bool]:
    """Return the seconds that both sides decode captions of very different lengths, and whether their tokens agree."""
    with torch.no_grad(), autocast(arguments):
        embeds = encode_images(model, batch["pixel_values"])
        found = {}

        def generate(name, switch):
            switch(model)
            original = type(model.text_decoder)._get_logits_processor

            def with_ends(self, *args, **kwargs):
                processors = original(self, *args, **kwargs)
                processors.append(EndsLikeRealCaptions())
                return processors

            model.text_decoder._get_logits_processor = with_ends.__get__(model.text_decoder)
            try:
                found[name] = generate_captions(model, embeds, [START], cross_attention_of(model, embeds), **decoding)
            finally:
                del model.text_decoder._get_logits_processor

        seconds = alternate(
            {"ours": lambda: generate("ours", use_fast_blip), "stock": lambda: generate("stock", use_stock_blip)},
            1,
            arguments.device,
        )
    return seconds, torch.equal(found["ours"], found["stock"])


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
def plain_weights():
    """Decode without packed weights, whose products torch does not count."""
    before = torch.backends.mkldnn.is_available
    torch.backends.mkldnn.is_available = lambda: False  # what `packed_weights` asks for
    try:
        yield
    finally:
        torch.backends.mkldnn.is_available = before


def attention_flops(model, batch_size) -> int:
    """Return the products of the fused attention of the vision model, which torch does not count on a CPU."""
    vision = model.config.vision_config
    patches = model.vision_model.embeddings.num_positions
    counted = model.device.type != "cpu"
    return 0 if counted else 2 * 2 * batch_size * vision.num_hidden_layers * patches**2 * vision.hidden_size


if __name__ == "__main__":
    sys.exit(0 if main(parser(__doc__).parse_args()) else 1)
