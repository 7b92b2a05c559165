"""Weights of linear layers on a CPU in the layout of oneDNN's kernels, laid out once instead of in each call."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel


# The layout is that for products with this many rows. It is the same for 6 to 2,308 rows; the one for a single row
# makes all others slower
LAYOUT_ROWS = 48


@contextlib.contextmanager
def packed_weights(text_decoder: BlipTextLMHeadModel) -> Iterator[None]:
    """Lay out the float32 weights that captions pass, where they are on a CPU, for oneDNN while the context lasts.

    Without it, a linear layer lays out its weight anew in each call, which for a few rows costs as much as the
    product: at BLIP-base's shape 48 rows are 1.2 to 1.8 times as fast with it, 12 rows 1.8 to 3 times. It takes the
    memory of the weights once more. The projections of the images are left out: they multiply 577 rows an image at
    once and would not gain. The operators are those that `torch.compile` uses for frozen weights (torch 2.13,
    `torch/_inductor/fx_passes/mkldnn_fusion.py`).
    """
    attentions = [layer.crossattention.self for layer in text_decoder.bert.encoder.layer]
    of_images = {linear for attention in attentions for linear in (attention.key, attention.value)}
    linears = []
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        linears = [
            module
            for module in text_decoder.modules()
            if type(module) is nn.Linear
            and module not in of_images
            and module.weight.is_cpu
            and module.weight.dtype == torch.float32
            and "forward" not in vars(module)  # one that a user has replaced
        ]
    try:
        for linear in linears:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), LAYOUT_ROWS)
            linear.forward = functools.partial(_packed_linear, linear, packed)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _packed_linear(linear: nn.Linear, packed: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():  # the operator has no gradients
        return F.linear(inputs, linear.weight, linear.bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, linear.bias, "none", [], "")
