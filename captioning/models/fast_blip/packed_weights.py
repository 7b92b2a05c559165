"""Weights of linear layers on a CPU in the layout of oneDNN's kernels, laid out once instead of in each call."""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel


# The layout is that for products with this many rows. It is the same for 6 to 2,308 rows; the one for a single row
# makes all others slower
LAYOUT_ROWS = 48


def caption_layers(text_decoder: BlipTextLMHeadModel) -> list[nn.Module]:
    """Return the modules that process the tokens of captions.

    The projections of the images are left out: they multiply 577 rows an image at once and would not gain.
    """
    layers = text_decoder.bert.encoder.layer
    projections = {
        linear for layer in layers for linear in (layer.crossattention.self.key, layer.crossattention.self.value)
    }
    return [module for module in text_decoder.modules() if module not in projections]


@contextlib.contextmanager
def packed_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lay out the float32 weights of linear layers on a CPU for oneDNN while the context lasts.

    Without it, a linear layer lays out its weight anew in each call, which for a few rows costs as much as the
    product: at BLIP-base's shape 48 rows are 1.2 to 1.8 times as fast with it, 12 rows 1.8 to 3 times. It takes the
    memory of the weights once more. The operators are those that `torch.compile` uses for frozen weights (torch 2.13,
    `torch/_inductor/fx_passes/mkldnn_fusion.py`).

    Args:
        modules: the linear layers among them get another `forward` for that time, unless they have one already.
    """
    linears = []
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        linears = [
            module
            for module in modules
            if type(module) is nn.Linear
            and type(module.weight) is nn.Parameter  # not the shard of one, as in FSDP
            and module.weight.is_cpu
            and module.weight.dtype == torch.float32
            and "forward" not in vars(module)
            and module.weight.numel()
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
    bias = None if linear.bias is None else linear.bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
