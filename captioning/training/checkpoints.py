"""Which checkpoints of an output folder a run can resume from."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from captioning.models.lora import WEIGHT_FILES


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Return the newest complete checkpoint, or None; each incomplete one is logged.

    A run that was killed while it saved left no `trainer_state.json`, which the Trainer writes last, or half of one;
    a run that was killed while it removed an old checkpoint left some of its files.
    """
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    checkpoints = {int(step): path for path in paths if (step := path.name.rpartition("-")[2]).isdigit()}
    for step, path in sorted(checkpoints.items(), reverse=True):
        fault = checkpoint_fault(path, step)
        if fault is None:
            return str(path)
        logger.warning("%s is incomplete and is skipped: %s", path, fault)
    return None


def checkpoint_fault(folder: Path, step: int | None = None) -> str | None:
    """Return why a run cannot resume from a checkpoint, None if it can; of large files only the ends are read.

    If `step` is given, the checkpoint must be of that optimizer step.
    """
    try:
        for path in folder.glob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        path = folder / "trainer_state.json"
        state = TrainerState.load_from_json(str(path))
        found = state.global_step
        # Both lines fail for fields of other types
        sum([found, state.epoch, state.max_steps, state.train_batch_size, *(log["step"] for log in state.log_history)])
        state.stateful_callbacks["TrainerControl"].keys()
    except Exception:  # whatever a damaged file makes of the fields
        return f"{path.name} is missing or damaged"
    if step is not None and found != step:
        return f"trainer_state.json is of step {found}"
    weights = next((name for name in WEIGHT_FILES if (folder / name).is_file()), WEIGHT_FILES[0])
    for name in (weights, "optimizer.pt", "scheduler.pt"):  # without the last, stock loads no optimizer
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob("*.pth")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif not zipfile.is_zipfile(path):
                return f"{path.name} is damaged"
        except (OSError, SafetensorError) as error:
            return f"{path.name} is damaged: {error}"
    return None
