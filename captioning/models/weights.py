"""What is wrong with weights that were loaded."""

from collections.abc import Collection

import torch

from captioning.errors import UserError


def refuse_missing_weights(names: Collection[str], what: str) -> None:
    """Raise UserError if there are `names` of weights that `what` lacks, which stock would draw at random."""
    if names:
        raise UserError(f"{what} lacks {len(names)} weights ('{min(names)}', ...); give another checkpoint")


def nan_weights(model: torch.nn.Module) -> str | None:
    """Return the name of the first weight or buffer that holds NaN or infinity, None if there is none."""
    for name, values in model.state_dict().items():
        # The sum, a tenth of the time, shows both; it may also overflow
        if not values.sum().isfinite() and not values.isfinite().all():
            return name
    return None


def refuse_nan_weights(model: torch.nn.Module, source: str) -> None:
    """Raise UserError if a weight of the model that was loaded from `source` is NaN or infinite."""
    if name := nan_weights(model):
        raise UserError(f"model '{source}': '{name}' holds NaN or infinity; give a checkpoint from before it broke")
