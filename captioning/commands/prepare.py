"""Check the rows of any source, and store them in a folder that --dataset_name takes, or describe them."""

from dataclasses import fields

from captioning.commands import positive
from captioning.data.layout import Layout


EXAMPLE = "eltorio/ROCOv2-radiology data/rocov2"
WORK = "captioning.data.prepare:prepare"
ARGUMENTS = {
    "source": {"help": "Hub id, folder, table of paths and captions, or 'phantoms'; see docs/data.md"},
    "folder": {"nargs": "?", "help": "new folder to write; its rejected.jsonl lists the rows that were left out"},
    "--describe": {"action": "store_true", "help": "write no folder, but print statistics: captions, images, leaks"},
    "--json": {"action": "store_true", "help": "the statistics as JSON"},
    "--revision": {"help": "commit, branch or tag of a Hub id"},
    "--max_rejected_fraction": {"type": float, "default": 0.01, "help": "share of a split that may be left out: 0.01"},
    "--num_proc": {"type": positive, "help": "number of processes that check the rows"},
}
for item in fields(Layout):
    kind = next(kind for kind in (int, float, str) if kind.__name__ in str(item.type))
    ARGUMENTS[f"--{item.name}"] = {"type": kind, "default": item.default, "help": item.metadata["help"]}
