"""The text decoder with a cache in which the beams of an image share its keys and values: one token at a time.

`CaptionDecoder` attends to the slots in use and drops finished images: the least work, as a CPU wants it. On a GPU a
token is too little work to launch some 20 kernels a layer for: `FixedShapeDecoder` keeps all shapes, so that a step
is recorded once a batch as a CUDA graph and launched whole.
"""

import os
from typing import ClassVar

import torch
from torch.nn import functional as F
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextLMHeadModel


CrossAttention = list[tuple[torch.Tensor, torch.Tensor]]

FIXED_SHAPE_ON = GRAPHS_ON = {"cuda"}  # types of devices with a `FixedShapeDecoder`, and with graphs; tests set both
if os.environ.get("CUDA_GRAPHS") == "0":  # where a driver cannot record
    GRAPHS_ON = set()


def project_images(text_decoder: BlipTextLMHeadModel, image_embeds: torch.Tensor) -> CrossAttention:
    """Project `image_embeds` `[B, P + 1, D]` into the keys and values of each layer's cross-attention.

    Returns:
        For each layer the keys `[B, H, d, P + 1]`, ready to be multiplied by queries from the left, and the values
        `[B, H, P + 1, d]`, in bfloat16 under its autocast. In memory, keys have the order that the decoder reads.
    """
    fixed, projected = decoder_class(image_embeds.device) is FixedShapeDecoder, []
    for layer in text_decoder.bert.encoder.layer:
        attention = layer.crossattention.self
        heads = (attention.num_attention_heads, attention.attention_head_size)
        keys, values = (
            linear(image_embeds).unflatten(-1, heads).transpose(1, 2) for linear in (attention.key, attention.value)
        )
        keys = keys.contiguous().mT if fixed else keys.mT.contiguous()
        projected.append((keys, values.contiguous()))
    return projected


def decoder_class(device: torch.device) -> type["CaptionDecoder"]:
    """Return the decoder for a device."""
    return FixedShapeDecoder if device.type in FIXED_SHAPE_ON else CaptionDecoder


class CaptionDecoder:
    """The text decoder with a cache of the keys and values of all tokens so far.

    The beams of an image share one row of the cache, and each token takes one slot of it.

    Args:
        text_decoder: supplies the layers.
        cross_attention: from `project_images`; `keep` overwrites it.
        num_slots: the most tokens that an image can have, those of all its beams together.
    """

    def __init__(self, text_decoder: BlipTextLMHeadModel, cross_attention: CrossAttention, num_slots: int):
        self.model, self.cross_attention = text_decoder, cross_attention
        self.num_slots = -(-num_slots // 8) * 8  # fused kernels copy a mask whose rows are not multiples of 16 bytes
        # Keys and values [B, H, slots, d] of each layer. Not filled: on a CPU, slots never used then take no memory
        self.cache = [
            tuple(values.new_empty(*values.shape[:2], self.num_slots, values.shape[3]) for _ in range(2))
            for _, values in cross_attention
        ]
        self.used = 0  # slots

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states `[B, N, D]` of captions or prompts `[B, N]`, padded on the right.

        Padding needs no mask: attention is causal, so no token attends to what follows it.
        """
        self.slots = positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self(tokens, positions, (positions <= positions[:, None])[None])

    def start(self, num_rows: int) -> None:
        """Begin `num_rows` beams or samples of each image, after its prompt has been read."""
        batch, device = len(self.cache[0][0]), self.slots.device
        self.visible = torch.zeros(batch, num_rows, self.num_slots, dtype=torch.bool, device=device)
        self.visible[:, :, : self.used] = True
        self.slots = torch.arange(self.used, self.used + num_rows, device=device)
        self.position = self.slots[:1].clone()

    def step(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits `[B, N, V]` after the last tokens `[B, N]` of N beams; the next step may overwrite them.

        `parents` `[B, N]` are the beams that each continues; None: each continues itself.
        """
        if parents is not None:
            self.visible.copy_(self.visible.gather(1, parents[:, :, None].long().expand_as(self.visible)))
        self.visible.scatter_(2, self.slots[None, :, None].expand(len(tokens), -1, 1), True)
        logits = self.model.cls(self(tokens, self.position, self.visible))
        self.position += 1
        self.slots += len(self.slots)
        return logits

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Decode N more tokens of each image, which take the slots `self.slots` `[N]` of the cache.

        Args:
            tokens: `[B, N]`: a prompt of N tokens, or the last token of each of N beams.
            positions: `[N]`, or one for all N, in their captions.
            visible: bool `[B or 1, N, slots]`, the slots that each token attends to, its own among them.

        Returns:
            The last hidden states `[B, N, D]`.
        """
        self.used += tokens.shape[1]
        hidden = self.model.bert.embeddings(input_ids=tokens, position_ids=positions[None])
        visible = visible[:, :, : self.used]
        mask = self.cache[0][0].new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))  # in the queries' type
        for index, layer in enumerate(self.model.bert.encoder.layer):
            hidden = self._layer(layer, index, hidden, mask[:, None])
        return hidden

    def _layer(self, layer: BlipTextLayer, index: int, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attention = layer.attention.self
        heads = (attention.num_attention_heads, attention.attention_head_size)
        query, key, value = (
            linear(hidden).unflatten(-1, heads).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        for cache, new in zip(self.cache[index], (key, value), strict=True):
            cache.index_copy_(2, self.slots, new)
        keys, values = (cache[:, :, : self.used] for cache in self.cache[index])
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        hidden = layer.attention.output(context.transpose(1, 2).flatten(2), hidden)

        attention = layer.crossattention.self
        query = attention.query(hidden).unflatten(-1, heads).transpose(1, 2)
        context = self._look_at_image(query, *self.cross_attention[index])
        hidden = layer.crossattention.output(context.transpose(1, 2).flatten(2), hidden)
        return layer.feed_forward_chunk(hidden)

    def _look_at_image(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # One product for all beams of an image; for so few rows a fused kernel is not faster on a CPU
        return torch.matmul(torch.matmul(query / query.shape[-1] ** 0.5, keys).softmax(dim=-1), values)

    def someone_leaves(self, done: torch.Tensor, num_new: int, is_last: bool) -> bool:
        """Tell whether images leave the batch, of which bool `done` `[B]` are finished, after `num_new` tokens."""
        return bool(done.any())

    def keep(self, done: torch.Tensor) -> torch.Tensor:
        """Drop the finished images, bool `done` `[B]`, and return the indices `[B']` of those kept, in new order.

        The last images move into the places of the dropped ones, so that large tensors are not copied whole.
        """
        num_kept = int((~done).sum())
        index = torch.arange(num_kept, device=done.device)
        holes = done[:num_kept].nonzero()[:, 0]
        movers = num_kept + (~done[num_kept:]).nonzero()[:, 0]
        index[holes] = movers
        for layers in (self.cross_attention, self.cache):
            for layer, tensors in enumerate(layers):
                for tensor in tensors:
                    tensor[holes] = tensor[movers]
                layers[layer] = tuple(tensor[:num_kept] for tensor in tensors)
        self.visible = self.visible[index]
        return index


class FixedShapeDecoder(CaptionDecoder):
    """A `CaptionDecoder` whose steps have the same shapes: on a GPU one CUDA graph, elsewhere the same code.

    A token attends to all slots, through a mask, and the CPU waits for a result only every few tokens, so that it
    stays ahead of the GPU. Finished images stay until the last is finished: a smaller batch would be recorded anew.
    """

    look_every = 8  # tokens; those after the end change no caption, in stock neither
    _graph: torch.cuda.CUDAGraph | None = None
    _last: ClassVar[dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]]] = {}

    def start(self, num_rows: int) -> None:
        """See `CaptionDecoder.start`."""
        super().start(num_rows)
        for cache in (cache for caches in self.cache for cache in caches):
            cache[:, :, self.used :] = 0  # what is not visible has weight 0, and 0 times NaN is NaN
        self.used = self.num_slots
        self.parents = torch.arange(num_rows, device=self.slots.device).repeat(len(self.visible), 1)
        self.tokens = torch.zeros_like(self.parents)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> torch.Tensor:
        """See `CaptionDecoder.step`."""
        self.tokens.copy_(tokens)
        if parents is not None:
            self.parents.copy_(parents)
        if tokens.device.type not in GRAPHS_ON:
            return self._step()
        if self._graph is None:
            return self._record()
        self._graph.replay()
        return self._logits

    def _step(self) -> torch.Tensor:
        return super().step(self.tokens, self.parents)

    def _record(self) -> torch.Tensor:
        """Take the first step kernel by kernel, which sets up what a recording must not, and record the next one.

        Recorded anew for each batch: under autocast the weights in bfloat16 live no longer than the batch.
        """
        device = self.slots.device
        current = torch.cuda.current_stream(device)
        # In the memory of the last graph, which is kept for that: a pool that no graph uses cannot be used again
        stream, *last = self._last.get(device) or (torch.cuda.Stream(device),)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                first = self._step()
                try:
                    self._capture(*last)
                except torch.OutOfMemoryError:  # a recording cannot take the memory that PyTorch holds for others
                    torch.cuda.empty_cache()
                    self._capture(*last)
        finally:
            current.wait_stream(stream)
        self._last[device] = (stream, self._graph)
        return first

    def _capture(self, *last: torch.cuda.CUDAGraph) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Not by `torch.cuda.graph`, which gives unused memory back to the driver. A loader's thread may pin memory
        self._graph.capture_begin(*(graph.pool() for graph in last), capture_error_mode="thread_local")
        try:
            self._logits = self._step()
        finally:
            self._graph.capture_end()

    def _look_at_image(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys.mT, values)

    def someone_leaves(self, done: torch.Tensor, num_new: int, is_last: bool) -> bool:
        """See `CaptionDecoder.someone_leaves`: all at once."""
        return (num_new % self.look_every == 0 or is_last) and bool(done.all())
