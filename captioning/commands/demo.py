"""Show a page on this machine that captions images in a browser, or write it as a Hugging Face Space."""

from captioning.commands import positive


EXAMPLE = "outputs/my-run"
WORK = "captioning.inference.app:demo"
ARGUMENTS = {
    "model": {"help": "folder of a saved model, or Hub id"},
    "--revision": {"help": "commit, branch or tag of a Hub id"},
    "--device": {"help": "as torch names it; default: the GPU if there is one"},
    "--host": {"default": "127.0.0.1", "help": "address to listen at; default: 127.0.0.1, for this machine alone"},
    "--port": {"type": positive, "help": "default: the first free one from 7860"},
    "--train": {"help": "source of training images, as --dataset_name: the page shows the captions of the nearest"},
    "--train_images": {"type": positive, "default": 500, "help": "how many of them, encoded at the start: 500"},
    "--export_space": {"metavar": "FOLDER", "help": "write the page as a Hugging Face Space instead of showing it"},
}
