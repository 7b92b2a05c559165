"""What ends a training early: NaN or infinity, full memory, a full disk, a signal, too many unreadable images.

Each becomes a line that says how to go on from the last checkpoint. `command_line.py` handles signals elsewhere.
"""

import json
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback

from captioning.command_line import full_disk
from captioning.errors import UserError, causes, is_disk_full, is_out_of_memory
from captioning.training.checkpoints import last_complete_checkpoint


logger = logging.getLogger(__name__)

FEW_UNREADABLE = 20  # images that may be unreadable whatever their share: the first batches are too small a sample
TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed", "unexpected pos")  # torch does not say why
SMALLER_BATCH = {
    "train": "a lower --per_device_train_batch_size with more --gradient_accumulation_steps, "
    "--auto_find_batch_size true, or --gradient_checkpointing true",
    "eval": "a lower --per_device_eval_batch_size, or fewer --num_beams",
}


def not_finite(what: str, output_dir: str) -> UserError:
    """Return the error for a loss or weights that are NaN or infinite: `what`, and how to go on."""
    last = last_complete_checkpoint(output_dir)
    resume = f"the last good checkpoint is {last}: go on from it with --resume_from_checkpoint true"
    go_on = resume if last else "there is no checkpoint yet: start again"
    return UserError(f"{what}; {go_on}, with a lower --learning_rate or --max_grad_norm, or --bf16 instead of --fp16")


@contextmanager
def full_is_user_error(output_dir: str, batch_size: int, what: str) -> Iterator[None]:
    """Turn a full memory or disk into a `UserError`; `what` is `train` or `eval`, as in the flag of the batch size."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error) or _torch_found_disk_full(error, output_dir):
            where = full_disk(error, output_dir, "free some, or set a lower --save_total_limit,")
            go_on = "run again with --resume_from_checkpoint true: complete checkpoints are kept"
            raise UserError(f"no space left {where} and {go_on}") from error
        if is_out_of_memory(error):
            size = f"per_device_{what}_batch_size {batch_size}"
            raise UserError(f"out of memory with {size}; set {SMALLER_BATCH[what]}") from error
        raise


def _torch_found_disk_full(error: Exception, folder: str) -> bool:
    """Tell whether torch failed to write, and a megabyte does not fit either: nothing else shows a quota."""
    if not any(text in str(cause) for cause in causes(error) for text in TORCH_CANNOT_WRITE):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            return probe.write(bytes(2**20)) < 2**20
    except OSError as fault:
        return is_disk_full(fault)


class StopOnSignal(TrainerCallback):
    """On a signal, finish the current step, save a checkpoint and stop; it is enough if one process gets it."""

    def __init__(self):
        self.received = 0  # the signal that this process got, 0: none; after `agree`, that of any process
        self.stopping = False  # the training was told to end

    def receive(self, number: signal.Signals) -> None:
        """Handle the signal, for `on_stop_signals`."""
        self.received = number
        again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
        what = "when the current step or evaluation is finished, a checkpoint is saved and the run ends"
        os.write(2, f"{number.name}: {what}{again}\n".encode())  # not by `logging`, whose lock may be held

    def agree(self, args) -> bool:
        """Return whether any process has received a signal; all processes must call this."""
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        return self.received > 0

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end; at the end of an epoch the evaluation comes first, as in any run."""
        if self.agree(args):
            self.stopping = control.should_training_stop = True
            control.should_save = state.epoch != round(state.epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint of the finished epoch."""
        control.should_save |= self.stopping


class UnreadableImages(TrainerCallback):
    """List streamed training images that cannot be read, which the collator masks from the loss; too many end the run.

    `max_fraction` is of the rows trained on so far, from 0 to 1; `FEW_UNREADABLE` images are always allowed.
    """

    def __init__(self, max_fraction: float, rejected_file: str | os.PathLike):
        self.max_fraction = max_fraction
        self.rejected_file = Path(rejected_file)
        self._count = multiprocessing.Value("q", 0)  # shared by the workers that load data
        self._first_step = 0

    def add(self, image_id: str, reason: str) -> None:
        """Log and list an image; called in the process that collates it."""
        logger.warning("Training image '%s' is left out: %s", image_id, reason)
        entry = {"split": "train", "image_id": image_id, "reason": f"unreadable image: {reason}"}
        line = json.dumps(entry, ensure_ascii=False)
        with self._count.get_lock():
            self._count.value += 1
            known = self.rejected_file.read_text(encoding="utf-8") if self.rejected_file.exists() else ""
            if line not in known.splitlines():  # the image comes again in each epoch
                with open(self.rejected_file, "a", encoding="utf-8") as file:
                    file.write(line + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        """Start to count."""
        self._first_step, self._count.value = state.global_step, 0

    def on_step_end(self, args, state, control, **kwargs):
        """Raise a UserError if there are too many; that of a worker would be the text of a traceback."""
        steps = state.global_step - self._first_step
        seen = steps * args.train_batch_size * args.gradient_accumulation_steps
        if self._count.value > max(FEW_UNREADABLE, self.max_fraction * seen):
            raise UserError(
                f"split 'train': {self._count.value} of about {seen} images read cannot be used; see "
                f"{self.rejected_file}, or raise --max_rejected_fraction above {self.max_fraction:g}"
            )
