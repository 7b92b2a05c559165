"""Faster classes for BLIP's modules: fused attention, an MLP that keeps less, the loss of caption tokens alone.

`use_fast_blip` changes the classes of a loaded model and nothing else: names and values of the parameters and
the files on disk stay plain BLIP. The numbers are those of stock transformers up to rounding.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BlipForConditionalGeneration
from transformers.activations import GELUActivation
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.blip import modeling_blip_text as blip_text
from transformers.models.blip.modeling_blip import BlipAttention, BlipMLP
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextSelfAttention
from transformers.utils import output_capturing

from captioning.models.captioner import IGNORE_INDEX


def use_fast_blip(model: BlipForConditionalGeneration, fast: bool = True) -> BlipForConditionalGeneration:
    """Switch `model` to the fast classes, or back to those of transformers, in place, and return it."""
    classes = {stock: ours for ours, stock in STOCK_CLASSES.items()} if fast else STOCK_CLASSES
    # Only the code changes: hooks, devices and parameters stay. Classes that others gave a module are left alone
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


# --- Attention ------------------------------------------------------------------------------------------------


class FastVisionAttention(BlipAttention):
    """Self-attention over patches without storing a `[P + 1, P + 1]` map of attention weights per head."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what stock does for `hidden_states` `[B, P + 1, D]`; the weights only if they are recorded."""
        if _weights_are_recorded():
            return super().forward(hidden_states, **kwargs)
        batch, length, _ = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).contiguous()  # the kernel gains more than the copy costs
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(context.transpose(1, 2).flatten(2)), None


class FastTextAttention(BlipTextSelfAttention):
    """Attention of the text decoder; its cross-attention over all patches of an image is fused likewise.

    Self-attention stays stock's: where a mask hides all that a token could see, fused kernels give other gradients.
    So does cross-attention with a cache, in which stock keeps the projected images.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args, encoder_hidden_states: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what stock does for `hidden_states` `[B, L, D]`."""
        if encoder_hidden_states is None or kwargs.get("past_key_values") is not None or _weights_are_recorded():
            return super().forward(hidden_states, *args, encoder_hidden_states=encoder_hidden_states, **kwargs)
        linears = {self.query: hidden_states, self.key: encoder_hidden_states, self.value: encoder_hidden_states}
        query, key, value = (
            linear(states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for linear, states in linears.items()
        )
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2), None


def _weights_are_recorded() -> bool:
    """Tell whether the model is called with `output_attentions`: the fused kernels do not return weights."""
    recorded = output_capturing._active_collector.get()
    return bool(recorded) and bool({"attentions", "cross_attentions"} & set(recorded))


# --- MLP ------------------------------------------------------------------------------------------------------


class FastVisionMLP(BlipMLP):
    """The MLP of a vision layer, which keeps for the backward pass the input of its activation, not the output.

    Both are four times as wide as the layer and together half of what a layer keeps. To compute the activation again
    takes a hundredth of the layer's time.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what stock does for `[B, P + 1, D]`."""
        if not (_is(self.fc1, nn.Linear) and _is(self.fc2, nn.Linear) and _is_plain(self.activation_fn)):
            return super().forward(hidden_states)  # the dropout of an adapter would differ when computed again
        inner = self.fc1(hidden_states)
        if torch.is_grad_enabled() and inner.requires_grad:
            # Recomputation stops at the input of `fc2`, whose product is not computed again
            return checkpoint(self._activate_and_project, inner, use_reentrant=False, preserve_rng_state=False)
        if type(self.activation_fn) is GELUActivation and self.activation_fn.act is F.gelu:
            return self.fc2(torch.ops.aten.gelu_(inner))  # in place: saves a CPU from clearing new memory
        return self._activate_and_project(inner)

    def _activate_and_project(self, inner: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(inner))


# --- Text decoder ---------------------------------------------------------------------------------------------


class FastTextDecoder(BlipTextLMHeadModel):
    """The text decoder, whose loss is computed from the logits of its targets alone."""

    @functools.wraps(BlipTextLMHeadModel.forward)  # `generate` reads the signature
    def forward(self, *args, **kwargs):
        """Return what stock does; with `labels` `[B, L]`, `logits` are `[N, V]`, those of the N targets in order.

        With a vocabulary of 30,524 the head and its loss cost as much as three layers; padding needs neither.
        """
        if not _asks_for_mean_loss(kwargs):
            return super().forward(*args, **kwargs)
        targets = kwargs["labels"][:, 1:]
        is_target = targets != IGNORE_INDEX
        inputs = {name: kwargs.get(name) for name in ("input_ids", "attention_mask", "encoder_hidden_states")}
        outputs = self.bert(**inputs, is_decoder=True, use_cache=False)
        logits = self.cls(outputs.last_hidden_state[:, :-1][is_target])
        return CausalLMOutputWithCrossAttentions(
            loss=F.cross_entropy(logits, targets[is_target], label_smoothing=self.label_smoothing),
            logits=logits,
            hidden_states=outputs.hidden_states,  # where the config asks for them
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


def _asks_for_mean_loss(kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of the text decoder asks for the mean loss of its `labels`, and for nothing unusual."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    logits_to_keep, reduction = given.pop("logits_to_keep", 0), given.pop("reduction", "mean")
    usual = {"input_ids", "attention_mask", "encoder_hidden_states", "labels", "use_cache"}
    everything = isinstance(logits_to_keep, int) and logits_to_keep == 0
    return {"input_ids", "labels"} <= given.keys() <= usual and reduction == "mean" and everything


STOCK_CLASSES = {
    FastVisionAttention: BlipAttention,
    FastVisionMLP: BlipMLP,
    FastTextAttention: BlipTextSelfAttention,
    FastTextDecoder: BlipTextLMHeadModel,
}


# --- What others did to a model -------------------------------------------------------------------------------


def has_shipped_layers(text_decoder: BlipTextLMHeadModel) -> bool:
    """Tell whether the modules whose parts `decoder.py` calls one by one are those of this file and transformers.

    Hooks on them, or other modules in their places, would be passed over.
    """
    bert = text_decoder.bert
    return (
        _is(bert, blip_text.BlipTextModel)
        and _is(bert.encoder, blip_text.BlipTextEncoder)
        and all(
            _is(layer, blip_text.BlipTextLayer)
            and _is(layer.attention, blip_text.BlipTextAttention)
            and _is(layer.attention.self, FastTextAttention)
            and _is(layer.crossattention, blip_text.BlipTextAttention)
            and _is(layer.crossattention.self, FastTextAttention)
            for layer in bert.encoder.layer
        )
    )


def _is(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module has no hooks and its own `forward`: then its parts may be called instead of it."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # The hooks with which transformers records outputs stay on a module when nothing is recorded
    recording = [getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks]
    return "forward" not in vars(module) and all(recording)
