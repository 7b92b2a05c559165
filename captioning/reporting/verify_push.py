"""The commit of a push, loaded back from the Hub as others will load it."""

import filecmp
import logging
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, snapshot_download
from PIL import Image

from captioning.hub.faults import describe_fault
from captioning.hub.repository import MODEL_FILES, REWRITTEN_FILES
from captioning.models.captioner import Captioner
from captioning.models.load import load_captioner
from captioning.reporting.run_record import RunRecord
from captioning.training.trainer import CaptioningTrainer


logger = logging.getLogger(__name__)


def verify_push(commit: CommitInfo, record: RunRecord, trainer: CaptioningTrainer | None = None) -> None:
    """Log whether the pushed model loads, has the bytes of the output folder, and captions the sample as in the run.

    The caption needs the `trainer` of the run, for its precision and device. Nothing is raised: the model is on the
    Hub already.
    """
    what = f"{commit.repo_url.repo_id} at {commit.oid}"
    try:
        # An empty cache, so that nothing comes from an earlier download; on the disk that has held the model
        with tempfile.TemporaryDirectory(prefix=".push-", dir=record.folder, ignore_cleanup_errors=True) as cache:
            repo_id, patterns = commit.repo_url.repo_id, list(MODEL_FILES)
            folder = snapshot_download(repo_id, revision=commit.oid, cache_dir=cache, allow_patterns=patterns)
            captioner = load_captioner(folder)
            captioner.set_prompt(record.recipe["prompt"])
            faults = _other_files(record.folder, Path(folder))
            if trainer is not None:
                faults += _other_caption(captioner, trainer, record)
    except Exception as error:
        logger.warning("Not verified: %s cannot be loaded back: %s", what, describe_fault(error))
    else:
        if faults:
            logger.warning("Not verified: %s is not what was pushed: %s", what, "; ".join(faults))
        else:
            logger.info("Verified: %s loads, and is what was pushed", what)


def _other_files(here: Path, there: Path) -> list[str]:
    paths = {path for pattern in MODEL_FILES for path in here.glob(pattern) if path.name not in REWRITTEN_FILES}
    names = sorted(path.relative_to(here).as_posix() for path in paths)
    _, differ, missing = filecmp.cmpfiles(here, there, names, shallow=False)
    return [f"{name} differs" for name in differ] + [f"{name} is missing" for name in missing]


def _other_caption(captioner: Captioner, trainer: CaptioningTrainer, record: RunRecord) -> list[str]:
    """Return what differs in the caption of the sample."""
    captioner.model.to(trainer.args.device)
    found = trainer.caption(Image.open(record.folder / "sample.png"), captioner)
    known = record.sample["caption"]
    return [] if found == known else [f"its caption of sample.png is '{found}', not '{known}'"]
