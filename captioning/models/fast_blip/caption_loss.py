"""The loss of a batch of captions without the positions that no label depends on.

Captions of a batch are as long as its longest, and most of them end before: a third to a half of the positions are
padding. Attention alone needs captions in rows; for all other layers of the decoder they are packed here, one behind
the other. The loss and its gradients are those of stock up to the rounding of float arithmetic.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from collator import IGNORE_INDEX


@dataclass
class Packing:
    """The positions of B captions that are computed: of each row its first, as many as its labels depend on.

    Args:
        batch_size: B.
        width: L', positions of the longest row.
        index: int64 `[N]`, the positions in the flattened rows `[B * L']`, in order.
        has_label: bool `[N]`, where the next token of the caption is a label.
    """

    batch_size: int
    width: int
    index: torch.Tensor
    has_label: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> "Packing | None":
        """Return the packing for `labels` `[B, L]`; None if there are none, or a mask hides what they depend on.

        A mask of another shape than `[B, L]` says which token sees which: that is for rows alone.
        """
        has_label = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        # A token is seen by itself and those behind it: needed is all up to the last position before a label
        needed = has_label.flip(1).cumsum(dim=1).flip(1) > 0
        if attention_mask is not None and attention_mask.shape != labels.shape:
            return None
        if attention_mask is not None and not attention_mask.bool()[needed].all():
            return None
        width = int(needed.sum(dim=1).max())
        if width == 0:
            return None
        needed, has_label = needed[:, :width].flatten(), has_label[:, :width].flatten()
        return cls(len(labels), width, needed.nonzero()[:, 0], has_label[needed])

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Return of `rows` `[B, L', ...]` what is computed, `[1, N, ...]`."""
        return rows.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return `packed` `[1, N, D]` in rows `[B, L', D]`, with zeros where nothing is computed."""
        rows = packed.new_zeros(self.batch_size * self.width, packed.shape[-1])
        return rows.index_copy(0, self.index, packed[0]).view(self.batch_size, self.width, -1)


def packed_logits(
    text_decoder: BlipTextLMHeadModel, packing: Packing, input_ids: torch.Tensor, image_embeds: torch.Tensor
) -> torch.Tensor:
    """Return the logits `[N', V]` from which the N' labels of a batch are predicted, in their order.

    Args:
        text_decoder: with attention that takes a `Packing` for its mask: `fast_blip.FastTextAttention`. Hooks on its
            layers see the captions packed.
        packing: of the captions.
        input_ids: `[B, L]`, the captions.
        image_embeds: `[B, P + 1, D]`.
    """
    bert = text_decoder.bert
    words = packing.pack(input_ids[:, : packing.width])
    positions = bert.embeddings.position_ids[:, packing.index % packing.width]
    hidden = bert.encoder(
        bert.embeddings(input_ids=words, position_ids=positions),
        attention_mask=packing,
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=packing,
    ).last_hidden_state
    return text_decoder.cls(hidden[0, packing.has_label])
