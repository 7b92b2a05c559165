"""How many bytes does a parameter take in training: weight, gradient and the state of AdamW, without activations?

    python benchmarks/weights.py [--json weights.json]

Counts the tensors of a step of `CaptioningTrainer` on a CPU. The ratio is to the formula of docs/models.md.
"""

import tempfile

from datasets import Dataset
from measure import parser, report

from captioning.files import PROJECT
from captioning.models.load import build_captioner
from captioning.training.adapt import load_model
from captioning.training.recipe import parse_arguments
from captioning.training.trainer import CaptioningTrainer
from collator import CaptioningCollator


RUN = "--max_steps 1 --eval_strategy no --save_strategy no --use_cpu true --model_name_or_path {0} --output_dir {0} "
KINDS = ("", "--freeze_vision_model true", "--use_peft true", "--use_peft true --torch_dtype bfloat16")


def _measure(folder: str, kind: str) -> dict:
    model_args, data_args, args = parse_arguments((RUN.format(folder) + kind).split())
    captioner = load_model(model_args, data_args, ["chest"], args)
    image = {"path": str(PROJECT / "docs" / "images" / "example.png"), "bytes": None}
    rows = Dataset.from_dict({"image": [image], "input_ids": captioner.tokenize(["chest"], 64)[0]})
    options = {"args": args, "generation_config": args.decoding(), "train_dataset": rows}
    trainer = CaptioningTrainer(captioner=captioner, data_collator=CaptioningCollator(captioner), **options)
    weights, found = list(captioner.model.parameters()), []

    def count(optimizer, *_) -> None:  # after the update, before the gradients are deleted
        states = [value for moments in optimizer.state.values() for value in moments.values()]
        for tensors in (weights, [weight.grad for weight in weights], states):
            found.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))

    trainer.create_optimizer().register_step_post_hook(count)
    trainer.train()
    number, learning = (sum(w.numel() for w in weights if w.requires_grad or both) for both in (True, False))
    ratio = sum(found) / (16 * learning + (2 if "bfloat16" in kind else 4) * (number - learning))
    parts = " + ".join(f"{part / number:.2f}" for part in found)
    row = {"what": f"{kind or 'all'} ({learning / number:.0%})", "value": f"{parts} = {sum(found) / number:.2f}"}
    return row | {"ratio": ratio, "target": 1.01, "at_most": True}


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        built = build_captioner("recipes/configs/blip_small.json", 0, None, ["chest"] * 9, 200)
        built.model.save_pretrained(temporary)
        built.processor.save_pretrained(temporary)
        table = [_measure(temporary, kind) for kind in KINDS]
    raise SystemExit(not report(arguments, "Bytes a parameter: weights + gradients + optimizer", table))
