"""TODO."""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextLMHeadModel


LAYOUT_ROWS = 48  # oneDNN's layouts for 6 to 2,308 rows are one; that for a single row makes the others slower


def caption_layers(text_decoder: BlipTextLMHeadModel) -> list[nn.Module]:
    """Return the modules that a token of a caption passes: not those that project images, 577 rows each, once."""
    images = {linear for layer in text_decoder.bert.encoder.layer for linear in _image_projections(layer)}
    return [module for module in text_decoder.modules() if module not in images]


@contextlib.contextmanager
def packed_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lay out float32 weights of linear layers on a CPU as oneDNN's kernels want them, while the context lasts.

    Without that, a linear layer of a few rows repacks its weight in each call: at BLIP-base's shape 48 rows are 1.2 to
    1.8 times as fast with it, 12 rows 1.8 to 3 times. It takes the memory of the weights once more. The operators are
    those that `torch.compile` puts in for frozen weights (torch 2.13, `torch/_inductor/fx_passes/mkldnn_fusion.py`).

    Args:
        modules: the linear layers among them are called by another `forward` meanwhile, but for those that another
            context has packed already; nothing else is touched.
    """
    linears = []
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        linears = [
            module
            for module in modules
            if type(module) is nn.Linear
            and type(module.weight) is nn.Parameter  # and not the part of one that another process completes
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


def is_packed(module: nn.Module) -> bool:
    """Tell whether a module is in the context of `packed_weights`."""
    return getattr(vars(module).get("forward"), "func", None) is _packed_linear


def _packed_linear(linear: nn.Linear, packed: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():  # another thread trains meanwhile: the operator knows no gradients
        return F.linear(inputs, linear.weight, linear.bias)
    bias = None if linear.bias is None else linear.bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


def _image_projections(layer: BlipTextLayer) -> tuple[nn.Linear, nn.Linear]:
    return layer.crossattention.self.key, layer.crossattention.self.value
