"""A run resumes from the newest complete checkpoint."""

import torch
from safetensors.torch import save_file

from captioning.training.checkpoints import last_complete_checkpoint


def test_incomplete_checkpoints_are_skipped(tmp_path, caplog):
    state = '{"global_step": %d, "epoch": 1, "train_batch_size": 4, "stateful_callbacks": {"TrainerControl": {}}}'
    states = (state, state, '{"global_st', None, *[state] * 4, state.replace("%d", "9"))
    for step, content in zip(range(10, 55, 5), states, strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.ones(99)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.ones(99)}, folder / name)
        if content:
            (folder / "trainer_state.json").write_text(content.replace("%d", str(step)))
    (tmp_path / "checkpoint-30" / "model.safetensors").unlink()  # as if killed while it was removed
    (tmp_path / "checkpoint-35" / "optimizer.pt").unlink()
    for step, name in ((40, "model.safetensors"), (45, "scheduler.pt")):
        path = tmp_path / f"checkpoint-{step}" / name
        path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "checkpoint-final").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-15")
    reasons = ("trainer_state.json", "trainer_state.json", "model.safetensors", "optimizer.pt", "model.safetensors")
    for step, reason in zip(range(20, 55, 5), (*reasons, "scheduler.pt", "trainer_state.json"), strict=True):
        assert f"checkpoint-{step} is incomplete and is skipped: {reason} is " in caplog.text
    assert last_complete_checkpoint(str(tmp_path / "none")) is None
