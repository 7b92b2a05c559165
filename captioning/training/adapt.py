"""The model, loaded or built, and adapted to a run."""

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from itertools import tee
from pathlib import Path
from typing import Any

from captioning.errors import UserError
from captioning.hub.revisions import pin_revision
from captioning.models.captioner import Captioner
from captioning.models.load import build_captioner, load_captioner, read_config, refuse_retrieved
from captioning.models.lora import add_lora, count_learning, is_adapted, merge_adapter
from captioning.models.optional_file import optional_file
from captioning.stages import stage
from captioning.training.arguments import CaptioningArguments, DataArguments, ModelArguments
from captioning.training.decoding import warn_of_other_settings


logger = logging.getLogger(__name__)


def pin_retriever(model_args: ModelArguments, args: CaptioningArguments) -> None:
    """Write the commit of the retriever, if any, into `args`; a model that takes no captions is a UserError."""
    if args.retriever:
        args.retriever_revision = pin_revision(args.retriever, args.retriever_revision, role="retriever")
    if args.retrieved_captions:
        refuse_retrieved(model_args.model_name_or_path, model_args.model_revision)


@stage("model")
def load_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    captions: Iterable[str],
    args: CaptioningArguments,
    checkpoint: str | None = None,
) -> Captioner:
    """Load the model, or build that of `config_name`, its tokenizer trained on `captions`, and adapt it to the run.

    A run that trains also learns how `captions` are written; a resumed one keeps the tokenizer of its checkpoint. The
    model's commit or config is written into `model_args`, the prompt of its family into `data_args` if there is none.
    A model that is missing, or cannot be adapted in this way, is a UserError.
    """
    captions, to_write = tee(captions)
    changed = checkpoint if args.resume_despite_changes else None  # its own tokenizer fits its embeddings
    if name := model_args.model_name_or_path:
        model_args.model_revision = pin_revision(name, model_args.model_revision)
        revision = None if changed else model_args.model_revision
        captioner = load_captioner(changed or name, revision, model_args.torch_dtype)
        if not args.do_train:
            warn_of_other_settings(captioner.model.generation_config, args.decoding())
            _warn_of_other_prompts(name, revision, args.retrieved_captions)
    else:
        model_args.model_config = read_config(model_args.config_name, model_args.model_config)
        tokenizer = changed or model_args.tokenizer_name or checkpoint
        captioner = build_captioner(
            model_args.config_name, args.seed, tokenizer, captions, model_args.vocab_size, model_args.model_config
        )
    _adapt(captioner, model_args, args)
    captioner.retrieved_captions = args.retrieved_captions
    captioner.set_prompt(data_args.prompt)
    data_args.prompt = captioner.prompt
    captioner.check_lengths(data_args.max_caption_length, args.max_new_tokens)
    captioner.set_generation_config(args.decoding(in_training=args.do_train))
    if not data_args.restore_surface_form:
        captioner.surface_form = None
    elif args.do_train and captioner.loses_surface_form:
        captioner.learn_surface_form(to_write)
    return captioner


def _warn_of_other_prompts(name: str, revision: str | None, number: int) -> None:
    """Log that a model was trained with another number of retrieved captions, if the recipe beside it says so."""
    with suppress(OSError, ValueError, TypeError, AttributeError):  # there is none, or one that is not ours
        recorded = json.loads(Path(optional_file(name, "recipe.json", revision)).read_text(encoding="utf-8"))
        if (was := recorded.get("retrieved_captions")) and was != number:
            logger.warning("The model was trained with --retrieved_captions %s, this run has %s", was, number)


def _adapt(captioner: Captioner, model_args: ModelArguments, args: CaptioningArguments) -> None:
    if args.do_train and is_adapted(captioner.model):
        if model_args.use_peft:
            mend = "train it with --merge_lora true first, or leave out --use_peft to train all weights"
            raise UserError(
                f"'{model_args.model_name_or_path}' is an adapter, and one of it could not be loaded; {mend}"
            )
        merge_adapter(captioner)
        captioner.model.requires_grad_(True)
    shapes = _shapes(captioner)
    captioner.adapt(
        model_args.image_size, model_args.label_smoothing, model_args.freeze_vision_model, model_args.fast_blip
    )
    if not args.do_train:
        return
    if model_args.use_peft:
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError("gradient_checkpointing_kwargs: use_reentrant must be false with use_peft")
        if _shapes(captioner) != shapes:
            raise UserError(
                f"image_size {model_args.image_size} changes weights that an adapter does not hold; leave it out"
            )
        lora = (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout, model_args.lora_target_modules)
        add_lora(captioner, model_args.model_name_or_path, model_args.model_revision, *lora)
    elif model_args.torch_dtype != "float32":
        raise UserError(f"torch_dtype {model_args.torch_dtype} is for weights that do not learn; set --use_peft true")
    logger.info("%s", count_learning(captioner.model))


def _shapes(captioner: Captioner) -> dict[str, Any]:
    return {name: value.shape for name, value in captioner.model.named_parameters()}
