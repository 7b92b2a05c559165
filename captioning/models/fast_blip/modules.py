"""BLIP's fast path: fused attention, a leaner MLP, the head on caption tokens only, and beams that share their image.

`use_fast_blip` gives the modules of a loaded model other classes and leaves their parameters alone: names, values and
files on disk stay plain BLIP. The numbers are those of stock transformers up to the rounding of float arithmetic, the
generated tokens the same. Captions are decoded by `caption_decoding.py`.
"""

import functools
import inspect
import logging

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BlipForConditionalGeneration, GenerationConfig
from transformers.activations import GELUActivation
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.blip.modeling_blip import BlipAttention, BlipMLP
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextEncoder,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)
from transformers.utils import output_capturing

from captioning.models.captioner import IGNORE_INDEX
from captioning.models.fast_blip.decoding import decode_captions, project_images
from captioning.models.fast_blip.packed_weights import is_packed


logger = logging.getLogger(__name__)


def use_fast_blip(model: BlipForConditionalGeneration) -> BlipForConditionalGeneration:
    """Switch `model` to the fast path, in place, and return it; `use_stock_blip` undoes it."""
    return _swap_classes(model, {stock: fast for fast, stock in STOCK_CLASSES.items()})


def use_stock_blip(model: BlipForConditionalGeneration) -> BlipForConditionalGeneration:
    """Switch `model` back to what transformers ships, in place, and return it."""
    return _swap_classes(model, STOCK_CLASSES)


def is_fast(model: BlipForConditionalGeneration) -> bool:
    """Tell whether `model` is on the fast path."""
    return isinstance(model.text_decoder, FastTextDecoder)


def _swap_classes(model: nn.Module, classes: dict[type, type]) -> nn.Module:
    # A module's class is its code alone; hooks, devices, wrappers and parameters stay what they are. Subclasses made
    # by others (those of an adapter or FSDP) are not ours to replace.
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


# --- Attention ------------------------------------------------------------------------------------------------


class FastVisionAttention(BlipAttention):
    """Self-attention over patches that never stores the maps of `[P + 1, P + 1]` attention weights per head."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what stock does for `hidden_states` `[B, P + 1, D]`; the weights only if a caller records them."""
        if _weights_are_recorded():
            return super().forward(hidden_states, **kwargs)
        batch, length, _ = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).contiguous()  # faster in the kernel than the copy costs
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(context.transpose(1, 2).flatten(2)), None


class FastTextAttention(BlipTextSelfAttention):
    """Self- and cross-attention of the text decoder, likewise."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what stock does for `hidden_states` `[B, L, D]`; with a cache or recorded weights, through it."""
        mask = encoder_attention_mask if encoder_hidden_states is not None else attention_mask
        # Where a mask hides all that a token could see, the fused kernels have the values of stock and other gradients
        learns_masked = mask is not None and torch.is_grad_enabled()
        if past_key_values is not None or learns_masked or _weights_are_recorded():
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = self.query(hidden_states), self.key(states), self.value(states)
        if mask is not None:
            mask = mask.to(query.dtype)  # stock adds it to the scores, whatever its type
        query, key, value = (
            states.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for states in (query, key, value)
        )
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2).flatten(2), None


def _weights_are_recorded() -> bool:
    """Tell whether the model is called with `output_attentions`: the fused kernels have no weights to give."""
    recorded = output_capturing._active_collector.get()
    return bool(recorded) and bool({"attentions", "cross_attentions"} & set(recorded))


# --- MLP ------------------------------------------------------------------------------------------------------


class FastVisionMLP(BlipMLP):
    """The MLP of a vision layer, which keeps what enters the activation and not what leaves it.

    Both are four times as wide as the layer. Autograd would keep the one for the activation and the other for `fc2`,
    which together are half of what a layer keeps; the activation is a hundredth of the layer's work to do again.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what stock does for `[B, P + 1, D]`."""
        if not (_is(self.fc1, nn.Linear) and _is(self.fc2, nn.Linear) and _is_plain(self.activation_fn)):
            return super().forward(hidden_states)  # an adapter's dropout would not be the same when done again
        inner = self.fc1(hidden_states)
        if torch.is_grad_enabled() and inner.requires_grad:
            # The second run stops as soon as the input of `fc2` is there: its matrix product is not done again
            return checkpoint(self._activate_and_project, inner, use_reentrant=False, preserve_rng_state=False)
        if type(self.activation_fn) is GELUActivation and self.activation_fn.act is F.gelu:
            # In place: a CPU would clear fresh memory for what is four times as wide as the layer
            return self.fc2(torch.ops.aten.gelu_(inner))
        return self._activate_and_project(inner)

    def _activate_and_project(self, inner: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(inner))


# --- Text decoder ---------------------------------------------------------------------------------------------


class FastTextDecoder(BlipTextLMHeadModel):
    """The text decoder: its loss from the logits of caption tokens alone, its captions by `caption_decoding`."""

    @functools.wraps(BlipTextLMHeadModel.forward)  # `generate` reads the signature
    def forward(self, *args, **kwargs):
        """Return what stock does; with `labels` `[B, L]`, `logits` are `[N, V]`, of the N tokens not -100 in order.

        A vocabulary of 30,524 makes the head and its loss as dear as three layers, and padding and prompt need none.
        """
        kwargs |= dict(zip(FORWARD_PARAMETERS, args, strict=False))
        if not _asks_for_a_mean_loss(kwargs):
            return super().forward(**kwargs)
        labels = kwargs.pop("labels")
        for name in ("reduction", "return_logits", "logits_to_keep"):
            kwargs.pop(name, None)
        targets = labels[:, 1:]
        kept = targets != IGNORE_INDEX
        recorded = self.bert(**{"is_decoder": True} | kwargs | {"use_cache": False})
        logits = self.cls(recorded.last_hidden_state[:, :-1][kept])
        return CausalLMOutputWithCrossAttentions(
            loss=F.cross_entropy(logits, targets[kept], label_smoothing=self.label_smoothing),
            logits=logits,
            past_key_values=recorded.get("past_key_values"),
            hidden_states=recorded.get("hidden_states"),
            attentions=recorded.get("attentions"),
            cross_attentions=recorded.get("cross_attentions"),
        )

    @functools.wraps(BlipTextLMHeadModel.generate)
    def generate(self, inputs=None, generation_config=None, cross_attention=None, **kwargs):
        """Generate as stock does, token for token; what `caption_decoding` cannot do is left to stock, with a message.

        Args:
            inputs: as in stock, or `input_ids`: `[B, T]`, the start and prompt tokens.
            generation_config: as in stock.
            cross_attention: `caption_decoding.project_images` of `encoder_hidden_states`, where the caller has it
                already. It is used up.
            kwargs: as in stock, with `encoder_hidden_states` `[B, P + 1, D]`.
        """
        reason = self._needs_stock(inputs, generation_config, kwargs)
        if reason:
            _say_once(f"stock transformers generates: {reason}")
            return super().generate(inputs, generation_config, **kwargs)
        image_embeds = kwargs.pop("encoder_hidden_states")
        for name in ("encoder_attention_mask", "attention_mask"):
            kwargs.pop(name, None)  # all ones
        input_ids = kwargs.pop("input_ids", inputs)
        with torch.no_grad():
            if cross_attention is None:
                cross_attention = project_images(self, image_embeds)
            return super().generate(
                generation_config=generation_config,
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                custom_generate=decode_captions,
                cross_attention=cross_attention,
                **kwargs,
            )

    def _needs_stock(self, inputs, generation_config: GenerationConfig | None, kwargs: dict) -> str | None:
        """Return why `caption_decoding` cannot do this call, or None."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        known = {"input_ids", "encoder_hidden_states"}
        for name in ("attention_mask", "encoder_attention_mask"):
            if name in kwargs and not kwargs[name].all():
                return f"{name} hides positions"
        known |= {"attention_mask", "encoder_attention_mask"}
        if "encoder_hidden_states" not in kwargs:
            return "there is no image"
        if inputs is None and "input_ids" not in kwargs:
            return "there are no start tokens"
        if self.training:
            return "the model is in training mode"
        if not has_shipped_layers(self):
            return "the layers are not those of transformers, or have hooks"
        others = sorted(kwargs.keys() - known - vars(GenerationConfig()).keys())
        if others:
            return f"'{others[0]}' is given"
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
            return f"the settings ask for {mode.value.replace('_', ' ')}"
        for name, nothing in STOCK_SETTINGS.items():
            if getattr(config, name, None) not in (None, nothing):
                return f"'{name}' is set"
        return None


# Settings that ask for more than tokens, or whose processors look at more than one row's tokens; and what they are
# when they ask for nothing
STOCK_SETTINGS = {
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "cache_implementation": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "low_memory": False,
    "prefill_chunk_size": None,
    "stop_strings": None,
    "token_healing": False,
    "watermarking_config": None,
}
FORWARD_PARAMETERS = tuple(inspect.signature(BlipTextLMHeadModel.forward).parameters)[1:]  # without `self`
STOCK_CLASSES = {
    FastVisionAttention: BlipAttention,
    FastVisionMLP: BlipMLP,
    FastTextAttention: BlipTextSelfAttention,
    FastTextDecoder: BlipTextLMHeadModel,
}


def has_shipped_layers(text_decoder: BlipTextLMHeadModel) -> bool:
    """Tell whether the modules that decoding goes around are those of transformers, and nobody has hooked into them.

    The others, an adapter in the place of a linear layer among them, are called as stock calls them.
    """
    bert = text_decoder.bert
    return (
        _is(bert, BlipTextModel)
        and _is(bert.encoder, BlipTextEncoder)
        and all(
            _is(layer, BlipTextLayer)
            and _is(layer.attention, BlipTextAttention)
            and _is(layer.attention.self, FastTextAttention)
            and _is(layer.crossattention, BlipTextAttention)
            and _is(layer.crossattention.self, FastTextAttention)
            for layer in bert.encoder.layer
        )
    )


def _is(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Tell whether nobody has hooked into a module or replaced its `forward`: its parts may be called instead."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return (is_packed(module) or "forward" not in vars(module)) and all(
        # Those with which transformers records outputs stay behind when nothing is recorded
        getattr(hook, "__module__", None) == output_capturing.__name__
        for hook in hooks
    )


def _asks_for_a_mean_loss(kwargs: dict) -> bool:
    """Tell whether a call of the text decoder asks for a mean loss over labels `[B, L]`, and not for all logits."""
    labels, input_ids, logits_to_keep = (kwargs.get(name) for name in ("labels", "input_ids", "logits_to_keep"))
    return (
        labels is not None
        and (input_ids is None or input_ids.shape == labels.shape)
        and kwargs.get("reduction", "mean") == "mean"
        and not kwargs.get("return_logits")
        and "shift_labels" not in kwargs
        and kwargs.get("return_dict") is not False
        and (logits_to_keep is None or (isinstance(logits_to_keep, int) and not logits_to_keep))
    )


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("Fast BLIP: %s", message)
