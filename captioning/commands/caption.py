"""Caption images of your own by a saved model, with the decode settings that it was scored with."""

from captioning.commands import frame, new_file, positive


EXAMPLE = "user/model scans/ 'more/**/*.png' --output captions.csv"
WORK = "captioning.inference.caption:caption_images"
ARGUMENTS = {
    "model": {"help": "folder or Hub id of a model or an adapter"},
    "images": {"nargs": "+", "help": "files, folders, quoted patterns, or - for a list of them on standard input"},
    "--output": {
        "type": new_file(".csv", ".jsonl"),
        "help": "file to append captions to, .csv (ImageCLEF's ID,Caption) or .jsonl; what it holds is not done again",
    },
    "--html": {"type": new_file(".html"), "help": "page of images and captions to write at the end"},
    "--frame": {
        "type": frame,
        "default": "middle",
        "help": "of a DICOM: middle (the default), all, or a number from 1",
    },
    "--batch_size": {"type": positive, "default": 8, "help": "images at a time: 8"},
    "--device": {"help": "as PyTorch names it; default: the GPU if there is one"},
    "--revision": {"help": "commit, branch or tag of a Hub id"},
    "--prompt": {"help": "text that every caption continues; default: as in the training"},
}
OF_THE_MODEL = "default: as recorded with the model"
ARGUMENTS |= {
    f"--{name}": {"type": int, "help": OF_THE_MODEL}
    for name in ("num_beams", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size")
} | {"--length_penalty": {"type": float, "help": OF_THE_MODEL}}
