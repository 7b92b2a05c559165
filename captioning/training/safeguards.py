"""What ends a training early, and how: numbers that go wrong, memory and disks that are full, SIGTERM.

Each becomes a `UserError`: one line that says what happened, where, and how to go on from the last checkpoint.
"""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback

from captioning.errors import Stopped, UserError


logger = logging.getLogger(__name__)

SHOWN_IDS = 8  # of the batch whose loss is no number
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")  # as libraries in Rust and C++ say it
TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed", "unexpected pos")  # it does not say why
MEMORY_FULL = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "No executable batch size")


# --- Numbers that go wrong ------------------------------------------------------------------------------------


def loss_is_no_number(loss: float, step: int, image_ids: list[str], last_checkpoint: str | None) -> UserError:
    """Return the line for a loss that is NaN or infinite.

    Args:
        loss: of a micro-batch.
        step: the optimizer step under way, from 1.
        image_ids: of the micro-batch.
        last_checkpoint: where the run can be resumed.
    """
    ids = ", ".join(image_ids[:SHOWN_IDS]) + (", ..." if len(image_ids) > SHOWN_IDS else "")
    return UserError(
        f"the loss of step {step} is {loss}, at the images {ids or 'unknown'}; {_resume(last_checkpoint)}, with a "
        "lower --learning_rate or --max_grad_norm, or --bf16 instead of --fp16"
    )


def weight_is_no_number(step: int, last_checkpoint: str | None) -> UserError:
    """Return the line for weights that are NaN or infinite after an optimizer step, from 1."""
    return UserError(
        f"step {step} left weights that are no numbers, and no checkpoint is saved; {_resume(last_checkpoint)}, with "
        "a lower --learning_rate or --max_grad_norm"
    )


def _resume(last_checkpoint: str | None) -> str:
    if last_checkpoint is None:
        return "there is no checkpoint yet: start again"
    return f"the last good checkpoint is {last_checkpoint}: go on from it with --resume_from_checkpoint true"


# --- Memory and disk ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_is_user_error(output_dir: str, batch_size: int, what: str) -> Iterator[None]:
    """Turn a full memory or disk into a `UserError`.

    Args:
        output_dir: where the block writes.
        batch_size: of this process, that the block tries.
        what: its name, `train` or `eval`, as in the flag for the batch size.

    Raises:
        UserError: memory or disk is full. Other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error, output_dir):
            raise disk_full(error, output_dir) from error
        if is_out_of_memory(error):
            flags = {
                "train": "a lower --per_device_train_batch_size with more --gradient_accumulation_steps, "
                "--auto_find_batch_size true, or --gradient_checkpointing true",
                "eval": "a lower --per_device_eval_batch_size, or fewer --num_beams",
            }[what]
            raise UserError(f"out of memory with per_device_{what}_batch_size {batch_size}; set {flags}") from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a GPU, or the machine, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in MEMORY_FULL)


def is_disk_full(error: BaseException | None, output_dir: str) -> bool:
    """Tell whether an error, or one that it came from, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in DISK_FULL):
            return True
        if any(text in str(error) for text in TORCH_CANNOT_WRITE) and not _can_write(output_dir):
            return True
        error = error.__cause__ or error.__context__
    return False


def _can_write(folder: str) -> bool:
    """Tell whether a megabyte can be written into a folder: quotas are not to be seen otherwise."""
    probe = Path(folder) / ".space.tmp"
    try:
        probe.write_bytes(b"0" * 2**20)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return True


def disk_full(error: BaseException, output_dir: str) -> UserError:
    """Return the line for a full disk."""
    path = getattr(error, "filename", None) or output_dir
    return UserError(
        f"no space left to write '{path}'; free some, or set a lower --save_total_limit, and run again with "
        "--resume_from_checkpoint true: complete checkpoints are kept"
    )


# --- SIGTERM --------------------------------------------------------------------------------------------------


class StopOnSigterm(TrainerCallback):
    """On SIGTERM save a checkpoint after the step under way, and stop; of several processes, one must get it.

    Use as a context manager around the training, in the main thread; elsewhere it does nothing.
    """

    def __init__(self):
        self.received = False  # by this process, or by any after `agree`
        self.stopping = False  # the training was told to end
        self._before = None

    def __enter__(self) -> "StopOnSigterm":
        """Catch SIGTERM."""
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._catch)
        return self

    def __exit__(self, *error) -> None:
        """Leave SIGTERM to what it was left to before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _catch(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a worker that loads data, forked with this handler
            os._exit(128 + number)
        self.received = True
        # Not by the logger, whose lock the interrupted line may hold
        os.write(
            2, b"SIGTERM: when the step or evaluation under way is over, a checkpoint is saved and the run ends\n"
        )

    def agree(self, args) -> bool:
        """Return whether any process has got the signal; all must ask."""
        if args.world_size > 1:
            received = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self.received = bool(received)
        return self.received

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end; the last step of an epoch is evaluated first, as in any run."""
        if self.agree(args):
            self.stopping = control.should_training_stop = True
            control.should_save = state.epoch != round(state.epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save what the epoch ended with."""
        control.should_save |= self.stopping

    def stopped(self, checkpoint: str | None, step: int, max_steps: int) -> Stopped:
        """Return the error that ends the run, and says from which checkpoint it goes on."""
        place = f", from {checkpoint}" if checkpoint else ""
        return Stopped(
            f"stopped by SIGTERM after step {step} of {max_steps}; go on with the same command and "
            f"--resume_from_checkpoint true{place}",
            exit_status=128 + signal.SIGTERM,
        )


FEW_UNREADABLE = 20  # images that may be unreadable whatever their share: the first batches are no sample


# --- Unreadable images ----------------------------------------------------------------------------------------


class UnreadableImages(TrainerCallback):
    """What becomes of training images that turn out unreadable when they come: no pass has looked at them before.

    Such an image is told, counted over the workers of a process, and listed in `rejected.jsonl`; the collator has
    nothing learnt from it. Too many of them end the run.

    Args:
        max_fraction: of the rows trained on so far, from 0 to 1; `FEW_UNREADABLE` images are always allowed.
        rejected_file: list of the rows that cannot be used, one JSON object a line.
    """

    def __init__(self, max_fraction: float, rejected_file: str | os.PathLike):
        self.max_fraction = max_fraction
        self.rejected_file = Path(rejected_file)
        self._count = multiprocessing.Value("q", 0)
        self._first_step = 0

    def add(self, image_id: str, reason: str) -> None:
        """Note an image; called in whichever process collates it."""
        logger.warning("Training image '%s' is left out: %s", image_id, reason)
        line = json.dumps(
            {"split": "train", "image_id": image_id, "reason": f"unreadable image: {reason}"}, ensure_ascii=False
        )
        with self._count.get_lock():
            self._count.value += 1
            known = self.rejected_file.read_text(encoding="utf-8") if self.rejected_file.exists() else ""
            if line not in known.splitlines():  # it comes again in each epoch
                with open(self.rejected_file, "a", encoding="utf-8") as file:
                    file.write(line + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        """Start to count."""
        self._first_step, self._count.value = state.global_step, 0

    def on_step_end(self, args, state, control, **kwargs):
        """End a run that has met too many.

        Raises:
            UserError: here, and not in a worker, whose errors arrive wrapped in the text of their trace.
        """
        steps = state.global_step - self._first_step
        seen = steps * args.train_batch_size * args.gradient_accumulation_steps
        if self._count.value > max(FEW_UNREADABLE, self.max_fraction * seen):
            raise UserError(
                f"split 'train': {self._count.value} of about {seen} images read cannot be used; see "
                f"{self.rejected_file}, or raise --max_rejected_fraction above {self.max_fraction:g}"
            )
